"""Hidden states that wait between two blocks: in memory up to a limit, the others in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.checkpoint.tensorfile import raw_bytes


class Spill:
    """Tensors by key, of which `limit` bytes stay in memory; a context manager.

    The file lies in `folder`, has no name there, and goes with the last handle to it.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self._folder = folder
        self._left = limit
        self._kept: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, tuple[int, torch.dtype, torch.Size]] = {}
        self._end = 0

    def __enter__(self) -> Spill:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._kept.clear()

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep `tensor` under `key`, instead of an earlier one of the same size and type."""
        tensor = tensor.cpu()
        if key not in self._kept and key not in self._places:
            if tensor.nbytes <= self._left:
                self._left -= tensor.nbytes
            else:
                self._places[key] = self._end, tensor.dtype, tensor.shape
                self._end += tensor.nbytes
        if key not in self._places:
            self._kept[key] = tensor
            return
        self._file.seek(self._places[key][0])
        view = raw_bytes(tensor)
        while view.nbytes:  # an unbuffered write may be short
            view = view[self._file.write(view) :]

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor under `key`, None if there is none."""
        if key not in self._places:
            return self._kept.get(key)
        start, dtype, shape = self._places[key]
        tensor = torch.empty(shape, dtype=dtype)
        view = raw_bytes(tensor)
        self._file.seek(start)
        while view.nbytes:
            view = view[self._file.readinto(view) :]
        return tensor
