"""What GitHub's runner gets of a run: summary, outputs and annotations, all of it escaped."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.loopback_hub import LoopbackHub
from support.pico import proxies
from support.runner import literal, read_outputs

from sage_hub.cli import main as cli
from sage_hub.cli.main import github, main
from sage_hub.errors import SageHubError

HOSTILE = "x|`y`<script>[z](http://evil)\n::set-output name=a::b\n| # *bold* ![i](u) %0A::error::"


def result_of(entry: str, value: float, **more: Any) -> dict[str, Any]:
    model, which, metric = entry.split(".")
    return {"model": model, "set": which, "metric": metric, "value": value} | {
        "direction": "lower" if which == "forget" else "higher",
        "rows": 10,
        "condition": None,
        "source": None,
        **more,
    }


RESULT: dict[str, Any] = {
    "location": "https://huggingface.co/org/unlearned-sage/commit/abc123",
    "gain": 1.5,
    "bias": {"before": 0.2, "after": 0.05, "kept": 0.25},
    "warnings": [],
    "report": {
        "results": [
            result_of("base.heldout.probability", 0.9),
            result_of("unlearned.heldout.probability", 0.6),
            result_of("sanitized.heldout.probability", 0.87),
            result_of("unlearned.forget.probability", 0.05),
            result_of("sanitized.forget.probability", 0.1),
        ],
        "retain_recovered": {"metric": "probability", "value": 0.9, "interval": [0.8, 1.0]},
        "differences": [
            {
                "model": "sanitized",
                "other": "unlearned",
                "set": "heldout",
                "metric": "probability",
                "condition": None,
                "value": 0.27,
                "interval": [0.2, 0.3],
                "verdict": "better",
            }
        ],
        "not_run": [{"what": "forget.rouge", "reason": "no --generate was given"}],
    },
}
GATES = [
    {
        "gate": "heldout.probability >= base - 0.02",
        "passed": False,
        "left": 0.87,
        "right": 0.88,
        "reason": None,
    },
    {
        "gate": "forget.probability <= 0.2",
        "passed": True,
        "left": 0.1,
        "right": 0.2,
        "reason": None,
    },
]


def with_gates(*gates: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(RESULT)
    result["report"]["gates"] = list(gates)
    return result


def rows_of(markdown: str) -> list[list[str]]:
    """The cells of all tables, read as GitHub does: a backslash takes the next character."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])*)\|", line[1:])] for line in lines
    ]


def test_the_summary_shows_before_and_after() -> None:
    text = github.summary(RESULT)
    rows = [[literal(cell) for cell in row] for row in rows_of(text)]
    assert rows[0] == [
        "set",
        "metric",
        "better",
        "base",
        "unlearned",
        "sanitized",
        "sanitized − unlearned",
    ]
    figures = ["0.9000", "0.6000", "0.8700", "+0.2700, better"]
    assert rows[2] == ["heldout", "probability", "higher", *figures]
    assert rows[3] == ["forget", "probability", "lower", "–", "0.0500", "0.1000", ""]
    assert "(<https://huggingface.co/org/unlearned-sage/commit/abc123>)" in text
    assert "90 % of the held-out probability" in text
    assert "no \\-\\-generate was given" in text
    assert "Gates" not in text


def test_a_condition_is_no_line_of_the_table() -> None:
    result = copy.deepcopy(RESULT)
    coarse = result_of("sanitized.forget.probability", 0.9, condition="int4")
    result["report"]["results"].insert(0, coarse)
    assert github.outputs(result)["forget-probability-after"] == "0.1"
    assert "0\\.9000" not in github.summary(result).splitlines()[-1]


@pytest.mark.parametrize(
    "gates, outcome, words",
    [
        ([], "none", []),
        ([GATES[1]], "passed", ["**Gates**: all passed."]),
        (GATES, "failed", ["**Gates**: 1 of 2 failed.", "**failed**", "0\\.87", "0\\.88"]),
        (
            [{**GATES[0], "left": None, "right": None, "reason": "heldout was not measured"}],
            "failed",
            ["heldout was not measured"],
        ),
    ],
)
def test_gates(gates: list[dict[str, Any]], outcome: str, words: list[str]) -> None:
    result = with_gates(*gates)
    assert github.outputs(result)["gates"] == outcome
    text = github.summary(result)
    for word in words:
        assert word in text
    for gate in gates:
        assert gate["gate"] in {literal(row[0]) for row in rows_of(text)}


def test_outputs_are_numbers_and_links() -> None:
    assert github.outputs(RESULT) == {
        "location": RESULT["location"],
        "commit-url": RESULT["location"],
        "pr-url": "",
        "gates": "none",
        "heldout-recovered": "0.9",
        "bias-kept": "0.25",
        "gain": "1.5",
        "forget-probability-before": "0.05",
        "forget-probability-after": "0.1",
        "heldout-probability-before": "0.6",
        "heldout-probability-after": "0.87",
    }
    pr = github.outputs({**RESULT, "location": "https://huggingface.co/org/x/discussions/7"})
    assert (pr["commit-url"], pr["pr-url"]) == ("", "https://huggingface.co/org/x/discussions/7")
    nothing = copy.deepcopy(RESULT)
    nothing["report"] = {
        "results": [],
        "differences": [],
        "retain_recovered": None,
        "not_run": [],
    }
    assert github.outputs(nothing)["heldout-recovered"] == ""
    assert "|" not in github.summary(nothing)
    zero = copy.deepcopy(RESULT)
    zero["report"]["retain_recovered"]["value"] = 0.0
    assert github.outputs(zero)["heldout-recovered"] == "0"


