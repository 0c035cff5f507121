"""Whether rounding to the stored type undoes a part of a repair, and whether compensation mends it.

The repaired weights are evaluated in a float32 model: as they are, rounded to bfloat16 one by one,
and rounded column by column with each column's error made up for by those that follow, by the
retained second moment: GPTQ's rule (Frantar et al. 2022, arXiv 2210.17323) with bfloat16 as grid.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import methods
import torch
from data import MAIN
from evaluate import probabilities
from plan import Config
from sweep import Bench, truncated
from torch import Tensor

DAMPING = 0.01  # of the mean eigenvalue, as GPTQ has it
COLUMNS = 128  # between two products with all columns that follow
REPAIR = Config("sage", {"strength": 10, "energy": 0.9})


def run(bench: Bench, gains: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Each way to store the repair, at each of `gains`; `bias` is a share of the source's."""
    update: dict[str, Tensor] = {}
    for gain in gains:
        for way, store in WAYS.items():
            about = bench.about(REPAIR, gain, way)
            row = bench.ledger.get(about)
            if row is None:
                began = time.perf_counter()
                update = update or bench.update(REPAIR)[0]
                found = _measure(bench, update, gain, store)
                seconds = [0, round(time.perf_counter() - began, 1)]
                row = bench.ledger.put(about, {**found, "seconds": seconds})
            yield row


@torch.no_grad()
def _measure(
    bench: Bench, update: Mapping[str, Tensor], gain: float, store: Callable[..., Tensor]
) -> dict[str, Any]:
    model = bench.shop.load(bench.folder).float()
    weights = dict(model.named_parameters())
    source, left = 0.0, 0.0
    for name, change in update.items():
        base, spectrum = bench.base[name].float(), bench.site(name, MAIN).retain
        stored = store(base + gain * change, methods.moment(spectrum).to(base))
        weights[name].copy_(stored)
        leading = truncated(spectrum)
        source += methods.bias(bench.delta[name], leading)
        left += methods.bias(stored - base, leading)
    return {
        "bias": left / source,
        **{
            which: [round(p, 5) for p in probabilities(model, rows)]
            for which, rows in bench.sets.items()
        },
    }


def rounded(weight: Tensor, moment: Tensor) -> Tensor:
    """Each number by itself."""
    return weight.to(torch.bfloat16).to(weight)


def compensated(weight: Tensor, moment: Tensor) -> Tensor:
    """`weight` (out, in) on the bfloat16 grid, near it where `moment` (in, in) has energy."""
    damped = moment.double().clone()
    damped.diagonal().add_(DAMPING * moment.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).to(weight)
    left, stored = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        own = slice(start, min(start + COLUMNS, weight.shape[1]))
        errors = torch.zeros_like(left[:, own])
        for column in range(own.start, own.stop):
            stored[:, column] = rounded(left[:, column], moment)
            error = (left[:, column] - stored[:, column]) / inverse[column, column]
            left[:, column : own.stop] -= torch.outer(error, inverse[column, column : own.stop])
            errors[:, column - start] = error
        left[:, own.stop :] -= errors @ inverse[own, own.stop :]
    return stored


WAYS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": lambda weight, moment: weight,
    "rounded": rounded,
    "compensated": compensated,
}
