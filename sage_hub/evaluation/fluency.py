"""How a model talks about what it forgot: an unlearned model that babbles is not a good one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ProxyError
from sage_hub.evaluation.bootstrap import Estimate, estimate
from sage_hub.evaluation.comparison import Key
from sage_hub.evaluation.metrics import Seen
from sage_hub.evaluation.scoring import score
from sage_hub.model.blocks import open_blocks
from sage_hub.model.compute import type_of
from sage_hub.model.weights import open_weights
from sage_hub.rows.benchmark import evaluation_encoder
from sage_hub.rows.encoding import Encoded, Encoder
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

ANSWERS = 40  # of each model that are read, at most


def fluency(
    reader: Checkpoint,
    said: Mapping[str, Sequence[Seen]],
    tokens_of: Checkpoint,
    settings: Settings,
    scratch: Path,
    run: Run,
) -> dict[Key, Estimate]:
    """What `reader`, the base, makes of each model's own answers to the forget set.

    The mean negative log-likelihood of their tokens, in nats: little of what the base might say
    itself, much of babble.
    """
    encoder = evaluation_encoder(tokens_of, settings)
    answers = {model: _own(rows, encoder) for model, rows in said.items()}
    flat = [row for rows in answers.values() for row in rows]
    if not flat:
        return {}
    what = "Reading what they answered"
    with (
        open_weights(reader) as weights,
        open_blocks(reader, weights, settings.device, type_of(settings.compute_dtype)) as model,
    ):
        scored = iter(score(model, weights, flat, settings, scratch, run=run, what=what))
    found = {}
    for name, rows in answers.items():
        losses = [loss for loss in (next(scored).loss for _ in rows) if math.isfinite(loss)]
        if losses:
            found[Key(name, "forget", "fluency")] = estimate(losses, seed=settings.seed)
    return found


def _own(rows: Sequence[Seen], encoder: Encoder) -> list[Encoded]:
    """What was answered, behind what was asked; nothing where nothing was said."""
    found = []
    for one in [row for row in rows if row.said][:ANSWERS]:
        with suppress(ProxyError):  # it may be anything, also what a template would change
            told = encoder.row(replace(one.row, answer=f" {one.said}"), "an answer")
            found += [told] * bool(told.answer_tokens)
    return found
