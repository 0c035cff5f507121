"""Weights in the place of others in a model, for as long as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sage_hub.model.weights import Weights


@contextmanager
def filled(
    model: PreTrainedModel, names: Sequence[str], weights: Weights, device: str
) -> Iterator[None]:
    """Within it the weights of these names are on `device`, in the types that `model` has.

    Those that are there already stay, and are left to whoever has put them there.
    """
    missing = [name for name in names if _own(model, name)[name.rpartition(".")[2]].is_meta]
    with replaced(model, missing, lambda name, empty: weights(name).to(device, empty.dtype)):
        yield


@contextmanager
def copied(model: PreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Within it these weights are copies of what they are."""
    with replaced(model, names, lambda _, tensor: tensor.detach().clone()):
        yield


@contextmanager
def replaced(
    model: PreTrainedModel, names: Sequence[str], value: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Within it `value` (name, what is there) stands in the place of each of these weights."""
    before: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    try:
        for name in names:
            own, leaf = _own(model, name), name.rpartition(".")[2]
            before[name] = own[leaf]
            new, twin = value(name, own[leaf]), made.get(id(own[leaf]))
            # One parameter under two names stays one, unless an adapter changes one of them.
            if twin is None or not torch.equal(twin, new):
                twin = nn.Parameter(new, False) if isinstance(own[leaf], nn.Parameter) else new
                made[id(own[leaf])] = twin
            own[leaf] = twin
        yield
    finally:
        for name, tensor in before.items():
            _own(model, name)[name.rpartition(".")[2]] = tensor


def _own(model: PreTrainedModel, name: str) -> Any:
    """The dict of its module that holds the parameter or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return module._parameters if leaf in module._parameters else module._buffers


@torch.no_grad()
def make_buffers(model: PreTrainedModel, device: str) -> None:
    """Compute what no checkpoint holds, as the frequencies of rotary positions."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
            for leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = module._buffers[leaf].to(device)
