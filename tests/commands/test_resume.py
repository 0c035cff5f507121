"""Killed, out of disk, out of files: the same command goes on, to the same bytes."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.loopback_hub import LoopbackHub
from support.pico import make_pair, make_rows, write_rows
from support.power import lose_power, note_syncs
from support.processes import PROCESSES
from support.quick import hurry
from support.soak import Tally, seeds, within

import sage_hub
from sage_hub.checkpoint.location import Location
from sage_hub.checkpoint.pair import open_pair
from sage_hub.cli.main import main
from sage_hub.commands import push
from sage_hub.commands.job import Job
from sage_hub.commands.push import release
from sage_hub.commands.survey import check_weights, survey
from sage_hub.errors import NotFoundError
from sage_hub.evaluation.answers import beside
from sage_hub.evaluation.written import NAME
from sage_hub.publish.folder import Work, work_folder, working_on
from sage_hub.publish.verify import verify
from sage_hub.record import card
from sage_hub.record.manifest import MANIFEST
from sage_hub.runtime.progress import Clock
from sage_hub.runtime.run import Run

ON_DISK = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
CHANGING = {"README.md", "sage/report.json", "SHA256SUMS"}  # times, and the name of the folder
FIRST = 60  # operations on the disk, behind which a shard is finished
AT_MOST = 120  # seconds for a run on a busy machine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of many small shards, and few rows."""
    folder = tmp_path_factory.mktemp("many-shards")
    make_pair(folder, max_shard_size="4KB")
    write_rows(folder / "retain.jsonl", make_rows(8, seed=0))
    return folder


def arguments(source: Path, output: Path, *options: str) -> list[str]:
    words = ["sanitize", str(source / "base"), str(source / "unlearned"), "--output", str(output)]
    return [*words, "--retain", str(source / "retain.jsonl"), "--gain", "1", *options]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that hold times."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if name not in CHANGING}


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the run makes if nothing happens to it."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(arguments(source, output, "--quiet")) == 0
    return contents(output)


def run_until(words: list[str], folder: str, moment: int, counted: str) -> None:
    """Run the command, and be killed where it touches `folder` on disk for the moment-th time."""
    touched = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in ON_DISK and any(str(arg).startswith(folder) for arg in args[:2]):
            touched += 1
            if touched == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    hurry(setattr)
    note_syncs(Path(f"{counted}.synced"))
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    sys.addaudithook(watch)
    status = main(words)
    Path(counted).write_text(str(touched))
    sys.exit(status)


class Runs:
    """Runs of one command into one folder, in processes of their own."""

    def __init__(self, source: Path, place: Path) -> None:
        place.mkdir()
        self.place, self.output = place, place / "out"
        self.words = arguments(source, self.output)
        self.counted = place.parent / f"{place.name}.count"

    def run(self, *, moment: int = 0, seconds: float | None = None) -> int:
        """Run and be killed at an operation on the disk or after a time; the exit status."""
        process = PROCESSES.Process(
            target=run_until, args=(self.words, str(self.place), moment, str(self.counted))
        )
        process.start()
        if seconds is not None:
            process.join(seconds)
            process.kill()
        process.join(AT_MOST)
        assert process.exitcode is not None, "no end"
        return int(process.exitcode)

    def lose_power(self, chance: random.Random) -> int:
        """Drop what the runs have not synced."""
        return lose_power(self.place, Path(f"{self.counted}.synced"), chance)

    def finish(self) -> None:
        """Run in this process, to the end."""
        with within(AT_MOST):
            assert main([*self.words, "--quiet"]) == 0

    def half_done(self) -> bool:
        return any(work_folder(self.output).glob("shards/*.json"))

    def check_output(self, expected: dict[str, bytes]) -> None:
        """What is at the output is whole."""
        if self.output.exists():
            assert contents(self.output) == expected
            assert verify(str(self.output)).differences == ()


