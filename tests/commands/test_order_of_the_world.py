"""The world moves on between two runs: days, tokenizers, rows and repos under the same names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from support.loopback_hub import LoopbackHub
from support.pico import CHAT, make_pair, make_rows, to_jsonl, write_rows

from sage_hub.cli.main import main
from sage_hub.commands import push
from sage_hub.publish.folder import work_folder
from sage_hub.record.manifest import MANIFEST
from sage_hub.rows import encoding

DATED = "w{{ strftime_now('%d') }} " + CHAT  # a word of the pico tokenizer
CHANGING = {"README.md", "sage/report.json", "SHA256SUMS"}  # times, and the name of the folder
Today = Callable[[str], None]


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Today:
    """Sets the day of the clock."""

    def set_to(day: str) -> None:
        class Stopped(date):
            @classmethod
            def today(cls) -> Stopped:
                return cls.fromisoformat(day)

        monkeypatch.setattr(encoding, "date", Stopped)

    set_to("2026-11-27")
    return set_to


@pytest.fixture
def dated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a pair whose chat template writes the date."""
    make_pair(tmp_path, chat_template=DATED)
    write_rows(tmp_path / "retain.jsonl", make_rows(8, seed=0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*more: str) -> list[str]:
    both = ["base", "unlearned"] if "push" not in more else ["org/base", "org/unlearned"]
    command = ["push" if "push" in more else "sanitize", *both, "--retain", "retain.jsonl"]
    return [*command, "--gain", "1", *(word for word in more if word != "push")]


def contents(folder: str) -> dict[str, bytes]:
    """All files but those that hold times."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if name not in CHANGING}


def manifest_of(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(folder, MANIFEST).read_text())
    return content


def stop_at(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command until it calls `name`."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(push, name, stop)
        assert main([*arguments]) == 130


# A template that writes the date


@pytest.mark.parametrize("day", ["2026-11-28", "2026-11-20"])  # a clock may go back, too
def test_a_run_that_goes_on_another_day_has_the_date_of_its_first(
    day: str,
    dated: Path,
    today: Today,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words("--output", "undisturbed", "-q")) == 0
    assert manifest_of("undisturbed")["prompts"]["date"] == "2026-11-27"
    stop_at("check_written", monkeypatch, *words("--output", "out", "-q"))
    statistics = work_folder(dated / "out") / "statistics.safetensors"
    calibrated = statistics.stat().st_mtime_ns
    today(day)
    stop_at("open_as_user", monkeypatch, *words("--output", "out", "-q"))
    assert statistics.stat().st_mtime_ns == calibrated
    capsys.readouterr()
    assert main(words("--output", "out")) == 0
    said = capsys.readouterr().err
    assert "The prompts have the date 2026-11-27, as those of the run that began this." in said
    assert contents("out") == contents("undisturbed")
    assert main(words("--output", "anew", "-q")) == 0
    assert manifest_of("anew")["prompts"]["date"] == day
    assert contents("anew") != contents("out")


def test_what_was_begun_with_other_inputs_lends_no_date(
    dated: Path,
    today: Today,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at("check_written", monkeypatch, *words("--output", "out", "-q"))
    today("2026-11-28")
    write_rows(dated / "retain.jsonl", make_rows(9, seed=5))
    assert main(words("--output", "out")) == 0
    assert "was begun by a run with other inputs" in capsys.readouterr().err
    assert manifest_of("out")["prompts"]["date"] == "2026-11-28"


def test_a_date_that_is_given_wins(
    dated: Path, today: Today, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at("check_written", monkeypatch, *words("--output", "out", "-q"))
    today("2026-11-28")
    assert main(words("--output", "out", "--date", "2026-11-28")) == 0
    assert "was begun by a run with other inputs" in capsys.readouterr().err
    assert manifest_of("out")["settings"]["date"] == "2026-11-28"


def test_a_release_is_recognized_on_another_day(
    hub: LoopbackHub, dated: Path, today: Today, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", dated / side)
    assert main(words("push", "-q")) == 0
    assert main(words("--output", "out", "-q")) == 0
    commits = len(hub.commits("org/unlearned-sage"))
    made = contents("out")
    today("2026-11-28")
    capsys.readouterr()
    assert main(words("push")) == 0
    assert "is this very release already; nothing was sent" in capsys.readouterr().err
    assert main(words("--output", "out")) == 0
    assert "holds this very release already" in capsys.readouterr().err
    assert (len(hub.commits("org/unlearned-sage")), contents("out")) == (commits, made)
    assert main(words("push", "--date", "2026-11-28", "-q")) == 0
    assert len(hub.commits("org/unlearned-sage")) == commits + 1


def test_statistics_lend_their_date_and_a_difference_is_said(
    dated: Path, today: Today, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = ["stats", "base", "--retain", "retain.jsonl", "--output", "base.safetensors", "-q"]
    assert main(stats) == 0
    assert main(words("--output", "at-once", "-q")) == 0
    today("2026-11-28")
    ready = ["sanitize", "base", "unlearned", "--gain", "1", "--stats", "base.safetensors"]
    ready += ["--heldout", "heldout.jsonl"]
    capsys.readouterr()
    assert main([*ready, "--output", "out"]) == 0
    assert "were made with" not in capsys.readouterr().err
    assert manifest_of("out")["settings"]["date"] == "2026-11-27"
    assert manifest_of("out")["prompts"]["date"] == "2026-11-27"
    assert manifest_of("out")["files"] == manifest_of("at-once")["files"]
    other = ["--date", "2026-11-28", "--system-prompt", "w1", "--output", "other"]
    assert main([*ready, *other]) == 0
    said = capsys.readouterr().err
    assert 'were made with date "2026-11-27"; this run has "2026-11-28".' in said
    assert 'were made with system_prompt none; this run has "w1".' in said
    assert main(["audit", *ready[1:3], "--stats", ready[-3], "--json"]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out)["settings"]["date"] == "2026-11-27"
    assert "were made with" not in said


def test_statistics_that_were_begun_another_day_go_on(
    dated: Path, today: Today, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sage_hub.calibration import calibrate

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    stats = ["stats", "base", "--retain", "retain.jsonl", "--output"]
    assert main([*stats, "undisturbed.safetensors", "-q"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "write_statistics", stop)
        assert main([*stats, "base.safetensors", "-q"]) == 130
    today("2026-11-28")
    capsys.readouterr()
    assert main([*stats, "base.safetensors"]) == 0
    assert "4 of 4 blocks were calibrated already" in capsys.readouterr().err
    made, expected = (dated / f"{name}.safetensors" for name in ("base", "undisturbed"))
    assert made.read_bytes() == expected.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "write_statistics", stop)
        assert main([*stats, "other.safetensors", "-q"]) == 130
    today("2026-11-29")
    assert main([*stats, "other.safetensors", "--date", "2026-11-29"]) == 0
    assert "were calibrated already" not in capsys.readouterr().err


def test_a_rebuild_on_another_day_makes_the_same_bytes(dated: Path, today: Today) -> None:
    assert main(words("--output", "out", "-q")) == 0
    today("2026-11-28")
    assert main(["verify", "out", "--rebuild", "-q"]) == 0


def test_eval_says_which_date_and_template_it_used(
    dated: Path, today: Today, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "base", "--heldout", "heldout.jsonl", "--json"]) == 0
    prompts = json.loads(capsys.readouterr().out)["prompts"]
    assert prompts["date"] == "2026-11-27"
    assert len(prompts["chat_template"]) == len(prompts["tokenizer_fingerprint"]) == 64


# What lies on this machine alone


def test_the_plan_says_what_making_it_again_will_need(
    hub: LoopbackHub, dated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same that `verify --rebuild` and the card ask for in the end."""
    (dated / "sets").mkdir()
    write_rows(dated / "sets" / "heldout.jsonl", make_rows(4, seed=4))
    own = words("--heldout", "sets/heldout.jsonl", "--reference", "./base", "--output", "out")
    assert main([*own, "--dry-run", "--json"]) == 0
    out, said = capsys.readouterr()
    local = ["./base", "./unlearned", "retain.jsonl", "heldout.jsonl"]
    assert json.loads(out)["local"] == local
    assert f"folder that holds {', '.join(local)}: the record has their names alone" in said
    assert "not even there" not in said
    assert main([*own, "-q"]) == 0
    assert f"In a folder that holds {', '.join(f'`{n}`' for n in local)}" in (
        Path("out/README.md").read_text()
    )
    write_rows(dated / "sets" / "retain.jsonl", make_rows(4, seed=6))
    clash = words("--heldout", "sets/retain.jsonl", "--output", "other", "--dry-run")
    assert main(clash) == 0
    assert "as 2 of these are called retain.jsonl; rename one" in capsys.readouterr().err
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", dated / side)
    hub.add_repo("org/rows", {"retain.jsonl": to_jsonl(make_rows(8, seed=0))}, "dataset")
    on_hub = ["push", "org/base", "org/unlearned", "--dry-run"]
    assert main([*on_hub, "--retain", "hf://datasets/org/rows/retain.jsonl", "--json"]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out)["local"] == []
    assert "made again" not in said


# What changes under its name


def test_a_rebuild_says_what_has_changed_under_its_name(
    dated: Path, today: Today, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("--output", "out", "--tokenizer", "./base", "-q")) == 0
    rows = (dated / "retain.jsonl").read_bytes()
    (dated / "base" / "chat_template.jinja").write_text(CHAT)
    assert main(["verify", "out", "--rebuild"]) == 27
    said = capsys.readouterr().out
    assert "the tokenizer has other files now, and another chat template" in said
    assert "rows of retain.jsonl" not in said
    (dated / "base" / "chat_template.jinja").write_text(DATED)
    write_rows(dated / "retain.jsonl", make_rows(8, seed=7))
    assert main(["verify", "out", "--rebuild"]) == 27
    said = capsys.readouterr().out
    assert "the retain rows of retain.jsonl are others now" in said
    assert "tokenizer" not in said
    (dated / "retain.jsonl").write_bytes(rows)
    shutil.rmtree(dated / "base")
    shutil.copytree(dated / "unlearned", dated / "base")
    make_pair(dated / "new", chat_template=DATED, max_shard_size="1MB")
    shutil.rmtree(dated / "unlearned")
    shutil.copytree(dated / "new" / "base", dated / "unlearned")
    assert main(["verify", "out", "--rebuild"]) == 27
    assert "the base model, base, has other weights or another config" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sanitize", "stats"])
def test_a_tokenizer_that_changes_during_the_run_is_noticed(
    command: str, dated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sage_hub.calibration import calibrate

    shutil.copytree(dated / "base", dated / "tokenizer")
    real = calibrate.find_sites

    def later(*arguments: Any) -> Any:
        (dated / "tokenizer" / "chat_template.jinja").write_text(CHAT)
        return real(*arguments)

    monkeypatch.setattr(calibrate, "find_sites", later)
    both = ["base", "unlearned", "--gain", "1", "--output", "out"]
    own = both if command == "sanitize" else ["base", "--output", "out.safetensors"]
    own = [command, *own, "--retain", "retain.jsonl", "--tokenizer", "./tokenizer", "-q"]
    assert main(own) == 17
    said = capsys.readouterr().err
    assert "chat_template.jinja of tokenizer was changed while it was being read" in said
    assert not (dated / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda row: {**row, "question": row["question"].upper()}, id="case"),
        pytest.param(lambda row: {**row, "perturbed_answer": ["w9 w8"]}, id="wrong answers"),
    ],
)
def test_rows_that_change_in_little_are_other_rows(
    change: Callable[[dict[str, str]], dict[str, Any]], dated: Path
) -> None:
    """In what serves to evaluate, too, and though an overlap is found whatever the case."""
    rows = make_rows(6, seed=3)
    write_rows(dated / "heldout.jsonl", rows)
    own = words("--heldout", "heldout.jsonl", "--output", "out", "-q")
    assert main(own) == 0
    before = manifest_of("out")["fingerprint"]
    write_rows(dated / "heldout.jsonl", [change(row) for row in rows])
    assert main(own) == 0
    assert manifest_of("out")["fingerprint"] != before


