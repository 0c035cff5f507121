"""One safetensors file, some rows at a time: read the header, read rows.

The `safetensors` library maps whole files and saves whole dictionaries; here memory is bounded by
the rows in hand. Its strict parser still has the first word on every file that is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

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
# Read, to be dequantized; nothing is computed with them, nor written.
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
READ = DTYPES | FLOAT8
LONGEST_NAME = 512  # of a tensor, in letters
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

    @property
    def rows(self) -> int:
        """The tensor as a matrix: its last dimension is a row; a vector is one column."""
        return row_count(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1


def row_count(shape: tuple[int, ...]) -> int:
    """The rows of a tensor of `shape` seen as a matrix: a 3-D one's matrices stand in a column."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


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
        if math.prod(max(n, 1) for n in info.shape) >= 1 << 63:
            raise broken(f"the shape of tensor {key!r} is too large")
        dtype = READ.get(info.dtype)
        if dtype is not None and info.nbytes != math.prod(info.shape) * dtype.itemsize:
            raise broken(f"tensor {key!r} has the wrong number of bytes for its shape")
        end = info.stop
    return Header(ordered, dict(metadata), data_start)


def read_header(path: Path) -> Header:
    """The header of the file at `path`. Raises CorruptCheckpointError if the file is not whole."""
    if not path.is_file():
        raise NotFoundError(
            f"{path.name} is not a file any more; fetch or save it again, and run the same command."
        )
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


def check_names(header: Header, name: str) -> None:
    """Raise CorruptCheckpointError for a tensor whose name no file can hold or nobody can use."""
    for tensor in header.tensors:
        readable = tensor.isprintable() and len(tensor) <= LONGEST_NAME
        if not tensor or tensor == "__metadata__" or not readable:
            raise CorruptCheckpointError(
                f"A tensor in {name} is called {tensor[:LONGEST_NAME]!r}, which is no name of a "
                "weight; save the model again (save_pretrained)."
            )


class RowReader(Protocol):
    """An open file of tensors, or what looks like one."""

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `name` as a matrix, in memory of their own."""


class OpenTensors(RowReader, Protocol):
    """A file of tensors to read from."""

    @property
    def header(self) -> Header:
        """Its header, as it is now."""


class TensorReader:
    """An open safetensors file; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)

    def __enter__(self) -> TensorReader:
        # Unbuffered: rows are read in large blocks, straight into their tensor.
        self._file = self.path.open("rb", buffering=0)
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
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `name` as a matrix, in memory of their own."""
        info = self.header.tensors[name]
        if info.dtype not in READ:
            raise CorruptCheckpointError(
                f"Tensor {name!r} in {self.path.name} has the type {info.dtype}, "
                "which sage-hub cannot compute with; save it as bfloat16, float16 or float32."
            )
        if not 0 <= start <= stop <= info.rows:
            raise CorruptCheckpointError(
                f"Tensor {name!r} in {self.path.name} has {info.rows} rows, and {stop} are "
                "needed; fetch or save it again."
            )
        dtype = READ[info.dtype]
        rows = torch.empty(stop - start, info.columns, dtype=dtype)
        buffer = raw_bytes(rows)
        self._file.seek(self.header.data_start + info.start + start * info.columns * dtype.itemsize)
        while buffer.nbytes:
            count = self._file.readinto(buffer)
            if not count:
                raise CorruptCheckpointError(
                    f"{self.path.name} ends in the middle of tensor {name!r}; "
                    "it changed or was cut while it was read. Run the same command again."
                )
            buffer = buffer[count:]
        return rows

    def map(self, name: str) -> Tensor:
        """The tensor `name` mapped from the file; its pages are given back when it is dropped."""
        info = self.header.tensors[name]
        if not info.nbytes:
            return self.read(name)
        begin = self.header.data_start + info.start
        before = begin % mmap.ALLOCATIONGRANULARITY
        # A private copy-on-write map, because torch takes no read-only memory.
        pages = mmap.mmap(
            self._file.fileno(),
            info.nbytes + before,
            access=mmap.ACCESS_COPY,
            offset=begin - before,
        )
        count = math.prod(info.shape)
        flat = torch.frombuffer(pages, dtype=DTYPES[info.dtype], count=count, offset=before)
        return flat.reshape(info.shape)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` as a file holds them (little-endian, C order)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(bytearray())


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


def file_sha256(path: Path) -> str:
    """The SHA-256 of the file at `path` in hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
