"""The gain: the search finds what is asked for, the closed form is held back, runs say which."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_release import load_weights, proxies

from sage_hub.cli import main
from sage_hub.gain import CLOSE, LARGEST, Level, closed_form, search
from sage_hub.shards import STRENGTHS, Measurement

SOURCE = Level(forget=0.1, retain=0.5)


def falling(rate: float, harm: float = 0.0) -> Any:
    """A model that forgets with the gain, and that loses retention beyond γ = 1 / harm."""
    return lambda gain: Level(0.8 * math.exp(-rate * (gain - 1)), 0.9 - 0.4 * harm * gain)


@given(st.floats(0.05, 3), st.floats(0.01, 0.7), st.floats(1, 60))
def test_the_smallest_gain_that_reaches_the_target(
    rate: float, target: float, start: float
) -> None:
    gain, outcome, tried = search(falling(rate), target, SOURCE, start)
    exact = 1 + math.log(0.8 / target) / rate
    if exact > LARGEST:
        assert (gain, outcome) == (LARGEST, "held back")
        return
    assert outcome == "reached"
    assert exact <= gain * (1 + 1e-9)
    assert gain <= exact * CLOSE
    assert len(tried) < 25


def test_a_target_that_is_reached_already_takes_no_gain() -> None:
    assert search(falling(1), 0.9, SOURCE, 5)[:2] == (1.0, "reached")


@given(st.floats(0.02, 1), st.floats(1, 60))
def test_no_gain_harms_retained_rows_more_than_the_source(harm: float, start: float) -> None:
    gain, outcome, tried = search(falling(0.01, harm), 0.01, SOURCE, start)
    assert outcome == "held back"
    assert gain == 1 or tried[gain].retain >= SOURCE.retain
    allowed = 1 / harm
    assert gain >= min(max(1.0, allowed / CLOSE), LARGEST) * (1 - 1e-9)


def measurement(retain: float, retain_filtered: float, forget: float, kept: float) -> Measurement:
    zeros = (0.0,) * len(STRENGTHS)
    return Measurement("t", "m", 3, retain, retain_filtered, 1.0, 1.0, forget, kept, zeros)


def test_the_closed_form_keeps_the_carrier() -> None:
    found = closed_form([measurement(1.0, 0.01, 4.0, 1.0), measurement(1.0, 0.01, 5.0, 1.25)])
    assert found is not None
    assert found.gain == pytest.approx(2)
    assert found.search == {"matching": pytest.approx(2), "held_back": False}


def test_and_never_the_bias_of_the_source() -> None:
    found = closed_form([measurement(1.0, 0.25, 16.0, 1.0)])
    assert found is not None
    assert found.gain == 2  # not 4, with which the bias would be four times the source's
    assert found.search == {"matching": 4, "held_back": True}
    assert closed_form([measurement(1.0, 0.25, 1.0, 0.0)]) is None


def run(pair: Path, out: Path, *more: str) -> dict[str, Any]:
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", str(out), "--quiet"]
    words = ["sanitize", *both, *proxies(pair), "--generate-rows", "0", *more]
    assert main(words) == 0
    manifest: dict[str, Any] = json.loads((out / "sage" / "manifest.json").read_text())
    report = json.loads((out / "sage" / "report.json").read_text())
    figures = {(r["model"], r["set"], r["metric"]): r["value"] for r in report["results"]}
    return manifest | {"figures": figures}


def test_a_run_reaches_the_level_and_records_how(pair: Path, tmp_path: Path) -> None:
    plain = run(pair, tmp_path / "plain", "--strength", "10")
    own, source = (plain["figures"][m, "forget", "probability"] for m in ("sanitized", "unlearned"))
    target = (own + source) / 2
    if own < source:  # a random update may forget more when it is filtered
        target = own * 0.99
    found = run(
        pair, tmp_path / "out", "--strength", "10", "--gain", "auto", "--target", str(target)
    )
    search_record = found["gain_search"]
    assert search_record["of"] == "--target"
    tried = {entry["gain"]: entry["forget"] for entry in search_record["tried"]}
    assert found["gain"] in tried
    # What was evaluated on the way is what was written.
    written = found["figures"]["sanitized", "forget", "probability"]
    assert written == pytest.approx(tried[found["gain"]], rel=2e-2)
    if search_record["outcome"] == "reached":
        assert written <= target * 1.02
    assert not list(tmp_path.glob(".*partial"))

    # And it is the same as to give that gain.
    again = run(pair, tmp_path / "again", "--strength", "10", "--gain", repr(found["gain"]))
    assert again["gain_search"] is None
    ours, theirs = load_weights(tmp_path / "out"), load_weights(tmp_path / "again")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--gain", "auto", "--forget", ""], "forget"),
        (["--target", "0.1"], "A target is what gain 'auto'"),
        (["--gain", "auto", "--target", "nan"], "target must be a number"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], says: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", str(pair.parent / "x")]
    words = [word for word in words if word not in ("--forget", "")]
    retain = ["--retain", str(pair / "retain.jsonl")]
    assert main(["sanitize", *both, *retain, *words]) == 2
    assert says in capsys.readouterr().err
