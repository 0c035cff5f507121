"""The two sides as people have them: what differs and does not matter, is noted, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import CONFIGS, make_adapter
from support.architectures import load, make_model, make_sides, move, reference
from support.checkpoints import load_weights
from support.mutations import add, edit_config, remap, rename
from support.pico import make_config, make_rows, make_tokenizer, write_rows
from transformers import LlamaForCausalLM

from sage_hub.cli.main import main

MORE = {"mtp.fc.weight": torch.ones(4, 8), "model.layers.2.eh_proj.weight": torch.ones(3, 3)}


def words_for(pair: Path, *options: str) -> list[str]:
    sides = [str(pair / "base"), str(pair / "unlearned")]
    return ["sanitize", *sides, "--retain", str(pair / "retain.jsonl"), *options]


def planned(
    pair: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str, list[str]]:
    """Of a dry run the status, the sentence, and the warnings of the plan."""
    capsys.readouterr()
    status = main([*words_for(pair), "--output", "out", "--dry-run", "--json", "-q", *options])
    out, err = capsys.readouterr()
    assert err.count("\n") == bool(status)
    assert not Path("out").exists()
    return status, err, json.loads(out)["warnings"]


def test_tensors_that_no_model_knows_in_the_base_alone(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words_for(pair), "--output", "plain", "-q"]) == 0
    plain = load_weights(Path("plain"))
    add(pair / "base", MORE)
    status, _, warnings = planned(pair, capsys)
    assert status == 0
    assert any("and 1 more tensors are of base alone" in warning for warning in warnings)
    assert main([*words_for(pair), "--output", "more", "-q"]) == 0
    found = load_weights(Path("more"))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_tensors_that_no_model_knows_in_the_unlearned_side_alone(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows what they hold, and they would be published."""
    add(pair / "unlearned", {"v_head.weight": torch.ones(1, 32)})
    status, sentence, _ = planned(pair, capsys)
    assert status == 13
    assert "'v_head.weight' of unlearned has no place in its model" in sentence


def test_the_same_unknown_tensors_on_both_sides(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("base", "unlearned"):
        add(pair / side, MORE)
    status, _, warnings = planned(pair, capsys)
    assert status == 0
    assert not any("alone" in warning for warning in warnings)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [64, 80])
def test_vocabularies_of_two_sizes(
    rows: int, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaForCausalLM(make_config(tie_word_embeddings=tied))
    make_sides(tmp_path, model, model)
    move(model)
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "unlearned")
    sides = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--output", str(tmp_path / "out")]
    sets = [str(write_rows(tmp_path / f"{seed}.jsonl", make_rows(20, seed))) for seed in range(3)]
    retain, forget, heldout = sets
    if rows < make_config().vocab_size:  # it has no place for words of these rows
        assert main(["sanitize", *sides, "--retain", retain, "--quiet"]) == 18
        assert f"the embedding of unlearned has {rows} rows" in capsys.readouterr().err
        return
    assert main(["sanitize", *sides, "--retain", retain]) == 0
    said = f"has 72 rows in base ('model.embed_tokens.weight') and {rows} in unlearned"
    assert said in capsys.readouterr().err
    found = load(tmp_path / "out").state_dict()
    source = load(tmp_path / "unlearned").state_dict()
    expected = reference(tmp_path / "base", tmp_path / "unlearned", make_rows(20, 0))
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor, atol=1e-4), name
        assert torch.equal(found[name], source[name]) == ("_proj" not in name), name
    # Every model that a run with all sets makes has the vocabulary of the unlearned side.
    more = ["--retain", retain, "--forget", forget, "--heldout", heldout]
    assert main(["sanitize", *sides, *more, "--quiet", "--force"]) == 0


