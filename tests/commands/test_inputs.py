"""Inputs that people really have, singly and in pairs: the plan finds what the run would."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from support.loopback_hub import LoopbackHub
from support.mishaps import MISHAPS
from support.pico import proxies, write_rows
from support.soak import seeds

from sage_hub.cli.main import main
from sage_hub.commands import survey


def run(pair: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """The status of `sanitize`, and what it says where it refuses."""
    sides = [str(pair / "base"), str(pair / "unlearned"), "--output", str(pair / "out"), "--quiet"]
    capsys.readouterr()
    status = main(["sanitize", *sides, *proxies(pair), "--gain", "2", *options])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("name", MISHAPS)
def test_an_input_that_people_have(
    name: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = MISHAPS[name]
    change(pair)
    before = sorted(pair.rglob("*"))
    status, err = run(pair, capsys, "--dry-run")
    assert status == expected, err
    assert sorted(pair.rglob("*")) == before
    assert err.count("\n") == (1 if expected else 0), err
    assert run(pair, capsys, "--generate-rows", "0")[0] == expected
    assert (pair / "out").exists() == (expected == 0)


@pytest.mark.parametrize("seed", seeds(12, 400))
def test_two_at_once(seed: int, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the plan takes the run takes, and nothing is an internal error.

    A second mishap that finds its file gone stops there: what it leaves is an input too.
    """
    both = list(itertools.permutations(MISHAPS, 2))
    first, second = random.Random(seed).choice(both)
    MISHAPS[first][0](pair)
    with suppress(OSError, ValueError, KeyError, RuntimeError):
        MISHAPS[second][0](pair)
    planned, err = run(pair, capsys, "--dry-run")
    assert planned != 1, (first, second, err)
    done, err = run(pair, capsys, "--generate-rows", "0")
    assert done == planned, (first, second, err)
    shutil.rmtree(pair)


# What a sentence of the plan may end in, where it names no option and no line of a settings file.
TO_DO = {
    *("change", "check", "choose", "fetch", "gather", "give", "leave", "load", "make", "merge"),
    *("name", "pass", "put", "remove", "rename", "run", "save", "see", "use", "write"),
}


@pytest.mark.parametrize("name", [name for name, (_, status) in MISHAPS.items() if status])
def test_a_problem_says_what_to_do(
    name: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MISHAPS[name][0](pair)
    sides = [str(pair / "base"), str(pair / "unlearned"), "--output", str(pair / "out")]
    capsys.readouterr()
    assert main(["sanitize", *sides, *proxies(pair), "--quiet", "--dry-run", "--json"])
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    problems = found.get("problems", [found])  # or what kept it from a plan
    for said in (problem["message"] for problem in problems):
        words = set(re.findall(r"\w+", said.lower()))
        assert " --" in said or words & TO_DO, said


def test_a_problem_names_the_line_of_the_settings(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the file that gives the setting; what the command line gives is an option."""
    write_rows(Path("bad.jsonl"), [{"question": "w1", "answer": ""}])
    Path("sage.yaml").write_text(
        "seed: 1\nforget: bad.jsonl\ngates:\n  - nothing.probability > 1\n", encoding="utf-8"
    )
    sides = [str(pair / "base"), str(pair / "unlearned")]
    assert main(["push", *sides, "--dry-run"]) == 18
    shown = capsys.readouterr().err
    assert "'answer' is empty or not text. See sage.yaml, line 2." in shown
    assert main(["push", *sides, "--forget", "bad.jsonl", "--dry-run"]) == 18
    assert "'answer' is empty or not text. See --forget." in capsys.readouterr().err
    assert main(["data"]) == 18
    assert "See sage.yaml, line 2." in capsys.readouterr().out
    rows = str(pair / "forget.jsonl")
    assert main(["push", *sides, "--forget", rows, "--dry-run"]) == 2
    assert "See sage.yaml, line 3." in capsys.readouterr().err
    Path("sage.yaml").rename("other.yaml")
    words = ["push", *sides, "--forget", rows, "--config", "other.yaml", "--dry-run"]
    assert main(words) == 2
    assert "See other.yaml, line 3." in capsys.readouterr().err


def test_each_set_that_cannot_be_read_is_a_problem(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [str(pair / "base"), str(pair / "unlearned")]
    sets = ["--retain", "no.jsonl", "--forget", "none.jsonl", "--heldout"]
    words = ["push", *sides, *sets, str(pair / "heldout.jsonl"), "--dry-run", "--json"]
    assert main(words) == 10
    found = json.loads(capsys.readouterr().out)["problems"]
    assert [one["message"].split()[3] for one in found] == ["no.jsonl", "none.jsonl"]


def test_a_settings_file_that_is_gone_meanwhile_hides_no_problem(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(Path("bad.jsonl"), [{"question": "w1", "answer": ""}])
    Path("mine.yaml").write_text("forget: bad.jsonl\n", encoding="utf-8")
    read = survey.Inputs.read_set

    def remove(own: survey.Inputs, which: str) -> None:
        Path("mine.yaml").unlink(missing_ok=True)
        read(own, which)

    monkeypatch.setattr(survey.Inputs, "read_set", remove)
    sides = [str(pair / "base"), str(pair / "unlearned")]
    assert main(["push", *sides, "--config", "mine.yaml", "--dry-run"]) == 18
    assert "'answer' is empty or not text. See --forget." in capsys.readouterr().err


def test_a_problem_names_the_line_of_the_settings_of_a_repo(
    on_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.add_commit("org/unlearned", {"sage.yaml": b"\nheldout: rows.jsonl", "rows.jsonl": b"{"})
    assert main(["plan", "org/base", "org/unlearned"]) == 0  # the plan shows it, and the estimate
    assert "See sage.yaml of org/unlearned, line 2." in capsys.readouterr().out
