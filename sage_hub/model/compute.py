"""In which type a model is run: the one it is stored in, or float32 where that is faster."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# float32 is exact to more digits but takes twice the memory, and machines on which the two are
# about as fast should not differ from one run to the next.
CLEARLY = 1.25
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_TOKENS, _FEATURES = 256, 512  # of the products that are timed
_RUNS, _ENOUGH = 8, 0.02  # how often, and after how many seconds no more


def compute_type(wanted: str, stored: torch.dtype, device: str) -> torch.dtype:
    """The type in which a model is run that is `stored` so: the one `wanted`, or for "auto" the
    stored one, unless on this CPU float32 is clearly faster."""
    if wanted != "auto":
        return TYPES[wanted]
    if stored == torch.float32 or torch.device(device).type != "cpu":
        return stored
    return faster(stored, seconds(stored), seconds(torch.float32))


def name_of(dtype: torch.dtype) -> str:
    """The name that settings have for it."""
    return _NAMES.get(dtype, "float32")


def type_of(name: str) -> torch.dtype | None:
    """The type that settings call so; None for "auto", where no machine has had its say."""
    return TYPES.get(name)


def faster(stored: torch.dtype, of_stored: float, of_float32: float) -> torch.dtype:
    """The stored type, or float32 if the same work takes that a clearly shorter time."""
    return torch.float32 if of_stored > CLEARLY * of_float32 else stored


def seconds(dtype: torch.dtype) -> float:
    """How long the products of a layer take on this CPU, found out in a few milliseconds.

    Of both kinds: with weights that are stored (out, in), and untransposed, as GPT-2 has them,
    which without units for a type may be a hundred times slower.
    """
    x = torch.ones(_TOKENS, _FEATURES, dtype=dtype)
    weight = torch.ones(_FEATURES, _FEATURES, dtype=dtype)
    products: tuple[Callable[[], Tensor], ...] = (lambda: x @ weight.T, lambda: x @ weight)
    return sum(map(_shortest, products))


def _shortest(do: Callable[[], object]) -> float:
    """The shortest of a few runs; the first one may compile code."""
    times: list[float] = []
    while len(times) < _RUNS and sum(times) < _ENOUGH:
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return min(times)
