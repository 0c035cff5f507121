"""LoRA adapters of pico models, and a run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sage_hub.cli.main import main
from support.architectures import make_model
from support.pico import make_rows, make_tokenizer, write_rows

ADAPTER = "adapter_model.safetensors"


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rsLoRA": (
        "Llama",
        {
            "target_modules": ["q_proj", "gate_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"layers.0.mlp.gate_proj": 3},
        },
    ),
    "whole modules": (
        "Llama",
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "up_proj"]},
    ),
    "head and embedding": ("Llama", {"target_modules": ["lm_head", "embed_tokens", "k_proj"]}),
    "biases": ("Llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "GPT2": ("GPT2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Phi3": ("Phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "tied": ("Gemma3Text", {"target_modules": ["q_proj", "down_proj"]}),
}


def make_adapter(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    """Write folder/base, the adapter folder/unlearned and the two in one, folder/merged."""
    architecture, options = CONFIGS[name]
    base = make_model(architecture)
    base.save_pretrained(folder / "base", max_shard_size="30KB")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.1 if "lora" in parameter_name else 0.02
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "unlearned")
    tensors = load_file(folder / "unlearned" / ADAPTER)
    tensors = {tensor: value.to(dtype).contiguous() for tensor, value in tensors.items()}
    save_file(tensors, folder / "unlearned" / ADAPTER, metadata={"format": "pt"})
    load_merged(folder / "base", folder / "unlearned").save_pretrained(folder / "merged")
    for side in ("base", "merged"):
        make_tokenizer().save_pretrained(folder / side)
    write_rows(folder / "retain.jsonl", make_rows(40, seed=0))
    write_rows(folder / "forget.jsonl", make_rows(10, seed=1))


def load_merged(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def sanitize(folder: Path, *options: str) -> Path:
    arguments = [str(folder / "base"), str(folder / "unlearned"), "--output", str(folder / "out")]
    arguments += ["--quiet", "--retain", str(folder / "retain.jsonl"), *options]
    assert main(["sanitize", *arguments]) == 0
    return folder / "out"
