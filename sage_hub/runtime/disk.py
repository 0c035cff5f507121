"""Files that a kill or a power cut leaves as they were, or whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """Write `text` to `path`: who looks sees what was there before, or all of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    made = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(made, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(made)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the file, or all that is in the folder, on the disk before anything else happens."""
    for part in (*path.rglob("*"), path):
        if part.is_file():
            with part.open("r+b") as file:
                os.fsync(file.fileno())
        else:
            _sync_names(part)


def _sync_names(folder: Path) -> None:
    with suppress(OSError):  # not every system can open a folder
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
