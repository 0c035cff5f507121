"""The bare command: the base writes rows, and the gain keeps what the source has lost of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.learned import make_learned_pair
from support.pico import make_rows, write_rows

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.cli.main import main
from sage_hub.commands import job as jobs
from sage_hub.commands import rows
from sage_hub.commands.inputs import Supply
from sage_hub.evaluation.written import NAME
from sage_hub.repair import effect
from sage_hub.settings import Settings

pytestmark = pytest.mark.taught

# The model is so small that what is kept and what is forgotten share most of its directions.
SOFTLY = ["--strength", "10", "--energy", "0.95", "--keep", "0.3"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    make_learned_pair(folder)
    return folder


def sanitize(folder: Path, out: Path, *options: str) -> int:
    sides = [str(folder / "base"), str(folder / "unlearned")]
    return main(["sanitize", *sides, "--output", str(out), *options])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def figures(report: Any, which: str) -> dict[str, float]:
    found = report["results"]
    return {r["model"]: r["value"] for r in found if (r["set"], r["metric"]) == which}


def test_the_bare_command_repairs(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved = tmp_path / "out", tmp_path / "saved.jsonl"
    heldout = ["--heldout", str(learned / "heldout.jsonl")]
    assert sanitize(learned, out, *SOFTLY, *heldout, "--save-retain", str(saved)) == 0
    err = capsys.readouterr().err
    assert "written by the base before calibration" in err
    assert "it is not measured how much is forgotten" in err

    manifest, report = read(out / "sage" / "manifest.json"), read(out / "sage" / "report.json")
    search = manifest["gain_search"]
    assert manifest["gain"] > 2
    assert search["kept"] >= 0.3
    assert manifest["statistics"]["data"]["retain"]["name"] == NAME
    guard = figures(report, ("guard", "probability"))
    assert guard["sanitized"] > guard["unlearned"] + 0.05
    assert {"base", "unlearned", "sanitized"} <= figures(report, ("heldout", "probability")).keys()

    # What was written is in no file of the release: it may be what had to go.
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(lines) >= 20
    published = b"\n".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert not any(line["question"].encode() in published for line in lines)

    # Neither is what was given to evaluate on in it, nor most of what was to be forgotten, which
    # is a tenth of all that the base knows.
    held = {json.loads(x)["question"] for x in (learned / "heldout.jsonl").read_text().splitlines()}
    gone = {json.loads(x)["question"] for x in (learned / "forget.jsonl").read_text().splitlines()}
    asked = {line["question"] for line in lines}
    assert not asked & held
    assert len(asked & gone) <= 0.07 * len(asked)

    # And the release is the same if it is made again, here from the rows that were saved.
    again = tmp_path / "again"
    assert sanitize(learned, again, *SOFTLY, *heldout, "-q") == 0
    assert read(again / "sage" / "manifest.json")["files"] == manifest["files"]
    more = ["--retain", str(saved), "--gain", str(manifest["gain"])]
    assert sanitize(learned, tmp_path / "saved", *SOFTLY, *more, "-q") == 0
    weights = "model.safetensors"
    assert (tmp_path / "saved" / weights).read_bytes() == (out / weights).read_bytes()


def test_a_run_that_was_stopped_does_not_have_them_written_again(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "calibrate", stop)
        assert sanitize(learned, tmp_path / "out", *SOFTLY, "-q") == 130
    monkeypatch.setattr(rows, "write_rows", stop)
    assert sanitize(learned, tmp_path / "out", *SOFTLY, "-q") == 0


def test_what_was_given_is_not_written_again(learned: Path, tmp_path: Path) -> None:
    """Nor with another answer, nor if only statistics know it: guard rows would guard little."""
    saved, more = tmp_path / "saved.jsonl", ["--heldout", str(learned / "heldout.jsonl")]
    more += ["--gain", "1", "--generate-rows", "0", "-q"]
    assert sanitize(learned, tmp_path / "1", *more, "--save-retain", str(saved)) == 0
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    asked = {line["question"] for line in lines}

    def written_beside(*options: str) -> set[str]:
        again = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        forget = ["--forget", str(learned / "heldout.jsonl")]  # so that retain rows are wanted
        options = (*options, "--generate-rows", "0", "--save-retain", str(again), "-q")
        assert sanitize(learned, again.with_suffix(""), *forget, *options) == 0
        return {json.loads(line)["question"] for line in again.read_text().splitlines()}

    assert asked & written_beside()
    otherwise = [{**line, "answer": "fact1"} for line in lines]
    known = write_rows(tmp_path / "known.jsonl", otherwise)
    assert not asked & written_beside("--bystander", f"known={known}")
    statistics = str(tmp_path / "known.safetensors")
    job = ["stats", str(learned / "base"), "--retain", str(saved), "--output", statistics, "-q"]
    assert main([*job, "--energy", "0.99"]) == 0
    assert not asked & written_beside("--stats", statistics)


def test_where_forgetting_is_damage_nothing_is_released(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitize(learned, tmp_path / "out", *SOFTLY[:4], "--keep", "1", "-q") == 14
    assert "damage and forgetting are one here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert sanitize(learned, tmp_path / "out", "--gain", "1", "-q") == 0


def test_of_a_narrow_update_no_gain_is_chosen(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(learned / "base", narrow)
    weights = load_file(narrow / "model.safetensors")
    for name in [name for name in weights if name.endswith("layers.1.mlp.down_proj.weight")]:
        weights[name] += 0.1
    save_file(weights, narrow / "model.safetensors", {"format": "pt"})
    job = ["sanitize", str(learned / "base"), str(narrow), "--output", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effect, "FEW", 0.1)  # this model has 14 maps
        assert main([*job, "-q"]) == 14
    assert "differ in 1 of 14 linear maps" in capsys.readouterr().err
    assert main([*job, "--gain", "1", "-q"]) == 0


def test_a_source_that_has_lost_nothing_needs_no_repair(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [str(learned / "base"), str(learned / "better")]
    assert main(["sanitize", *sides, "--output", str(tmp_path / "out"), "-q"]) == 14
    assert "there is no damage to repair" in capsys.readouterr().err


def test_general_texts_stand_in_for_a_base_that_writes_nothing(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are random, so what it samples has no end."""
    assert sanitize(pair, tmp_path / "out", "--gain", "1") == 0
    assert "general texts stand in" in capsys.readouterr().err
    manifest = read(tmp_path / "out" / "sage" / "manifest.json")
    assert "general-purpose" in manifest["statistics"]["data"]["retain"]["name"]


