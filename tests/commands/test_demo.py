"""`sage-hub demo` as the README has it: the whole of it, and the commands that it prints."""

from __future__ import annotations

import json
import shlex
import webbrowser
from pathlib import Path

import pytest
from support.soak import soak

from sage_hub.cli.main import main


@pytest.mark.parametrize("method", ["npo", soak("ga")])
def test_the_demo_repairs_more_than_it_gives_back(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    assert main(["demo", "--json", "--quiet", "--method", method]) == 0
    result = json.loads(capsys.readouterr().out)
    value = {
        (r["model"], r["set"]): r["value"]
        for r in result["report"]["results"]
        if r["metric"] == "probability"
    }
    assert value["base", "heldout"] > 0.98
    assert value["unlearned", "heldout"] < 0.9 * value["base", "heldout"]
    assert value["unlearned", "forget"] < 0.2
    # As much is forgotten as by the source, which so is the control, and most is back.
    assert value["sanitized", "forget"] <= 1.01 * value["unlearned", "forget"]
    assert result["report"]["control_by"] == "source"
    assert result["report"]["retain_recovered"]["value"] > 0.7

    # The commands it prints work as they stand, and `push` makes the same weights again.
    manifest = Path("sage-demo/release/sage/manifest.json")
    first = json.loads(manifest.read_text())["files"]
    for command in result["commands"]:
        program, *arguments = shlex.split(command)
        assert program == "sage-hub"
        assert main([*arguments, "--quiet"]) == 0
    assert [command.split()[1] for command in result["commands"]] == ["review", "push", "audit"]
    assert Path("sage-demo/release.review.html").is_file()
    assert json.loads(manifest.read_text())["files"] == first
    assert "whole model (28 weights)" in capsys.readouterr().out

    # A folder with something in it is not overwritten.
    assert main(["demo", "--quiet"]) == 23
