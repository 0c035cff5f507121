"""What is written is whole or not there, whenever a run ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sage_hub.runtime.disk import sync, write_whole


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "report.json"
    write_whole(path, "before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, "after")
    assert path.read_text() == "after"


def test_what_a_killed_run_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".card.partial").write_text("half")
    write_whole(tmp_path / "card", "é", mode=0o600)
    assert (tmp_path / "card").read_bytes() == "é".encode()
    assert (tmp_path / "card").stat().st_mode & 0o077 == 0


def test_every_file_of_a_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    (tmp_path / "empty").touch()
    sync(tmp_path)
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))} <= synced
