"""`sage-hub init`: what it writes is taken by the plan as it stands, whatever the pair."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.adapters import CONFIGS, make_adapter
from support.architectures import ARCHITECTURES, make_model, make_sides, move
from support.loopback_hub import LoopbackHub
from support.pico import CHAT, make_tokenizer, write_rows

from sage_hub.cli.config import load_settings
from sage_hub.cli.main import main
from sage_hub.settings import SETTINGS, Settings

FILE = Path("sage.yaml")


def init(*words: object, capsys: pytest.CaptureFixture[str]) -> Any:
    """What is found, as JSON has it."""
    capsys.readouterr()
    assert main(["init", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def proposed() -> list[dict[str, Any]]:
    """The proposals of the file, a block between two other lines each."""
    names = "|".join(SETTINGS)
    text = FILE.read_text(encoding="utf-8")
    blocks = re.findall(rf"(?:^# (?:{names}):.*\n(?:^#  ? ?- .*\n|^#   \w+: hf.*\n)*)+", text, re.M)
    return [yaml.safe_load(re.sub("^# ", "", block, flags=re.M)) for block in blocks]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral", "Llava"])
def test_the_plan_takes_the_file_of_any_architecture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in ARCHITECTURES
    model = make_model(name)
    make_sides(tmp_path, model, model)
    move(model)
    model.save_pretrained(tmp_path / "unlearned")
    sides = [str(tmp_path / "base"), str(tmp_path / "unlearned")]
    found = init(*sides, capsys=capsys)
    assert (
        found["model_type"] == json.loads((tmp_path / "base/config.json").read_text())["model_type"]
    )
    assert load_settings({}, config=None, unlearned=None)[0] == Settings()
    assert main(["plan", *sides]) == 0
    assert f"Settings come from {FILE}" in capsys.readouterr().err
    for values in proposed():
        Settings(**values)


@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_the_plan_takes_the_file_of_an_adapter(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in CONFIGS
    make_adapter(tmp_path, name)
    sides = [str(tmp_path / "base"), str(tmp_path / "unlearned")]
    assert init(*sides, capsys=capsys)["kind"] == "a LoRA adapter"
    assert main(["plan", *sides]) == 0
    found = init(*sides, "--force", "--merge", capsys=capsys)
    assert found["kind"] == "a LoRA adapter, to be merged"
    assert load_settings({}, config=None, unlearned=None)[0] == Settings(merge=True)
    assert main(["plan", *sides]) == 0


def test_what_is_found_of_a_pair(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(CHAT).save_pretrained(pair / "base")
    found = init(pair / "base", pair / "unlearned", capsys=capsys)
    assert (found["kind"], found["context"]) == ("a whole model", 64)
    assert found["dtype"] == {"base": "bfloat16", "unlearned": "bfloat16"}
    assert found["shards"] == {"base": 3, "unlearned": 3}
    assert found["tokenizer"] == {"of": "base", "chat_template": True}
    text = FILE.read_text(encoding="utf-8")
    assert "#   tokenizer: of base, with a chat template" in text
    assert str(pair) not in text


def test_the_next_command_is_one_that_runs(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [str(pair / "base"), str(pair / "unlearned")]
    assert main(["init", *sides]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(command) == ["sage-hub", "push", *sides, "--dry-run"]
    assert main(shlex.split(command)[1:]) == 0
    assert main(["init", *sides, "--output", "my settings.yaml"]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert main(shlex.split(command)[1:]) == 0
    assert "Settings come from my settings.yaml" in capsys.readouterr().err


def test_a_file_that_is_there_is_kept(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FILE.write_text("not: [yaml", encoding="utf-8")
    sides = [str(pair / "base"), str(pair / "unlearned")]
    assert main(["init", *sides]) == 23
    assert "--force" in capsys.readouterr().err
    assert FILE.read_text(encoding="utf-8") == "not: [yaml"
    assert main(["init", *sides, "--force"]) == 0
    assert main(["init", *sides, "--force", "--output", "."]) == 23
    assert main(["init", *sides, "--output", "nowhere/sage.yaml"]) == 10


def test_a_pair_that_cannot_be_opened_leaves_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "./absent", "./other"]) == 10
    assert not FILE.exists()


def test_sets_that_are_here_are_proposed(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("forget.jsonl"), [{"text": "w1"}])
    Path("retain.csv").write_text("text\nw2\n")
    Path("heldout.pdf").write_text("w3")
    init(pair / "base", pair / "unlearned", capsys=capsys)
    here, beside = proposed()[:2]
    assert here == {"retain": "retain.csv", "forget": "forget.jsonl"}
    assert beside.keys() == {"heldout"}  # which lies beside the pair, as the others do too
    for side in ("base", "unlearned"):
        shutil.move(pair / side, side)
    init("./base", "./unlearned", "--force", capsys=capsys)
    here, own = proposed()[:2]
    assert here == {"retain": "retain.csv", "forget": "forget.jsonl"}
    assert own == {"heldout": "heldout.jsonl"}


@pytest.mark.parametrize("where", [Path(), Path("settings")])
def test_sets_beside_the_checkpoints_are_proposed_and_can_be_taken(
    where: Path, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where.mkdir(exist_ok=True)
    sides = [str(pair / "base"), str(pair / "unlearned")]
    file = where / "sage.yaml"
    assert main(["init", *sides, "--output", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert "Files that lie beside base" in text
    assert str(pair) not in text
    file.write_text(re.sub(r"^# ((?:retain|forget|heldout): .*)", r"\1", text, flags=re.M))
    settings = load_settings({}, config=file, unlearned=None)[0]
    for which, source in settings.sets.items():
        assert Path(source).samefile(pair / f"{which}.jsonl")
    assert len(settings.sets) == 3
    assert main(["push", *sides, "--dry-run", "--config", str(file)]) == 0


def test_a_folder_whose_name_no_line_can_hold_is_not_proposed(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pair.rename(pair.with_name("two\nlines"))
    init(folder / "base", folder / "unlearned", capsys=capsys)
    assert {which: f"{which}.jsonl" for which in ("retain", "forget", "heldout")} in proposed()
    assert "beside" not in FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, forget",
    [
        ("tofu_Llama_full_forget05_NPO", "locuslab/TOFU?config=forget05"),
        ("muse_books_SimNPO", "muse-bench/MUSE-Books?config=verbmem&split=forget"),
        ("zephyr-wmdp-cyber", "cais/wmdp?config=wmdp-cyber&split=test"),
    ],
)
def test_a_benchmark_is_known_by_its_name(
    name: str, forget: str, hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("org/base", pair / "base")
    hub.add_repo(f"org/{name}", pair / "unlearned")
    init("org/base", f"org/{name}", capsys=capsys)
    (found,) = (values for values in proposed() if forget in values.get("forget", ""))
    Settings(**found)


def test_the_data_sets_of_a_card_are_proposed_and_obeyed_by_nobody(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a repo says of itself may end no comment."""
    evil = "a/b\nstrength: 0"
    card = yaml.safe_dump({"datasets": ["org/facts", evil, f"{evil}\r# "]})
    (pair / "base" / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    (pair / "unlearned" / "chat_template.jinja").write_text("x")
    folder = pair.with_name("pair\nstrength: 0\u2028energy: 1")
    pair.rename(folder)
    init(folder / "base", folder / "unlearned", capsys=capsys)
    assert {"retain": "hf://datasets/org/facts"} in proposed()
    assert load_settings({}, config=None, unlearned=None)[0] == Settings()


def test_a_pair_without_a_tokenizer_is_told_so(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer().save_pretrained("words")
    for side in ("base", "unlearned"):
        for file in (pair / side).glob("*token*"):
            file.unlink()
    sides = [pair / "base", pair / "unlearned"]
    assert init(*sides, capsys=capsys)["tokenizer"] is None
    assert "# tokenizer: org/name" in FILE.read_text(encoding="utf-8")
    found = init(*sides, "--force", "--tokenizer", "./words", capsys=capsys)
    assert found["tokenizer"]["of"] == "words"
    assert load_settings({}, config=None, unlearned=None)[0] == Settings(tokenizer="./words")
    assert main(["plan", *map(str, sides)]) == 0


def test_settings_of_the_unlearned_side_are_mentioned(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pair / "unlearned" / "sage.yaml").write_text("strength: 3\n")
    init(pair / "base", pair / "unlearned", capsys=capsys)
    assert "has a sage.yaml of its own" in FILE.read_text(encoding="utf-8")
