"""Pickled weights seen as safetensors, where asked for by name: tensors alone, no code is run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from errno import EINVAL
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_hub.checkpoint.files import Files, Through, read_json
from sage_hub.checkpoint.layouts import INDEX, SINGLE
from sage_hub.checkpoint.tensorfile import READ, Header, OpenTensors, TensorInfo
from sage_hub.errors import CorruptCheckpointError, PickledWeightsError
from sage_hub.hub.client import may_pass, status_of

ADAPTER_CONFIG = "adapter_config.json"
WHOLE, SHARDED, ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
ZIP = b"PK\3\4"  # how one begins
T = TypeVar("T")
_TYPES = {dtype: name for name, dtype in READ.items()}


def unpickled(files: Files) -> Files:
    """`files`, with pickled weights seen as safetensors where there are no others.

    Raises CorruptCheckpointError for an index that points to no such pickle.
    """
    there = files.sizes
    adapter = ADAPTER.removesuffix(".bin") + ".safetensors"
    if {SINGLE, INDEX} & there.keys() or {ADAPTER_CONFIG, adapter} <= there.keys():
        return files
    if WHOLE in there:
        return Unpickled(files, {SINGLE: WHOLE})
    if SHARDED in there:
        shards = _shards(files)
        called = {
            f"model-{n:05}-of-{len(shards):05}.safetensors": s for n, s in enumerate(shards, 1)
        }
        return Unpickled(files, {INDEX: SHARDED, **called})
    if ADAPTER in there:
        return Unpickled(files, {adapter: ADAPTER})
    return files


def _shards(files: Files) -> list[str]:
    weight_map = read_json(files, SHARDED).get("weight_map")
    found = set(weight_map.values() if isinstance(weight_map, dict) else ())
    for shard in found or {None}:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.bin", shard):
            raise CorruptCheckpointError(
                f"{SHARDED} of {files.name} points to {shard!r}, which is no pickle in its "
                "folder; save the checkpoint again."
            )
        if shard not in files.sizes:
            raise CorruptCheckpointError(
                f"{files.name} lacks {shard}, which its index names; fetch it."
            )
    return sorted(found)


@dataclass(frozen=True)
class Unpickled(Through):
    """Files of which pickles are seen as the safetensors that they could be."""

    pickles: Mapping[str, str]  # as what each is seen -> what it is called
    dropped: frozenset[str] = frozenset()  # tensors that are others once more

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
        return _header_of(self._glimpse(file), self.dropped)

    @contextmanager
    def open(self, file: str) -> Iterator[OpenTensors]:
        path = self.files.path(self._own(file))
        yield _PickleReader(_load(path, path.name, self.name, in_place=True), self.dropped)

    def without_twins(self, tied: Callable[[str], bool]) -> Unpickled:
        """The same without tensors that are `tied` and that another one holds too."""
        twice: set[str] = set()
        for file in self.shards:
            firsts: dict[object, str] = {}
            for name, tensor in self._glimpse(file).items():
                if firsts.setdefault(_place_of(tensor), name) != name and tied(name):
                    twice.add(name)
        return replace(self, dropped=frozenset(twice))

    def _glimpse(self, file: str) -> dict[str, Tensor]:
        """The tensors of `file` without their data."""
        pickle = self._own(file)

        def glimpse(stream: BinaryIO) -> dict[str, Tensor]:
            if stream.read(len(ZIP)) != ZIP:
                raise PickledWeightsError(
                    f"{pickle} of {self.name} is no file of torch 1.6 or later, the only ones that "
                    "can be read in parts; load it where you trust it, and save it again "
                    "(save_pretrained)."
                )
            stream.seek(0)
            found = _load(stream, pickle, self.name, in_place=False)
            _check_records(stream, found, f"{pickle} of {self.name}")
            return found

        return self.files.look(pickle, glimpse)

    def sha256(self, file: str) -> str:
        return self.files.sha256(self._own(file))

    def missing_bytes(self, files: list[str]) -> int:
        return self.files.missing_bytes([self._own(file) for file in files])

    def close(self, file: str) -> None:
        self.files.close(self._own(file))

    def _own(self, file: str) -> str:
        return self.pickles.get(file, file)


class _PickleReader:
    """The tensors of a pickle, mapped from the file."""

    def __init__(self, tensors: Mapping[str, Tensor], dropped: Collection[str]) -> None:
        self._tensors = tensors
        self.header = _header_of(tensors, dropped)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own."""
        return self._tensors[name].clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `name` as a matrix, in memory of their own."""
        return _rows(self._tensors[name], start, stop)


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows of `tensor` as a matrix, and no others: one that is not contiguous is never copied."""
    if tensor.ndim < 2:
        rows = tensor.reshape(-1, 1)[start:stop]
    elif tensor.ndim == 2 or tensor.is_contiguous():
        rows = tensor.flatten(0, -2)[start:stop]
    else:
        height = tensor[0].numel() // tensor.shape[-1]
        places = range(start // height, -(-stop // height))
        parts = ((p, max(start - p * height, 0), min(stop - p * height, height)) for p in places)
        rows = torch.cat([_rows(tensor[place], first, last) for place, first, last in parts])
    return rows.clone(memory_format=torch.contiguous_format)


def _load(source: Path | BinaryIO, pickle: str, name: str, *, in_place: bool) -> dict[str, Tensor]:
    """The tensors of a pickle by their names: mapped, or without their data (of no bytes).

    Raises PickledWeightsError for one that holds anything else, or cannot be read in parts.
    """
    how: dict[str, Any] = {"map_location": "cpu", "mmap": in_place or None}
    try:
        # A fake tensor takes no storage, so that of the file only the pickle proper is read.
        with nullcontext() if in_place else FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is one sentence of ours for all
            found: Any = torch.load(source, weights_only=True, **how)
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
            + (f" ({str(strange[0])[:99]!r} is none)" if strange else "")
            + "; save the model with save_pretrained."
        )
    return {key: value.detach() for key, value in found.items()}


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with numbers in the file."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _offset(tensor: Tensor) -> int | None:
    """Where in the file the storage of a tensor without data lies, if this torch tells."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _check_records(stream: BinaryIO, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise PickledWeightsError where numbers cannot be mapped from the file as they are.

    torch looks at no record's size where it maps, and would take what lies behind for the rest.
    """
    with ZipFile(stream) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    storages = {_offset(t): t.untyped_storage().nbytes() for t in tensors.values()}
    storages.pop(None, None)
    needed, there = sorted(storages.values(), reverse=True), [e.file_size for e in entries]
    pairs = zip_longest(needed, sorted(there, reverse=True)[: len(needed)], fillvalue=0)
    if any(room < size for size, room in pairs):
        raise PickledWeightsError(f"{name} lacks a part of its numbers; fetch or save it again.")
    if any(entry.compress_type != ZIP_STORED for entry in entries):
        raise PickledWeightsError(
            f"{name} was compressed afterwards, and cannot be read in parts; load it where you "
            "trust it, and save it again (save_pretrained)."
        )


def _why(error: Exception) -> str:
    said = str(error)
    if "weights_only" in said or "Weights only" in said:
        return "holds more than tensors, which would run as code"
    if isinstance(error, OSError) or "zip archive" in said:
        return "is cut"
    return "cannot be read as tensors"


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Which numbers of which storage it is."""
    where = _offset(tensor), tensor.storage_offset()
    return (*where, tensor.dtype, tensor.shape, tensor.stride())


def _header_of(tensors: Mapping[str, Tensor], dropped: Collection[str]) -> Header:
    """The header that the tensors would have as safetensors."""
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, tensor in tensors.items():
        if name not in dropped:
            start, end = end, end + tensor.numel() * tensor.dtype.itemsize
            dtype = _TYPES.get(tensor.dtype, str(tensor.dtype))
            infos[name] = TensorInfo(dtype, tuple(tensor.shape), start, end)
    return Header(infos, {}, 0)