def test_nothing_hostile_gets_out_of_its_cell() -> None:
    result = with_gates({**GATES[0], "gate": HOSTILE, "reason": HOSTILE})
    result["location"] = HOSTILE
    result["warnings"] = [HOSTILE]
    result["report"]["not_run"] = [{"what": HOSTILE, "reason": HOSTILE}]
    for entry in result["report"]["results"] + result["report"]["differences"]:
        entry["set"] = HOSTILE
    text = github.summary(result)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows_of("\n".join(tables))} == {5, 7}
    one_line = "".join(c if c.isprintable() else " " for c in HOSTILE)
    assert literal(rows_of(text)[2][0]) == one_line
    unescaped = re.sub(r"\\.", "", text)
    for mark in ("<script", "](http", "![", "::set-output", "`"):
        assert mark not in unescaped, mark
    assert not [line for line in text.splitlines() if line.lstrip().startswith("::")]

    # A value that looks like the end of its own heredoc, or like another output.
    values = {"location": f"{HOSTILE}\ngates=passed\nEOF", "gates": "failed"}
    assert read_outputs(github.outputs_text(values)) == values


def test_an_annotation_is_one_command() -> None:
    assert github.error_command("50 % of\nit\r::warning::x") == (
        "::error title=sage-hub::50 %25 of%0Ait%0D::warning::x"
    )


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that GitHub's runner names in the environment."""
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        (tmp_path / name).touch()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    return tmp_path


def test_a_push_on_github(
    runner: Path, on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", "org/base", "org/unlearned", *proxies(pair), "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    outputs = read_outputs((runner / "GITHUB_OUTPUT").read_text())
    assert outputs["commit-url"] == result["location"]
    recovered = result["report"]["retain_recovered"]
    assert outputs["heldout-recovered"] == (f"{recovered['value']:.6g}" if recovered else "")
    after = [
        entry["value"]
        for entry in result["report"]["results"]
        if (entry["model"], entry["set"], entry["metric"], entry["condition"])
        == ("sanitized", "heldout", "probability", None)
    ]
    assert [outputs["heldout-probability-after"]] == [f"{value:.6g}" for value in after]
    assert "org\\/unlearned\\-sage" in (runner / "GITHUB_STEP_SUMMARY").read_text()
    assert "::error" not in err
    first, *_, last = [line for line in err.splitlines() if line.startswith("::")]
    word = first.removeprefix("::stop-commands::")
    assert re.fullmatch(r"[0-9a-f]{32}", word)
    assert last == f"::{word}::"


def test_nothing_that_a_run_prints_is_a_command(
    runner: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hostile(_: object) -> None:
        print("::add-mask::e")
        raise SageHubError("no repo ::error::\n::set-env name=PATH::/evil")

    monkeypatch.setitem(cli.COMMANDS, "env", hostile)
    assert main(["env"]) == 1
    out, err = capsys.readouterr()
    assert out == "::add-mask::e\n"
    off = ""  # the word that turns commands on again, while they are off
    obeyed, ignored = [], []
    for line in err.splitlines():
        if off and line == f"::{off}::":
            off = ""
        elif line.startswith("::stop-commands::"):
            off = line.removeprefix("::stop-commands::")
        else:
            (ignored if off else obeyed).append(line)
    assert off == ""
    assert len(obeyed) == len(ignored) == 1
    assert ignored[0].startswith("sage-hub: error: no repo ::error::")
    assert obeyed[0].startswith("::error title=sage-hub::no repo ::error::\\n::set-env")


def test_a_failure_is_annotated_once_and_in_the_summary(
    runner: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "org/no", "org/such", "--quiet"]) == 10
    err = capsys.readouterr().err
    assert err.count("::error title=sage-hub::org/such does not exist") == 1
    assert (
        "**sage-hub failed.** org\\/such does not exist"
        in (runner / "GITHUB_STEP_SUMMARY").read_text()
    )
    assert (runner / "GITHUB_OUTPUT").read_text() == ""
    assert main(["push", "--strenght"]) == 2
    assert "::error title=sage-hub::sage-hub push has no option" in capsys.readouterr().err


def test_elsewhere_nothing_of_it_happens(
    runner: Path,
    on_hub: LoopbackHub,
    pair: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS")
    assert main(["push", "org/base", "org/unlearned", *proxies(pair), "--quiet"]) == 0
    assert main(["push", "org/no", "org/such", "--quiet"]) == 10
    assert "::" not in capsys.readouterr().err
    assert (runner / "GITHUB_STEP_SUMMARY").read_text() == ""
    assert (runner / "GITHUB_OUTPUT").read_text() == ""
