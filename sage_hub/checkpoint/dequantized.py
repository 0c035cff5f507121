"""Quantized weights read as the numbers that they stand for: codes of a table, times scales.

Float8 with a scale per block, row or tensor (DeepSeek, compressed-tensors), bitsandbytes' int8
(LLM.int8, arXiv 2208.07339) and its 4-bit types (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sage_hub.checkpoint.files import Through
from sage_hub.checkpoint.tensorfile import FLOAT8, Header, OpenTensors, TensorInfo
from sage_hub.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from sage_hub.checkpoint.index import Checkpoint

STATE = ".quant_state.bitsandbytes__"
KINDS_OF_4_BIT = ("nf4", "fp4")
# What lies beside a weight and is no number of the model, by what follows the weight's stem.
BESIDE = (
    *(".weight_scale", ".weight_scale_inv", ".input_scale", ".input_scale_ub", ".activation_scale"),
    *(".SCB", ".weight_format"),
)
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
        if self.order and read(self.order, 0, -1).any():
            raise CorruptCheckpointError(
                f"{self.weight!r} is in an order for one kind of GPU; save the checkpoint again "
                "with a bitsandbytes of today."
            )
        across = -(-self.shape[1] // columns)
        codes = read(self.weight, start, stop).view(torch.uint8)
        first, last = start // rows, -(-stop // rows)
        # However it lies in the file, a block's scale is one number.
        scales = read(self.scale, 0, -1).float().reshape(-1, across)[first:last] / self.steps
        scales = scales[torch.arange(start, stop) // rows - first]
        scales = scales.repeat_interleave(columns, 1)[:, : self.shape[1]]
        table = torch.arange(256, dtype=torch.uint8).view(self.values).float()
        return codes, table, scales


@dataclass(frozen=True)
class FourBit:
    """Two codes in a byte, the first in its upper half; blocks run on from row to row."""

    weight: str
    shape: tuple[int, int]
    code: str  # "nf4" or "fp4"

    @property
    def kind(self) -> str:
        return f"bitsandbytes {self.code}"

    def decode(self, read: Rows, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        state = self._state(read)
        size = state["blocksize"]
        packed = read(self.weight, first // 2, -(-last // 2)).flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
        codes = codes[first % 2 :][: last - first].reshape(-1, columns)
        scales = self._scales(read, state, first // size, -(-last // size))
        scales = scales.repeat_interleave(size)[first % size :][: last - first]
        return codes, read(f"{self.weight}.quant_map", 0, -1).flatten(), scales.view_as(codes)

    def _scales(self, read: Rows, state: Mapping[str, Any], start: int, stop: int) -> Tensor:
        """The scales of blocks [start, stop), which may be quantized themselves."""
        scales = read(f"{self.weight}.absmax", start, stop).flatten()
        if "nested_blocksize" not in state:
            return scales.float()
        table = read(f"{self.weight}.nested_quant_map", 0, -1).flatten()
        size = state["nested_blocksize"]
        outer = read(f"{self.weight}.nested_absmax", start // size, -(-stop // size)).flatten()
        outer = outer[torch.arange(start, stop) // size - start // size]
        return table[scales.long()] * outer + float(state["nested_offset"])

    def _state(self, read: Rows) -> dict[str, Any]:
        raw = bytes(read(f"{self.weight}{STATE}{self.code}", 0, -1).flatten().tolist())
        try:
            state = dict(json.loads(raw))
            fits = tuple(state["shape"]) == self.shape and state["quant_type"] == self.code
            sizes = (state["blocksize"], state.get("nested_blocksize", 1))
            fits &= all(isinstance(n, int) and n > 0 for n in sizes)
            fits &= math.isfinite(float(state.get("nested_offset", 0.0)))
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise CorruptCheckpointError(
                f"What bitsandbytes says of {self.weight!r} does not fit its shape, "
                f"{list(self.shape)}; fetch or save the checkpoint again."
            )
        return state


@dataclass(frozen=True)
class Dequantized(Through):
    """Files in which quantized weights are read as float32."""

    raw: Mapping[str, Header]  # shard -> its header as it is
    packed: Mapping[str, Packed]

    @property
    def reading(self) -> str:
        kinds = ", ".join(sorted({one.kind for one in self.packed.values()}))
        beneath = f"; {self.files.reading}" if self.files.reading else ""
        return f"quantized ({kinds}), and read as the numbers that this stands for{beneath}"

    @cached_property
    def homes(self) -> dict[str, str]:
        """Tensor -> the shard that it lies in."""
        return {name: shard for shard, header in self.raw.items() for name in header.tensors}

    def header(self, file: str) -> Header:
        return _seen(self.raw[file], self.packed)

    def open(self, file: str) -> Dequantizing:
        return Dequantizing(self, file)


class Dequantizing:
    """An open shard of which quantized weights are read as float32; a context manager."""

    def __init__(self, files: Dequantized, shard: str) -> None:
        self._files, self._shard = files, shard
        self._elsewhere: dict[str, Tensor] = {}

    def __enter__(self) -> Dequantizing:
        self._stack = ExitStack()
        self._own: OpenTensors = self._stack.enter_context(self._files.files.open(self._shard))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def header(self) -> Header:
        """That of the weights as they are seen."""
        return _seen(self._own.header, self._files.packed)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own."""
        if name not in self._files.packed:
            return self._own.read(name)
        shape = self._files.packed[name].shape
        return self.read_rows(name, 0, math.prod(shape[:-1])).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `name` as a matrix, in memory of their own."""
        if name not in self._files.packed:
            return self._own.read_rows(name, start, stop)
        codes, table, scales = self._files.packed[name].decode(self._rows, start, stop)
        return table[codes.int()] * scales

    def rounding(self, name: str, start: int, stop: int) -> float:
        """What rounding these rows has changed, as the sum of squares to be expected.

        A number is anywhere between the middles of the gaps around its value, which are w apart:
        w²/12. Zero for a tensor that is not quantized.
        """
        if name not in self._files.packed:
            return 0.0
        codes, table, scales = self._files.packed[name].decode(self._rows, start, stop)
        return float((_widths(table)[codes.int()] * scales).square().sum() / 12)

    def _rows(self, tensor: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor of this shard, or of another's, which is small; -1 is the end."""
        home = self._files.homes[tensor]
        info = self._files.raw[home].tensors[tensor]
        stop = info.rows if stop < 0 else stop
        if home == self._shard:
            return self._own.read_rows(tensor, start, stop)
        if tensor not in self._elsewhere:
            with self._files.files.open(home) as other:
                self._elsewhere[tensor] = other.read_rows(tensor, 0, info.rows)
            self._files.files.close(home)
        return self._elsewhere[tensor][start:stop]


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with quantized weights, of the kinds that are known, as numbers in float32.

    What is quantized otherwise stays as it is. Raises CorruptCheckpointError for scales that do
    not fit their weights.
    """
    found = dict(_find(checkpoint))
    if not found:
        return checkpoint
    files = Dequantized(checkpoint.files, checkpoint.headers, found)
    headers = {shard: _seen(header, found) for shard, header in checkpoint.headers.items()}
    return replace(checkpoint, files=files, headers=headers)


def _find(checkpoint: Checkpoint) -> Iterator[tuple[str, Packed]]:
    for name in checkpoint.shard_of:
        stem, info = name.removesuffix(".weight"), checkpoint.info(name)
        scale = next(
            (
                s
                for s in (f"{stem}.weight_scale_inv", f"{stem}.weight_scale")
                if _has(checkpoint, s)
            ),
            "",
        )
        if info.dtype in FLOAT8 and scale:
            yield name, _scaled(checkpoint, name, scale, FLOAT8[info.dtype])
        elif info.dtype == "I8" and _has(checkpoint, f"{stem}.SCB"):
            yield name, _scaled(checkpoint, name, f"{stem}.SCB", torch.int8)
        elif info.dtype == "U8" and _has(checkpoint, f"{name}.absmax"):
            for kind in KINDS_OF_4_BIT:
                if _has(checkpoint, f"{name}{STATE}{kind}"):
                    yield name, _four_bit(checkpoint, name, kind)


def _has(checkpoint: Checkpoint, tensor: str) -> bool:
    return tensor in checkpoint.shard_of


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
                order = order if _has(checkpoint, order) else ""
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


def _four_bit(checkpoint: Checkpoint, name: str, kind: str) -> FourBit:
    """Its shape is that of the model's parameter: a header has it as bytes alone."""
    architecture = checkpoint.architecture
    shape = architecture.parameters.get(architecture.parameter(name) or "", ())
    if len(shape) != 2 or -(-math.prod(shape) // 2) != checkpoint.info(name).nbytes:
        raise CorruptCheckpointError(
            f"Tensor {name!r} of {checkpoint.name} does not hold the {list(shape)} numbers of "
            "4 bits that config.json gives it; fetch or save the checkpoint again."
        )
    return FourBit(name, (shape[0], shape[1]), kind)


def _seen(header: Header, packed: Mapping[str, Packed]) -> Header:
    """`header` with `packed` weights in float32, without what lies beside them."""
    beside = {f"{name.removesuffix('.weight')}{end}" for name in packed for end in BESIDE}
    kept = {
        name: info
        for name, info in header.tensors.items()
        if name not in beside and not name.startswith(tuple(f"{one}." for one in packed))
    }
    seen: dict[str, TensorInfo] = {}
    end = 0
    for name, info in kept.items():
        start, end = end, end + info.nbytes
        if name in packed:
            shape = packed[name].shape
            end = start + math.prod(shape) * torch.float32.itemsize
            info = TensorInfo("F32", shape, start, end)
        seen[name] = replace(info, start=start, stop=end)
    return Header(seen, header.metadata, 0)


def _widths(table: Tensor) -> Tensor:
    """Of each value how far it is from the middle of the gap below to that of the gap above."""
    values = torch.unique(table[torch.isfinite(table)])
    middles = (values[1:] + values[:-1]) / 2
    below = torch.cat([values[:1], middles])
    above = torch.cat([middles, values[-1:]])
    place = torch.searchsorted(values, table.nan_to_num()).clamp(max=len(values) - 1)
    return (above - below)[place]
