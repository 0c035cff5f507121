"""Several processes at one job, as torchrun starts them: who does what, and what they exchange."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sage_hub.errors import PeerError, SageHubError, UsageError

T = TypeVar("T")

# Of one exchange. A process that died is noticed at once, a slow one is waited for.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. All of them call the same methods in the same order.

    Each raises PeerError when another process is gone.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the record, publishes and talks."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """The part of `items` that this process does."""
        return list(items[self.rank :: self.count])

    def add_up(self, tensor: Tensor) -> None:
        """Replace `tensor` by the sum of all processes', in place."""
        if self.count > 1:
            with _peers_at_hand():
                dist.all_reduce(tensor)

    def all(self, value: T) -> list[T]:
        """What each process has, in the order of the ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _peers_at_hand():
            dist.all_gather_object(found, value)
        return found

    def to_first(self, value: T) -> list[T]:
        """What each process has, in the order of the ranks; empty but in the first."""
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.first else None
        with _peers_at_hand():
            dist.gather_object(value, found, dst=0)
        return found or []

    def once(self, do: Callable[[], T]) -> T:
        """The result of `do`, which the first process calls for all; all raise its error too."""
        if self.count == 1:
            return do()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = do()
            except SageHubError as error:
                found[1] = error
        with _peers_at_hand():
            dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise found[1]
        result: T = found[0]
        return result

    def at_first(self, do: Callable[[], T]) -> T | None:
        """What `do` makes, which stays in the first process; None in the others."""
        made: list[T] = []
        self.once(lambda: made.append(do()))
        return made[0] if made else None


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun has started; alone if it has started none.

    Raises UsageError if there are GPUs, and fewer than processes on this machine.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if 0 < gpus <= own:
        raise UsageError(
            f"torchrun starts more processes here than there are GPUs ({gpus}): use "
            f"--nproc-per-node {gpus}, or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU."
        )
    with _peers_at_hand():
        if gpus:
            torch.cuda.set_device(own)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=_PATIENCE)
    yield Ranks(dist.get_rank(), count)


@contextmanager
def _peers_at_hand() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo's and nccl's words for it differ
        raise PeerError(
            "Another process of this job is gone; its own message says why, and the same command "
            "goes on where the job stopped."
        ) from error
