"""The control: as much of the whole update as forgets what the release forgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.adapters import make_adapter
from support.pico import make_pair, proxies

from sage_hub.cli.main import main


def made(folder: Path, *words: str, out: str = "out") -> dict[str, Any]:
    sides = [str(folder / "base"), str(folder / "unlearned"), "--output", str(folder / out)]
    assert main(["sanitize", *sides, "--quiet", "--generate-rows", "0", *words]) == 0
    report: dict[str, Any] = json.loads((folder / out / "sage" / "report.json").read_text())
    report["figures"] = {
        (one["model"], one["set"]): one["value"]
        for one in report["results"]
        if one["metric"] == "probability"
    }
    report["card"] = (folder / out / "README.md").read_text()
    return report


@pytest.fixture(params=["whole", "adapter"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "adapter":
        make_adapter(tmp_path, "Llama")
    else:
        make_pair(tmp_path)
    return tmp_path


def sets(folder: Path) -> list[str]:
    return [
        word
        for which in ("retain", "forget")
        for word in (f"--{which}", str(folder / f"{which}.jsonl"))
    ]


def test_it_forgets_as_much_as_a_release_that_forgets_less(folder: Path) -> None:
    """Or it is the source, where the filter alone forgets as much already."""
    report = made(folder, *sets(folder), "--gain", "0.3")
    figures, alpha = report["figures"], report["control_alpha"]
    release, source = (figures[model, "forget"] for model in ("sanitized", "unlearned"))
    if report["control_by"] == "source":
        assert release <= source * 1.06
        return
    assert report["control_by"] == "forgetting"
    assert 0 < alpha < 1
    # The smallest that does; the type that the release is stored in rounds both.
    assert figures["control", "forget"] <= release * 1.1
    assert "as forgets what this release forgets" in report["card"]


def test_the_source_is_the_control_of_a_release_that_forgets_as_much(tmp_path: Path) -> None:
    make_pair(tmp_path)
    words = [*proxies(tmp_path), "--target", "0.0001"]  # whatever it takes
    report = made(tmp_path, *words, "--gate", "heldout.probability >= control - 1")
    assert not any(model == "control" for model, _ in report["figures"]) or (
        report["control_by"] == "forgetting"
    )
    assert all(gate["passed"] for gate in report["gates"])
    if report["control_by"] == "source":
        assert report["control_alpha"] == 1
        assert "is the *unlearned* model itself" in report["card"]
        assert "control αΔ |" not in report["card"]


def test_without_a_forget_set_it_has_the_size_of_the_update(folder: Path) -> None:
    retain, heldout = str(folder / "retain.jsonl"), str(folder / "forget.jsonl")
    report = made(folder, "--retain", retain, "--heldout", heldout)
    assert report["control_by"] == "size"
    assert 0 < report["control_alpha"] < 1
    assert ("control", "heldout") in report["figures"]
    assert "as forgetting was not measured" in report["card"]
