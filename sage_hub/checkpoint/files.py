"""The files of a checkpoint: of a local folder, or of a Hub repo."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from sage_hub.checkpoint.hashes import Stamp, sha256_of, stamp
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.location import Location, parse_location
from sage_hub.checkpoint.tensorfile import (
    Header,
    OpenTensors,
    TensorReader,
    read_header,
)
from sage_hub.errors import CorruptCheckpointError, NotFoundError, UsageError

T = TypeVar("T")

MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Files(Protocol):
    """The files of one checkpoint, wherever they are."""

    @property
    def name(self) -> str:
        """A name fit to publish: no path of this machine."""

    @property
    def commit(self) -> str | None:
        """The commit SHA on the Hub, None for a folder."""

    @property
    def location(self) -> Location:
        """Where they lie."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every file with its size in bytes."""

    @property
    def private(self) -> bool:
        """Whether they are in a private repo of the Hub."""

    @property
    def reading(self) -> str:
        """How weights are made of what lies there; empty where they are read as they are."""

    def path(self, file: str) -> Path:
        """A local path with the bytes of `file`, fetched if need be."""

    def folder(self, files: list[str]) -> Path:
        """A local folder that holds `files`."""

    def look(self, file: str, take: Callable[[BinaryIO], T]) -> T:
        """What `take` makes of `file`, which is not fetched, but for the parts that it reads."""

    def header(self, file: str) -> Header:
        """The header of a file of tensors, without its data."""

    def open(self, file: str) -> AbstractContextManager[OpenTensors]:
        """A file of tensors to read rows of, fetched if need be."""

    def sha256(self, file: str) -> str:
        """The SHA-256 of `file` in hex."""

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError if a file is not what it was when it was hashed."""

    def missing_bytes(self, files: list[str]) -> int:
        """How many bytes of `files` would have to be downloaded."""

    def close(self, file: str) -> None:
        """`file` is not needed for now."""

    def passing(self, folder: Path) -> Files:
        """The same, keeping a downloaded weight file, in `folder`, only until it is closed."""


def _is_bookkeeping(parts: Sequence[str]) -> bool:
    """Whether a file is git's, or what `hf download` keeps beside what it has fetched."""
    return ".git" in parts or parts[:2] == (".cache", "huggingface")


class LocalFiles:
    """The files below a local folder."""

    commit: str | None = None
    private = False
    reading = ""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise NotFoundError(
                f"The folder {folder} does not exist; check the path (a Hub repo is org/name)."
            )
        _check_links(folder)
        self._folder = folder
        self.location = Location(folder)
        self.name = self.location.name
        self.sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not _is_bookkeeping(path.relative_to(folder).parts)
        }
        for name in (self.name, *self.sizes):
            check_name(name)
        self._hashes: dict[str, tuple[str, Stamp]] = {}

    def path(self, file: str) -> Path:
        return self._folder / file

    def folder(self, files: list[str]) -> Path:
        return self._folder

    def look(self, file: str, take: Callable[[BinaryIO], T]) -> T:
        with (self._folder / file).open("rb") as stream:
            return take(stream)

    def header(self, file: str) -> Header:
        return read_header(self._folder / file)

    def open(self, file: str) -> AbstractContextManager[OpenTensors]:
        return TensorReader(self._folder / file)

    def sha256(self, file: str) -> str:
        if file not in self._hashes:
            self._hashes[file] = sha256_of(self._folder / file)
        return self._hashes[file][0]

    def check_unchanged(self) -> None:
        for file, (_, before) in self._hashes.items():
            path = self._folder / file
            if not path.is_file() or stamp(path) != before:
                raise CorruptCheckpointError(
                    f"{file} of {self.name} was changed while it was being read, so nothing is "
                    "made of it; run the same command again when nothing writes to it."
                )

    def missing_bytes(self, files: list[str]) -> int:
        return 0

    def close(self, file: str) -> None:
        pass

    def passing(self, folder: Path) -> LocalFiles:
        return self


@dataclass(frozen=True)
class Through:
    """Files that are others, seen in another way: for a subclass to say in which."""

    files: Files

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def commit(self) -> str | None:
        return self.files.commit

    @property
    def location(self) -> Location:
        return self.files.location

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.files.sizes

    @property
    def private(self) -> bool:
        return self.files.private

    @property
    def reading(self) -> str:
        return self.files.reading

    def path(self, file: str) -> Path:
        return self.files.path(file)

    def folder(self, files: list[str]) -> Path:
        return self.files.folder(files)

    def look(self, file: str, take: Callable[[BinaryIO], T]) -> T:
        return self.files.look(file, take)

    def header(self, file: str) -> Header:
        return self.files.header(file)

    def open(self, file: str) -> AbstractContextManager[OpenTensors]:
        return self.files.open(file)

    def sha256(self, file: str) -> str:
        return self.files.sha256(file)

    def check_unchanged(self) -> None:
        self.files.check_unchanged()

    def missing_bytes(self, files: list[str]) -> int:
        return self.files.missing_bytes(files)

    def close(self, file: str) -> None:
        self.files.close(file)

    def passing(self, folder: Path) -> Files:
        return replace(self, files=self.files.passing(folder))


def _check_links(folder: Path) -> None:
    """Raise UsageError if a file of `folder` is a link out of it.

    A snapshot in the Hub's cache, whose files are links to the blobs beside it, is whole.
    """
    root = folder.resolve()
    places = [root]
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            places.append(place.parent.with_name("blobs"))
    for path in folder.rglob("*"):
        if path.is_file() and not any(path.resolve().is_relative_to(p) for p in places):
            raise UsageError(
                f"{path.relative_to(folder)} of {folder.name} is a link to a file outside the "
                "folder; replace it by a copy of the file."
            )


def open_files(text: str) -> Files:
    """The files of the repo or folder that `text` names. Raises NotFoundError or AccessError."""
    location = parse_location(text)
    if location.folder is None:
        return HubFiles(location.repo, location.revision, below=location.below)
    return LocalFiles(location.folder)


def read_json(files: Files, name: str) -> dict[str, Any]:
    """The JSON object in file `name`. Raises NotFoundError or CorruptCheckpointError."""
    if name not in files.sizes:
        raise NotFoundError(
            f"{files.name} has no {name}; pass what save_pretrained writes, a whole checkpoint."
        )
    raw = files.path(name).read_bytes()
    if is_lfs_pointer(raw):
        raise CorruptCheckpointError(
            f"{name} of {files.name} is a Git LFS pointer and not the file; run git lfs pull."
        )
    if raw.startswith(MARKS):
        raise CorruptCheckpointError(
            f"{name} of {files.name} begins with a byte order mark, with which transformers cannot "
            "read it; save it in UTF-8 without one."
        )
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CorruptCheckpointError(
            f"{name} of {files.name} is not a JSON object; fetch or save it again."
        )
    return content


def check_name(name: str) -> None:
    """Raise UsageError for the name of a local file that is not UTF-8: no record could hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"The name {name} is not UTF-8; rename the file or folder.") from None


def is_lfs_pointer(content: bytes) -> bool:
    """Whether `content` stands for a large file that git has not fetched."""
    return content.startswith(b"version https://git-lfs.github.com/spec/")


def digest(content: Mapping[str, Any]) -> str:
    """A SHA-256 over `content`, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
