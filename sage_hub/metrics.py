"""Forget and retain metrics of one model: how probable it finds the answers of each set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from sage_hub.blocks import Block, BlockModel
from sage_hub.encoding import Batch, Encoded, batches
from sage_hub.progress import SILENT, Progress
from sage_hub.ranks import ALONE, Ranks
from sage_hub.spill import Spill
from sage_hub.weights import Weights

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
    model: BlockModel,
    weights: Weights,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    hidden: Spill,
    ranks: Ranks = ALONE,
    what: str = "Evaluating",
    progress: Progress = SILENT,
) -> list[tuple[float, int]]:
    """Per row: the mean negative log-likelihood of its answer tokens in nats, and their number.

    `hidden` keeps the rows between two blocks of the model; with several `ranks` each does a part
    of them. Rows whose answer was cut away by truncation count zero tokens and NaN.
    """
    losses: dict[int, tuple[float, int]] = {}
    own = ranks.mine(list(batches(rows, batch_size)))
    with progress.counter(what, len(rows), "row") as bar:
        for block in model.blocks:
            with model.holding(block, weights, head=True):
                for number, batch in enumerate(own):
                    before = hidden.get(number)
                    if block.finishes:
                        losses |= _losses(model, block, batch, before)
                    else:
                        hidden.put(number, model.run(block, batch, before))
                    bar.update(ranks.count * len(batch.rows) / len(model.blocks))
    everything = {place: found for part in ranks.all(losses) for place, found in part.items()}
    return [everything[place] for place in range(len(rows))]


def _losses(
    model: BlockModel, block: Block, batch: Batch, before: Tensor | None
) -> Iterator[tuple[int, tuple[float, int]]]:
    """Place of each row -> its loss and tokens, from what the last block makes of `before`."""
    for line, place in enumerate(batch.rows):
        row = batch.row(line)
        answer = row.answer[0, 1:]
        if not answer.any():
            yield place, (math.nan, 0)
            continue
        # Row by row, so that the logits of a whole batch never exist at once.
        states = None if before is None else before[line : line + 1, : row.ids.shape[1]]
        logits = model.run(block, row, states, logits=True)[0]
        wanted = row.ids[0, 1:][answer].to(logits.device)
        chosen = logits[:-1][answer.to(logits.device)].float()
        yield place, (float(torch.nn.functional.cross_entropy(chosen, wanted)), len(wanted))


def evaluate(
    name: str,
    model: BlockModel,
    weights: Weights,
    sets: Mapping[str, Sequence[Encoded]],
    *,
    batch_size: int,
    hidden: Spill,
    ranks: Ranks = ALONE,
    progress: Progress = SILENT,
) -> list[Result]:
    """Probability and loss of `model` on each of `sets`, from one pass over its weights.

    Probability is the mean over rows of exp(−ℓ), ℓ the row's mean negative log-likelihood per
    answer token, as TOFU defines it (Maini et al. 2024, arXiv 2401.06121); loss is the mean of
    the negative log-likelihood over all answer tokens of the set, in nats.
    """
    found = iter(
        answer_losses(
            model,
            weights,
            [row for rows in sets.values() for row in rows],
            batch_size=batch_size,
            hidden=hidden,
            ranks=ranks,
            what=f"Evaluating {name}",
            progress=progress,
        )
    )
    results = []
    for which, rows in sets.items():
        losses = [(loss, tokens) for loss, tokens in islice(found, len(rows)) if tokens]
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
