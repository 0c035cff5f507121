"""What brings forgotten knowledge back: coarser weights, and a little training on some of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sage_hub.checkpoint.architecture import linear_maps
from sage_hub.model.blocks import BlockModel
from sage_hub.model.weights import Weights
from sage_hub.rows.encoding import Encoded, batches

BITS = (8, 4)
GROUP = 128  # inputs that share a scale


@dataclass(frozen=True)
class Recipe:
    """How a model is taught a part of the forget set again. The same for every release."""

    rows: int = 20  # half of the forget rows at most
    epochs: int = 2
    batch_size: int = 4
    learning_rate: float = 2e-5  # AdamW without weight decay, in float32

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


RECIPE = Recipe()
# Weight, gradient and two moments of AdamW in float32, and the weight in its own type.
TRAINING_BYTES = 18


def quantized(weights: Weights, model: BlockModel, bits: int) -> Weights:
    """`weights` with those of linear layers rounded to `bits` bits.

    Symmetric round-to-nearest with a scale per output and GROUP inputs, as the plainest weight
    quantizers do; the LM head and the embedding stay as they are.
    """
    maps = linear_maps(model.model)

    def read(name: str) -> Tensor:
        weight = weights(name)
        if name not in maps:
            return weight
        transposed = maps[name][0].transposed
        rounded = round_to_nearest(weight.mT if transposed else weight, bits)
        return rounded.mT if transposed else rounded

    return read


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """`weight` (…, in), each GROUP of inputs on a grid of its own with 2^bits − 1 steps."""
    steps = 2 ** (bits - 1) - 1
    groups = []
    for group in torch.split(weight.float(), GROUP, dim=-1):
        scale = group.abs().amax(dim=-1, keepdim=True) / steps
        groups.append(torch.where(scale > 0, (group / scale).round() * scale, group))
    return torch.cat(groups, dim=-1).to(weight.dtype)


def choose_taught(rows: int, seed: int) -> list[int]:
    """The places of the forget rows that are taught again; the others show what comes back."""
    places = list(range(rows))
    random.Random(seed).shuffle(places)
    return sorted(places[: min(RECIPE.rows, rows // 2)])


def relearn(model: BlockModel, rows: Sequence[Encoded], seed: int) -> None:
    """Train `model`, which must be whole and in memory, on the answers of `rows` by RECIPE."""
    trained = model.model.requires_grad_(True)
    # The parameters alone, as what is computed and not stored (rotary frequencies) has its type.
    types = {parameter: parameter.dtype for parameter in trained.parameters()}
    for parameter in types:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained.parameters(), RECIPE.learning_rate, weight_decay=0)
    order = random.Random(seed)
    for _ in range(RECIPE.epochs):
        places = list(range(len(rows)))
        order.shuffle(places)
        for start in range(0, len(places), RECIPE.batch_size):
            part = [rows[place] for place in places[start : start + RECIPE.batch_size]]
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
    trained.requires_grad_(False)
    for parameter, dtype in types.items():
        parameter.data = parameter.data.to(dtype)
