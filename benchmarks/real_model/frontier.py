"""Forget against held-out retention: the curve of a method, and what it recovers at a level.

Pure functions on the per-row probabilities of evaluated points. Intervals are bootstrap over rows,
paired: base, source and every point are averaged over the same drawn rows, and equal seeds draw the
same rows, so the draws of two methods can be subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Point: TypeAlias = tuple[Sequence[float], Sequence[float]]  # per row: forget, held-out


def mean(values: Sequence[float]) -> float:
    """The mean over rows."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Curve:
    """Mean held-out against mean forget probability, in falling order of forget."""

    forget: np.ndarray
    heldout: np.ndarray

    @classmethod
    def of(cls, points: Sequence[Point]) -> Curve:
        """The curve through the means of `points`."""
        return cls.through(
            np.array([np.mean(forget) for forget, _ in points]),
            np.array([np.mean(heldout) for _, heldout in points]),
        )

    @classmethod
    def through(cls, forget: np.ndarray, heldout: np.ndarray) -> Curve:
        order = np.argsort(-forget, kind="stable")
        return cls(forget[order], heldout[order])

    def at(self, level: float) -> float | None:
        """The best held-out probability where forget is `level` or less; None beyond the curve.

        Points that forget more count as they are, and between two points the curve is straight.
        """
        enough = np.flatnonzero(self.forget <= level + 1e-12)
        if not len(enough):
            return None
        best = float(self.heldout[enough].max())
        first = int(enough[0])
        if first == 0:
            return best
        above, below = self.forget[first - 1], self.forget[first]
        share = (above - level) / (above - below)
        between = self.heldout[first - 1] + share * (self.heldout[first] - self.heldout[first - 1])
        return max(best, float(between))


@dataclass(frozen=True)
class Recovery:
    """The share of the lost retention that came back, and the same for drawn rows."""

    value: float | None
    draws: np.ndarray

    @property
    def low(self) -> float | None:
        return self._percentile(2.5)

    @property
    def high(self) -> float | None:
        return self._percentile(97.5)

    def _percentile(self, q: float) -> float | None:
        return float(np.nanpercentile(self.draws, q)) if len(self.draws) else None


def recovery(
    points: Sequence[Point],
    source: Point,
    base: Point,
    *,
    level: str,
    reference: Point | None = None,
    slack: float = 0.0,
    draws: int = 1000,
    seed: int = 0,
) -> Recovery:
    """(held-out at the level − source's) / (base's − source's) on the curve through `points`.

    `level` "source": the source's mean forget probability (plus `slack`); "reference": that of the
    `reference` where the source is below it. No value if the curve does not reach the level, or if
    the source has lost nothing. In a draw that it just misses, its lowest point stands for it.
    """
    forget = np.array([point[0] for point in (source, *points)])  # (1 + points, rows)
    heldout = np.array([point[1] for point in (base, source, *points)])
    trained = None if reference is None else np.array(reference[0])
    if level == "reference" and trained is None:
        raise ValueError("the level of a reference needs one")

    def share(on_forget: np.ndarray, on_heldout: np.ndarray, clamp: bool) -> float | None:
        means = forget @ on_forget
        kept = heldout @ on_heldout
        aim = means[0] + slack
        if level == "reference" and trained is not None:
            aim = max(aim, float(trained @ on_forget))
        curve = Curve.through(means[1:], kept[2:])
        found = curve.at(max(aim, curve.forget[-1]) if clamp else aim)
        lost = float(kept[0] - kept[1])
        return None if found is None or lost <= 0 else (found - kept[1]) / lost

    rows = forget.shape[1], heldout.shape[1]
    even = [np.full(n, 1 / n) for n in rows]
    value = share(even[0], even[1], clamp=False)
    if value is None:
        return Recovery(None, np.empty(0))
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in rows]
    found = [share(one, other, clamp=True) for one, other in zip(*drawn, strict=True)]
    return Recovery(value, np.array(found, dtype=float))


def gain_at(gains: Sequence[float], points: Sequence[Point], level: float) -> float | None:
    """The gain at which mean forget probability falls to `level`, log-linear between points.

    `gains` rise. None if no point reaches the level; the first gain if that does already.
    """
    means = [float(np.mean(forget)) for forget, _ in points]
    for place, now in enumerate(means):
        if now > level:
            continue
        if place == 0:
            return gains[0]
        share = (means[place - 1] - level) / (means[place - 1] - now)
        logs = np.log(gains[place - 1]), np.log(gains[place])
        return float(np.exp(logs[0] + share * (logs[1] - logs[0])))
    return None
