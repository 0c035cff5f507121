"""Pico models of every architecture people have, and what a release of them must equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from support.pico import make_rows, make_tokenizer, write_rows

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


VISION = {"hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 8}


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
    "GptOss": {**EXPERTS, "head_dim": 8, "num_local_experts": 4, "rope_scaling": None},
    "Llava": {
        "text_config": {"model_type": "llama", **LLAMA},
        "vision_config": {
            **{"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            **{"num_hidden_layers": 1, "num_attention_heads": 4},
        },
        "image_token_index": 71,
    },
    "Qwen2_5_VL": {
        "text_config": {**LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
        "vision_config": {
            **{"depth": 1, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
            **VISION,
        },
        "image_token_id": 71,
    },
}


def auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, **options
    )
    return model.eval()


def make_model(name: str) -> PreTrainedModel:
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).float()
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


def single(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


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
        if name in ("linear", "addmm", "matmul"):
            x, weight = args[1:3] if name == "addmm" else args[:2]
            key = self.names.get(weight.data_ptr())
            if key is not None:
                self.inputs.setdefault(key, []).append(x.reshape(-1, x.shape[-1]).double())
                if name != "linear":
                    self.transposed.add(key[0])
        return func(*args, **(kwargs or {}))


def reference(base: Path, unlearned: Path, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Parameter -> sanitized weight at λ=10, ρ=.9, in float64."""
    sides = [
        load(folder, dtype=torch.float32, experts_implementation="eager")
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
        g[:k] = 10 * s[:k] / (s.mean() + 10 * s[:k])
        removed = v @ torch.diag(g) @ v.T
        delta = u - b
        u -= removed @ delta if name in watch.transposed else delta @ removed
    return result


def make_sides(folder: Path, base: PreTrainedModel, unlearned: PreTrainedModel) -> list[str]:
    """Save two models with tokenizer and proxy; the arguments of a run on them."""
    for side, model in (("base", base), ("unlearned", unlearned)):
        model.save_pretrained(folder / side)
        make_tokenizer().save_pretrained(folder / side)
    write_rows(folder / "retain.jsonl", make_rows(40, seed=0))
    arguments = [str(folder / "base"), str(folder / "unlearned"), "--quiet", "--retain"]
    return ["sanitize", *arguments, str(folder / "retain.jsonl"), "--output", str(folder / "out")]


def check_release(folder: Path) -> dict[str, dict[str, Any]]:
    """The release equals the reference; what was done with each tensor."""
    rows = [json.loads(line) for line in (folder / "retain.jsonl").read_text().splitlines()]
    expected = reference(folder / "base", folder / "unlearned", rows)
    found = load(folder / "out", dtype="auto").state_dict()
    assert found.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert torch.allclose(found[parameter].double(), tensor, rtol=1e-4, atol=1e-5), parameter
    manifest = json.loads((folder / "out" / "sage" / "manifest.json").read_text())
    return {tensor["name"]: tensor for tensor in manifest["tensors"]}
