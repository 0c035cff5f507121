"""`sage-hub demo` as the README has it: the whole of it, and the commands that it prints."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from support.soak import soak

from sage_hub.cli.main import main
from sage_hub.commands import demo_models


def with_fewer_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the people, who are learnt in half the time."""
    people = demo_models._RECIPES["people"]
    learn = dataclasses.replace(people.learn, steps=250, rate=3e-3)
    fewer = dataclasses.replace(people, retain=16, heldout=16, learn=learn)
    monkeypatch.setitem(demo_models._RECIPES, "people", fewer)


@pytest.mark.parametrize("people", ["fewer", soak("all")])
def test_the_demo_repairs_more_than_it_gives_back(
    people: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if people == "fewer":
        with_fewer_people(monkeypatch)
    assert main(["demo", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    value = {
        (r["model"], r["set"]): r["value"]
        for r in result["report"]["results"]
        if r["metric"] == "probability"
    }
    assert value["base", "heldout"] > 0.98
    assert value["unlearned", "heldout"] < 0.9 * value["base", "heldout"]
    assert value["unlearned", "forget"] < 0.2
    assert value["sanitized", "heldout"] > value["control", "heldout"]
    # As much is forgotten as by the source, and more is known.
    assert value["sanitized", "forget"] <= 1.01 * value["unlearned", "forget"]
    assert value["sanitized", "heldout"] > value["unlearned", "heldout"]

    # The commands it prints work as they stand, and the first makes the same weights again.
    manifest = Path("sage-demo/release/sage/manifest.json")
    first = json.loads(manifest.read_text())["files"]
    for command in result["commands"]:
        program, *arguments = shlex.split(command)
        assert program == "sage-hub"
        assert main([*arguments, "--quiet"]) == 0
    assert json.loads(manifest.read_text())["files"] == first
    assert "whole model (28 weights)" in capsys.readouterr().out

    # A folder with something in it is not overwritten.
    assert main(["demo", "--quiet"]) == 23
