"""What holds releases of a device against the reference, and times them, on a pico pair."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.pico import make_pair

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import reference
import release


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_pair(tmp_path / "pair")
    return tmp_path / "pair"


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def test_a_release_is_held_against_float64(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made / "found.json"
    run(reference, monkeypatch, str(made), "--device", "cpu", "--json", str(file))
    found = json.loads(file.read_text())["found"]
    assert [one["dtype"] for one in found] == ["float32", "bfloat16"]
    assert found[0]["missed"] < reference.ALLOWED < found[1]["missed"]
    monkeypatch.setattr(reference, "ALLOWED", found[0]["missed"] / 2)
    with pytest.raises(SystemExit, match="float32 misses the reference by"):
        run(reference, monkeypatch, str(made))


def test_the_stages_of_a_release_are_timed(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made / "found.json"
    run(release, monkeypatch, str(made), "--rows", "7", "--json", str(file))
    runs = json.loads(file.read_text())["runs"]
    assert [one["kind"] for one in runs] == ["search", "pass"]
    assert all(set(release.STAGES) <= one["report"]["seconds"].keys() for one in runs)
    assert {one["rows"] for one in runs[0]["report"]["data"].values()} == {7}
    assert "cpu search" in capsys.readouterr().out
