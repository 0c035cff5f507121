"""Stored numbers that are not the weights: told by the config, by types and by names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sage_hub.checkpoint.tensorfile import DTYPES, FLOATS, Header
from sage_hub.errors import QuantizedError

STATED = ("quantization_config", "compression_config", "quantization")
# What GPTQ, AWQ, bitsandbytes, compressed-tensors and FP8 put beside the numbers, or call them.
NAMES = re.compile(
    r".*\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|SCB|weight\.(absmax|quant_\w+\..*|SCB))"
)


def refuse_quantized(name: str, config: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Raise QuantizedError for a checkpoint called `name` whose weights are not plain numbers."""
    for kind in _stated(config):
        raise QuantizedError(
            f"{name} is quantized ({kind}); pass the checkpoint it was made from, and quantize the "
            "sanitized one."
        )
    for header in headers.values():
        for tensor, info in header.tensors.items():
            weight = tensor.endswith(".weight") and info.dtype not in FLOATS
            if NAMES.fullmatch(tensor):
                said = f"is of a quantized weight ({info.dtype})"
            elif weight or info.dtype not in DTYPES:
                said = f"is stored as {info.dtype}, as quantized weights are"
            else:
                continue
            raise QuantizedError(
                f"Tensor {tensor!r} of {name} {said}; pass a bfloat16, float16 or float32 "
                "checkpoint."
            )


def _stated(config: Mapping[str, Any]) -> Iterator[str]:
    """How the model, or a part of it, is quantized by its config."""
    parts = [config]
    while parts:
        for key, value in parts.pop().items():
            if key in STATED and value:
                yield str(value.get("quant_method", key)) if isinstance(value, dict) else key
            elif isinstance(value, dict):
                parts.append(value)