def test_all_that_moves_on_the_hub_is_taken_again_where_it_was(
    hub: LoopbackHub, dated: Path, today: Today, capsys: pytest.CaptureFixture[str]
) -> None:
    """Main of both sides, of the tokenizer's repo and of the data: rebuild takes their commits."""
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", dated / side)
    hub.add_repo("org/tokenizer", dated / "base")
    hub.add_repo("org/rows", {"retain.jsonl": to_jsonl(make_rows(8, seed=0))}, "dataset")
    own = ["sanitize", "org/base", "org/unlearned", "--tokenizer", "org/tokenizer", "--gain", "1"]
    own += ["--retain", "hf://datasets/org/rows/retain.jsonl", "--output"]
    assert main([*own, "out", "-q"]) == 0
    today("2026-11-28")
    make_pair(dated / "new", chat_template=CHAT)
    for side in ("base", "unlearned"):
        files = {path.name: path.read_bytes() for path in (dated / "new" / side).iterdir()}
        weights = {name: data for name, data in files.items() if not name.endswith(".jinja")}
        config = json.loads(weights["config.json"]) | {"rope_theta": 5000.0}
        hub.add_commit(f"org/{side}", weights | {"config.json": json.dumps(config).encode()})
    hub.add_commit("org/tokenizer", {"chat_template.jinja": CHAT.encode()})
    hub.add_commit("org/rows", {"retain.jsonl": to_jsonl(make_rows(9, seed=9))}, "dataset")
    assert main(["verify", "out", "--rebuild", "-q"]) == 0
    capsys.readouterr()
    assert main([*own, "new-out", "-q"]) == 0
    before, now = manifest_of("out"), manifest_of("new-out")
    for side in ("base", "unlearned"):
        assert now["sources"][side]["commit"] != before["sources"][side]["commit"]
    for name in ("tokenizer", "retain"):
        assert now["settings"][name] != before["settings"][name]
    assert "date" not in now["settings"]
    assert now["prompts"]["chat_template"] != before["prompts"]["chat_template"]
