"""Disks of other kinds: without locks or links, full, and with a clock that goes back."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.loopback_hub import LoopbackHub
from support.pico import make_rows, write_rows

from sage_hub.cli.main import main
from sage_hub.errors import TargetError
from sage_hub.publish.folder import work_folder
from sage_hub.runtime import shelf
from sage_hub.runtime.places import alone_in

LOCKLESS = ["ENOSYS", "ENOLCK", "ENOTSUP", "EPERM", "EINVAL"]


def failing(code: str) -> Callable[..., Any]:
    """A call of the system that this kind of disk does not know."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    return fail


@pytest.fixture
def here(pair: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(pair / "retain.jsonl", make_rows(8, seed=0))
    monkeypatch.chdir(pair)
    return pair


def words(output: str = "out", *more: str) -> list[str]:
    both = ["sanitize", "base", "unlearned", "--output", output, "--gain", "1", "-q"]
    return [*both, "--retain", "retain.jsonl", *more]


# Locks


@pytest.mark.parametrize("code", LOCKLESS)
def test_one_run_at_a_time_where_the_system_knows_no_locks(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    folder = tmp_path / "work"
    for _ in range(2):
        folder.mkdir()
        with (
            alone_in(folder, "lock", "It is busy."),
            pytest.raises(TargetError, match=r"^It is busy\."),
        ):
            alone_in(folder, "lock", "It is busy.")
        (folder / "lock").unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()


HOLD = """
import errno, fcntl, os, pathlib, signal, sys
from sage_hub.runtime.places import alone_in

def fail(*_):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = fail
with alone_in(pathlib.Path(sys.argv[1]), "lock", "It is busy."):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_killed_holds_no_folder_there_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "lock.held").exists()
    monkeypatch.setattr(fcntl, "flock", failing("ENOLCK"))
    with alone_in(tmp_path, "lock", "It is busy."):
        pass
    (tmp_path / "lock.held").write_text("1\nanother-machine\n")  # of which nobody knows
    with pytest.raises(TargetError, match=r"If none is on, remove .*lock\.held\."):
        alone_in(tmp_path, "lock", "It is busy.")


def test_a_lock_file_that_cannot_be_written_is_no_matter_of_locks(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(OSError, match="lock"):
        alone_in(tmp_path, "lock", "It is busy.")


@pytest.mark.parametrize("code", ["ENOSYS", "ENOTSUP"])
def test_a_run_on_a_disk_without_locks_and_links(
    code: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on where it was stopped, leaves nothing behind, and makes the same."""
    assert main(words("expected")) == 0
    monkeypatch.setattr(fcntl, "flock", failing(code))
    for name in ("link", "symlink"):
        monkeypatch.setattr(os, name, failing("EPERM"))
    before = {path.name for path in here.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("sage_hub.commands.push.open_as_user", failing("ENOSPC"))
        assert main(words("out", "--stats-cache", "cache")) == 21
    assert work_folder(here / "out").is_dir()
    assert main(words("out", "--stats-cache", "cache")) == 0
    assert {p.name for p in here.iterdir()} - before == {"out", "out.answers.jsonl", "cache"}
    for file in (here / "expected").glob("*.safetensors"):
        assert (here / "out" / file.name).read_bytes() == file.read_bytes()
    assert len([*(here / "cache").iterdir()]) == 1
    assert "warn" not in capsys.readouterr().err.lower()


def test_the_hub_s_client_without_locks_is_told_of(
    on_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing("ENOLCK"))
    assert main(["sanitize", "org/base", "org/unlearned", "--output", "out", "--dry-run"]) == 2
    assert "set HF_HOME to a folder of a disk of this machine." in capsys.readouterr().err


# Links


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP", "EXDEV", "EMLINK"])
def test_the_first_of_two_is_agreed_on_without_links(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that goes on might compute in another type, and so begin anew."""
    monkeypatch.setattr(os, "link", failing(code))
    assert shelf.agree("kind", "key", "first") == "first"
    assert shelf.agree("kind", "key", "second") == "first"
    assert [path.name for path in shelf.shelf("kind").iterdir()] == ["key.json"]


# A clock that goes back


def test_a_clock_that_goes_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, steps = time.time(), itertools.count()
    monkeypatch.setattr(time, "time", lambda: begun - 60 * next(steps))
    monkeypatch.setattr(time, "time_ns", lambda: int((begun - 60 * next(steps)) * 1e9))
    assert main(words("one")) == 0
    old = begun - 10 * 365 * 86_400
    for path in (here / "base").iterdir():  # as if written after the clock was put back
        os.utime(path, (old, old))
    assert main(words("two")) == 0
    assert main(["verify", "one", "--rebuild", "-q"]) == 0
    for file in (here / "one").glob("*.safetensors"):
        assert (here / "two" / file.name).read_bytes() == file.read_bytes()


# TMPDIR


@pytest.mark.parametrize(
    "command",
    [
        ["audit", "base", "unlearned", "--retain", "retain.jsonl"],
        ["eval", "base", "--heldout", "heldout.jsonl"],
        ["stats", "base", "--retain", "retain.jsonl", "--output", "base.safetensors"],
        ["verify", "made", "--rebuild"],
    ],
    ids=lambda words: words[0],
)
def test_no_room_for_a_temporary_folder(
    command: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command[0] != "verify" or main(words("made")) == 0
    monkeypatch.setattr(tempfile, "mkdtemp", failing("ENOSPC"))
    assert main([*command, "-q"]) == 21
    assert "No temporary folder can be made (No space left on device); set TMPDIR" in (
        capsys.readouterr().err
    )


def test_a_rebuild_that_does_not_fit_is_refused_before_it_begins(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder that it is made in is of TMPDIR's disk."""
    assert main(words("made")) == 0
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr("sage_hub.publish.folder.shutil.disk_usage", lambda _: free)
    assert main(["verify", "made", "--rebuild", "-q"]) == 21
    assert "HF_HOME or TMPDIR to a larger disk" in capsys.readouterr().err
