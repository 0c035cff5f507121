"""The method on whole models in float64, written apart from the package: what it must equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def sanitized_reference(
    base: Path,
    unlearned: Path,
    rows: Sequence[dict[str, str]],
    *,
    strength: float,
    energy: float,
    gain: float,
) -> dict[str, torch.Tensor]:
    """Tensor name -> sanitized weight in float64, not rounded to the stored type."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0].double())
            )
    for row in rows:  # one at a time: nothing to pad
        text = f"Question: {row['question']}\nAnswer: {row['answer']}"
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    w_base, w_unlearned = _weights(base), _weights(unlearned)
    result = {}
    for name, u in w_unlearned.items():
        module = name.removesuffix(".weight")
        if module not in inputs:
            result[name] = u
            continue
        delta = u - w_base[name]
        x = torch.cat(inputs[module])
        s, v = torch.linalg.eigh(x.T @ x / len(x))
        s, v = s.flip(0), v.flip(1)
        k = int((s.cumsum(0) < energy * s.sum()).sum()) + 1
        mean = s.mean()
        keep = torch.eye(len(s), dtype=torch.float64)
        for i in range(k):
            keep -= strength * s[i] / (mean + strength * s[i]) * torch.outer(v[:, i], v[:, i])
        result[name] = w_base[name] + gain * delta @ keep
    return result


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor.double()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
