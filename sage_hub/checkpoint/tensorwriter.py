"""A safetensors file written front to back, some rows at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from sage_hub.checkpoint.tensorfile import TensorInfo, dtype_name, raw_bytes
from sage_hub.runtime.threads import Behind


class TensorWriter:
    """Write a safetensors file front to back; it gets its name only when it is whole.

    The same tensors give the same bytes: the header is ours, its order that of the data. The
    SHA-256 is taken while writing, so the file need not be read again for it. Hashing and writing
    go on in a thread of their own, a few blocks behind the caller.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.sha256 = ""
        self._partial = path.with_name(path.name + ".partial")
        self._todo = list(tensors.items())[::-1]
        self._written = 0  # bytes of the tensor that is due
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
        self._hash = hashlib.sha256()
        self._behind = Behind(self._put)

    def __enter__(self) -> TensorWriter:
        self._file = self._partial.open("wb", buffering=0)
        self._put(len(self._head).to_bytes(8, "little") + self._head)
        self._behind.start()
        return self

    def write(self, name: str, rows: Tensor) -> None:
        """Write the next tensor, or the next rows of it.

        Raises ValueError if they are not what the header names next. `rows` must not be changed
        afterwards.
        """
        self._skip_empty(unless=name)
        if not self._todo:
            raise ValueError(f"wrote {name!r} behind the last tensor of the header")
        due, info = self._todo[-1]
        self._written += rows.nbytes
        fits = rows.shape == info.shape or rows.shape[1:] == (info.columns,)
        if (name, dtype_name(rows.dtype), fits) != (due, info.dtype, True) or (
            self._written > info.nbytes
        ):
            raise ValueError(
                f"wrote {name!r} {tuple(rows.shape)} where the header has {due!r} {info}"
            )
        self._behind.put(raw_bytes(rows))
        if self._written == info.nbytes:
            self._todo.pop()
            self._written = 0

    def _skip_empty(self, unless: str = "") -> None:
        """Tensors without elements may be left out."""
        while self._todo and self._todo[-1][1].nbytes == 0 and self._todo[-1][0] != unless:
            self._todo.pop()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._skip_empty()
        try:
            self._behind.finish(wait=error is None)
            if error is None and self._todo:
                raise ValueError(f"{self.path.name}: {len(self._todo)} tensors were not written")
            if error is None:
                os.fsync(self._file.fileno())
                self._file.close()
                self._partial.replace(self.path)
                self.sha256 = self._hash.hexdigest()
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while view.nbytes:  # an unbuffered write may be short
            view = view[self._file.write(view) :]
