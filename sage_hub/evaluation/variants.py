"""Variants of one model on the same rows, in one pass over its weights: what a search asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.evaluation.comparison import figures
from sage_hub.evaluation.evaluate import Study, prepared
from sage_hub.evaluation.look import seen_by
from sage_hub.evaluation.scoring import Known, score_each
from sage_hub.model.blocks import cut, open_blocks
from sage_hub.model.compute import type_of
from sage_hub.model.weights import Blend, open_blends
from sage_hub.runtime.machine import GB
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

ROOM = 1 / 8  # of --memory, at most: for what is read or computed once for all variants


@dataclass(frozen=True)
class Variant:
    """A variant's figures, set and metric -> value, without generated answers, and their rows."""

    figures: Mapping[tuple[str, str], float]
    known: Known


def room_for_a_block(side: Checkpoint, settings: Settings) -> float:
    """The bytes of the largest block in float32, so that it is there for all variants."""
    model = cut(side.of_model.empty_model())
    state = model.model.state_dict(keep_vars=True)
    largest = max(sum(state[n].numel() for n in block.parameters) for block in model.blocks)
    return min(ROOM * settings.memory * GB, float(largest) * torch.float32.itemsize)


def evaluate_variants(
    side: Checkpoint,
    base: Checkpoint,
    variants: Mapping[str, Blend | None],
    study: Study,
    settings: Settings,
    scratch: Path,
    run: Run = Run(),  # noqa: B008 - frozen
) -> dict[str, Variant]:
    """What each of `variants` makes of the rows of `study`.

    A variant is what its blend makes of the weights of `base` and of `side`, or `side` itself.
    """
    sets, _ = prepared(study, settings)
    rows = [row for part in sets for told in part.told for row in told]
    what = f"Evaluating {', '.join(variants)}"
    room = room_for_a_block(side, settings)
    with (
        open_blends(side, base, [*variants.values()], room) as weights,
        open_blocks(side, weights[0], settings.device, type_of(settings.compute_dtype)) as model,
    ):
        scored = score_each(model, weights, rows, settings, scratch, run=run, what=what)
    found: dict[str, Variant] = {}
    for name, own in zip(variants, scored, strict=True):
        made, _ = figures(sets, {(name, None): seen_by(sets, own)}, settings.seed, study.origin)
        values = {(key.set, key.metric): figure.value for key, figure in made.items()}
        found[name] = Variant(values, dict(zip(rows, own, strict=True)))
    return found
