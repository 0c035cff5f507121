"""Several answers to each question, as a model's users get them: what greedy ones do not show."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.evaluation.scoring import Choice, answer
from sage_hub.evaluation.suites import SAMPLES, Answering
from sage_hub.model.blocks import BlockModel
from sage_hub.rows.encoding import Encoded
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

SAMPLED = "sampled"  # the condition


def sample_answers(
    model: BlockModel,
    tokens_of: Checkpoint,
    rows: Mapping[int, Encoded],
    kind: Answering,
    settings: Settings,
    *,
    run: Run = Run(),  # noqa: B008 - frozen
    what: str = "Sampling",
) -> dict[int, tuple[str, ...]]:
    """SAMPLES answers to each of `rows`, at temperature 1 and from all words.

    The same for the same weights, seed and rows, whatever the batches. `model` must be whole, and
    in memory.
    """
    many = [row for row in rows.values() for _ in range(SAMPLES)]
    with torch.random.fork_rng():  # which transformers asks for the one token that is left
        texts = answer(
            model,
            tokens_of,
            many,
            replace(kind, tuned=False),
            settings.batch_size,
            run=run,
            what=what,
            drawing=partial(drawing, settings.seed),
        )
    starts = range(0, len(texts), SAMPLES)
    return {
        place: tuple(texts[start : start + SAMPLES])
        for place, start in zip(rows, starts, strict=True)
    }


def drawing(seed: int, places: Sequence[int]) -> Choice:
    """Draws the next token of rows by its probability, by a row of chances for each of `places`."""
    chances = [random.Random(f"{seed} {place}") for place in places]

    def choose(logits: Tensor) -> Tensor:
        held = logits.float().nan_to_num().softmax(-1).cumsum(-1)
        drawn = torch.tensor([[chance.random()] for chance in chances], device=held.device)
        taken = torch.searchsorted(held, drawn * held[:, -1:])
        return torch.full_like(logits, -torch.inf).scatter(1, taken, 0.0)

    return choose
