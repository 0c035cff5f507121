"""How quantized weights are packed: codes of a table, times scales; told by names and shapes.

Float8 with a scale per block, row or tensor (DeepSeek, compressed-tensors), bitsandbytes' int8
(LLM.int8, arXiv 2208.07339) and its 4-bit types (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sage_hub.checkpoint.tensorfile import FLOAT8, FLOATS
from sage_hub.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from sage_hub.checkpoint.index import Checkpoint

STATE = ".quant_state.bitsandbytes__"
CODES_OF_4_BIT = ("nf4", "fp4")
BLOCKS = tuple(2**power for power in range(2, 13))  # sizes that blocks of 4 bits may have
INT8_STEPS = 127  # bitsandbytes' scale is the largest number of a row
Rows = Callable[[str, int, int], Tensor]  # tensor, first row, last row (excluded)


class Packed(Protocol):
    """A quantized weight of the given shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight, (out, in)."""

    @property
    def kind(self) -> str:
        """What it is called."""

    def decode(self, read: Rows, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [start, stop): codes (rows, in) in uint8, the table of their values, and scales."""

    def check(self, read: Rows) -> None:
        """Raise CorruptCheckpointError for what the header does not tell and decoding needs."""


@dataclass(frozen=True)
class Scaled:
    """Codes of one byte; (rows, columns) of a block share a scale."""

    weight: str
    scale: str
    shape: tuple[int, int]
    block: tuple[int, int]
    values: torch.dtype  # that the bytes are of
    steps: float = 1.0  # in a scale
    order: str = (
        ""  # the tensor that says in which order bitsandbytes has put them, if there is one
    )

    @property
    def kind(self) -> str:
        return "bitsandbytes int8" if self.values == torch.int8 else "float8"

    def decode(self, read: Rows, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = self.block
        across = -(-self.shape[1] // columns)
        codes = read(self.weight, start, stop).view(torch.uint8)
        first, last = start // rows, -(-stop // rows)
        # However it lies in the file, a block's scale is one number.
        scales = read(self.scale, 0, -1).float().reshape(-1, across)[first:last] / self.steps
        scales = scales[torch.arange(start, stop) // rows - first]
        scales = scales.repeat_interleave(columns, 1)[:, : self.shape[1]]
        table = torch.arange(256, dtype=torch.uint8).view(self.values).float()
        return codes, table, scales

    def check(self, read: Rows) -> None:
        """Raise CorruptCheckpointError for int8 that old versions have put into another order."""
        if self.order and read(self.order, 0, -1).any():
            raise CorruptCheckpointError(
                f"{self.weight!r} is in an order for one kind of GPU; save the checkpoint again "
                "with a bitsandbytes of today."
            )


@dataclass(frozen=True)
class FourBit:
    """Two codes in a byte, the first in its upper half; blocks run on from row to row."""

    weight: str
    shape: tuple[int, int]
    code: str  # "nf4" or "fp4"
    block: int  # numbers that share a scale
    outer_block: int | None = None  # scales that share one, where they are quantized themselves

    @property
    def kind(self) -> str:
        return f"bitsandbytes {self.code}"

    def decode(self, read: Rows, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        columns, size = self.shape[1], self.block
        first, last = start * columns, stop * columns
        packed = read(self.weight, first // 2, -(-last // 2)).flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
        codes = codes[first % 2 :][: last - first].reshape(-1, columns)
        scales = self._scales(read, first // size, -(-last // size))
        scales = scales.repeat_interleave(size)[first % size :][: last - first]
        return codes, read(f"{self.weight}.quant_map", 0, -1).flatten(), scales.view_as(codes)

    def _scales(self, read: Rows, start: int, stop: int) -> Tensor:
        """The scales of blocks [start, stop)."""
        scales = read(f"{self.weight}.absmax", start, stop).flatten()
        if self.outer_block is None:
            return scales.float()
        table = read(f"{self.weight}.nested_quant_map", 0, -1).flatten()
        size = self.outer_block
        outer = read(f"{self.weight}.nested_absmax", start // size, -(-stop // size)).flatten()
        outer = outer[torch.arange(start, stop) // size - start // size]
        return table[scales.long()] * outer + float(self._state(read)["nested_offset"])

    def check(self, read: Rows) -> None:
        """Raise CorruptCheckpointError unless bitsandbytes says of it what it looks like."""
        self._state(read)

    def _state(self, read: Rows) -> dict[str, Any]:
        raw = bytes(read(f"{self.weight}{STATE}{self.code}", 0, -1).flatten().tolist())
        try:
            state = dict(json.loads(raw))
            fits = tuple(state["shape"]) == self.shape and state["quant_type"] == self.code
            fits &= _blocks(self.shape, state["blocksize"]) == _blocks(self.shape, self.block)
            fits &= (self.outer_block is None) == ("nested_blocksize" not in state)
            if self.outer_block is not None:
                fits &= math.isfinite(float(state["nested_offset"]))
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            fits = False
        if not fits:
            raise CorruptCheckpointError(
                f"What bitsandbytes says of {self.weight!r} does not fit its shape, "
                f"{list(self.shape)}, or what lies beside it; fetch or save the checkpoint again."
            )
        return state


def find_packed(checkpoint: Checkpoint) -> Iterator[tuple[str, Packed]]:
    """The weights that are quantized in a known way, by their names.

    Raises CorruptCheckpointError for what does not fit together.
    """
    for name in checkpoint.shard_of:
        stem, info = name.removesuffix(".weight"), checkpoint.info(name)
        scales = [f"{stem}.weight_scale_inv", f"{stem}.weight_scale", f"{stem}.SCB"]
        scale = next((scale for scale in scales if _is_float(checkpoint, scale)), "")
        if info.dtype in FLOAT8 and scale:
            yield name, _scaled(checkpoint, name, scale, FLOAT8[info.dtype])
        elif info.dtype == "I8" and scale.endswith(".SCB") and not _is_turned(checkpoint, name):
            yield name, _scaled(checkpoint, name, scale, torch.int8)
        elif info.dtype == "U8" and not _is_turned(checkpoint, name):
            for code in CODES_OF_4_BIT:
                if f"{name}{STATE}{code}" in checkpoint.shard_of:
                    yield name, _four_bit(checkpoint, name, code)


def _is_float(checkpoint: Checkpoint, tensor: str) -> bool:
    return tensor in checkpoint.shard_of and checkpoint.info(tensor).dtype in FLOATS


def _is_turned(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether it is GPT-2's kind of layer, which bitsandbytes turns round before it packs it."""
    return checkpoint.architecture.stored_transposed(tensor)


def _scaled(checkpoint: Checkpoint, name: str, scale: str, values: torch.dtype) -> Scaled:
    weight, scales = checkpoint.info(name).shape, checkpoint.info(scale).shape
    if len(weight) == 2:
        out, columns = weight
        if values == torch.int8:
            blocks: list[Any] = [(1, columns)]
        else:
            stated: Any = checkpoint.config.get("quantization_config")
            stated = stated.get("weight_block_size") if isinstance(stated, dict) else None
            blocks = [stated, (1, columns), (out, columns), (128, 128)]
        for block in blocks:
            if _tiles(block, (out, columns), scales):
                found = Scaled(name, scale, (out, columns), tuple(block), values)
                if values != torch.int8:
                    return found
                order = f"{name.removesuffix('.weight')}.weight_format"
                order = order if order in checkpoint.shard_of else ""
                return replace(found, steps=INT8_STEPS, order=order)
    raise CorruptCheckpointError(
        f"The scales {scale!r} of {checkpoint.name} have the shape {[*scales]}, which does not fit "
        f"the weight's, {[*weight]}; fetch or save the checkpoint again."
    )


def _tiles(block: Any, shape: tuple[int, int], scales: tuple[int, ...]) -> bool:
    """Whether blocks of this size make up a weight of `shape`, with a scale of each in `scales`."""
    if not isinstance(block, (list, tuple)) or len(block) != 2:
        return False
    if not all(isinstance(n, int) and n > 0 for n in block):
        return False
    down, across = (-(-n // size) for n, size in zip(shape, block, strict=True))
    flat = [(down,)] * (across == 1) + [()] * (down == across == 1)
    return scales in [(down, across), *flat]


def _four_bit(checkpoint: Checkpoint, name: str, code: str) -> FourBit:
    """Its shape is that which the model has for it: a header has it as bytes alone."""
    shape = checkpoint.architecture.shape_of(name)
    if len(shape) != 2 or checkpoint.info(name).shape != (-(-math.prod(shape) // 2), 1):
        raise CorruptCheckpointError(
            f"Tensor {name!r} of {checkpoint.name} does not hold the {list(shape)} numbers of "
            "4 bits that config.json gives it; fetch or save the checkpoint again."
        )

    def held(part: str, *kinds: str) -> int:
        """How many numbers lie beside it under this name, of one of these kinds."""
        there = f"{name}.{part}" in checkpoint.shard_of
        info = checkpoint.info(f"{name}.{part}") if there else None
        return info.rows if info and info.dtype in kinds and len(info.shape) == 1 else 0

    count = held("absmax", "F32", "U8")
    block = next((size for size in BLOCKS if _blocks(shape, size) == count), None)
    fits = held("quant_map", "F32") == 16
    outer = None
    if not held("absmax", "F32"):
        there = held("nested_absmax", "F32")
        outer = next((size for size in BLOCKS if -(-count // size) == there), None)
        fits &= outer is not None and held("nested_quant_map", "F32") == 256
    if not fits or block is None:
        raise CorruptCheckpointError(
            f"What lies beside {name!r} of {checkpoint.name} does not fit its {list(shape)} "
            "numbers of 4 bits; fetch or save the checkpoint again."
        )
    return FourBit(name, (shape[0], shape[1]), code, block, outer)


def _blocks(shape: tuple[int, ...], size: int) -> int:
    """How many blocks of `size` numbers there are."""
    return -(-math.prod(shape) // size)
