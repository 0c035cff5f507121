"""What a terminal shows, in colours and to its width, and that nobody else's text commands it."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sage_hub.cli import main as cli
from sage_hub.cli.display import evaluation_text
from sage_hub.cli.main import main
from sage_hub.cli.terminal import Part, plain, print_text
from sage_hub.hub.client import log
from sage_hub.record.tables import Cell, Table
from sage_hub.runtime.progress import Progress

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = "[red]x[b] \x1b[31m\x1b]0;t\x07 \u202eabc\u200b\u2066 :boom:\r"
ESCAPED = r"[red]x[b] \x1b[31m\x1b]0;t\x07 \u202eabc\u200b\u2066 :boom:\r"
ROWS: list[list[str | Cell]] = [
    ["heldout", "extraction_strength", "0.0130", Cell("+0.0375 [0.01, 0.05] better", "better")],
    ["forget", "probability", "0.0127", Cell("-0.0250 [-0.05, -0.01] worse", "worse")],
    ["retain", "loss", "4.4894", Cell("0.0000 [-0.1, 0.1] within noise", "within noise")],
]
SUMMARY: list[Part] = [
    Table(["set", "metric", "control αΔ", "change of the last"], ROWS, keys=2),
    "",
    Cell("gate met: heldout.probability >= base - 0.02 (0.87 against 0.88)", "passed"),
    Cell("gate NOT met: forget.probability <= 0.1 (0.2 against 0.1)", "failed"),
    Table((), [("  base", "org/base"), ("  needs", "97.2 kB to download, 50 kB of disk")], gap=1),
    "https://huggingface.co/org/a-release-whose-name-is-longer-than-a-line/commit/0123456789abcdef",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


def shown(parts: list[Part], width: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        screen = Terminal()
        print_text(parts, screen)
    return screen.getvalue()


@pytest.mark.parametrize("width", [48, 60, 80, 400])
def test_nothing_is_cut_and_nothing_sticks_out(width: int) -> None:
    text = COLOUR.sub("", shown(SUMMARY, width))
    *lines, location = text.splitlines()
    assert location == SUMMARY[-1]  # to be copied
    assert max(len(line.rstrip()) for line in lines) <= min(width, 80)  # nor is it stretched
    assert {"97.2", "0.0127", "-0.0250", "noise", "control", "worse"} <= set(text.split())
    assert text.replace("\n", "").count("met:") == 2


@pytest.mark.parametrize("width", [48, 80])
def test_a_command_stays_one_line(width: int) -> None:
    command = "  sage-hub push ./a-base ./an-unlearned-model --retain retain.jsonl --to ./a-release"
    assert command in shown(["Run it again:", "", command], width).splitlines()


def test_a_table_that_is_too_wide_is_several_with_the_same_rows() -> None:
    narrow, wide = (COLOUR.sub("", shown(SUMMARY[:1], width)).split() for width in (60, 80))
    assert wide.count("heldout") == 1
    assert narrow.count("heldout") == narrow.count("extraction_strength") == 2
    assert narrow.count("0.0127") == narrow.count("+0.0375") == 1


def test_verdicts_are_told_by_colour_and_word() -> None:
    text = shown(SUMMARY, 100)
    found = re.findall(r"\x1b\[(3[12]|2)m([^\x1b]+)", text)
    said = [(colour, words.strip()) for colour, words in found]
    green, red, dim = "32", "31", "2"
    assert [(colour, words.split("]")[-1].split(":")[0].strip()) for colour, words in said] == [
        (green, "better"),
        (red, "worse"),
        (dim, "within noise"),
        (green, "gate met"),
        (red, "gate NOT met"),
    ]


def test_without_colours_a_line_stays_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = """\
set      metric               control αΔ  change of the last
-------  -------------------  ----------  -------------------------------
heldout  extraction_strength  0.0130      +0.0375 [0.01, 0.05] better
forget   probability          0.0127      -0.0250 [-0.05, -0.01] worse
retain   loss                 4.4894      0.0000 [-0.1, 0.1] within noise

gate met: heldout.probability >= base - 0.02 (0.87 against 0.88)
gate NOT met: forget.probability <= 0.1 (0.2 against 0.1)
  base  org/base
  needs 97.2 kB to download, 50 kB of disk
https://huggingface.co/org/a-release-whose-name-is-longer-than-a-line/commit/0123456789abcdef
"""
    pipe = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")  # of a pipeline's log, which is no terminal
    print_text(SUMMARY, pipe)
    assert pipe.getvalue() == expected
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(SUMMARY, 40) == expected
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert shown(SUMMARY, 40) == expected


def hostile_report() -> dict[str, Any]:
    about = {"set": HOSTILE, "metric": "probability", "condition": None}
    results = [
        {**about, "model": model, "value": 0.5, "direction": "lower", "rows": 9, "source": None}
        for model in ("./base", f"./{HOSTILE}")
    ]
    gap = {"model": f"./{HOSTILE}", "other": "./base", "value": 0.1, "interval": [0.0, 0.2]}
    return {
        "results": results,
        "differences": [{**about, **gap, "verdict": "within noise"}],
        "not_run": [{"what": f"accuracy on {HOSTILE}", "reason": HOSTILE}],
    }


def test_no_name_commands_the_terminal() -> None:
    parts = list(evaluation_text(hostile_report()))
    coloured = shown(parts, 400)
    assert {*COLOUR.findall(coloured)} == {"\x1b[1m", "\x1b[2m", "\x1b[0m"}  # no red
    for text in (COLOUR.sub("", coloured), plain(parts)):
        assert text.replace("\n", "").isprintable()
        assert text.count(ESCAPED) == 4  # a set, a model, what was not run and why


def test_nor_does_that_of_a_checkpoint(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = (pair / "base").rename(pair / HOSTILE)
    words = [str(base), str(pair / "unlearned"), "--retain", str(pair / "retain.jsonl")]
    assert main(["plan", *words]) == 0
    assert f"  base        {ESCAPED} (local folder, " in capsys.readouterr().out
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["plan", *words, "--verbose"]) == 0
    text = COLOUR.sub("", screen.getvalue())
    assert ESCAPED in text
    assert text.replace("\n", "").isprintable()


def test_nor_does_json_a_trace_a_bar_or_what_a_server_says(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    obeyed = HOSTILE + "\x9b2J\x7f"  # what begins a command in one character, as some take it

    def said(args: argparse.Namespace) -> None:
        log.warning("%s", obeyed)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with Progress(quiet=False).counter(obeyed, 2, "file") as bar:
            bar.update()
            shown = bar.desc
        assert shown.isprintable()
        args.result = {"name": obeyed}
        if fails:
            raise ValueError(obeyed)

    monkeypatch.setenv("SAGE_HUB_DEBUG", "1")
    monkeypatch.setitem(cli.COMMANDS, "env", said)
    for fails in (False, True):
        assert main(["env", "--json"]) == fails
        out, err = capfd.readouterr()
        assert out.replace("\n", "").isprintable()
        found = json.loads(out)
        assert fails or found == {"name": obeyed}
        assert not {"\x1b]", "\x07", "\u202e", "\x9b", "\x7f"} & {*err, *re.findall("\x1b.", err)}


def test_help_does_without_rich() -> None:
    code = (
        "import sys; from sage_hub.cli.main import main\n"
        "try: main(['push', '--help'])\n"
        "finally: assert 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
