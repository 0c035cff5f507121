"""In which type a model is run: the one it is stored in, or float32 where that is faster."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.checkpoint.files import digest
from sage_hub.runtime.shelf import agree, recall
from sage_hub.runtime.versions import versions

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# float32 is exact to more digits but takes twice the memory, and machines on which the two are
# about as fast should not differ from one run to the next.
CLEARLY = 1.25
# Variables that hold a library back from kernels that the machine has.
NARROWING = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_TOKENS, _FEATURES = 256, 512  # of the products that are timed
_RUNS, _ENOUGH = 8, 0.02  # how often, and after how many seconds no more


def compute_type(wanted: str, stored: torch.dtype, device: str) -> torch.dtype:
    """The type in which a model is run that is `stored` so: the one `wanted`, or for "auto" the
    stored one, unless on this CPU float32 is clearly faster.

    That is found out once for a machine and kept: a second look at a busy one might end otherwise,
    and a run that was stopped would not go on."""
    if wanted != "auto":
        return TYPES[wanted]
    if stored == torch.float32 or torch.device(device).type != "cpu":
        return stored
    key = digest({"stored": name_of(stored), "machine": _machine(), "versions": versions()})
    with suppress(LookupError):
        return TYPES.get(str(recall("compute", key)), stored)
    chosen = faster(stored, seconds(stored), seconds(torch.float32))
    return TYPES[agree("compute", key, name_of(chosen))]


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
    """How long the products of a layer take one core of this CPU, found out in milliseconds.

    In time of the processor, so that other work on the machine has no say in it. Of both kinds:
    with weights that are stored (out, in), and untransposed, as GPT-2 has them, which without
    units for a type may be a hundred times slower.
    """
    x = torch.ones(_TOKENS, _FEATURES, dtype=dtype)
    weight = torch.ones(_FEATURES, _FEATURES, dtype=dtype)
    products: tuple[Callable[[], Tensor], ...] = (lambda: x @ weight.T, lambda: x @ weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sum(map(_shortest, products))
    finally:
        torch.set_num_threads(threads)


def _machine() -> dict[str, Any]:
    """What the time of a product depends on here, beside the libraries."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    narrowed = {name: os.environ[name] for name in NARROWING if name in os.environ}
    return {
        "model": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **narrowed,
    }


def _shortest(do: Callable[[], object]) -> float:
    """The shortest of a few runs; the first one may compile code."""
    times: list[float] = []
    while len(times) < _RUNS and sum(times) < _ENOUGH:
        start = time.thread_time()
        do()
        times.append(time.thread_time() - start)
    return min(times)
