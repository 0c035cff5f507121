"""What will be done with every tensor and file, decided from headers before any work starts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sage_hub.checkpoint.adapter import LowRank
from sage_hub.checkpoint.architecture import Linear
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.merged import Merged
from sage_hub.checkpoint.tensorfile import DTYPES, FLOATS, TensorInfo, layout
from sage_hub.errors import SageHubError

UNKNOWN = "not known to belong to a model"  # why a file stays behind that nothing else is said of


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor of the unlearned side, and where the base has them.

    The two sides may cut a parameter into tensors differently; a piece lies in one tensor on both,
    and in one linear map at most.
    """

    start: int
    stop: int
    base: str | None  # the tensor of the base; None if it has none
    base_start: int
    linear: Linear | None  # the map to filter; None if the rows are taken as they are


@dataclass(frozen=True)
class Operation:
    """What to do with one tensor of the unlearned side, piece by piece."""

    tensor: str
    shard: str
    info: TensorInfo
    pieces: tuple[Piece, ...]
    reason: str = ""  # why it is not filtered
    named: str = ""  # in the release, where wrappers had put words into its name
    stored: str = ""  # the type in the release, as safetensors names it; info's if empty
    pair: LowRank | None = None  # the pair that it is A of: the update is then s·B A

    @property
    def name(self) -> str:
        """Its name in the release."""
        return self.named or self.tensor

    @property
    def dtype(self) -> torch.dtype:
        """The type in the release."""
        return DTYPES[self.stored or self.info.dtype]

    def outputs(self, of: Mapping[str, float]) -> float:
        """What of the maps' outputs, `of` each by name, is made by the rows of this tensor."""
        parts = []
        for piece in self.pieces:
            if piece.linear is not None:
                own, rows = piece.stop - piece.start, piece.linear.stop - piece.linear.start
                share = 1.0 if self.pair is not None else own / rows
                parts.append(share * of[piece.linear.name])
        return math.fsum(parts)

    def describe(self) -> dict[str, Any]:
        """The operation for a listing."""
        return {
            "tensor": self.tensor,
            "shard": self.shard,
            "shape": list(self.info.shape),
            "dtype": self.info.dtype,
            "stored": self.stored or self.info.dtype,
            "action": "filter" if self.linears else "copy",
            "modules": [linear.name for linear in self.linears],
            "reason": self.reason,
            "base": list(dict.fromkeys(piece.base for piece in self.pieces if piece.base)),
        }

    @property
    def linears(self) -> list[Linear]:
        """The maps that are filtered."""
        return [piece.linear for piece in self.pieces if piece.linear is not None]


