"""A local file is hashed once as long as it stays as it is, and one that changes is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.checkpoints import change
from support.pico import make_rows, write_rows

from sage_hub.checkpoint import hashes
from sage_hub.checkpoint.hashes import sha256_of
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.cli.main import main
from sage_hub.repair import write


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long enough ago, with a shelf of its own."""
    monkeypatch.setattr("sage_hub.runtime.shelf.shelf", lambda kind: tmp_path / kind)
    monkeypatch.setattr(hashes, "SETTLED", -1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"some numbers")
    return path


def test_it_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = sha256_of(file)
    monkeypatch.setattr(hashes, "file_sha256", lambda path: pytest.fail("was read again"))
    assert sha256_of(file)[0] == first == file_sha256(file)
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    with pytest.raises(pytest.fail.Exception, match="again"):
        sha256_of(copy)


@pytest.mark.parametrize("keeps_its_time", [False, True])
def test_other_bytes_are_noticed(file: Path, keeps_its_time: bool) -> None:
    """Whatever is done to hide them: no program can set the time of the last change."""
    first, seen = sha256_of(file)
    about = file.stat()
    while file.stat().st_ctime_ns == about.st_ctime_ns:  # the clock of files has ticks
        file.write_bytes(b"more numbers")
    if keeps_its_time:
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    second, now = sha256_of(file)
    assert (second, now) != (first, seen)
    assert second == file_sha256(file)


def test_what_was_only_just_written_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 10**12)
    sha256_of(file)
    assert not (file.parent / "hashes").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"found": 3}', "\x00"])
def test_a_shelf_that_cannot_be_read_is_no_hindrance(file: Path, content: str) -> None:
    first, _ = sha256_of(file)
    (kept,) = (file.parent / "hashes").iterdir()
    kept.write_text(content)
    assert sha256_of(file)[0] == first


@pytest.mark.parametrize("side", ["base", "unlearned"])
def test_a_source_that_changes_meanwhile_is_not_released(
    side: str,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    treat, done = write._treat, []

    def and_change(*args: object) -> object:
        if not done:
            done.append(change(pair / side, "model.norm.weight", lambda tensor: tensor + 1))
        return treat(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "_treat", and_change)
    rows = write_rows(tmp_path / "retain.jsonl", make_rows(5, seed=0))
    out = tmp_path / "out"
    command = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "-q"]
    assert main([*command, "--retain", str(rows), "--output", str(out)]) == 17
    assert "was changed while it was being read" in capsys.readouterr().err
    assert not out.exists()
