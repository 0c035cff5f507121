"""A network and a Hub that fail: the target is as it was, or complete, and a second run finishes.

Each fault strikes a request that an undisturbed run makes, chosen by chance: first the phase of the
run, then the request. There are two of each kind, and in the soak more, and pairs of them.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from huggingface_hub.utils._http import default_client_factory
from support.loopback_hub import TOKENS, LoopbackHub, Request
from support.pico import make_rows
from support.processes import PROCESSES, run_hurried
from support.soak import SECRET, Tally, soak, within

from sage_hub.cli.main import main
from sage_hub.hub import client as asking

SEEDS = pytest.mark.parametrize("seeds", [range(2), soak(range(2, 24))], ids=["few", "more"])
KILLS = pytest.mark.parametrize("seeds", [range(2), soak(range(2, 27))], ids=["few", "more"])
TARGET = "org/target"
CHANGING = {"README.md", "sage/report.json", "SHA256SUMS", ".gitattributes"}  # their times
FOREVER = 1_000_000
LOW_DISK = "--low-disk"
FINISHED = "finished by the next run"
AT_MOST = 120  # seconds for a run of one or two on a busy machine, with all that it tries again


PAIR = [
    "org/base",
    "org/unlearned",
    "--retain",
    "hf://datasets/org/facts",
    "--gain",
    "1",
    "--quiet",
]
PUSH = ["push", *PAIR, "--to", TARGET, "--yes"]


@dataclass
class World:
    """A Hub with two sources, a proxy and perhaps an older release, and one command."""

    hub: LoopbackHub
    repos: Mapping[tuple[str, str], Any]  # repo and kind -> its files
    older: Mapping[str, bytes]
    command: list[str]
    whole: Mapping[str, bytes] = field(default_factory=dict)  # what comes out undisturbed
    requests: list[Request] = field(default_factory=list)  # that an undisturbed run makes

    def look(self) -> None:
        """See what an undisturbed run does."""
        self.begin(with_older=True)
        self.hub.requests.clear()
        assert self.run() == 0
        self.requests = list(self.hub.requests)
        self.whole = lasting(self.found())

    def found(self) -> dict[str, bytes]:
        """What is at the target."""
        return self.hub.files(TARGET)

    def begin(self, *, with_older: bool) -> str | None:
        """Start over; the head of the target, if it is there."""
        for folder in (HF_HUB_CACHE, f"{HF_HOME}/sage-hub"):
            shutil.rmtree(folder, ignore_errors=True)
        self.hub.reset()
        for (name, kind), files in self.repos.items():
            self.hub.add_repo(name, files, kind)
        return self.hub.add_repo(TARGET, self.older) if with_older else None

    def run(self) -> int:
        return main(self.command)

    @property
    def there(self) -> bool:
        return ("model", TARGET) in self.hub.repos

    def head(self) -> str | None:
        return self.hub.commits(TARGET)[-1].sha if self.there else None

    def is_complete(self, *, beside: Mapping[str, bytes] = {}) -> bool:
        """Whether the target is the release, byte for byte, and what was there `beside` it."""
        if not self.there:
            return False
        found = self.found()
        if any(found.pop(name, None) != data for name, data in beside.items()):
            return False
        return lasting(found) == self.whole and found.keys() >= CHANGING

    def is_untouched(self, head: str | None) -> bool:
        """Whether the target is as it was: not there, empty, or at that head."""
        if head is None:
            return not self.there or set(self.hub.files(TARGET)) == {".gitattributes"}
        return self.head() == head


class Pull(World):
    """The same into a folder of this machine."""

    @property
    def output(self) -> Path:
        return Path(self.command[self.command.index("--output") + 1])

    def begin(self, *, with_older: bool) -> str | None:
        super().begin(with_older=False)
        shutil.rmtree(self.output, ignore_errors=True)
        return None

    def found(self) -> dict[str, bytes]:
        files = (path for path in self.output.rglob("*") if path.is_file())
        return {path.relative_to(self.output).as_posix(): path.read_bytes() for path in files}

    @property
    def there(self) -> bool:
        return self.output.exists()

    def is_complete(self, *, beside: Mapping[str, bytes] = {}) -> bool:
        return lasting(self.found()) == self.whole

    def is_untouched(self, head: str | None) -> bool:
        return not self.there


def lasting(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in CHANGING}


@pytest.fixture(scope="module")
def prepared(
    _pair: Path, _the_hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("faults")
    statistics = str(folder / "statistics.safetensors")
    retain = ["--retain", str(_pair / "retain.jsonl"), "--quiet"]
    assert main(["stats", str(_pair / "base"), *retain, "--output", statistics]) == 0
    # Nothing is calibrated or evaluated, to save time; `evaluated` does both.
    command = [*PUSH, "--stats", statistics, LOW_DISK]
    world = World(_the_hub, sources(_pair), {}, command)
    world.begin(with_older=False)
    assert main([*command, "--strength", "3"]) == 0
    world.older = {n: d for n, d in _the_hub.files(TARGET).items() if n != ".gitattributes"}
    world.look()
    yield world
    _the_hub.reset()


def sources(pair: Path) -> Mapping[tuple[str, str], Any]:
    rows = [json.dumps(row) for row in make_rows(4, 7)]
    return {
        ("org/base", "model"): pair / "base",
        ("org/unlearned", "model"): pair / "unlearned",
        ("org/facts", "dataset"): {"train.jsonl": "\n".join(rows).encode()},
    }


@pytest.fixture(scope="module")
def evaluated(_pair: Path, prepared: World) -> World:
    """The same with calibration, evaluation and a card that has something to say."""
    sets = ["--heldout", str(_pair / "heldout.jsonl"), "--generate-rows", "0"]
    world = World(prepared.hub, prepared.repos, prepared.older, [*PUSH, *sets])
    world.look()
    return world


@pytest.fixture(scope="module")
def pulled(prepared: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Both sources and the rows are fetched, and nothing is sent."""
    output = ["--output", str(tmp_path_factory.mktemp("pulled") / "out")]
    world = Pull(prepared.hub, prepared.repos, {}, ["sanitize", *PAIR, *output])
    world.look()
    return world


