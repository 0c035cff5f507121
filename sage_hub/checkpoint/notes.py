"""What a person should know of the two sides, though they can be worked with."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.architecture import unwrapped
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.layouts import INDEX, SINGLE
from sage_hub.checkpoint.pair import Pair

# Settings of a config that change what the same weights compute, and those that only look so.
COMPUTES = re.compile(
    "rope|act$|activation|head|eps|norm|window|layer_types|softcap|scal|multiplier|experts|topk|"
    "group|attention|attn|rotary"
)
IDLE = re.compile("dropout|output_|_implementation|initializer|aux_loss")


def notes_on(pair: Pair) -> Iterator[str]:
    """A sentence for each of them."""
    base, unlearned = pair.base, pair.unlearned
    for side in (base, unlearned):
        yield from _two_sets_of_weights(side)
        if side.files.reading:
            yield f"The weights of {side.name} are {side.files.reading}."
    if isinstance(unlearned, Adapter):
        yield from _another_base(unlearned)
        return
    for key, (theirs, ours) in differing_settings(base, unlearned).items():
        yield (
            f"{key} is {theirs} in the config of {base.name} and {ours} in that of "
            f"{unlearned.name}; if they were not trained so, correct the wrong one."
        )
    for name, (rows, others) in [*resized_vocabulary(base, unlearned).items()][:1]:
        yield (
            f"The vocabulary has {rows} rows in {base.name} ({name!r}) and {others} in "
            f"{unlearned.name}; the release has the latter's embedding and head, as ever, and rows "
            "are read with tokens that both have."
        )
    known = {unwrapped(tensor) for tensor in unlearned.shard_of}
    strange = [
        tensor
        for tensor in base.shard_of
        if base.architecture.parameter(tensor) is None
        and not base.architecture.may_be_absent(tensor)
        and unwrapped(tensor) not in known
    ]
    if strange:
        yield (
            f"{_counted(strange)} of {base.name} alone, without a place in its model (as layers "
            "that predict further tokens): not used, and not in the release."
        )
    if wrapped := [tensor for tensor in unlearned.shard_of if tensor != unwrapped(tensor)]:
        yield (
            f"A wrapper has left its mark in names of {unlearned.name} ({wrapped[0]!r}), by which "
            "transformers finds no weight; the release has them without it."
        )


def differing_settings(base: Checkpoint, unlearned: Checkpoint) -> dict[str, tuple[object, object]]:
    """Settings of the language model in which the configs differ, with the value on each side."""
    theirs, ours = base.architecture.settings, unlearned.architecture.settings
    return {
        key: (theirs.get(key), ours.get(key))
        for key in sorted(theirs.keys() | ours.keys())
        if COMPUTES.search(key) and not IDLE.search(key) and theirs.get(key) != ours.get(key)
    }


def resized_vocabulary(base: Checkpoint, unlearned: Checkpoint) -> dict[str, tuple[int, int]]:
    """Embedding and head, where they have more or fewer tokens on one side: rows on each.

    No weight of the layers between depends on how many tokens there are. A name that one side has
    not is tied to one that it has, whichever side ties them.
    """
    theirs, ours = base.architecture, unlearned.architecture
    head = theirs.head
    names = {theirs.embedding, head, *theirs.twins(head), *ours.twins(head)} - {""}
    found = {}
    for name in sorted((*names, f"{head.removesuffix('.weight')}.bias"), key=len, reverse=True):
        one, other = theirs.parameters.get(name, (0,)), ours.parameters.get(name, (0,))
        if 0 not in (one[0], other[0]) and one[0] != other[0] and one[1:] == other[1:]:
            found[name] = one[0], other[0]
    return found


def shapes_of(side: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Parameter, or tensor of none -> its shape."""
    return {
        at.parameter if at else unwrapped(tensor): (
            side.architecture.parameters[at.parameter] if at else side.info(tensor).shape
        )
        for tensor, at in side.places.items()
    }


def _another_base(adapter: Adapter) -> Iterator[str]:
    named, repo = adapter.config.get("base_model_name_or_path"), adapter.base.files.location.repo
    if repo and named and named != repo:  # which is not repeated, as it may be a private path
        yield f"By its config {adapter.name} was trained on another base; its release names {repo}."


def _two_sets_of_weights(side: Checkpoint) -> Iterator[str]:
    if {SINGLE, INDEX} <= side.files.sizes.keys() and side.shards == [SINGLE]:
        yield (
            f"{side.name} has {SINGLE} and an index of shards, {INDEX}; {SINGLE} is taken, as "
            "transformers does. Remove the one that is out of date."
        )


def _counted(tensors: list[str]) -> str:
    more = len(tensors) - 1
    return f"{tensors[0]!r} is" if not more else f"{tensors[0]!r} and {more} more tensors are"
