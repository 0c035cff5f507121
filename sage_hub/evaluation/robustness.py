"""What brings forgotten knowledge back without any training: coarser weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_hub.checkpoint.architecture import linear_maps
from sage_hub.model.blocks import BlockModel
from sage_hub.model.weights import Weights

BITS = (8, 4)
GROUP = 128  # inputs that share a scale


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