@dataclass(frozen=True)
class Plan:
    """The whole run as data: it can be printed, counted and checked off."""

    base: Checkpoint
    unlearned: Checkpoint
    operations: tuple[Operation, ...]
    carried: tuple[str, ...]  # files that come along verbatim
    left_behind: dict[str, str]  # files that don't, and why
    problems: tuple[SageHubError, ...] = ()  # each would stop the run
    equal: frozenset[str] = frozenset()  # shards that the base has byte for byte
    low_disk: bool = False  # a downloaded shard is kept only while it is read

    @property
    def output_bytes(self) -> int:
        """The size of the release in bytes, but for the record."""
        carried = sum(self.unlearned.files.sizes[name] for name in self.carried)
        tensors = (info for shard in self.unlearned.shards for info in self.layout(shard).values())
        return sum(info.nbytes for info in tensors) + carried

    @property
    def largest_output(self) -> int:
        """The largest shard of the release in bytes."""
        return max(
            sum(info.nbytes for info in self.layout(shard).values())
            for shard in self.unlearned.shards
        )

    @property
    def passing_bytes(self) -> int:
        """The disk for downloads where a shard is kept only while it is read: one of each side."""
        return sum(
            max(side.files.missing_bytes([shard]) for shard in side.shards)
            for side in (self.base, self.unlearned)
        )

    @property
    def download_bytes(self) -> int:
        """The weights that are not on this machine yet, in bytes."""
        return sum(side.files.missing_bytes(side.shards) for side in (self.base, self.unlearned))

    @cached_property
    def in_shard(self) -> dict[str, list[Operation]]:
        """Shard -> its operations, in the order of its bytes."""
        found: dict[str, list[Operation]] = {shard: [] for shard in self.unlearned.shards}
        for operation in self.operations:
            found[operation.shard].append(operation)
        return found

    def knowing_hashes(self) -> Plan:
        """The plan when shards of equal hash on both sides are known to be untouched."""
        changed = any(op.stored or op.name != op.tensor for op in self.operations)
        if isinstance(self.unlearned, Merged) or self.unlearned.files.reading or changed:
            return self
        theirs = {self.base.files.sha256(shard) for shard in self.base.shards}
        ours = self.unlearned.files
        equal = frozenset(s for s in self.unlearned.shards if ours.sha256(s) in theirs)
        return replace(self, equal=equal)

    def passing(self, folder: Path) -> Plan:
        """The plan with low disk: downloads go to `folder`."""
        sides = self.base.passing(folder / "base"), self.unlearned.passing(folder / "unlearned")
        return replace(self, base=sides[0], unlearned=sides[1], low_disk=True)

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError if a file of either side is not what it was at first."""
        self.base.check_unchanged()
        self.unlearned.check_unchanged()

    def base_shards(self, shard: str) -> list[str]:
        """The shards of the base that `shard` of the unlearned side needs, in that order."""
        if shard in self.equal:
            return []
        pieces = (piece for op in self.in_shard[shard] for piece in op.pieces)
        needed = (self.base.shard_of[piece.base] for piece in pieces if piece.base)
        return list(dict.fromkeys(needed))

    def layout(self, shard: str) -> dict[str, TensorInfo]:
        """The tensors of `shard` as the release holds them."""
        return layout(
            (op.name, op.stored or op.info.dtype, op.info.shape) for op in self.in_shard[shard]
        )

    def without(self, named: Iterable[Path]) -> Plan:
        """The plan when these files, where they are the unlearned side's, don't come along."""
        places = {path.resolve() for path in named}
        names = {path.name for path in named}
        unknown = (name for name, why in self.left_behind.items() if why == UNKNOWN)
        left = [
            name
            for name in (*self.carried, *unknown)
            if Path(name).name in names and self.unlearned.files.path(name).resolve() in places
        ]
        return replace(
            self,
            carried=tuple(name for name in self.carried if name not in left),
            left_behind=self.left_behind | dict.fromkeys(left, "data or settings of this run"),
        )

    def stored_as(self, dtype: str | None) -> Plan:
        """The plan when all floating point tensors are stored as `dtype` (of safetensors)."""
        if dtype is None:
            return self
        operations = tuple(
            replace(operation, stored=dtype) if operation.info.dtype in FLOATS else operation
            for operation in self.operations
        )
        return replace(self, operations=operations)

    def to_filter(self) -> list[Operation]:
        """The operations that filter."""
        return [operation for operation in self.operations if operation.linears]

    def observed(self, modules: Iterable[str]) -> Plan:
        """The plan when only `modules` have a site: the others' weights are copied."""
        known = set(modules)

        def keep(piece: Piece) -> Piece:
            seen = piece.linear is None or piece.linear.name in known
            return piece if seen else replace(piece, linear=None)

        operations = []
        for operation in self.operations:
            pieces = tuple(keep(piece) for piece in operation.pieces)
            reason = operation.reason
            if operation.linears and not any(piece.linear for piece in pieces):
                reason = "its module saw no input during calibration"
            operations.append(replace(operation, pieces=pieces, reason=reason))
        return replace(self, operations=tuple(operations))

    def describe(self) -> dict[str, Any]:
        """The plan for `--json`."""
        return {
            "base": {"name": self.base.name, "commit": self.base.commit},
            "unlearned": {"name": self.unlearned.name, "commit": self.unlearned.commit},
            "tensors": len(self.operations),
            "filter": len(self.to_filter()),
            "copy": dict(Counter(op.reason for op in self.operations if not op.linears)),
            "carried": list(self.carried),
            "left_behind": self.left_behind,
            "download_bytes": self.download_bytes,
            "output_bytes": self.output_bytes,
            "low_disk_bytes": self.passing_bytes,
            "operations": [operation.describe() for operation in self.operations],
        }
