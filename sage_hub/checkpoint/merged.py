"""A whole model that is read as a base with an adapter merged in, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sage_hub.checkpoint.adapter import WEIGHTS, Adapter
from sage_hub.checkpoint.architecture import Architecture
from sage_hub.checkpoint.dequantized import Dequantized
from sage_hub.checkpoint.files import Files, Through, digest
from sage_hub.checkpoint.index import TOKENIZER_FILES, Checkpoint
from sage_hub.checkpoint.tensorfile import Header, RowReader
from sage_hub.errors import AdapterError, NothingToDoError, QuantizedError
from sage_hub.runtime.progress import SILENT, Progress


def merged(adapter: Adapter) -> Merged:
    """The model that `adapter` makes of its base.

    Raises AdapterError where the adapter changes one of two weights that are tied, QuantizedError
    where the base is quantized.
    """
    _refuse_tied(adapter)
    if isinstance(adapter.base.files, Dequantized):
        raise QuantizedError(
            f"{adapter.base.name} is quantized, and a merged model is not; leave out --merge, or "
            "pass the checkpoint that it was made from."
        )
    base = adapter.base
    return Merged(_Overlay(adapter.files, base.files), base.headers, adapter)


@dataclass(frozen=True)
class Merged(Checkpoint):
    """The base with an adapter merged in, computed row by row as it is read."""

    adapter: Adapter

    @cached_property
    def architecture(self) -> Architecture:
        return self.adapter.base.architecture

    @property
    def of_model(self) -> Checkpoint:
        return self.adapter.base

    @contextmanager
    def open_shard(self, shard: str) -> Iterator[RowReader]:
        with ExitStack() as stack:
            base = stack.enter_context(self.adapter.base.open_shard(shard))
            adapter = stack.enter_context(self.adapter.open_shard(WEIGHTS))
            yield _MergedReader(base, adapter, self.adapter, self.headers[shard])

    def passing(self, folder: Path) -> Merged:
        base = self.adapter.base.passing(folder)
        return replace(self, adapter=replace(self.adapter, base=base))

    def fingerprint(self, progress: Progress = SILENT) -> str:
        sides = {"base": self.adapter.base, "adapter": self.adapter}
        return digest({name: side.fingerprint(progress) for name, side in sides.items()})


@dataclass(frozen=True)
class _MergedReader:
    base: RowReader
    tensors: RowReader
    adapter: Adapter
    header: Header

    def read(self, name: str) -> Tensor:
        info = self.header.tensors[name]
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.base.read_rows(name, start, stop)
        place = self.adapter.architecture.place(name, self.header.tensors[name].shape)
        if place is None:
            return rows
        for change in self.adapter.changes.values():
            if change.place.parameter != place.parameter:
                continue
            first = max(place.start + start, change.place.start)
            last = min(place.start + stop, change.place.stop)
            if first < last:
                mine = slice(first - place.start - start, last - place.start - start)
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                rows[mine] = change.apply(self.tensors, rows[mine], first - change.place.start)
        return rows


@dataclass(frozen=True)
class _Overlay(Through):
    """The files of a merged model: the base's, under the adapter's name, with its tokenizer."""

    base: Files  # and `files` are the adapter's

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        own = {n: s for n, s in self.files.sizes.items() if self._holder(n) is self.files}
        return {**self.base.sizes, **own}

    def path(self, file: str) -> Path:
        return self._holder(file).path(file)

    def folder(self, files: list[str]) -> Path:
        raise NotImplementedError("a merged model lies in no folder")

    def header(self, file: str) -> Header:
        return self._holder(file).header(file)

    def sha256(self, file: str) -> str:
        return self._holder(file).sha256(file)

    def check_unchanged(self) -> None:
        self.base.check_unchanged()
        self.files.check_unchanged()

    def missing_bytes(self, files: list[str]) -> int:
        return self.files.missing_bytes([WEIGHTS])

    def close(self, file: str) -> None:
        self._holder(file).close(file)

    def _holder(self, file: str) -> Files:
        taken = file in (*TOKENIZER_FILES, "README.md", "LICENSE")
        return self.files if taken and file in self.files.sizes else self.base


def check_effect(side: Checkpoint) -> None:
    """Raise NothingToDoError for an adapter, merged or not, that leaves its base as it is."""
    adapter = side.adapter if isinstance(side, Merged) else side
    if isinstance(adapter, Adapter) and not adapter.does_something():
        raise NothingToDoError(
            f"The adapter {adapter.name} leaves {adapter.base.name} as it is, because of each pair "
            "A or B is zero, as before training; there is no update to sanitize."
        )


def _refuse_tied(adapter: Adapter) -> None:
    tied = adapter.architecture.tied
    for change in adapter.changes.values():
        if change.place.parameter in (*tied, *tied.values()):
            raise AdapterError(
                f"The adapter {adapter.name} changes {change.place.parameter!r}, which the base "
                "ties to another weight; merging would change both. Leave out --merge."
            )
