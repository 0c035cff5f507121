"""Every weight of a language model is in its checkpoint: none is ever made up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sage_hub.checkpoint.architecture import Architecture
from sage_hub.checkpoint.tensorfile import row_count
from sage_hub.errors import CorruptCheckpointError, MissingTensorError

if TYPE_CHECKING:
    from sage_hub.checkpoint.index import Checkpoint


def check_covered(checkpoint: Checkpoint) -> None:
    """Raise MissingTensorError for a weight of the language model that no tensor holds.

    A weight that is tied to one that is held need not be. What is outside of the language model,
    as its eyes, is not looked at, but for tensors that are empty. Raises CorruptCheckpointError
    for rows that two tensors hold, ArchitectureError for a tensor that does not fit in.
    """
    architecture = checkpoint.architecture
    empty = [t for t in checkpoint.shard_of if _is_emptied(checkpoint, t)]
    if empty:
        raise MissingTensorError(
            f"Tensor {empty[0]!r} of {checkpoint.name} is empty{_and_more(empty)}, as ZeRO-3 "
            "leaves what lies on other devices; gather the weights and save them again."
        )
    missing = [name for name in _needed(architecture) if not _is_held(checkpoint, name)]
    if missing:
        raise MissingTensorError(
            f"{missing[0]!r} is not in {checkpoint.name}{_and_more(missing)}, and a weight is "
            f"never made up: {_likely_cause(checkpoint, missing)}."
        )


def _needed(architecture: Architecture) -> Iterator[str]:
    for name in architecture.parameters:
        ignored = name not in architecture.tied and architecture.may_be_absent(name)
        if not name.startswith(architecture.outside) and not ignored:
            yield name


def _is_held(checkpoint: Checkpoint, parameter: str) -> bool:
    """Whether all rows of `parameter`, or of one that is tied to it, are there."""
    architecture, holders = checkpoint.architecture, checkpoint.holders
    own = next((name for name in architecture.twins(parameter) if name in holders), None)
    reached = 0
    for before, tensor in zip(["", *holders[own]], holders[own], strict=False) if own else ():
        place = checkpoint.places[tensor]
        assert place is not None  # a holder
        if place.start < reached:
            raise CorruptCheckpointError(
                f"Tensors {before!r} and {tensor!r} of {checkpoint.name} are one weight under two "
                "names; remove one of them."
            )
        if place.start > reached:
            return False
        reached = place.stop
    return own is not None and reached == row_count(architecture.parameters[own])


def _is_emptied(checkpoint: Checkpoint, tensor: str) -> bool:
    if 0 not in checkpoint.info(tensor).shape:
        return False
    parameter = checkpoint.architecture.parameter(tensor)
    return parameter is not None and 0 not in checkpoint.architecture.parameters[parameter]


def _and_more(names: Sequence[str]) -> str:
    more = len(names) - 1
    return f", nor are {more} more" if more > 1 else ", nor is 1 more" if more else ""


def _likely_cause(checkpoint: Checkpoint, missing: Sequence[str]) -> str:
    """What has become of the `missing` parameters, as far as the names and shapes tell."""
    architecture, first = checkpoint.architecture, missing[0]
    strange = [t for t in checkpoint.shard_of if architecture.parameter(t) is None]
    if any(".lora_A." in t or ".base_layer." in t for t in strange):
        return (
            "an adapter was saved within the model; merge it (merge_and_unload) and save that, or "
            "save the adapter alone"
        )
    for tensor in strange:
        prefix = tensor.removesuffix(first)
        if prefix != tensor and all(t.startswith(prefix) for t in checkpoint.shard_of):
            return f"all names begin with {prefix!r}; rename the tensors, without it"
    for tensor, place in checkpoint.places.items():
        if place is None and architecture.parameter(tensor) in missing:
            return (
                f"transformers makes it of {tensor!r} as it loads, and not row by row; load the "
                "model with transformers and save it again (save_pretrained)"
            )
    layers = [_layer(name) for name in missing]
    there = max((_layer(name) for name in checkpoint.holders), default=-1)
    if min(layers) > there >= 0:
        return (
            f"config.json promises {max(layers) + 1} layers, and the weights are those of "
            f"{there + 1}; correct the one, or save the other again"
        )
    shape = architecture.parameters[first]
    for tensor in strange:
        if checkpoint.info(tensor).shape == shape:
            return (
                f"{tensor!r}, which the model has no place for, is of its shape; rename it if it "
                "is the same"
            )
    if all(name in architecture.twins(architecture.head) for name in missing):
        return "the model was saved without its head; save it as a causal language model"
    return "save the whole model again, with save_pretrained"


def _layer(name: str) -> int:
    """The number of the layer that parameter `name` is in; -1 if it is in none."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else -1
