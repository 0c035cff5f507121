"""The method on whole models in float64, written apart from the package: what it must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Rows: TypeAlias = Sequence[dict[str, str]]


def sanitized_reference(
    base: Path,
    unlearned: Path,
    rows: Rows,
    *,
    strength: float,
    energy: float,
    gain: float,
    shares: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """Tensor name -> sanitized weight in float64, not rounded to the stored type."""
    moments = _moments(base, rows)
    w_base, result = _weights(base), _weights(unlearned)
    for module, moment in moments.items():
        name = f"{module}.weight"
        kept = (result[name] - w_base[name]) @ _filter(moment, strength, energy)
        result[name] = w_base[name] + gain * shares.get(module, 1.0) * kept
    return result


def shares_reference(
    base: Path, unlearned: Path, retain: Rows, forget: Rows, *, strength: float, energy: float
) -> dict[str, float]:
    """Module -> its share of the gain: what it forgets for what it disturbs, median 1."""
    kept, gone = _moments(base, retain), _moments(base, forget)
    w_base, w_unlearned = _weights(base), _weights(unlearned)
    worth = {}
    for module, moment in kept.items():
        name = f"{module}.weight"
        update = (w_unlearned[name] - w_base[name]) @ _filter(moment, strength, energy)
        biases = [float((update @ c @ update.T).trace()) for c in (gone[module], moment)]
        worth[module] = biases[0] / biases[1]
    median = sorted(worth.values())[len(worth) // 2]
    return {module: found / median for module, found in worth.items()}


def _filter(moment: torch.Tensor, strength: float, energy: float) -> torch.Tensor:
    """What the update is multiplied with: I − U diag(g) Uᵀ."""
    s, v = torch.linalg.eigh(moment)
    s, v = s.flip(0), v.flip(1)
    k = int((s.cumsum(0) < energy * s.sum()).sum()) + 1
    g = strength * s[:k] / (s.mean() + strength * s[:k])
    return torch.eye(len(s), dtype=torch.float64) - v[:, :k] @ torch.diag(g) @ v[:, :k].T


def _moments(base: Path, rows: Rows) -> dict[str, torch.Tensor]:
    """Linear layer -> the second moment of its inputs over all tokens of `rows`."""
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
    everything = {name: torch.cat(found) for name, found in inputs.items()}
    return {name: x.T @ x / len(x) for name, x in everything.items()}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor.double()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
