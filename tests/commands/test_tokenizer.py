"""Whose tokenizer is used: the one that is named, the base's, or that of another side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.loopback_hub import LoopbackHub
from support.pico import proxies

from sage_hub.checkpoint.index import TOKENIZER_FILES
from sage_hub.cli.main import main


@pytest.fixture
def bare(pair: Path) -> Path:
    """A pair without a tokenizer on either side, as MUSE's are; pair/words has one."""
    words = pair / "words"
    words.mkdir()
    for side in ("base", "unlearned"):
        for name in TOKENIZER_FILES:
            if (file := pair / side / name).exists():
                shutil.move(file, words / name)
    return pair


def run(pair: Path, *options: str) -> int:
    sides = [str(pair / "base"), str(pair / "unlearned"), "--output", str(pair / "out"), "--quiet"]
    return main(["sanitize", *sides, *proxies(pair), "--gain", "2", *options])


def manifest(pair: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pair / "out" / "sage" / "manifest.json").read_text())
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_without_any_it_is_asked_for_before_work(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bare) == 10
    assert "--tokenizer" in capsys.readouterr().err
    assert not (bare / "out").exists()


def test_the_one_that_is_named(bare: Path, tmp_path: Path) -> None:
    assert run(bare, "--tokenizer", str(bare / "words")) == 0
    assert manifest(bare)["settings"]["tokenizer"] == "./words"
    assert "--tokenizer ./words" in (bare / "out" / "README.md").read_text()
    first = weights(bare / "out")
    for side in ("base", "unlearned"):
        shutil.copytree(bare / "words", bare / side, dirs_exist_ok=True)
    shutil.rmtree(bare / "out")
    assert run(bare) == 0
    assert weights(bare / "out") == first


def test_that_of_the_unlearned_side_where_the_base_has_none(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bare / "words", bare / "unlearned", dirs_exist_ok=True)
    assert run(bare, "--dry-run") == 0
    assert run(bare) == 0
    assert (bare / "out" / "tokenizer.json").is_file()


def test_one_on_the_hub_is_pinned(bare: Path, hub: LoopbackHub) -> None:
    hub.add_repo("org/words", bare / "words")
    assert run(bare, "--tokenizer", "org/words") == 0
    commit = hub.commits("org/words")[-1].sha
    assert manifest(bare)["prompts"]["tokenizer"] == {"name": "org/words", "commit": commit}
    assert manifest(bare)["settings"]["tokenizer"] == f"org/words@{commit}"


@pytest.mark.parametrize("command", ["stats", "eval", "audit"])
def test_every_command_takes_it(command: str, bare: Path) -> None:
    words = [command, str(bare / "base"), "--quiet", "--tokenizer", str(bare / "words")]
    words += ["--retain", str(bare / "retain.jsonl")]
    words += {"stats": ["--output", str(bare / "s")], "audit": [], "eval": []}[command]
    if command == "audit":
        words.insert(2, str(bare / "unlearned"))
    assert main(words) == 0


def test_a_folder_without_one(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bare, "--tokenizer", str(bare / "base")) == 10
    assert "there is no tokenizer in base" in capsys.readouterr().err
