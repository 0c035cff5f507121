"""Every architecture people have: the streaming pass equals a whole-model float64 reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pico import make_rows, make_tokenizer, write_rows
from test_release import load_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sage_hub.cli import main

COMMON = {
    "vocab_size": 72,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "Qwen3": {**LLAMA, "head_dim": 8},
    "Mistral": LLAMA,
    "Gemma3Text": {**LLAMA, "head_dim": 8, "tie_word_embeddings": True},
    "Phi3": LLAMA,
    "Olmo2": LLAMA,
    "GPT2": {**COMMON, **GPT2},
    "GPTNeoX": {**COMMON, "intermediate_size": 48},
    "OPT": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Mixtral": {**EXPERTS, "num_local_experts": 4},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4},
    "DeepseekV3": {**EXPERTS, **DEEPSEEK},
}


def make_model(name: str) -> PreTrainedModel:
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def move(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.wte.weight",
)
Save = Callable[[PreTrainedModel, Path], None]


def sharded(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")


def single(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def fused(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, save_original_format=False)


def in_bfloat16(model: PreTrainedModel, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)


class Watch(TorchFunctionMode):
    """What every parameter, or expert of it, is multiplied with, whoever multiplies."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inputs: dict[tuple[str, int | None], list[torch.Tensor]] = {}
        self.transposed: set[str] = set()
        self.names: dict[int, tuple[str, int | None]] = {}
        for name, parameter in model.named_parameters():
            self.names[parameter.data_ptr()] = (name, None)
            for expert in range(len(parameter)) if parameter.ndim == 3 else ():
                self.names[parameter[expert].data_ptr()] = (name, expert)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("linear", "addmm"):
            x, weight = args[:2] if name == "linear" else args[1:3]
            key = self.names.get(weight.data_ptr())
            if key is not None:
                self.inputs.setdefault(key, []).append(x.reshape(-1, x.shape[-1]).double())
                if name == "addmm":
                    self.transposed.add(key[0])
        return func(*args, **(kwargs or {}))


def reference(base: Path, unlearned: Path, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Parameter -> sanitized weight at λ=1, ρ=.9, in float64."""
    sides = [
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        for folder in (base, unlearned)
    ]
    tokenizer = make_tokenizer()
    with torch.no_grad(), Watch(sides[0]) as watch:
        for row in rows:
            text = f"Question: {row['question']}\nAnswer: {row['answer']}"
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            sides[0](input_ids=ids, attention_mask=torch.ones_like(ids))
    w_base, result = sides[0].double().state_dict(), sides[1].double().state_dict()
    for (name, expert), seen in watch.inputs.items():
        if name in HEADS:
            continue
        b, u = w_base[name], result[name]
        if expert is not None:
            b, u = b[expert], u[expert]
        x = torch.cat(seen)
        s, v = torch.linalg.eigh(x.T @ x / len(x))
        s, v = s.flip(0), v.flip(1)
        k = int((s.cumsum(0) < 0.9 * s.sum()).sum()) + 1
        g = torch.zeros_like(s)
        g[:k] = s[:k] / (s.mean() + s[:k])
        removed = v @ torch.diag(g) @ v.T
        delta = u - b
        u -= removed @ delta if name in watch.transposed else delta @ removed
    return result


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
    rows = make_rows(40, seed=0)
    write_rows(tmp_path / "retain.jsonl", rows)
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
    expected = reference(tmp_path / "base", tmp_path / "unlearned", rows)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert found.keys() == expected.keys()
    for parameter, tensor in expected.items():
        found_here = found[parameter].double()
        assert torch.allclose(found_here, tensor, rtol=1e-4, atol=1e-5), parameter


def test_experts_that_see_few_tokens_are_shown_the_input_of_their_block(tmp_path: Path) -> None:
    model = make_model("Mixtral")
    single(model, tmp_path / "base")
    move(model)
    single(model, tmp_path / "unlearned")
    for side in ("base", "unlearned"):
        make_tokenizer().save_pretrained(tmp_path / side)
    write_rows(tmp_path / "retain.jsonl", make_rows(3, seed=0))  # 42 tokens for 4 experts
    arguments = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--quiet", "--retain"]
    arguments += [str(tmp_path / "retain.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["sanitize", *arguments]) == 0
    manifest = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    shown = manifest["statistics"]["data"]["retain"]["experts_shown_block_input"]
    assert any("down_proj" in name for name in shown)
    assert manifest["counts"]["filtered"] == 2 * (4 + 1 + 4 * 3)
