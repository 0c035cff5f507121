"""What brings forgotten knowledge back: training on some of it, or on what was to be kept."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from sage_hub.calibration.budget import RUNTIME
from sage_hub.model.blocks import BlockModel
from sage_hub.rows.encoding import Encoded, batches


@dataclass(frozen=True)
class Recipe:
    """How a model is taught rows again. The same for every release."""

    rows: int = 20  # half of the forget rows at most
    epochs: int = 2  # after which the model is *relearned*
    batch_size: int = 4
    learning_rate: float = 2e-5  # AdamW without weight decay, in float32
    steps: tuple[int, ...] = (10, 25, 50, 100)  # the same training goes on; points of a curve
    retain_rows: int = 200  # at most, for as many steps as the longest of these

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return {**asdict(self), "steps": list(self.steps)}


RECIPE = Recipe()
RELEARNED, ON_RETAIN = "relearned", "relearned_retain"
BEFORE = "relearned_0"  # the rows that are not taught, before anything is
CURVE = {f"relearned_{steps}": steps for steps in RECIPE.steps}
RECOVERING = (RELEARNED, *CURVE, ON_RETAIN)  # the conditions with a relearning_recovery
# Weight, gradient and two moments of AdamW in float32, and the weight in its own type.
TRAINING_BYTES = 18
# What is kept of a token for the way back, in float32: so many numbers for each feature of a layer,
# and for each word that could come next.
KEPT, KEPT_OF_WORDS = 36, 4


@dataclass(frozen=True)
class Attack:
    """Rows that a model is taught, and when it is looked at."""

    what: str
    taught: Sequence[Encoded]
    looks: Mapping[str, int]  # condition -> after how many steps

    @property
    def stops(self) -> set[int]:
        """After how many steps there is something to look at."""
        return set(self.looks.values())


def choose_taught(rows: int, seed: int) -> list[int]:
    """The places of the forget rows that are taught again; the others show what comes back."""
    places = list(range(rows))
    random.Random(seed).shuffle(places)
    return sorted(places[: min(RECIPE.rows, rows // 2)])


def on_forget(taught: Sequence[Encoded]) -> Attack:
    """A part of the forget set is taught again: RELEARNED, and the points of the CURVE."""
    own = RECIPE.epochs * -(-len(taught) // RECIPE.batch_size)
    return Attack("relearning", taught, {RELEARNED: own, **CURVE})


def on_retain(rows: Sequence[Encoded], seed: int) -> Attack:
    """Rows that were to be kept are taught, and none that had to go."""
    some = random.Random(seed).sample(list(rows), min(RECIPE.retain_rows, len(rows)))
    return Attack("relearning on retained rows", some, {ON_RETAIN: max(RECIPE.steps)})


def trained_tokens(tokens: int, longest: int) -> int:
    """Tokens that both attacks together train on, at most, in sets of `tokens` tokens."""
    shown = RECIPE.batch_size * max(RECIPE.steps)  # rows, of each attack
    times = (-(-shown // rows) for rows in (RECIPE.rows, RECIPE.retain_rows))
    return sum(min(shown * longest, again * tokens) for again in times)


def training_bytes(model: BlockModel, rows: Sequence[Encoded]) -> float:
    """The memory that it takes to train `model` on `rows`, about."""
    whole, (words, width) = model.model, model.model.get_input_embeddings().weight.shape
    layers: int = whole.config.get_text_config().num_hidden_layers
    tokens = RECIPE.batch_size * max(len(row.ids) for row in rows)
    kept: float = 4.0 * tokens * (KEPT * layers * width + KEPT_OF_WORDS * words)
    trained: int = TRAINING_BYTES * sum(parameter.numel() for parameter in whole.parameters())
    return RUNTIME + trained + kept


def relearn(
    model: BlockModel, rows: Sequence[Encoded], seed: int, stops: Collection[int]
) -> Iterator[int]:
    """Train `model`, which must be whole and in memory, on the answers of `rows` by RECIPE.

    In one run; it yields the number of steps at each of `stops`, the weights being in their own
    type then.
    """
    trained = model.model.requires_grad_(True)
    # The parameters alone, as what is computed and not stored (rotary frequencies) has its type.
    types = {parameter: parameter.dtype for parameter in trained.parameters()}
    for parameter in types:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained.parameters(), RECIPE.learning_rate, weight_decay=0)
    for step, part in enumerate(islice(_shown(rows, seed), max(stops)), 1):
        (batch,) = batches(part, len(part))
        labels = batch.ids.masked_fill(~batch.answer, -100)
        trained(
            input_ids=batch.ids.to(model.device),
            attention_mask=batch.mask.to(model.device),
            labels=labels.to(model.device),
            use_cache=False,
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in stops:
            exact = {parameter: parameter.data for parameter in types}
            for parameter, dtype in types.items():
                parameter.data = parameter.data.to(dtype)
            trained.requires_grad_(False)
            yield step
            trained.requires_grad_(True)
            for parameter, weight in exact.items():
                parameter.data = weight
    trained.requires_grad_(False)
    for parameter, dtype in types.items():
        parameter.data = parameter.data.to(dtype)


def _shown(rows: Sequence[Encoded], seed: int) -> Iterator[list[Encoded]]:
    """Batches without an end, every row once in each epoch, in an order of its own."""
    order = random.Random(seed)
    while True:
        places = list(range(len(rows)))
        order.shuffle(places)
        for start in range(0, len(places), RECIPE.batch_size):
            yield [rows[place] for place in places[start : start + RECIPE.batch_size]]
