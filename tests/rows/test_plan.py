"""What is wrong with rows is found by every command before any work, and by `--dry-run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pico import CHAT, make_rows, proxies, write_rows

from sage_hub.cli.main import main

COMMANDS = {
    "sanitize": ["sanitize", "base", "unlearned", "--output", "made"],
    "dry run": ["sanitize", "base", "unlearned", "--output", "made", "--dry-run"],
    "push": ["push", "base", "unlearned", "--to", "./made"],
    "eval": ["eval", "base", "unlearned"],
    "stats": ["stats", "base", "--output", "made"],
    "audit": ["audit", "base", "unlearned"],
}


def deaf(pair: Path) -> str:
    """A chat template that writes no question."""
    (pair / "base" / "chat_template.jinja").write_text("<user> {{ messages[-1].content }}")
    return "retain.jsonl, row 1: the chat template does not write"


def unknown_token(pair: Path) -> str:
    """A tokenizer with a token more than the embedding has rows for."""
    file = pair / "base" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w59": 66', '"w59": 66, "later": 72'))
    rows = make_rows(12, 1)
    rows[4]["answer"] += " later"
    write_rows(pair / "forget.jsonl", rows)
    return "forget.jsonl, row 5: its token 'later' has the number 72"


def mixed(pair: Path) -> str:
    """Questions and choices in one set."""
    choices = {"question": "w1", "choices": ["w2", "w3"], "answer": 0}
    write_rows(pair / "forget.jsonl", [*make_rows(6, 1), *[choices] * 6])
    return "forget.jsonl, row 7: a row with question/choices/answer"


def pointer(pair: Path) -> str:
    """A set that Git LFS has not fetched."""
    (pair / "retain.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    return "retain.jsonl is a Git LFS pointer"


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("spoil", [deaf, unknown_token, mixed, pointer])
def test_rows_that_cannot_be_used_stop_every_command(
    command: list[str],
    spoil: Callable[[Path], str],
    pair: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pair)
    said = spoil(pair)
    sets = proxies(pair) if command[0] in ("sanitize", "push", "eval") else proxies(pair)[:4]
    assert main([*command, *sets, "--quiet"]) == 18
    assert said in capsys.readouterr().err
    assert not (pair / "made").exists()


def test_the_plan_shows_the_first_row_of_each_set(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pair / "base" / "chat_template.jinja").write_text(CHAT)
    write_rows(pair / "forget.jsonl", [{"question": "w1", "answer": "w2"}])
    base, unlearned = str(pair / "base"), str(pair / "unlearned")
    target = ["--output", str(pair / "made"), "--dry-run"]
    assert main(["sanitize", base, unlearned, *target, *proxies(pair)]) == 0
    plan = " ".join(capsys.readouterr().err.split())
    assert "1 rows as the model sees it: <user> w1 <end> <assistant> ⇒ w2 <end> heldout" in plan


def test_a_model_that_ran_away_is_evaluated(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in (pair / "unlearned").glob("*.safetensors"):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] *= 1e3
            assert tensors["lm_head.weight"].isfinite().all()
            save_file(tensors, shard, {"format": "pt"})
    rows = [{**row, "perturbed_answer": ["w1 w2", "w3"]} for row in make_rows(6, 1)]
    choices = [{"question": f"w{n}", "choices": ["w8", "w9"], "answer": n % 2} for n in range(6)]
    forget = str(write_rows(pair / "forget.jsonl", rows))
    heldout = str(write_rows(pair / "heldout.jsonl", choices))
    models = [str(pair / "base"), str(pair / "unlearned")]
    sets = ["--forget", forget, "--heldout", heldout, "--suite", "tofu", "--generate-rows", "0"]
    with torch.random.fork_rng():
        assert main(["eval", *models, *sets]) == 0
    assert "truth_ratio" in capsys.readouterr().out