@pytest.fixture
def world(prepared: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(asking, "SILENCE", 0.25)
    monkeypatch.setattr(prepared.hub, "hangs_for", 0.5)
    yield prepared
    prepared.begin(with_older=False)
    set_client_factory(default_client_factory)


def aim(world: World, chance: random.Random, fits: Callable[[Request], bool]) -> dict[str, Any]:
    """One of the requests: its method, its path, and how many of the same come before it."""
    phases: dict[str, list[int]] = {}
    for number, request in enumerate(world.requests):
        if fits(request):
            phases.setdefault(phase_of(request), []).append(number)
    number = chance.choice(phases[chance.choice(sorted(phases))])
    struck = world.requests[number]
    before = [(r.method, r.path) for r in world.requests[:number]]
    path = f"^{re.escape(struck.path)}$"
    skip = before.count((struck.method, struck.path))
    phase = phase_of(struck)
    return {"method": struck.method, "path_regex": path, "skip": skip, "phase": phase}


SENDING = ("/preupload/main", "/objects/batch", "/info/lfs/verify")


def phase_of(request: Request) -> str:
    """What a run is at when it makes this request."""
    path = request.path.partition("?")[0]
    if "/commit/" in path:
        return "the commit"
    if request.method == "PUT" or path.endswith(SENDING):
        return "the upload"
    if "whoami" in path or "repos/create" in path or TARGET in path:
        return "a look at the target"
    if request.storage or path.endswith(".safetensors") or "/datasets/" in path:
        return "a download"
    return "the plan"


def any_request(request: Request) -> bool:
    return True


def with_a_body(request: Request) -> bool:
    return request.method in ("GET", "PUT", "POST") and request.status in (200, 206)


def of_a_file(request: Request) -> bool:
    """The bytes of a file, not a range of them, which serves to read a header."""
    place = request.storage or "/resolve/" in request.path
    return place and request.method == "GET" and request.status == 200


def that_changes_something(request: Request) -> bool:
    return request.method in ("PUT", "POST")


ONCE = {
    # What happens, to which requests, and the exit statuses that are right.
    "cut": ("cut", with_a_body, {0}),
    "hang": ("hang", any_request, {0}),
    "lost": ("lost", that_changes_something, {0}),
    "short": ("short", of_a_file, {0}),
    "wrong": ("wrong", of_a_file, {0}),
    "429": (429, any_request, {0}),
    "500": (500, any_request, {0}),
    "503": (503, any_request, {0}),
    # Not all that is asked for is needed.
    "403": (403, any_request, {0, 11}),
    # What is not there need not be: the target is created then, and sources are missed.
    "404": (404, any_request, {0, 10, 11, 25}),
}
FOR_LONG = {
    "no answers any more": ("hang", any_request, {0, 25}),
    "errors from now on": (503, any_request, {0, 25}),
    "wrong bytes from now on": ("wrong", of_a_file, {17}),
    "short bytes from now on": ("short", of_a_file, {25}),
}


@SEEDS
@pytest.mark.parametrize("kind", [*ONCE, *FOR_LONG])
def test_a_fault(
    kind: str, seeds: range, world: World, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in tally.each(seeds):
        try_faults("push", [kind], world, tally, capsys)
    assert_struck(tally, seeds)


@pytest.mark.parametrize("seeds", [range(2), soak(range(2, 150))], ids=["few", "more"])
def test_two_faults(
    seeds: range, world: World, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in tally.each(seeds):
        kinds = random.Random(seed).sample([*ONCE, *FOR_LONG], 2)
        try_faults("push, two faults", kinds, world, tally, capsys)


@pytest.mark.parametrize("seeds", [range(2), soak(range(2, 62))], ids=["few", "more"])
@pytest.mark.parametrize("which", ["evaluated", "pulled"])
@pytest.mark.usefixtures("world")
def test_a_fault_of_another_run(
    which: str,
    seeds: range,
    request: pytest.FixtureRequest,
    tally: Tally,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With calibration and evaluation; or into a folder."""
    other: World = request.getfixturevalue(which)
    said = {"evaluated": "push, calibrated and evaluated", "pulled": "pull into a folder"}[which]
    kinds = [*ONCE, *FOR_LONG]
    fitting = [kind for kind in kinds if any(map({**ONCE, **FOR_LONG}[kind][1], other.requests))]
    for seed in tally.each(seeds):
        try_faults(said, [fitting[seed % len(fitting)]], other, tally, capsys)


def try_faults(
    command: str, kinds: list[str], world: World, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    """The case of the tally's seed: faults of these kinds, and what must hold."""
    chance = random.Random(f"{command} {kinds} {tally.seed}")
    head = world.begin(with_older=chance.random() < 0.5)
    right: set[int] = set()
    said = []
    for kind in kinds:
        what, fits, statuses = {**ONCE, **FOR_LONG}[kind]
        where = aim(world, chance, fits)
        phase = where.pop("phase")
        where["times"] = FOREVER if kind in FOR_LONG else 1
        if isinstance(what, int):
            world.hub.fail(status=what, **where)
        else:
            world.hub.disturb(what=what, **where)
        right |= statuses
        said.append(f"{kind} at {phase} {where}")
        tally.count("Hub faults, by phase", phase, "aimed at")
    kind = " and ".join(kinds) if len(kinds) == 1 else "pairs of kinds"
    check(world, head, right, f"{command}, seed {tally.seed}: {said}", kind, tally, capsys, command)


def check(
    world: World,
    head: str | None,
    right: set[int],
    case: str,
    kind: str,
    tally: Tally,
    capsys: pytest.CaptureFixture[str],
    command: str = "push",
) -> None:
    """Run, look at the target, and run again when all is well."""
    capsys.readouterr()
    with within(AT_MOST):
        status = world.run()
    out, err = capsys.readouterr()
    struck = world.hub.struck
    case = f"{case}: status {status}, {err}"
    assert status in (right if struck else {0}), case
    assert not SECRET.search(out + err), case
    if status == 0:
        assert world.is_complete(), case
        assert err == "", case
    else:
        assert out == "", case
        assert err.startswith("sage-hub: error: "), case
        assert err.count("\n") == 1, case
        assert "Internal error" not in err, case
        assert world.is_untouched(head), case
    world.hub.calm()
    if status != 0:
        with within(AT_MOST):
            assert world.run() == 0, case
        assert world.is_complete(), case
        assert capsys.readouterr().err == ""
    ending = "finished" if status == 0 else "refused, target untouched, finished by the next run"
    tally.count("Hub faults", f"{command}: {kind}", ending if struck else "not reached")
    assert not Path(HF_HOME, "sage-hub", "org--target").exists(), case
    for path in Path(HF_HOME).rglob("*"):
        assert not path.is_file() or not SECRET.search(path.read_bytes().decode("latin-1")), path
    for name, data in world.found().items():
        assert not SECRET.search(data.decode("latin-1")), name


def assert_struck(tally: Tally, seeds: range) -> None:
    """Few of the faults may miss, as where an earlier one has changed the requests."""
    missed = sum(n for (_, _, ending), n in tally.ended.items() if ending == "not reached")
    assert missed <= len(seeds) / 2


@SEEDS
def test_a_source_that_moves_during_the_run(
    seeds: range, world: World, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = max(n for n, r in enumerate(world.requests) if "/api/models/org/unlearned" in r.path)
    later = world.requests[opened + 1 :]
    for seed in tally.each(seeds):
        chance = random.Random(seed)
        head = world.begin(with_older=seed % 2 == 0)
        side = chance.choice(["org/base", "org/unlearned"])
        where = aim(world, chance, lambda request: request in later)
        del where["phase"]

        def move(side: str = side) -> None:
            files = {n: b"other" for n in world.hub.files(side) if n.endswith("safetensors")}
            world.hub.add_commit(side, files)

        world.hub.disturb(what=move, **where)
        check(world, head, {0}, f"seed {seed}", "a source moves", tally, capsys)
    assert_struck(tally, seeds)


@SEEDS
def test_a_target_that_moves_during_the_run(
    seeds: range, world: World, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    looked = max(n for n, r in enumerate(world.requests) if r.path.endswith("/refs"))
    later = world.requests[looked + 1 :]
    for seed in tally.each(seeds):
        chance = random.Random(seed)
        world.begin(with_older=True)
        where = aim(world, chance, lambda request: request in later)
        del where["phase"]
        moved: list[str] = []
        theirs = {"notes.txt": b"somebody's"}

        def move(moved: list[str] = moved, theirs: dict[str, bytes] = theirs) -> None:
            moved.append(world.hub.add_commit(TARGET, theirs))

        world.hub.disturb(what=move, **where)
        assert world.run() == 24
        assert "changed while the release was made" in capsys.readouterr().err
        assert world.head() == moved[0]
        assert world.run() == 0
        assert world.is_complete(beside=theirs)
        ending = "refused, target untouched, finished by the next run"
        tally.count("Hub faults", "push: the target moves", ending)


def test_a_damaged_file_in_the_cache_is_fetched_again(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.begin(with_older=False)
    assert world.run() == 0
    for blob in Path(HF_HUB_CACHE).rglob("blobs/*"):
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    del world.hub.repos["model", TARGET]
    assert world.run() == 0
    assert world.is_complete()


class TestStopped:
    """A push that is stopped in the middle goes on where it stopped."""

    @SEEDS
    @pytest.mark.usefixtures("ctrl_c")
    def test_by_ctrl_c(
        self, seeds: range, world: World, tally: Tally, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for seed in tally.each(seeds):
            chance = random.Random(seed)
            head = world.begin(with_older=seed % 2 == 0)
            where = aim(world, chance, that_changes_something)
            del where["phase"]
            world.hub.disturb(what=lambda: os.kill(os.getpid(), signal.SIGINT), **where)
            status = main([word for word in world.command if word != "--quiet"])
            err = capsys.readouterr().err
            assert status == 130
            assert err.endswith("Interrupted; the same command goes on where this one stopped.\n")
            assert "the same command goes on there" in err
            assert world.is_untouched(head) or world.is_complete()
            self.finish(world, world.command)
            tally.count("Kills", "push: Ctrl-C at a request", FINISHED)

    @pytest.mark.usefixtures("ctrl_c")
    def test_ctrl_c_does_not_wait_for_an_upload(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world.begin(with_older=False)
        monkeypatch.setattr(world.hub, "hangs_for", 60.0)
        world.hub.disturb("PUT", "/lfs/", "hang")
        command = [sys.executable, "-m", "sage_hub", *world.command]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 120
            while not world.hub.struck and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            _, err = process.communicate(timeout=50)
        assert process.returncode == 130
        assert "the same command goes on where this one stopped" in err
        assert time.monotonic() - begun < 30
        self.finish(world, world.command)

    @KILLS
    @pytest.mark.parametrize("dropped", ["", LOW_DISK], ids=["low disk", "kept"])
    def test_by_kill(self, dropped: str, seeds: range, world: World, tally: Tally) -> None:
        command = [word for word in world.command if word != dropped]
        for seed in tally.each(seeds):
            chance = random.Random(seed)
            head = world.begin(with_older=seed % 2 == 0)
            where = aim(world, chance, that_changes_something)
            del where["phase"]
            process = PROCESSES.Process(target=run_hurried, args=(command,))
            world.hub.disturb(what=lambda process=process: process.kill(), **where)
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert world.is_untouched(head) or self.is_whole(world, command)
            self.finish(world, command)
            how = "push: SIGKILL at a request" + (", all kept" if dropped else ", low disk")
            tally.count("Kills", how, FINISHED)

    def is_whole(self, world: World, command: Sequence[str]) -> bool:
        """Whether the target is what `command` makes, which may be another than the world's."""
        if command == world.command:
            return world.is_complete()
        world.hub.calm()
        return main(["verify", f"{TARGET}@{world.head()}", "--quiet"]) == 0

    def finish(self, world: World, command: Sequence[str]) -> None:
        world.hub.calm()
        assert main(command) == 0
        assert LOW_DISK not in command or world.is_complete()
        commit = world.hub.commits(TARGET)[-1].sha
        assert main(["verify", f"{TARGET}@{commit}", "--quiet"]) == 0
        puts = Counter(r.path for r in world.hub.requests if r.method == "PUT")
        # The one that was under way when the end came may go twice.
        assert sum(puts.values()) - len(puts) <= 1


def test_no_token_is_written_shown_or_sent_elsewhere(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secrets = {"hf_readingsecret": TOKENS["hf_reader"], "hf_writingsecret": TOKENS["hf_writer"]}
    monkeypatch.setattr(world.hub, "tokens", {**world.hub.tokens, **secrets})
    monkeypatch.setenv("HF_TOKEN", "hf_readingsecret")
    monkeypatch.setenv("SAGE_HUB_DEBUG", "1")
    noisy = [word for word in world.command if word not in ("--quiet", LOW_DISK)]
    shown = ""
    for number, options in enumerate([[], [LOW_DISK], [LOW_DISK, "--create-pr", "--json"]]):
        world.begin(with_older=number == 1)
        monkeypatch.setenv("SAGE_HUB_WRITE_TOKEN", "hf_writingsecret" if number else "")
        argument = [] if number else ["--token", "hf_writingsecret"]
        for fault in [("POST", "/commit/", 403), ("PUT", "/lfs/", 503), ("GET", "/org/", 500)]:
            world.hub.fail(*fault)
        world.hub.disturb("GET", "/resolve/", "wrong")
        assert main([*noisy, *argument, *options, "--verbose"]) == 11
        work = [path for path in Path(HF_HOME).rglob("*") if path.is_file()]
        assert work
        assert main([*noisy, *argument, *options, "--verbose"]) == 0
        shown += "".join(capsys.readouterr())
        places = [Path(HF_HOME), tmp_path, Path.cwd()]
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        written = [path.read_bytes() for path in {*work, *files} if path.is_file()]
        written += world.hub.files(TARGET).values()
        written += [commit.message.encode() for commit in world.hub.commits(TARGET)]
        for secret in secrets:
            assert not [data for data in written if secret.encode() in data]
            assert secret not in shown
            sent = [r for r in world.hub.requests if secret in f"{r.path} {r.headers}"]
            assert sent
            assert not [r for r in sent if r.storage]
            assert {r.headers["authorization"] for r in sent} == {f"Bearer {secret}"}
    assert "trying again" in shown
