"""Folders of a run: one that is its alone while it works there, and one that goes with it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from sage_hub.errors import DiskSpaceError, TargetError


def alone_in(folder: Path, lock: str, busy: str) -> AbstractContextManager[object]:
    """Take the file `lock` of `folder`; it is let go at the end, and before when the run dies.

    Where the file system knows no locks, as some of a network do, a file that names this process
    stands for one. Raises TargetError, which says that the folder is `busy`, if another run has it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it falls back by itself in one case, as is done below
            taken = _taken(FileLock(folder / lock), busy)
    except (OSError, NotImplementedError) as error:
        if getattr(error, "filename", None) is not None:  # the file cannot be written
            raise
        held = folder / f"{lock}.held"
        taken = _taken(SoftFileLock(held), f"{busy} If none is on, remove {held}.")
    stack = ExitStack()
    stack.callback(_let_go, taken, folder)
    return stack


def _taken(lock: BaseFileLock, busy: str) -> BaseFileLock:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise TargetError(busy) from None
    return lock


def _let_go(lock: BaseFileLock, folder: Path) -> None:
    lock.release()
    with suppress(OSError):  # what is in it stays
        folder.rmdir()


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, on the disk that TMPDIR names. Raises DiskSpaceError if there is none."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="sage-hub-")
    except OSError as error:
        raise DiskSpaceError(
            f"No temporary folder can be made ({error.strerror}); set TMPDIR to one with room."
        ) from None
    with folder as name:
        yield Path(name)
