"""Gates: what the small language takes, what it refuses, and what a failed one does to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loopback_hub import LoopbackHub
from support.pico import proxies

from sage_hub.cli.main import main
from sage_hub.errors import UsageError
from sage_hub.record.gates import check_names, parse

FACTS = {
    "base.heldout.probability": 0.9,
    "unlearned.heldout.probability": 0.5,
    "heldout.probability": 0.85,
    "sanitized.heldout.probability": 0.85,
    "robustness.int4.forget.probability": 0.2,
    "robustness.int4.unlearned.forget.probability": 0.3,
    "bias.relative": 0.0005,
    "retain_recovered": 0.875,
}


@pytest.mark.parametrize(
    "text, passed, left, right",
    [
        ("heldout.probability >= base - 0.02", False, 0.85, 0.88),
        ("heldout.probability >= base - 0.06", True, 0.85, 0.84),
        ("heldout.probability > unlearned", True, 0.85, 0.5),
        ("unlearned.heldout.probability < base", True, 0.5, 0.9),
        ("robustness.int4.forget.probability <= unlearned", True, 0.2, 0.3),
        ("bias.relative <= 1e-3", True, 0.0005, 0.001),
        ("retain_recovered >= 2 * 0.5 - 0.25", True, 0.875, 0.75),
        ("-retain_recovered <= -(1 / 2)", True, -0.875, -0.5),
        ("base.heldout.probability - heldout.probability <= 0.1", True, 0.05, 0.1),
    ],
)
def test_a_condition_over_the_record(text: str, passed: bool, left: float, right: float) -> None:
    gate = parse(text)
    check_names([gate], FACTS)
    found = gate.check(FACTS)
    assert found.passed is passed
    assert (found.left, found.right) == (pytest.approx(left), pytest.approx(right))


def test_what_was_not_measured_is_not_met() -> None:
    found = parse("forget.probability <= 1").check(FACTS)
    assert not found.passed
    assert found.reason == "forget.probability was not measured"
    assert not parse("retain_recovered / 0 > 1").check(FACTS).passed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "heldout.probability",
        "1 <= heldout.probability <= 2",
        "heldout.probability == 1",
        "heldout.probability is 1",
        "__import__('os').system('true') > 0",
        "(lambda: 1)() > 0",
        "[1][0] > 0",
        "'a' > 'b'",
        "True > 0",
        "2 ** 999999999 > 0",
        "heldout.probability > base; 1",
        "base > 0.5",
        "1 > base",
        "a" * 501 + " > 0",
        "(" * 400 + "1" + ")" * 90 + " > 0",
    ],
)
def test_nothing_else_is_understood(text: str) -> None:
    with pytest.raises(UsageError, match="The gate"):
        parse(text)


@given(st.text(max_size=60))
def test_any_text_is_a_condition_or_refused_in_a_sentence(text: str) -> None:
    try:
        gate = parse(text)
    except UsageError:
        return
    gate.check(FACTS)  # and never raises


@given(
    st.sampled_from(sorted(FACTS)),
    st.sampled_from([">=", "<=", ">", "<"]),
    st.floats(-2, 2, allow_nan=False),
)
def test_comparisons_are_pythons(name: str, sign: str, bound: float) -> None:
    gate = parse(f"{name} {sign} {bound!r}")
    assert gate.check(FACTS).passed is bool(eval(f"{FACTS[name]} {sign} {bound}"))


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*heldout\.probability"):
        check_names([parse("heldout.probabilty > 0")], FACTS)
    check_names([parse("mmlu.acc > 0.3")], FACTS, tasks=["mmlu"])


def _push(pair: Path, *more: str) -> int:
    both = [str(pair / "base"), str(pair / "unlearned"), "--to", "org/out", "--yes"]
    return main(["push", *both, *proxies(pair), "--generate-rows", "0", *more])


def test_a_failed_gate_publishes_nothing_keeps_the_release_and_can_be_changed(
    hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = ["--gate", "heldout.probability >= base + 1", "--gate", "bias.kept <= 0.9"]
    assert _push(pair, *gates, "--json") == 30
    out, err = capsys.readouterr()
    result: dict[str, Any] = json.loads(out)
    assert [gate["passed"] for gate in result["report"]["gates"]] == [False, True]
    assert "1 gate is not met, and nothing was published: heldout.probability >= base + 1" in err
    assert not hub.files("org/out").keys() - {".gitattributes"}
    kept = Path(result["location"])
    assert (kept / "sage" / "report.json").is_file()
    assert "**no**" in (kept / "README.md").read_text()

    # With a gate that can be met the same release is published, and not made again.
    assert _push(pair, "--gate", "bias.kept <= 0.9") == 0
    assert "is not made again" in capsys.readouterr().err
    report = json.loads(hub.files("org/out")["sage/report.json"])
    assert [gate["gate"] for gate in report["gates"]] == ["bias.kept <= 0.9"]
    assert main(["verify", "org/out", "--quiet"]) == 0


def test_only_what_meets_the_gates_takes_the_place_of_a_release(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(pair / "base"), str(pair / "unlearned"), "--to", str(tmp_path / "out")]
    words += [*proxies(pair), "--generate-rows", "0", "--quiet", "--json"]
    assert main(words) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    other = [*words, "--gain", "2"]
    capsys.readouterr()
    assert main([*other, "--gate", "heldout.probability >= base + 1"]) == 30
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    kept = Path(json.loads(capsys.readouterr().out)["location"])
    refused = json.loads((kept / "sage" / "manifest.json").read_text())
    assert refused["gain"] == 2
    assert main([*other, "--gate", "heldout.probability >= base - 1"]) == 0
    accepted = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    assert accepted["files"] == refused["files"]
    assert not (tmp_path / ".out.partial").exists()


def test_a_gate_on_a_set_that_is_not_given_asks_for_it() -> None:
    known = ["forget.probability", "base.forget.probability"]
    with pytest.raises(UsageError, match="needs --heldout; give it"):
        check_names([parse("heldout.probability >= base")], known)


def test_a_wrong_gate_is_refused_before_any_work(
    hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _push(pair, "--gate", "heldout.probabilty >= 0.5") == 2
    assert "did you mean" in capsys.readouterr().err
    assert _push(pair, "--gate", "robustness.int4.forget.probability <= unlearned") == 2
    assert "which this run does not measure" in capsys.readouterr().err
