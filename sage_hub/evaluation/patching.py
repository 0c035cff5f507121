"""What a model makes of rows while hidden states of other models are put into it, layer by layer.

Every weight is read once: between two blocks wait the states of all rows, as they are and with
those of each other model behind each layer so far, so that nothing before a patch is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sage_hub.evaluation.look import Candidate
from sage_hub.evaluation.scoring import score_states
from sage_hub.model.blocks import BlockModel, open_blocks
from sage_hub.model.compute import type_of
from sage_hub.model.spill import Spill
from sage_hub.model.weights import Weights, open_weights
from sage_hub.rows.encoding import Batch, Encoded, batches
from sage_hub.runtime.machine import GB
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

PART = 1 / 8  # of --memory: for the states that wait, and as much for those that are put in
Branch = tuple[str, int] | None  # whose states were put in, and behind which layer; or nobody's


@dataclass(frozen=True)
class Patched:
    """ℓ of each row, in nats per token: of a model as it is, and with the states of others."""

    alone: np.ndarray  # (rows,)
    by: Mapping[str, np.ndarray]  # the other's name -> (layers, rows)


def count_layers(model: BlockModel) -> int:
    """How many layers can be run one by one; none where the model is one block."""
    return sum(block.begins < block.ends for block in model.blocks)


@torch.inference_mode()
def patch(
    target: Candidate,
    sources: Mapping[str, Candidate],
    rows: Sequence[Encoded],
    settings: Settings,
    scratch: Path,
    run: Run = Run(),  # noqa: B008 - frozen
) -> Patched:
    """Put the states of each of `sources` into `target`, behind one layer at a time.

    At the tokens from which the answers of `rows` are predicted; the layers behind go on from them.
    All have the layers and the width of `target`. States that memory has no room for wait in the
    folder `scratch`; with several ranks each does a part of the rows.
    """
    shown = run.ranks.mine(list(batches(rows, settings.batch_size)))
    room, count = PART * settings.memory * GB, run.ranks.count
    with Spill(scratch, room) as given:
        for name, source in sources.items():
            what = f"Taking the states of {name}"
            with (
                _opened(source, settings) as (model, weights),
                Spill(scratch, room) as waiting,
                run.progress.counter(what, count_layers(model) * len(rows), "row") as bar,
            ):
                for layer, place, states in _behind_layers(model, weights, shown, waiting):
                    given.put((name, layer, place), states[_predicting(shown[place])])
                    bar.update(count * len(shown[place].rows))
        with _opened(target, settings) as (model, weights), Spill(scratch, room) as waiting:
            layers = count_layers(model)
            runs = len(model.blocks) + len(sources) * layers * (layers + 1) // 2
            what = f"Patching with those of {', '.join(sources)}"
            with run.progress.counter(what, runs * len(rows), "row") as bar:
                found = _losses(
                    model,
                    weights,
                    [(batch, [[_answer(rows[place])] for place in batch.rows]) for batch in shown],
                    sources,
                    given,
                    waiting,
                    lambda batch: bar.update(count * len(batch.rows)),
                )
    losses = {key: loss for part in run.ranks.all(found) for key, loss in part.items()}

    def of(branch: Branch) -> list[float]:
        return [losses[branch, place] for place in range(len(rows))]

    by = {name: np.array([of((name, n)) for n in range(layers)]) for name in sources}
    return Patched(np.array(of(None)), by)


@contextmanager
def _opened(candidate: Candidate, settings: Settings) -> Iterator[tuple[BlockModel, Weights]]:
    side, dtype = candidate.side, type_of(settings.compute_dtype)
    with (
        open_weights(side, candidate.base, candidate.blend) as weights,
        open_blocks(side, weights, settings.device, dtype) as model,
    ):
        yield model, weights


def _behind_layers(
    model: BlockModel, weights: Weights, shown: Sequence[Batch], waiting: Spill
) -> Iterator[tuple[int, int, Tensor]]:
    """Layer, place of the batch, and its states behind that layer (rows, tokens, features)."""
    for block in model.blocks[:-1]:
        with model.holding(block, weights):
            for place, batch in enumerate(shown):
                states = model.run(block, batch, waiting.get(place))
                waiting.put(place, states)
                if block.begins < block.ends:
                    yield block.begins, place, states


def _losses(
    model: BlockModel,
    weights: Weights,
    shown: Sequence[tuple[Batch, Sequence[Sequence[Sequence[int]]]]],
    sources: Collection[str],
    given: Spill,
    waiting: Spill,
    step: Callable[[Batch], object],
) -> dict[tuple[Branch, int], float]:
    """ℓ by branch and row, for batches with the answers of their rows.

    From the states `given` by source, layer and place of the batch.
    """
    found: dict[tuple[Branch, int], float] = {}
    branches: list[Branch] = [None]
    for block in model.blocks:
        with model.holding(block, weights, head=True):
            for branch, (place, (batch, answers)) in product(branches, enumerate(shown)):
                states = model.run(block, batch, waiting.get((branch, place)))
                if block.finishes:
                    scored = score_states(model, batch, states, answers, attacked=False)
                    for row, (one,) in zip(batch.rows, scored, strict=True):
                        found[branch, row] = one.loss
                else:
                    waiting.put((branch, place), states)
                step(batch)
        for name in sources if block.begins < block.ends else ():
            branches.append((name, block.begins))
            for place, (batch, _) in enumerate(shown):
                own, other = waiting.get((None, place)), given.get((name, block.begins, place))
                assert own is not None
                assert other is not None
                patched = own.clone()
                patched[_predicting(batch)] = other
                waiting.put((branches[-1], place), patched)
    return found


def _predicting(batch: Batch) -> Tensor:
    """(rows, tokens) bool: the tokens behind which one of the answer stands."""
    return torch.cat([batch.answer[:, 1:], torch.zeros_like(batch.answer[:, :1])], 1)


def _answer(row: Encoded) -> list[int]:
    return list(row.ids[row.answer_start :])
