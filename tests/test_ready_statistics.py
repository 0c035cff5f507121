"""Statistics that are made once: kept in a cache, published to the Hub, taken from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

from sage_hub import calibrate
from sage_hub.cli import main


def words(pair: Path, output: Path, *options: str) -> list[str]:
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    sides = [str(pair / "base"), str(pair / "unlearned")]
    return ["sanitize", *sides, "--output", str(output), *retain, *options]


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that calibration has made."""
    made: list[str] = []
    real = calibrate._calibrate

    def watched(*args: Any) -> None:
        made.append(args[3].name)
        real(*args)

    monkeypatch.setattr(calibrate, "_calibrate", watched)
    return made


def test_a_second_release_of_the_same_base_takes_the_first_ones_statistics(
    pair: Path, tmp_path: Path, calibrated: list[str]
) -> None:
    cache = ["--stats-cache", str(tmp_path / "cache")]
    assert main(words(pair, tmp_path / "plain")) == 0
    assert main(words(pair, tmp_path / "one", *cache)) == 0
    assert len(calibrated) == 2
    assert main(words(pair, tmp_path / "two", *cache, "--strength", "1")) == 0
    assert main(words(pair, tmp_path / "stronger", *cache, "--strength", "9")) == 0
    assert len(calibrated) == 2
    assert shards(tmp_path / "plain") == shards(tmp_path / "one") == shards(tmp_path / "two")
    assert shards(tmp_path / "one") != shards(tmp_path / "stronger")
    (kept,) = (tmp_path / "cache").iterdir()

    # What they depend on makes others; a damaged file is made again.
    assert main(words(pair, tmp_path / "other", *cache, "--max-tokens", "100")) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:-1])
    assert main(words(pair, tmp_path / "three", *cache)) == 0
    assert len(calibrated) == 4
    assert shards(tmp_path / "three") == shards(tmp_path / "one")


def test_statistics_on_the_hub(
    hub: LoopbackHub, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    assert main(["stats", str(pair / "base"), *retain, "--to", "org/base-stats"]) == 0
    capsys.readouterr()
    assert set(hub.files("org/base-stats")) >= {"statistics.safetensors", "README.md"}
    card = hub.files("org/base-stats")["README.md"].decode()
    assert "retain.jsonl, 40 rows" in card
    assert str(pair) not in card
    sides = [str(pair / "base"), str(pair / "unlearned"), "--quiet"]
    before = len(hub.requests)
    assert main(["push", *sides, "--stats", "org/base-stats", "--dry-run", "--to", "org/x"]) == 0
    assert not any(request.storage for request in hub.requests[before:])
    taken = tmp_path / "taken"
    assert main(["sanitize", *sides, "--stats", "org/base-stats", "--output", str(taken)]) == 0
    assert main(words(pair, tmp_path / "made")) == 0
    assert shards(taken) == shards(tmp_path / "made")
    manifest = json.loads((taken / "sage" / "manifest.json").read_text())
    commit = hub.commits("org/base-stats")[-1].sha
    assert manifest["statistics"]["file"] == f"org/base-stats@{commit}"
    # Made again, from another proxy, into the same repo: a commit more.
    forget = ["--retain", str(pair / "forget.jsonl"), "--quiet"]
    assert main(["stats", str(pair / "base"), *forget, "--to", "org/base-stats"]) == 0
    again = ["sanitize", *sides, "--stats", f"org/base-stats@{commit}", "--output"]
    assert main([*again, str(tmp_path / "pinned")]) == 0
    assert shards(tmp_path / "pinned") == shards(taken)


def test_a_repo_that_is_no_place_for_statistics(
    hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("org/model", pair / "base")
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    assert main(["stats", str(pair / "base"), *retain, "--to", "org/model"]) == 23
    assert "was not made by sage-hub for this" in capsys.readouterr().err
    sides = [str(pair / "base"), str(pair / "unlearned"), "--quiet", "--to", "org/x"]
    assert main(["push", *sides, "--stats", "org/model"]) == 10
    assert "has no statistics.safetensors" in capsys.readouterr().err
    for wrong in ("./nowhere.safetensors", "./nowhere", "../nowhere", "nowhere", str(pair)):
        assert main(["push", *sides, "--stats", wrong]) == 10
        err = capsys.readouterr().err
        assert ("is a folder" if wrong == str(pair) else "does not exist") in err