@pytest.mark.parametrize("tied_by", ["base", "unlearned"])
def test_vocabularies_of_two_sizes_of_which_one_side_ties(tied_by: str, tmp_path: Path) -> None:
    for side, size in (("base", 72), ("unlearned", 80)):
        tied = side == tied_by
        model = LlamaForCausalLM(make_config(vocab_size=size, tie_word_embeddings=tied))
        if side == "unlearned":
            move(model)
        model.save_pretrained(tmp_path / side)
        make_tokenizer().save_pretrained(tmp_path / side)
    write_rows(tmp_path / "retain.jsonl", make_rows(40, 0))
    assert main([*words_for(tmp_path), "--output", str(tmp_path / "out"), "-q"]) == 0


def test_both_tied_and_stored_under_two_names(tmp_path: Path) -> None:
    model = LlamaForCausalLM(make_config(tie_word_embeddings=True))
    words = make_sides(tmp_path, model, model)
    move(model)
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path / "unlearned")
    rename(tmp_path / "unlearned", lambda n: "lm_head.weight" if "embed_tokens" in n else n)
    assert main(words) == 0


@pytest.mark.parametrize("rows", [72, 80])
def test_a_base_with_the_larger_vocabulary(rows: int, tmp_path: Path) -> None:
    """Padded by the trainer on one side alone; the tokens that are used are in both."""
    model = LlamaForCausalLM(make_config(vocab_size=96))
    words = make_sides(tmp_path, model, model)
    move(model)
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "unlearned")
    assert main([*words, "--quiet"]) == 0
    assert load_weights(tmp_path / "out")["lm_head.weight"].shape[0] == rows


def test_the_text_part_of_a_model_with_eyes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sides(tmp_path, make_model("Llava"), make_model("Llama"))
    capsys.readouterr()
    assert main([*words_for(tmp_path), "--output", "out", "-q"]) == 12
    assert "unlearned is the text part (llama)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, noted",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "head_dim"),
        ({"_name_or_path": "x", "use_cache": False, "attention_dropout": 0.1}, ""),
        ({"transformers_version": "4.1", "initializer_range": 0.5, "eos_token_id": 2}, ""),
    ],
)
def test_configs_that_differ_in_what_they_compute(
    change: dict[str, object], noted: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, before = planned(pair, capsys)
    edit_config(pair / "unlearned", **change)
    status, _, warnings = planned(pair, capsys)
    assert status == 0
    new = [warning for warning in warnings if warning not in before]
    assert any(warning.startswith(f"{noted} is") for warning in new) == bool(noted), new
    assert noted or not new


def test_a_stale_file_beside_newer_shards_is_named(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_weights(pair / "base"), pair / "unlearned" / "model.safetensors")
    status, sentence, warnings = planned(pair, capsys)
    assert any("unlearned has model.safetensors and an index" in warning for warning in warnings), (
        status,
        sentence,
    )


def test_the_names_that_a_wrapper_left_are_said(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remap(pair / "unlearned", lambda own: {f"_orig_mod.{n}": t for n, t in own.items()})
    _, _, warnings = planned(pair, capsys)
    assert any("'_orig_mod." in warning and "without it" in warning for warning in warnings)


def test_a_lost_eye_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is outside of the language model comes along, so both sides must have it."""
    model = make_model("Llava")
    make_sides(tmp_path, model, model)
    move(model)
    model.save_pretrained(tmp_path / "unlearned")
    eye = next(n for n in load_weights(tmp_path / "base") if "vision_tower" in n)
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    for side in ("base", "unlearned"):
        remap(tmp_path / side, lambda own: {n: t for n, t in own.items() if n != eye})
        status, sentence, _ = planned(tmp_path, capsys)
        assert (status == 13) == (side == "base")
        assert (repr(eye) in sentence) == (side == "base")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"target_modules": ["embed_tokens"]}, "token embedding"),
        ({"target_modules": ["lm_head"]}, "LM head"),
    ],
)
def test_a_plan_that_filters_nothing_is_refused(
    options: dict[str, list[str]],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CONFIGS, "apart", ("Llama", options))
    make_adapter(tmp_path, "apart")
    status, sentence, _ = planned(tmp_path, capsys)
    assert status == 14
    assert "would be filtered" in sentence
    assert reason in sentence
