"""The weights of a model by the names of its parameters, each read when it is asked for.

As a checkpoint stores them, with an adapter in them, or part of the way from base to unlearned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from sage_hub.checkpoint.adapter import WEIGHTS, Adapter
from sage_hub.checkpoint.index import Checkpoint, open_shards
from sage_hub.checkpoint.merged import Merged
from sage_hub.checkpoint.tensorfile import RowReader
from sage_hub.errors import ArchitectureError

# Name of a parameter or buffer -> its value on the CPU, in a type of its own.
Weights = Callable[[str], Tensor]
# Name, the base's value and another one -> a third, as the control's or one with another gain.
Blend = Callable[[str, Tensor, Tensor], Tensor]

_OPEN = 2  # shards at a time: a layer may begin in one and end in the next


@contextmanager
def open_blends(
    checkpoint: Checkpoint, base: Checkpoint, blends: Sequence[Blend | None], room: float
) -> Iterator[list[Weights]]:
    """The weights of each of `blends`, None for those of `checkpoint` itself.

    What was read last, up to `room` bytes of each side, is not read again for the next blend, so
    that a block that all of them are asked for in turn is read once.
    """
    with (
        open_weights(checkpoint) as plain,
        open_weights(checkpoint, base, lambda _, __, own: own) as wide,
        open_weights(checkpoint, base, lambda _, origin, __: origin) as origins,
    ):
        own, origin = remembered(wide, room), remembered(origins, room)

        def blended(blend: Blend | None) -> Weights:
            if blend is None:
                return plain
            return lambda name: _blended(blend, name, origin(name), own(name))

        yield [blended(blend) for blend in blends]


def remembered(read: Callable[..., Tensor], room: float) -> Callable[..., Tensor]:
    """`read` (a name, and what else it wants), with what it gave last kept, up to `room` bytes."""
    kept: dict[str, Tensor] = {}

    def ask(name: str, *more: Tensor) -> Tensor:
        if name not in kept:
            made = read(name, *more)
            while kept and sum(t.nbytes for t in kept.values()) + made.nbytes > room:
                del kept[next(iter(kept))]
            kept[name] = made
        return kept[name]

    return ask


@contextmanager
def open_weights(
    checkpoint: Checkpoint, base: Checkpoint | None = None, blend: Blend | None = None
) -> Iterator[Weights]:
    """The weights that `checkpoint` stands for, or what `blend` makes of the base's and of them.

    The base of an adapter is its own. Asking for a weight that the model or `base` has not raises
    ArchitectureError.
    """
    with ExitStack() as stack:
        stored = stack.enter_context(_stored(checkpoint.of_model))
        own, origin = stored, stored
        if isinstance(checkpoint, Merged):
            checkpoint = checkpoint.adapter
        if isinstance(checkpoint, Adapter):
            tensors = stack.enter_context(checkpoint.open_shard(WEIGHTS))
            own = partial(_with_adapter, checkpoint, tensors, stored, wide=blend is not None)
        elif blend is not None and base is not None:
            origin = stack.enter_context(_stored(base))
        yield own if blend is None else lambda name: _blended(blend, name, origin(name), own(name))


def _blended(blend: Blend, name: str, base: Tensor, own: Tensor) -> Tensor:
    """What `blend` makes of both; of a vocabulary of two sizes, of the rows that both have."""
    if base.shape == own.shape:
        return blend(name, base, own)
    common = min(len(base), len(own))
    made = blend(name, base[:common], own[:common])
    return torch.cat([made, own[common:].to(made)])


def widened(*tensors: Tensor) -> list[Tensor]:
    """All in the widest of their types, in float32 at least."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return [tensor.to(wide) for tensor in tensors]


def part_of_the_way(alpha: float) -> Blend:
    """W_b + α (W − W_b)."""

    def blend(_: str, base: Tensor, weight: Tensor) -> Tensor:
        b, w = widened(base, weight)
        return b + alpha * (w - b)

    return blend


@contextmanager
def _stored(checkpoint: Checkpoint) -> Iterator[Weights]:
    architecture = checkpoint.architecture
    held = checkpoint.holders

    def read(name: str) -> Tensor:
        shape = architecture.parameters.get(name)
        if shape is None:
            raise ArchitectureError(f"{checkpoint.name} has no parameter {name!r}.")
        rows = []
        for tensor in next(held[twin] for twin in architecture.twins(name) if twin in held):
            reader, info = shard(checkpoint.shard_of[tensor]), checkpoint.info(tensor)
            rows.append(reader.read_rows(tensor, 0, info.rows))
        return (torch.cat(rows) if len(rows) > 1 else rows[0]).reshape(shape)

    with open_shards(checkpoint, _OPEN) as shard:
        yield read


def _with_adapter(
    adapter: Adapter, tensors: RowReader, stored: Weights, name: str, *, wide: bool
) -> Tensor:
    """A weight of the base with what the adapter does to it, unrounded if `wide`.

    PEFT changes one of two weights that are tied, and so does this.
    """
    whole = stored(name)
    if wide:
        (whole,) = widened(whole)
    rows = as_rows(whole)
    for change in adapter.changes.values():
        if change.place.parameter == name:
            part = rows[change.place.start : change.place.stop]
            part.copy_(change.apply(tensors, part, 0))
    return whole


def as_rows(weight: Tensor) -> Tensor:
    """A weight as the matrix whose rows maps and places count: a vector is a column, experts stack.

    A view of it.
    """
    return weight.view(-1, weight.shape[-1]) if weight.ndim > 1 else weight.view(-1, 1)
