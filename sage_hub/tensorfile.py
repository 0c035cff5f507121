"""One safetensors file, a tensor at a time: read the header, read a tensor, write front to back.

The `safetensors` library maps whole files and saves whole dictionaries; here memory is bounded by
one tensor. Its strict parser still has the first word on every file that is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sage_hub.errors import CorruptCheckpointError, NotFoundError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its type name, shape, and bytes [start, stop) behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file; `tensors` are in the order of their bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def check_header(
    fields: Mapping[str, Any], metadata: Mapping[str, str], data_start: int, name: str
) -> Header:
    """The header with `fields` (per tensor: dtype, shape, data_offsets); `name` is for the error.

    Raises CorruptCheckpointError unless the tensors tile the data without hole or overlap.
    """

    def broken(why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{name} is not a valid safetensors file ({why}); fetch or save it again."
        )

    try:
        tensors = {
            key: TensorInfo(
                str(field["dtype"]),
                tuple(int(n) for n in field["shape"]),
                int(field["data_offsets"][0]),
                int(field["data_offsets"][1]),
            )
            for key, field in fields.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, OverflowError):
        raise broken("its header cannot be read") from None
    end = 0
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    for key, info in ordered.items():
        if info.start != end or info.stop < info.start or any(n < 0 for n in info.shape):
            raise broken(f"the bytes of tensor {key!r} overlap another's or leave a hole")
        dtype = DTYPES.get(info.dtype)
        if dtype is not None and info.nbytes != math.prod(info.shape) * dtype.itemsize:
            raise broken(f"tensor {key!r} has the wrong number of bytes for its shape")
        end = info.stop
    return Header(ordered, dict(metadata), data_start)


def read_header(path: Path) -> Header:
    """The header of the file at `path`. Raises CorruptCheckpointError if the file is not whole."""
    if not path.is_file():
        raise NotFoundError(f"{path.name} is not a file any more; it was removed or replaced.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CorruptCheckpointError(
            f"{path.name} is corrupt or truncated ({error}); fetch or save it again."
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fields = json.loads(file.read(length))
    metadata = fields.pop("__metadata__", None) or {}
    return check_header(fields, metadata, 8 + length, path.name)


class TensorReader:
    """An open safetensors file; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)

    def __enter__(self) -> TensorReader:
        self._file = self.path.open("rb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own."""
        info = self.header.tensors[name]
        if info.dtype not in DTYPES:
            raise CorruptCheckpointError(
                f"Tensor {name!r} in {self.path.name} has the type {info.dtype}, "
                "which sage-hub cannot compute with; save it as bfloat16, float16 or float32."
            )
        buffer = bytearray(info.nbytes)
        self._file.seek(self.header.data_start + info.start)
        if self._file.readinto(buffer) != info.nbytes:
            raise CorruptCheckpointError(
                f"{self.path.name} ends in the middle of tensor {name!r}; "
                "it changed or was cut while it was read."
            )
        return from_bytes(buffer, info)


def from_bytes(buffer: bytearray, info: TensorInfo) -> Tensor:
    """A tensor over `buffer`, which it keeps alive."""
    dtype = DTYPES[info.dtype]
    if not buffer:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` as a file holds them (little-endian, C order)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Lay out tensors (name, type name, shape) one behind the other, in the order given."""
    infos, end = {}, 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        infos[name] = TensorInfo(dtype, shape, start, end)
    return infos


def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors has for `dtype`. Raises ValueError if we write none such."""
    if dtype not in _NAMES:
        raise ValueError(f"sage-hub does not write tensors of {dtype}")
    return _NAMES[dtype]


class TensorWriter:
    """Write a safetensors file front to back; it gets its name only when it is whole.

    The same tensors give the same bytes: the header is ours, its order that of the data. The
    SHA-256 is taken while writing, so the file need not be read again for it.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.sha256 = ""
        self._partial = path.with_name(path.name + ".partial")
        self._todo = list(tensors.items())[::-1]
        fields: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, info in tensors.items():
            fields[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [info.start, info.stop],
            }
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        # The format wants the data 8-byte aligned, by spaces behind the JSON.
        self._head = text + b" " * (-len(text) % 8)

    def __enter__(self) -> TensorWriter:
        self._hash = hashlib.sha256()
        self._file = self._partial.open("wb")
        self._put(len(self._head).to_bytes(8, "little"))
        self._put(self._head)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor. Raises ValueError if it is not the one that the header names."""
        if not self._todo:
            raise ValueError(f"wrote {name!r} behind the last tensor of the header")
        due, info = self._todo.pop()
        if (name, dtype_name(tensor.dtype), tuple(tensor.shape)) != (due, info.dtype, info.shape):
            raise ValueError(f"wrote {name!r} where the header has {due!r} {info}")
        self._put(raw_bytes(tensor))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None or self._todo:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            if error is None:
                raise ValueError(f"{self.path.name}: {len(self._todo)} tensors were not written")
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)
        self.sha256 = self._hash.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)


def file_sha256(path: Path) -> str:
    """The SHA-256 of the file at `path` in hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
