"""What a loaded model thinks of rows: answer probabilities, choices, losses; and how robustly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sage_hub.rows.encoding import Batch, Encoded, batches

BATCH = 10


def answer_logp(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability in nats and number of tokens of each answer in `batch`, (rows,) each.

    Padding is on the right, where causal attention does not look. Only answers go through the head.
    """
    device = model.device
    ids, targets = batch.ids.to(device), batch.answer[:, 1:].to(device)
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden[targets]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][targets], reduction="none")
    line = targets.nonzero()[:, 0]
    rows = len(batch.rows)
    logp = torch.zeros(rows, device=device).index_add(0, line, -losses)
    return logp, targets.sum(dim=1).float()


@torch.inference_mode()
def losses(model: Any, rows: Sequence[Encoded], batch_size: int = BATCH) -> list[float]:
    """Mean negative log-likelihood per answer token of each row, in nats."""
    found = [0.0] * len(rows)
    for batch in batches(rows, batch_size):
        logp, count = answer_logp(model, batch)
        for place, loss in zip(batch.rows, (-logp / count).tolist(), strict=True):
            found[place] = loss
    return found


def probabilities(model: Any, rows: Sequence[Encoded], batch_size: int = BATCH) -> list[float]:
    """TOFU's probability exp(−ℓ) of each row."""
    return torch.tensor(losses(model, rows, batch_size)).neg().exp().tolist()


def choices(model: Any, questions: Sequence[Sequence[Encoded]]) -> list[float]:
    """p(right) / Σ p(candidates) of each question, the right answer being the first."""
    flat = probabilities(model, [row for rows in questions for row in rows], 4 * BATCH)
    found, first = [], 0
    for rows in questions:
        own = flat[first : first + len(rows)]
        found.append(own[0] / sum(own))
        first += len(rows)
    return found


def round_to_nearest(weight: Tensor, bits: int, group: int = 64) -> Tensor:
    """`weight` (out, in) after symmetric round-to-nearest in groups of `group` inputs."""
    size = group if weight.shape[1] % group == 0 else weight.shape[1]
    grouped = weight.float().unflatten(1, (-1, size))
    top = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / top
    rounded = (grouped / scale).round().clamp(-top - 1, top) * scale
    return rounded.flatten(1).to(weight.dtype)


@contextmanager
def quantized(weights: dict[str, Tensor], bits: int) -> Iterator[None]:
    """Within it each of `weights` is rounded to `bits` bits, in place."""
    kept = {name: weight.clone() for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.copy_(round_to_nearest(weight, bits))
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])
