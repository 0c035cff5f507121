"""The spectra that a calibration has finished, kept block by block until its file is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.checkpoint.tensorfile import DTYPES, dtype_name, raw_bytes
from sage_hub.errors import note_kept
from sage_hub.method.spectra import Spectrum
from sage_hub.runtime.places import alone_in

BLOCKS = "blocks.jsonl"


def journal_of(path: Path) -> Path:
    """The folder beside the statistics file `path` in which its journal is kept."""
    return path.with_name(f".{path.name}.partial")


def begun(path: Path) -> tuple[Any, Any]:
    """The day and the key of the calibration into `path` that was stopped; None without one."""
    try:
        with (journal_of(path) / BLOCKS).open("rb") as file:
            head = json.loads(file.readline())
        return head["day"], head["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


class Journal:
    """Spectra by name, block by block, in a folder that outlives a run that is stopped.

    One file holds the numbers, another a line of JSON for each finished block, which is written
    once the numbers are on the disk. What is not of a finished block, or was begun under another
    `key`, is dropped when it is opened; `day` is the date of its prompts, where they have one. A
    context manager; it raises TargetError if another run has the folder.
    """

    def __init__(self, folder: Path, key: str, day: str | None = None) -> None:
        self.folder = folder
        self.notes: list[dict[str, Any]] = []  # of each finished block, what was said of it
        self._head = _line({"key": key, "day": day})
        self._entries: dict[str, dict[str, Any]] = {}
        self._open_block: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._alone = alone_in(
            self.folder,
            "lock",
            f"Another run calibrates into {self.folder} at this moment; wait for it, or choose "
            "another output.",
        )
        self._data = (self.folder / "spectra").open("a+b")
        self._index = (self.folder / BLOCKS).open("a+b")
        self.keep(len(self._recalled()))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._data.close()
        self._index.close()
        if error is not None and self._entries:
            note_kept(error, "finished blocks of the calibration", self.folder)
        if not self._entries:  # a block without sites is soon run again
            self.remove()
        self._alone.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def keep(self, blocks: int) -> None:
        """Drop all but the first `blocks`."""
        lines = self._recalled()[:blocks]
        self._index.truncate(
            len(self._head) + sum(len(_line(line)) for line in lines) if lines else 0
        )
        if not lines:
            self._index.write(self._head)
            self._index.flush()
        self._data.truncate(lines[-1]["end"] if lines else 0)
        self._entries = {name: one for line in lines for name, one in line["entries"].items()}
        self.notes = [line["note"] for line in lines]

    def add(self, name: str, found: Spectrum, outputs: Mapping[str, float]) -> None:
        """Take in a spectrum of the block that is not finished yet, and the mean of ‖W x‖² of its
        maps by their names.
        """
        parts: dict[str, tuple[str, list[int], int]] = {}
        for part, tensor in (("basis", found.basis), ("values", found.values)):
            start = self._data.seek(0, os.SEEK_END)
            parts[part] = dtype_name(tensor.dtype), list(tensor.shape), start
            self._data.write(raw_bytes(tensor))
        about = {"trace": found.trace, "tokens": found.tokens, "missed": found.missed}
        self._open_block[name] = {**about, "outputs": dict(outputs), "parts": parts}

    def finish_block(self, note: Mapping[str, Any]) -> None:
        """From here on the spectra that were added outlive the run, with a `note`."""
        self._data.flush()
        os.fsync(self._data.fileno())
        end = self._data.seek(0, os.SEEK_END)
        self._index.write(_line({"entries": self._open_block, "end": end, "note": note}))
        self._index.flush()
        os.fsync(self._index.fileno())
        self._entries |= self._open_block
        self._open_block = {}
        self.notes.append(dict(note))

    def scalars(self, name: str) -> dict[str, Any]:
        """Trace, tokens, what was missed, and outputs, of a spectrum."""
        return {key: value for key, value in self._entries[name].items() if key != "parts"}

    def empty(self, name: str, part: str) -> Tensor:
        """The "basis" or the "values" of a spectrum, without its numbers."""
        dtype, shape, _ = self._entries[name]["parts"][part]
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta")

    def read(self, name: str, part: str) -> Tensor:
        """The "basis" or the "values" of a spectrum."""
        tensor = torch.empty_like(self.empty(name, part), device="cpu")
        self._data.seek(self._entries[name]["parts"][part][2])
        self._data.readinto(raw_bytes(tensor))
        return tensor

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.notes = []

    def _recalled(self) -> list[dict[str, Any]]:
        """The lines of the finished blocks that were made under this key and are whole."""
        size = self._data.seek(0, os.SEEK_END)
        self._index.seek(0)
        lines = self._index.read().split(b"\n")[:-1]
        found: list[dict[str, Any]] = []
        if not lines or lines[0] != self._head.strip():
            return found
        for line in lines[1:]:
            try:
                block = json.loads(line)
                whole = _is_whole(block, size)
            except (
                LookupError,
                TypeError,
                ValueError,
                AttributeError,
                RuntimeError,
                OverflowError,
            ):
                whole = False
            if not whole:
                break
            found.append(block)
        return found


def _is_whole(block: Mapping[str, Any], size: int) -> bool:
    """Whether all that a line names lies in the first `size` bytes of the numbers."""
    ends = [block["end"]]
    for entry in block["entries"].values():
        numbers = [*entry["outputs"].values(), entry["trace"], entry["tokens"]]
        if not all(isinstance(one, (int, float)) for one in numbers) or "missed" not in entry:
            return False
        for dtype, shape, start in (entry["parts"][part] for part in ("basis", "values")):
            ends.append(start)
            ends.append(start + torch.empty(shape, dtype=DTYPES[dtype], device="meta").nbytes)
    lists = all(isinstance(one, list) for one in block["note"].values())
    return lists and all(type(end) is int and 0 <= end <= size for end in ends)


def _line(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about).encode() + b"\n"
