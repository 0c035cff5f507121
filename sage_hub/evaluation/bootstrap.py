"""Estimates with a paired bootstrap over rows: how sure a value, or a difference of two, is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

REPLICATES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, and what it comes out as when its rows are drawn anew with replacement.

    Two estimates over equally many rows see the same draws (Efron and Tibshirani 1993), so that
    what is done to their replicates is paired by row. `replicates` (REPLICATES,) is None where
    there are too few rows to draw from, or where there are none, as of a test's p-value.
    """

    value: float
    rows: int
    replicates: np.ndarray | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The percentile interval that holds the LEVEL of the replicates."""
        if self.replicates is None or not np.isfinite(self.replicates).all():
            return None
        outside = (1 - LEVEL) / 2
        low, high = np.quantile(self.replicates, (outside, 1 - outside))
        return float(low), float(high)


def estimate(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    seed: int,
    finish: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Estimate:
    """The weighted mean of `values`, one per row, put through `finish`."""
    v, rows = np.asarray(values, np.float64), len(values)
    w = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    means = np.array([(w * v).sum() / w.sum()])
    if rows > 1:
        # Which rows are drawn matters only by how often each one is.
        drawn = _counts(rows, seed)
        means = np.concatenate([means, (drawn @ (w * v)) / (drawn @ w)])
    found = means if finish is None else finish(means)
    return Estimate(float(found[0]), rows, found[1:] if rows > 1 else None)


def combine(function: Callable[..., np.ndarray], *parts: Estimate) -> Estimate:
    """An estimate of `function` of several, which must work elementwise on arrays."""
    value = float(function(*(np.asarray(part.value) for part in parts)))
    rows = min(part.rows for part in parts)
    drawn = [part.replicates for part in parts]
    if any(replicates is None for replicates in drawn):
        return Estimate(value, rows)
    with np.errstate(all="ignore"):
        return Estimate(value, rows, np.asarray(function(*drawn)))


@lru_cache(maxsize=4)
def _counts(rows: int, seed: int) -> np.ndarray:
    """How often each row is drawn in each replicate, (REPLICATES, rows)."""
    chance = np.random.default_rng([seed, rows])
    return chance.multinomial(rows, np.full(rows, 1 / rows), size=REPLICATES).astype(np.float64)
