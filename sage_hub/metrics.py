"""Forget and retain metrics of one model: how probable it finds the answers of each set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sage_hub.encoding import Encoded, batches
from sage_hub.progress import SILENT, Progress

# Direction of each metric on a retained set; on the forget set it is the opposite.
BETTER_ON_RETAIN = {"probability": "higher", "loss": "lower"}


def direction(metric: str, which: str) -> str:
    """Whether "higher" or "lower" is better for `metric` on the set `which`."""
    better = BETTER_ON_RETAIN[metric]
    if which != "forget":
        return better
    return "lower" if better == "higher" else "higher"


@dataclass(frozen=True)
class Result:
    """A metric of one model on one set, over `rows` rows and `tokens` answer tokens."""

    model: str
    set: str
    metric: str
    value: float
    direction: str
    rows: int
    tokens: int


@torch.inference_mode()
def answer_losses(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    what: str = "Evaluating",
    progress: Progress = SILENT,
) -> list[tuple[float, int]]:
    """Per row: the mean negative log-likelihood of its answer tokens in nats, and their number.

    Rows whose answer was cut away by truncation count zero tokens and NaN.
    """
    losses = [(math.nan, 0)] * len(rows)
    with progress.counter(what, len(rows), "row") as bar:
        for batch in batches(rows, batch_size):
            ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for line, place in enumerate(batch.rows):
                answer = batch.answer[line, 1:].to(model.device)
                if answer.any():
                    # Row by row, so that float32 logits of a whole batch never exist at once.
                    loss = torch.nn.functional.cross_entropy(
                        logits[line, :-1][answer].float(), ids[line, 1:][answer]
                    )
                    losses[place] = (float(loss), int(answer.sum()))
            bar.update(len(batch.rows))
    return losses


def evaluate(
    name: str,
    model: PreTrainedModel,
    sets: Mapping[str, Sequence[Encoded]],
    *,
    batch_size: int,
    progress: Progress = SILENT,
) -> list[Result]:
    """Probability and loss of `model` on each of `sets`.

    Probability is the mean over rows of exp(−ℓ), ℓ the row's mean negative log-likelihood per
    answer token, as TOFU defines it (Maini et al. 2024, arXiv 2401.06121); loss is the mean of
    the negative log-likelihood over all answer tokens of the set, in nats.
    """
    results = []
    for which, rows in sets.items():
        losses = [
            (loss, tokens)
            for loss, tokens in answer_losses(
                model,
                rows,
                batch_size=batch_size,
                what=f"Evaluating {name} on {which}",
                progress=progress,
            )
            if tokens
        ]
        if not losses:
            continue
        total = sum(tokens for _, tokens in losses)
        values = {
            "probability": math.fsum(math.exp(-loss) for loss, _ in losses) / len(losses),
            "loss": math.fsum(loss * tokens for loss, tokens in losses) / total,
        }
        results += [
            Result(name, which, metric, value, direction(metric, which), len(losses), total)
            for metric, value in values.items()
        ]
    return results


def retain_recovered(base: float, unlearned: float, sanitized: float) -> float | None:
    """The share of the lost retention that came back: (sanitized − unlearned) / (base − unlearned).

    None where nothing was lost.
    """
    lost = base - unlearned
    return (sanitized - unlearned) / lost if lost > 0 else None
