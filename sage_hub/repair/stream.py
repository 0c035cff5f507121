"""Both sides of an update read in blocks of rows, in the order of the bytes that are written."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sage_hub.checkpoint.index import open_shards
from sage_hub.errors import NonFiniteError
from sage_hub.model.weights import widened
from sage_hub.repair.plan import Operation, Piece, Plan
from sage_hub.runtime.progress import Progress
from sage_hub.runtime.threads import ahead

# Numbers in a block of rows: 4 MB in float32, so that a block stays in the cache while it is
# worked on. A larger one is slower and costs memory.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Block:
    """Some rows of one piece, read from both sides: what is in memory at a time."""

    operation: Operation
    piece: Piece
    base: Tensor | None
    unlearned: Tensor
    outer: Tensor | None = None  # the update is this times the rows: R of an adapter's pair

    @cached_property
    def changed(self) -> bool:
        """Whether the two sides differ here, as far as the stored type can tell."""
        if self.base is None:
            return True
        stored = self.operation.dtype
        return not torch.equal(self.base.to(stored), self.unlearned.to(stored))

    def update(self, rows: Tensor, base: Tensor) -> Tensor:
        """What `rows` in place of `base` do to the outputs, but for a rotation of these."""
        difference = rows - base
        return difference if self.outer is None else self.outer.to(difference) @ difference

    @property
    def transposed(self) -> bool:
        linear = self.piece.linear
        return linear is not None and linear.transposed and self.operation.pair is None

    def oriented(self, tensor: Tensor, device: str) -> Tensor:
        """The rows as (out, in), in float32 at least."""
        (wide,) = widened(tensor.to(device))
        return wide.T.contiguous() if self.transposed else wide


def stream_blocks(
    plan: Plan, shards: Sequence[str], what: str, progress: Progress
) -> Generator[Block, None, None]:
    """All rows of `shards` of the unlearned side in the order of their bytes, with the base's.

    It computes nothing, because in a thread of its own it would fight for the cores.
    """
    total = sum(plan.unlearned.files.sizes[shard] for shard in shards)
    with (
        open_shards(plan.base, 1 if plan.low_disk else None) as base_reader,
        ahead(_fetched(plan, shards), depth=1) as fetched,
        progress.counter(what, total, "B") as bar,
    ):
        for shard in shards if plan.low_disk else fetched:
            with plan.unlearned.open_shard(shard) as reader:
                for operation in plan.in_shard[shard]:
                    outer = None
                    if operation.pair is not None:
                        outer = operation.pair.outer(reader)
                    for piece, start, stop in _steps(operation):
                        unlearned = reader.read_rows(operation.tensor, start, stop)
                        base = None if outer is None else torch.zeros_like(unlearned)
                        if piece.base is not None:
                            shift = piece.base_start - piece.start
                            base = base_reader(plan.base.shard_of[piece.base]).read_rows(
                                piece.base, start + shift, stop + shift
                            )
                        yield Block(operation, piece, base, unlearned, outer)
                        bar.update(unlearned.nbytes)


def _fetched(plan: Plan, shards: Sequence[str]) -> Generator[str, None, None]:
    """The shards, each as soon as it is on this machine with what it needs of the base."""
    for shard in () if plan.low_disk else shards:
        plan.unlearned.files.path(shard)
        for other in plan.base_shards(shard):
            plan.base.files.path(other)
        yield shard


def _steps(operation: Operation) -> Iterator[tuple[Piece, int, int]]:
    """The pieces of a tensor, cut into blocks of rows."""
    rows = max(1, BLOCK // max(1, operation.info.columns))
    for piece in operation.pieces:
        linear = piece.linear
        whole = operation.pair is not None or (linear is not None and linear.transposed)
        step = max(1, piece.stop - piece.start) if whole else rows
        for start in range(piece.start, piece.stop, step):
            yield piece, start, min(start + step, piece.stop)


def check_finite(block: Block, plan: Plan) -> None:
    """Raise NonFiniteError for NaN or Inf on either side."""
    name = block.operation.tensor
    for tensor, tensor_name, side in (
        (block.unlearned, name, plan.unlearned),
        (block.base, block.piece.base or name, plan.base),
        (block.outer, name, plan.unlearned),
    ):
        if tensor is not None and tensor.is_floating_point() and not is_finite(tensor):
            raise NonFiniteError(
                f"Tensor {tensor_name!r} of {side.name} holds NaN or Inf; that checkpoint is "
                "broken; pass one from before it broke."
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; by the largest, which NaN is too, as that is the fast way."""
    return not tensor.numel() or bool(torch.isfinite(tensor.abs().max()))
