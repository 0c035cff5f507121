"""Every architecture people have: the streaming pass equals a whole-model float64 reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.architectures import (
    ARCHITECTURES,
    LLAMA,
    check_release,
    load,
    make_model,
    make_sides,
    move,
    reference,
    single,
)
from support.checkpoints import load_weights
from support.pico import make_rows, make_tokenizer, write_rows
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from sage_hub.cli.main import main

SEEING = ("Llava", "Qwen2_5_VL")


Save = Callable[[PreTrainedModel, Path], None]


def sharded(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")


def fused(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, save_original_format=False)


def in_bfloat16(model: PreTrainedModel, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)


LAYOUTS = {
    "sharded": (sharded, single),
    "fused": (fused, fused),
    "fused base": (fused, sharded),
    "fused unlearned": (sharded, fused),
    "bfloat16 base": (in_bfloat16, sharded),
}


@pytest.mark.parametrize(
    "name, layout",
    [(name, "sharded") for name in ARCHITECTURES]
    + [("Llama", "bfloat16 base")]
    + [
        (n, way) for n in ("Mixtral", "Qwen3Moe", "DeepseekV3") for way in LAYOUTS if "fused" in way
    ],
)
def test_streaming_equals_the_whole_model(name: str, layout: str, tmp_path: Path) -> None:
    save_base, save_unlearned = LAYOUTS[layout]
    model = make_model(name)
    save_base(model, tmp_path / "base")
    model.float()
    move(model)
    save_unlearned(model, tmp_path / "unlearned")
    for side in ("base", "unlearned"):
        make_tokenizer().save_pretrained(tmp_path / side)
    if layout == "bfloat16 base":  # the same weights for both, but stored in two types
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    write_rows(tmp_path / "retain.jsonl", make_rows(40, seed=0))
    arguments = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--quiet", "--retain"]
    arguments += [str(tmp_path / "retain.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["sanitize", *arguments]) == 0

    manifest = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    assert manifest["statistics"]["data"]["retain"]["experts_shown_block_input"] == []
    # Names, order, shapes and types are those of the unlearned side.
    ours, source = load_weights(tmp_path / "out"), load_weights(tmp_path / "unlearned")
    assert [(n, t.shape, t.dtype) for n, t in ours.items()] == [
        (n, t.shape, t.dtype) for n, t in source.items()
    ]
    done = check_release(tmp_path)
    if name in SEEING:
        eyes = {n for n in done if n.startswith(("vision_tower", "visual", "multi_modal"))}
        assert eyes
        assert {done[n]["reason"] for n in eyes} == {"outside the language model"}


def test_experts_that_see_few_tokens_are_shown_the_input_of_their_block(tmp_path: Path) -> None:
    model = make_model("Mixtral")
    arguments = make_sides(tmp_path, model, model)
    move(model)
    single(model, tmp_path / "unlearned")
    write_rows(tmp_path / "retain.jsonl", make_rows(3, seed=0))  # 42 tokens for 4 experts
    assert main(arguments) == 0
    manifest = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    shown = manifest["statistics"]["data"]["retain"]["experts_shown_block_input"]
    assert any("down_proj" in name for name in shown)
    assert manifest["counts"]["filtered"] == 2 * (4 + 1 + 4 * 3)


def make_tied(tied: bool) -> PreTrainedModel:
    """The same model either way, but for whether its head is a weight of its own."""
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    )
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("base_is_tied", [True, False])
def test_one_side_ties_its_head_and_the_other_does_not(base_is_tied: bool, tmp_path: Path) -> None:
    base, unlearned = make_tied(base_is_tied), make_tied(not base_is_tied)
    move(unlearned)
    assert main(make_sides(tmp_path, base, unlearned)) == 0
    head = ["lm_head.weight" in load_weights(tmp_path / s) for s in ("base", "unlearned", "out")]
    assert head == [not base_is_tied, base_is_tied, base_is_tied]
    done = check_release(tmp_path)
    assert done["model.embed_tokens.weight"]["reason"] == "token embedding"
    if base_is_tied:
        assert done["lm_head.weight"]["reason"] == "LM head"


@pytest.mark.parametrize("old", [("base",), ("unlearned",), ("base", "unlearned")])
def test_names_of_before_a_prefix_that_transformers_knows(
    old: tuple[str, ...], tmp_path: Path
) -> None:
    base = make_model("GPT2")
    arguments = make_sides(tmp_path, base, base)
    move(base)
    base.save_pretrained(tmp_path / "unlearned")
    for side in old:
        file = tmp_path / side / "model.safetensors"
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
        assert "wte.weight" in tensors
        save_file(tensors, file, metadata={"format": "pt"})
    assert main(arguments) == 0
    done = check_release(tmp_path)
    assert set(done) == set(load_file(tmp_path / "unlearned" / "model.safetensors"))
    assert sum(tensor["action"] == "filtered" for tensor in done.values()) == 2 * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_another_type_for_the_release(dtype: str, tmp_path: Path) -> None:
    base, unlearned = make_model("Llama"), make_model("Llama")
    move(unlearned)
    arguments = make_sides(tmp_path, base, unlearned)
    assert main([*arguments, "--out-dtype", dtype]) == 0
    wanted = getattr(torch, dtype)
    assert {t.dtype for t in load_weights(tmp_path / "out").values()} == {wanted}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    rows = [json.loads(line) for line in (tmp_path / "retain.jsonl").read_text().splitlines()]
    expected = reference(tmp_path / "base", tmp_path / "unlearned", rows)
    found = load(tmp_path / "out", dtype="auto").state_dict()
    for parameter, tensor in expected.items():
        rtol = 2**-8 if dtype == "bfloat16" else 1e-4
        assert found[parameter].dtype == wanted
        assert torch.allclose(found[parameter].double(), tensor, rtol=rtol, atol=1e-5), parameter


def test_a_type_that_cannot_hold_the_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, unlearned = make_model("Llama"), make_model("Llama")
    move(unlearned)
    with torch.no_grad():
        unlearned.lm_head.weight[0, 0] = 1e6
    arguments = make_sides(tmp_path, base, unlearned)
    assert main([*arguments, "--out-dtype", "float16"]) == 15
    assert "'lm_head.weight' overflows torch.float16" in capsys.readouterr().err
