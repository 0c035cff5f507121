"""Files of quantized weights, read as the numbers that these stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sage_hub.checkpoint.files import Through
from sage_hub.checkpoint.packed import Packed, find_packed
from sage_hub.checkpoint.tensorfile import Header, OpenTensors, TensorInfo

if TYPE_CHECKING:
    from sage_hub.checkpoint.index import Checkpoint

# What lies beside a weight and is no number of the model, by what follows the weight's stem.
BESIDE = (
    *(".weight_scale", ".weight_scale_inv", ".input_scale", ".input_scale_ub", ".activation_scale"),
    *(".SCB", ".weight_format"),
)


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

    @contextmanager
    def open(self, file: str) -> Iterator[OpenTensors]:
        with self.files.open(file) as own:
            yield Dequantizing(self, file, own)


class Dequantizing:
    """An open shard of which quantized weights are read as float32.

    Raises CorruptCheckpointError for what is in it and cannot be decoded.
    """

    def __init__(self, files: Dequantized, shard: str, own: OpenTensors) -> None:
        self._files, self._shard, self._own = files, shard, own
        self._elsewhere: dict[str, Tensor] = {}
        for name, packed in files.packed.items():
            if files.homes[name] == shard:
                packed.check(self._rows)

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
    not fit their weights; of shards that are on this machine all is looked at that can be wrong.
    """
    found = dict(find_packed(checkpoint))
    if not found:
        return checkpoint
    files = Dequantized(checkpoint.files, checkpoint.headers, found)
    for shard in checkpoint.headers:
        if not files.missing_bytes([shard]):
            with files.open(shard):
                pass
    headers = {shard: _seen(header, found) for shard, header in checkpoint.headers.items()}
    return replace(checkpoint, files=files, headers=headers)


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
