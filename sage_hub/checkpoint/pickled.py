"""Pickled weights seen as safetensors, where asked for by name: tensors alone, no code is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from errno import EINVAL
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_hub.checkpoint.files import Files, Through, read_json
from sage_hub.checkpoint.layouts import INDEX, SINGLE
from sage_hub.checkpoint.tensorfile import DTYPES, Header, OpenTensors, TensorInfo
from sage_hub.errors import CorruptCheckpointError, PickledWeightsError
from sage_hub.hub.client import may_pass, status_of

WHOLE, SHARDED, ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
ZIP = b"PK\3\4"  # how one begins
T = TypeVar("T")
_TYPES = {dtype: name for name, dtype in DTYPES.items()}


def unpickled(files: Files) -> Files:
    """`files`, with pickled weights seen as safetensors where there are no others.

    Raises CorruptCheckpointError for an index that points to no such pickle.
    """
    there = files.sizes
    if {SINGLE, INDEX, _called(ADAPTER)} & there.keys():
        return files
    if WHOLE in there:
        return Unpickled(files, {SINGLE: WHOLE})
    if SHARDED in there:
        return Unpickled(files, {INDEX: SHARDED, **{_called(s): s for s in _shards(files)}})
    if ADAPTER in there:
        return Unpickled(files, {_called(ADAPTER): ADAPTER})
    return files


def _called(pickle: str) -> str:
    """What a pickle is called as safetensors."""
    return pickle.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def _shards(files: Files) -> list[str]:
    weight_map = read_json(files, SHARDED).get("weight_map")
    found = set(weight_map.values() if isinstance(weight_map, dict) else ())
    for shard in found or {None}:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.bin", shard):
            raise CorruptCheckpointError(
                f"{SHARDED} of {files.name} points to {shard!r}, which is no pickle in its folder."
            )
        if shard not in files.sizes:
            raise CorruptCheckpointError(f"{files.name} lacks {shard}, which its index names.")
    return sorted(found)


@dataclass(frozen=True)
class Unpickled(Through):
    """Files of which pickles are seen as the safetensors that they could be."""

    pickles: Mapping[str, str]  # as what each is seen -> what it is called

    @property
    def shards(self) -> list[str]:
        """The files of weights, as they are seen."""
        return [name for name in self.pickles if name != INDEX]

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        own, taken = self.files.sizes, self.pickles.values()
        seen = {name: own[pickle] for name, pickle in self.pickles.items()}
        return {name: size for name, size in own.items() if name not in taken} | seen

    @property
    def reading(self) -> str:
        return f"pickled, in {self.pickles[self.shards[0]]}; only tensors are taken, no code is run"

    def path(self, file: str) -> Path:
        return self.files.path(self._own(file))

    def look(self, file: str, take: Callable[[BinaryIO], T]) -> T:
        return self.files.look(self._own(file), take)

    def header(self, file: str) -> Header:
        pickle = self._own(file)

        def header(stream: BinaryIO) -> Header:
            if stream.read(len(ZIP)) != ZIP:
                raise PickledWeightsError(
                    f"{pickle} of {self.name} is no file of torch 1.6 or later, the only ones that "
                    "can be read in parts; load it where you trust it, and save it again "
                    "(save_pretrained)."
                )
            stream.seek(0)
            return _header_of(_load(stream, pickle, self.name, in_place=False))

        return self.files.look(pickle, header)

    def open(self, file: str) -> OpenTensors:
        return _PickleReader(self.files.path(self._own(file)), self.name)

    def sha256(self, file: str) -> str:
        return self.files.sha256(self._own(file))

    def missing_bytes(self, files: list[str]) -> int:
        return self.files.missing_bytes([self._own(file) for file in files])

    def close(self, file: str) -> None:
        self.files.close(self._own(file))

    def _own(self, file: str) -> str:
        return self.pickles.get(file, file)


class _PickleReader:
    """The tensors of a pickle, mapped from the file; a context manager."""

    def __init__(self, path: Path, name: str) -> None:
        self._tensors = _load(path, path.name, name, in_place=True)
        self.header = _header_of(self._tensors)

    def __enter__(self) -> _PickleReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensors = {}

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own."""
        return self._tensors[name].clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `name` as a matrix, in memory of their own."""
        tensor = self._tensors[name]
        rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor.reshape(-1, 1)
        return rows[start:stop].clone(memory_format=torch.contiguous_format)


def _load(source: Path | BinaryIO, pickle: str, name: str, *, in_place: bool) -> dict[str, Tensor]:
    """The tensors of a pickle by their names: mapped, or without their data (of no bytes).

    Raises PickledWeightsError for one that holds anything else, or cannot be read in parts.
    """
    try:
        # A fake tensor takes no storage, so that of the file only the pickle proper is read.
        with nullcontext() if in_place else FakeTensorMode():
            found: Any = torch.load(source, weights_only=True, mmap=in_place or None)
    except Exception as error:  # of a hostile file it may be any
        of_hub = status_of(error) is not None or may_pass(error)
        if of_hub or (isinstance(error, OSError) and error.errno != EINVAL):  # a cut file's
            raise
        raise PickledWeightsError(
            f"{pickle} of {name} {_why(error)}; load it where you trust it, and save it again "
            "(save_pretrained)."
        ) from None
    entries = found.items() if isinstance(found, dict) else [("it", found)]
    strange = [key for key, value in entries if not (isinstance(key, str) and _is_plain(value))]
    if strange or not found:
        raise PickledWeightsError(
            f"{pickle} of {name} is not a model's tensors by their names"
            + (f" ({strange[0]!r} is none)" if strange else "")
            + "; save the model with save_pretrained."
        )
    return {key: value.detach() for key, value in found.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _why(error: Exception) -> str:
    said = str(error)
    if "weights_only" in said or "Weights only" in said:
        return "holds more than tensors, which would run as code"
    if isinstance(error, OSError) or "zip archive" in said:
        return "is cut"
    return "cannot be read as tensors"


def _header_of(tensors: Mapping[str, Tensor]) -> Header:
    """The header that the tensors would have as safetensors: one under two names only once."""
    infos: dict[str, TensorInfo] = {}
    seen: set[tuple[Any, ...]] = set()
    end = 0
    for name, tensor in tensors.items():
        where = tensor.untyped_storage()._cdata, tensor.storage_offset()
        key = (*where, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        dtype = _TYPES.get(tensor.dtype, str(tensor.dtype))
        infos[name] = TensorInfo(dtype, tuple(tensor.shape), start, end)
    return Header(infos, {}, 0)
