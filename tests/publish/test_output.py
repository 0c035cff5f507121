"""The output folder: whole or not there, and never in place of what isn't ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sage_hub.errors import DiskSpaceError, NetworkError, NonFiniteError, TargetError
from sage_hub.publish.folder import Work, check_disk, check_output, working_on
from sage_hub.record.manifest import MANIFEST
from sage_hub.repair.write import ShardRecord
from sage_hub.runtime.run import Run


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def make_release(folder: Path, word: str = "old") -> Path:
    (folder / MANIFEST).parent.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    (folder / "model.safetensors").write_text(word)
    return folder


@contextmanager
def working(output: Path, fingerprint: str = "1", *, force: bool = False) -> Iterator[Work]:
    work = Work(output.resolve(), fingerprint)
    with working_on(work, force=force, run=Run()):
        yield work


def release(output: Path, error: BaseException | None = None, *, force: bool = False) -> None:
    """Make a new release at `output`, and fail with `error` before the first part is finished."""
    with working(output, force=force) as work:
        (work.release / "model.safetensors").write_text("new")
        if error is not None:
            raise error
        (work.release / MANIFEST).parent.mkdir()
        (work.release / MANIFEST).write_text("{}")
        work.finish(force=force)


NEW = {"model.safetensors": "new", MANIFEST: "{}"}
OLD = {"model.safetensors": "old", MANIFEST: "{}"}


def test_the_folder_appears_whole_and_alone(tmp_path: Path) -> None:
    output = tmp_path / "some" / "where" / "out"
    with working(output) as work:
        assert work.folder.parent == output.parent  # on the same disk: a rename is enough
        (work.release / "half").write_text("done")
        assert not output.exists()
        work.finish(force=False)
    assert contents(tmp_path) == {"some/where/out/half": "done"}
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        release(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_the_release_before(force: bool, tmp_path: Path) -> None:
    output = make_release(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        release(output, KeyboardInterrupt(), force=force)
    assert contents(output) == OLD
    assert list(tmp_path.iterdir()) == [output]


def test_a_failure_of_the_last_step_puts_the_release_before_back(tmp_path: Path) -> None:
    output = make_release(tmp_path / "out")
    with working(output) as work:
        shutil.rmtree(work.release)  # so that it cannot be renamed
        with pytest.raises(FileNotFoundError):
            work.finish(force=False)
    assert contents(output) == OLD
    assert list(tmp_path.iterdir()) == [output]


def test_a_release_of_ours_is_replaced_as_a_whole(tmp_path: Path) -> None:
    output = make_release(tmp_path / "out")
    (output / "stale.safetensors").write_text("of two shards, one is left")
    release(output)
    assert contents(output) == NEW
    assert list(tmp_path.iterdir()) == [output]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    release(tmp_path / "out")
    assert contents(tmp_path / "out") == NEW


def test_a_relative_output_is_of_the_folder_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with working(Path("out")) as work:
        (work.release / "file").write_text("new")
        monkeypatch.chdir(tmp_path.parent)
        work.finish(force=False)
    assert contents(tmp_path) == {"out/file": "new"}


def begin(output: Path, error: BaseException) -> None:
    """Finish one shard of a release and fail."""
    with working(output) as work:
        (work.release / "a.safetensors").write_text("shard")
        made = ShardRecord("a.safetensors", sha256(b"shard").hexdigest(), ())
        work.keep("a.safetensors", {**asdict(made), "bytes": 5})
        raise error


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), NetworkError("down")])
def test_what_is_finished_stays_for_the_same_run_and_no_other(
    error: BaseException, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for fingerprint, found in [("1", True), ("2", False)]:
        with pytest.raises(type(error)):
            begin(output, error)
        assert not output.exists()
        with working(output, fingerprint) as work:
            assert (work.recall("a.safetensors") is not None) == found
        assert list(tmp_path.iterdir()) == []


def test_nothing_stays_where_the_same_run_would_fail_again(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        begin(tmp_path / "out", NonFiniteError("NaN"))
    assert list(tmp_path.iterdir()) == []


def test_a_release_that_was_moved_aside_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    output = make_release(tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()
    output.rename(tmp_path / ".out.partial" / "old")
    with pytest.raises(KeyboardInterrupt):
        release(output, KeyboardInterrupt())
    assert contents(tmp_path / "out") == OLD


def test_a_folder_that_is_not_ours_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(TargetError, match="not made by sage-hub"):
        release(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": "years"}


def test_force_replaces_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years")
    release(output, force=True)
    assert contents(tmp_path / "out") == NEW


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_refused(force: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(TargetError, match="is a file"):
        release(tmp_path / "out", force=force)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("spelling", ["base", "./base", "../{name}/base", "link"])
def test_a_source_is_refused_however_it_is_spelled(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_release(tmp_path / "base")
    (tmp_path / "link").symlink_to("base")
    output = Path(spelling.format(name=tmp_path.name))
    with pytest.raises(TargetError, match="one of the two sources"):
        check_output(output, [None, tmp_path / "base"], force=True)


def test_a_folder_that_holds_a_source_is_refused(tmp_path: Path) -> None:
    make_release(tmp_path)  # replacing it would delete the source below it
    source = make_release(tmp_path / "base")
    with pytest.raises(TargetError, match="source"):
        check_output(tmp_path, [source], force=True)


def test_hub_sources_are_in_nobodys_way(tmp_path: Path) -> None:
    check_output(tmp_path / "out", [None, None], force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("calibration, needed", [(5_000, 6_000), (100, 1_000 + 300)])
def test_the_disk_must_have_room_for_the_end_of_the_calibration_and_then_for_the_output(
    calibration: int, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: Any = SimpleNamespace(output_bytes=300, download_bytes=0)
    for free in (needed, needed - 1):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        enough = nullcontext() if free == needed else pytest.raises(DiskSpaceError)
        with enough:
            check_disk(plan, tmp_path / "out", statistics=1_000, calibration=calibration)
        monkeypatch.undo()