def test_that_no_row_could_be_shown_is_found_in_the_plan(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tokenizer, and a template that writes no user's turn: before hours, not after them."""
    for side in ("base", "unlearned"):
        shutil.copytree(learned / side, tmp_path / side)
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text("{{ messages[-1].content }} {{ messages[0].content | upper }}")
    assert sanitize(tmp_path, tmp_path / "out", "--dry-run", "-q") == 18
    assert "chat template" in capsys.readouterr().err
    for file in tmp_path.glob("*/*token*"):
        file.unlink()
    template.unlink()
    assert sanitize(tmp_path, tmp_path / "out", "--dry-run", "-q") == 10
    assert "tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, calibrates, written",
    [
        ({}, True, ("retain", "guard")),
        ({}, False, ("guard",)),
        ({"gain": 1.0}, True, ("retain",)),
        ({"retain": "r.jsonl"}, True, ("guard",)),
        ({"forget": "f.jsonl"}, True, ("retain",)),
        ({"forget": "f.jsonl"}, False, ("retain",)),
        ({"forget": "f.jsonl", "retain": "r.jsonl"}, True, ()),
        ({"gain": 1.0}, False, ()),
    ],
)
def test_what_the_base_writes(
    given: dict[str, Any], calibrates: bool, written: tuple[str, ...], pair: Path
) -> None:
    base = open_checkpoint(str(pair / "base"))
    settings = Settings(**given, compute_dtype="float32")
    assert Supply.of(base, settings, calibrates=calibrates) == Supply(written)
    small = Supply.of(base, Settings(**given, compute_dtype="float32", memory=0.1), calibrates=True)
    assert small.written == ()
    assert not small.general or "of memory" in small.why
    assert Supply.of(base, Settings(**given, low_disk=True), calibrates=True).written == ()


@pytest.mark.parametrize(
    "options, status, words",
    [
        (["--retain", "retain.jsonl"], 2, "here it writes none"),
        (["--gain", "1"], 23, "is there already"),
    ],
)
def test_rows_are_saved_where_there_are_some_and_over_nothing(
    options: list[str],
    status: int,
    words: str,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = write_rows(Path("retain.jsonl"), make_rows(5, seed=0)).read_bytes()
    save = ["--save-retain", "retain.jsonl", "-q"]
    assert sanitize(pair, tmp_path / "out", *options, *save) == status
    assert words in capsys.readouterr().err
    assert Path("retain.jsonl").read_bytes() == kept