@pytest.fixture(scope="module")
def operations(source: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an undisturbed run touches the disk."""
    runs = Runs(source, tmp_path_factory.mktemp("count") / "place")
    assert runs.run() == 0
    return int(runs.counted.read_text())


@pytest.mark.parametrize("power", [True, False], ids=["power lost", "killed"])
@pytest.mark.parametrize("seed", seeds(4, 60))
def test_killed_at_any_operation_on_the_disk(
    seed: int,
    power: bool,
    source: Path,
    undisturbed: dict[str, bytes],
    operations: int,
    tmp_path: Path,
    tally: Tally,
) -> None:
    """In turn: while shards are made, at the last two operations, and before the first shard.

    With the power goes all that was not synced.
    """
    chance = random.Random(seed)
    amid, early = chance.randint(FIRST, operations - 20), chance.randint(1, FIRST)
    runs = Runs(source, tmp_path / "place")
    what = "sanitize: SIGKILL" + (", power lost" if power else "") + " at an operation on the disk"

    def look(status: int) -> None:
        if power:
            runs.lose_power(chance)
        runs.check_output(undisturbed)
        if status:
            assert status == -signal.SIGKILL
            tally.count("Kills", what, "finished by the next run")

    first = runs.run(moment=(amid, operations - 1, operations, early)[seed % 4])
    assert first == -signal.SIGKILL
    look(first)
    assert power or runs.half_done() or seed % 4
    second = runs.run(moment=chance.randint(1, operations))  # perhaps killed again, perhaps done
    look(second)
    if second:
        runs.finish()
    runs.check_output(undisturbed)
    assert runs.output.exists()
    assert set(runs.place.iterdir()) == {runs.output, beside(runs.output)}


def test_a_run_stopped_while_it_writes_the_card_writes_it_later(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both runs take the same time, and so report the same."""

    class Stopped(Clock):
        def lap(self, stage: str) -> None:
            self.laps[stage] = 0.0

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sage_hub.commands.push.Clock", Stopped)
    words = arguments(source, tmp_path / "out", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(card, "draw", stop)
        assert main(words) == 130
    assert main(words) == 0
    assert contents(tmp_path / "out") == undisturbed
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.usefixtures("operations")  # the server has started
@pytest.mark.parametrize("seed", seeds(1, 8))
def test_killed_at_any_time(
    seed: int, source: Path, undisturbed: dict[str, bytes], tmp_path: Path, tally: Tally
) -> None:
    chance = random.Random(seed)
    runs = Runs(source, tmp_path / "timed")
    begun = time.monotonic()
    assert runs.run() == 0
    whole = time.monotonic() - begun
    shutil.rmtree(runs.output)
    killed = 0
    for _ in range(3):
        status = runs.run(seconds=chance.uniform(0, whole))
        killed += status == -signal.SIGKILL
        runs.check_output(undisturbed)
        if status:
            tally.count("Kills", "sanitize: SIGKILL at any time", "finished by the next run")
        if runs.output.exists():
            shutil.rmtree(runs.output)
    assert killed
    runs.finish()
    runs.check_output(undisturbed)
    assert set(runs.place.iterdir()) == {runs.output, beside(runs.output)}


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k,mode=1777", "none", str(folder)]
    may = ["sudo", "-n"] if os.geteuid() and shutil.which("sudo") else []
    if subprocess.run([*may, *mount], capture_output=True).returncode:
        pytest.skip("a disk of its own takes the right to mount; the next test stands in")
    yield folder
    gc.collect()  # the frames of the error hold pages of the disk mapped, as long as they live
    subprocess.run([*may, "umount", str(folder)], check=True)


def job(source: Path, output: Path) -> Job:
    settings = sage_hub.Settings(retain=str(source / "retain.jsonl"), gain=1.0)
    pair = open_pair(str(source / "base"), str(source / "unlearned"))
    return check_weights(survey(pair, Location(output), settings))


def test_a_disk_that_fills_up_during_the_run(
    source: Path, undisturbed: dict[str, bytes], tmpfs: Path
) -> None:
    output, filler, half_done = tmpfs / "out", tmpfs / "filler", 0
    for free in range(20_000, 400_000, 16_000):
        # Somebody else's file comes when the disk has been checked already.
        prepared = job(source, output)
        filler.write_bytes(bytes(max(0, shutil.disk_usage(tmpfs).free - free)))
        with suppress(OSError):
            release(prepared)
        filler.unlink()
        if output.exists():
            break
        half_done += any(work_folder(output).glob("shards/*.json"))
    assert half_done
    assert contents(output) == undisturbed
    assert not work_folder(output).exists()


@pytest.mark.parametrize("seed", seeds(2, 56))
def test_a_disk_that_is_full_at_any_time(
    seed: int,
    source: Path,
    undisturbed: dict[str, bytes],
    tmpfs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tally: Tally,
) -> None:
    """Somebody else's file comes when the disk has been checked already."""
    free = random.Random(seed).randrange(2_000, 220_000)
    output, filler = tmpfs / "out", tmpfs / "filler"

    def release_late(prepared: Job) -> object:
        filler.write_bytes(bytes(max(0, shutil.disk_usage(tmpfs).free - free)))
        return release(prepared)

    with monkeypatch.context() as patch:
        patch.setattr(push, "release", release_late)
        with within(AT_MOST):
            status = main(arguments(source, output, "--quiet"))
        gc.collect()
    err = capsys.readouterr().err
    filler.unlink()
    if status == 0:
        assert contents(output) == undisturbed
    else:
        assert status == 21
        assert err.startswith("sage-hub: error: The disk is full; nothing was published.")
        assert err.count("\n") == 1
        assert not output.exists()
        with within(AT_MOST):
            assert main(arguments(source, output, "--quiet")) == 0
        assert contents(output) == undisturbed
    assert set(tmpfs.iterdir()) == {output, beside(output)}
    ending = "refused in one line, finished by the next run" if status else "just enough room"
    tally.count("Full disks", "sanitize", ending)


def test_a_write_that_fails_is_explained_and_what_is_finished_stays(
    source: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_index = push.write_index

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(push, "write_index", full)
    assert main(arguments(source, tmp_path / "out", "--quiet")) == 21
    assert "The disk is full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.setattr(push, "write_index", write_index)
    assert main(arguments(source, tmp_path / "out")) == 0
    shards = len(list((source / "unlearned").glob("*.safetensors")))
    assert f"{shards} of {shards} shards are done" in capsys.readouterr().err
    assert contents(tmp_path / "out") == undisturbed


def test_a_source_file_that_vanishes_in_the_middle(
    source: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(source, tmp_path / "copy")
    copy, output = tmp_path / "copy", tmp_path / "out"
    prepared = job(copy, output)
    last = max((copy / "unlearned").glob("*.safetensors"))
    last.rename(tmp_path / "away")
    with pytest.raises(NotFoundError, match=last.name):
        release(prepared)
    assert not output.exists()
    assert main(arguments(copy, output)) == 17  # still away: said, and what is finished stays
    assert last.name in capsys.readouterr().err
    (tmp_path / "away").rename(last)
    assert main(arguments(copy, output)) == 0
    assert "Going on after an earlier run" in capsys.readouterr().err
    assert contents(output) == undisturbed


def test_other_settings_start_anew(
    source: Path, operations: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(source, tmp_path / "place")
    runs.run(moment=operations - 20)
    assert runs.half_done()
    assert main([*runs.words, "--strength", "2"]) == 0
    assert "starts anew" in capsys.readouterr().err
    assert main(arguments(source, tmp_path / "out", "--strength", "2", "--quiet")) == 0
    assert contents(runs.output) == contents(tmp_path / "out")


def test_a_finished_shard_that_was_damaged_is_made_again(
    source: Path, undisturbed: dict[str, bytes], operations: int, tmp_path: Path
) -> None:
    runs = Runs(source, tmp_path / "place")
    runs.run(moment=operations - 20)
    done = sorted((work_folder(runs.output) / "release").glob("*.safetensors"))
    done[0].write_bytes(done[0].read_bytes()[:-1] + b"x")
    done[1].unlink()
    assert runs.run() == 0
    runs.check_output(undisturbed)


def test_the_second_of_two_runs_into_one_folder_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = job(source, tmp_path / "out")
    with working_on(Work(tmp_path / "out", prepared.fingerprint), force=False, run=Run()):
        assert main(arguments(source, tmp_path / "out", "--quiet")) == 23
    assert "Another run is writing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_output_is_recognized_and_a_damaged_one_made_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(arguments(source, output, "--json")) == 0
    first = json.loads(capsys.readouterr().out)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(arguments(source, output, "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == first
    assert "not made again" in err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    whole = contents(output)
    for damage in (b"", b"other"):
        (output / "tokenizer.json").write_bytes(damage)
        assert main(arguments(source, output, "--quiet")) == 0
        assert contents(output) == whole


def test_verify_names_each_file_that_differs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(arguments(source, output, "--quiet")) == 0
    capsys.readouterr()
    assert main(["verify", str(output)]) == 0
    out, err = capsys.readouterr()
    assert "is what its record says: 22 files" in out
    assert "not covered: SHA256SUMS" in out
    assert err == ""

    shards = sorted(output.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    shards[1].unlink()
    (output / "pytorch_model.bin").write_bytes(b"from somewhere")
    assert main(["verify", str(output), "--json"]) == 27
    out, err = capsys.readouterr()
    differences = json.loads(out)["differences"]
    assert [line.split()[0] for line in differences] == [
        shards[0].name,
        shards[1].name,
        "pytorch_model.bin",
    ]
    assert err == "sage-hub: error: out is not what its record says: 3 differences.\n"


def test_verify_refuses_what_is_no_release(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(source / "base")]) == 10
    assert "it was not made by sage-hub" in capsys.readouterr().err


def test_verify_reads_the_hashes_of_a_repo_without_its_weights(
    hub: LoopbackHub, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert main(arguments(source, output, "--quiet")) == 0
    hub.add_repo("org/release", output)
    found = verify("org/release")
    assert found.differences == ()
    assert len(found.checked) == 22
    fetched = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert fetched
    assert not [path for path in fetched if path.endswith(".safetensors")]


def test_rebuild_makes_the_same_bytes_or_says_which_differ(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert main(arguments(source, output, "--quiet", "--strength", "inf")) == 0
    assert main(["verify", str(output), "--rebuild"]) == 10
    assert "was made from ./base, and the record" in capsys.readouterr().err
    monkeypatch.chdir(source)  # where the card's own command would be run
    assert main(["verify", str(output), "--rebuild"]) == 0
    other = tmp_path / "other"
    shutil.copytree(source, other)
    monkeypatch.chdir(other)
    (other / "retain.jsonl").write_text('{"text": "p1 a1 v1"}\n')
    capsys.readouterr()
    assert main(["verify", str(output), "--rebuild", "--json"]) == 27
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert "model-00002-of-00012.safetensors comes out as" in differences[0]


def test_a_rebuild_says_that_rows_the_base_wrote_may_be_others_here(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert main(arguments(source, output, "--quiet")) == 0
    manifest = json.loads((output / MANIFEST).read_text())
    manifest["statistics"]["data"]["retain"]["name"] = NAME
    (output / MANIFEST).write_text(json.dumps(manifest))
    (output / "SHA256SUMS").unlink()
    made = SimpleNamespace(manifest=manifest | {"files": {}})
    monkeypatch.setattr("sage_hub.commands.verify.sanitize", lambda *_, **__: made)
    monkeypatch.chdir(source)
    assert main(["verify", str(output), "--rebuild"]) == 27
    out, err = capsys.readouterr()
    assert "differs: the base wrote the rows itself, and may write others on another" in out
    assert err.startswith("The base wrote the rows itself")
