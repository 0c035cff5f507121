"""What will be done with every tensor and file, decided from headers before any work starts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sage_hub.adapter import Adapter, LowRank, Merged
from sage_hub.architecture import Architecture, Linear, Place, read_architecture
from sage_hub.checkpoint import INDEX, PICKLES, Checkpoint
from sage_hub.errors import ArchitectureError, MissingTensorError, SageHubError
from sage_hub.tensorfile import DTYPES, FLOATS, TensorInfo, layout

OTHER_WEIGHTS = (
    ".safetensors",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".npz",
    ".mlpackage",
    ".ot",
)
DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
# What training frameworks leave beside a model. Scores there are the source's.
TRAINING = re.compile(
    r"(runs|logs|wandb|checkpoint-\d+|global_step\d+)/|.*\.tfevents\.|.*\.log$"
    r"|(.*/)?(trainer_state|trainer_log)\.jsonl?$"
)
RESULTS = re.compile(
    r"evals?/|(.*/)?([A-Z]+_(EVAL|SUMMARY)|(all|train|eval)_results|results_[^/]*)\.json$"
)


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
    first: int = 0  # the row of the map that it begins with


@dataclass(frozen=True)
class Operation:
    """What to do with one tensor of the unlearned side, piece by piece."""

    tensor: str
    shard: str
    info: TensorInfo
    pieces: tuple[Piece, ...]
    reason: str = ""  # why it is not filtered
    stored: str = ""  # the type in the release, as safetensors names it; info's if empty
    pair: LowRank | None = None  # the pair that it is A of: the update is then s·B A

    @property
    def dtype(self) -> torch.dtype:
        """The type in the release."""
        return DTYPES[self.stored or self.info.dtype]

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
        if isinstance(self.unlearned, Merged) or any(op.stored for op in self.operations):
            return self
        theirs = {self.base.files.sha256(shard) for shard in self.base.shards}
        ours = self.unlearned.files
        equal = frozenset(s for s in self.unlearned.shards if ours.sha256(s) in theirs)
        return replace(self, equal=equal)

    def passing(self, folder: Path) -> Plan:
        """The plan with low disk: downloads go to `folder`."""
        sides = self.base.passing(folder / "base"), self.unlearned.passing(folder / "unlearned")
        return replace(self, base=sides[0], unlearned=sides[1], low_disk=True)

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
            (op.tensor, op.stored or op.info.dtype, op.info.shape) for op in self.in_shard[shard]
        )

    def without(self, named: Iterable[Path]) -> Plan:
        """The plan when these files, where they are the unlearned side's, don't come along."""
        places = {path.resolve() for path in named}
        names = {path.name for path in named}
        left = [
            name
            for name in self.carried
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


def make_plan(base: Checkpoint, unlearned: Checkpoint, parameters: str = "linear") -> Plan:
    """Match the two sides tensor by tensor and decide what happens to each.

    With `parameters` "all" embedding, LM head, norms and biases are filtered too. Its problems are
    an ArchitectureError for each shape that differs and a MissingTensorError for each tensor that
    only one side has. Raises ArchitectureError for different models.
    """
    if isinstance(unlearned, Adapter):
        return _plan_adapter(base, unlearned, parameters)
    theirs, ours = read_architecture(base), read_architecture(unlearned)
    if parameters == "all":
        ours = ours.with_others()
    if theirs.model_type != ours.model_type:
        raise ArchitectureError(
            f"{base.name} is a {theirs.model_type} model and {unlearned.name} a "
            f"{ours.model_type} model; the base must be the model that was unlearned."
        )
    problems: list[SageHubError] = []
    places = _places(ours, unlearned, problems)
    theirs_at = _rows_by_parameter(_places(theirs, base, problems), base)
    ours_at = _rows_by_parameter(places, unlearned)
    for parameter, runs in theirs_at.items():
        problems += _different_shapes(theirs, ours, base, unlearned, parameter)
        if not ours.may_be_absent(parameter):
            for lost in _uncovered(runs, ours_at.get(parameter, [])):
                problems.append(_missing(lost, base, unlearned))
    operations = []
    for shard, header in unlearned.headers.items():
        for tensor, info in header.tensors.items():
            place = places[tensor]
            parameter = place.parameter if place else tensor
            # A base that ties its head to the embedding has the head there.
            runs = theirs_at.get(parameter) or theirs_at.get(theirs.tied.get(parameter, ""), [])
            mine = _Run(place.start if place else 0, place.stop if place else info.rows, tensor)
            if not theirs.may_be_absent(parameter) or runs:
                for lost in _uncovered([mine], runs):
                    problems.append(_missing(lost, unlearned, base))
            operations.append(_decide(ours, shard, info, place, mine, runs))
    carried, left_behind = _sort_files(unlearned)
    return Plan(
        base,
        unlearned,
        tuple(operations),
        carried,
        left_behind,
        tuple(problems),
    )


def _plan_adapter(base: Checkpoint, adapter: Adapter, parameters: str) -> Plan:
    """A is filtered, B stays; whole tensors are treated as those of a whole model are."""
    architecture = adapter.architecture
    if parameters == "all":
        architecture = architecture.with_others()
    problems: list[SageHubError] = []
    base_at = _rows_by_parameter(_places(architecture, base, problems), base)
    operations = []
    for shard, header in adapter.headers.items():
        for tensor, info in header.tensors.items():
            change = adapter.changes.get(tensor)
            if change is None:
                pieces = (Piece(0, info.rows, None, 0, None),)
                operations.append(
                    Operation(tensor, shard, info, pieces, "B of a LoRA pair, which stays")
                )
                continue
            place, runs = change.place, base_at.get(change.place.parameter, [])
            if isinstance(change.by, str):
                mine = _Run(place.start, place.stop, tensor)
                operations.append(_decide(architecture, shard, info, place, mine, runs))
                continue
            reason = _reason(architecture, place.parameter, info)
            maps = architecture.linears.get(place.parameter, ())
            linear = next(
                (m for m in maps if m.start <= place.start and place.stop <= m.stop), None
            )
            piece = Piece(0, info.rows, None, 0, None if reason else linear)
            operations.append(Operation(tensor, shard, info, (piece,), reason, pair=change.by))
    carried, left_behind = _sort_files(adapter)
    return Plan(
        base,
        adapter,
        tuple(operations),
        carried,
        left_behind,
        tuple(problems),
    )


@dataclass(frozen=True, order=True)
class _Run:
    """Rows [start, stop) of a parameter, which `tensor` holds."""

    start: int
    stop: int
    tensor: str


def _places(
    architecture: Architecture, side: Checkpoint, problems: list[SageHubError]
) -> dict[str, Place | None]:
    """Where every tensor of `side` lies in the model; one that does not fit is a problem."""
    found: dict[str, Place | None] = {}
    for header in side.headers.values():
        for tensor, info in header.tensors.items():
            try:
                found[tensor] = architecture.place(tensor, info.shape)
            except ArchitectureError as error:
                problems.append(ArchitectureError(f"{side.name}: {error}"))
                found[tensor] = architecture.whole(tensor)  # so that it is one problem, not two
    return found


def _rows_by_parameter(
    places: Mapping[str, Place | None], side: Checkpoint
) -> dict[str, list[_Run]]:
    """Parameter -> the runs of its rows that `side` has, in order; a tensor of no parameter is
    one by its own name."""
    found: dict[str, list[_Run]] = {}
    for header in side.headers.values():
        for tensor, info in header.tensors.items():
            place = places[tensor] or Place(tensor, 0, info.rows)
            found.setdefault(place.parameter, []).append(_Run(place.start, place.stop, tensor))
    return {parameter: sorted(runs) for parameter, runs in found.items()}


def _uncovered(wanted: Sequence[_Run], there: Sequence[_Run]) -> Iterator[str]:
    """The tensors of `wanted` that have a row which none of `there` has."""
    for run in wanted:
        reached = run.start
        for other in there:
            if other.start <= reached < other.stop:
                reached = other.stop
        if reached < run.stop or not there:
            yield run.tensor


def _different_shapes(
    theirs: Architecture,
    ours: Architecture,
    base: Checkpoint,
    unlearned: Checkpoint,
    parameter: str,
) -> Iterator[SageHubError]:
    shapes = theirs.parameters.get(parameter), ours.parameters.get(parameter)
    shared = parameter in base.shard_of and parameter in unlearned.shard_of
    if shapes == (None, None) and shared:
        shapes = base.info(parameter).shape, unlearned.info(parameter).shape
    if None not in shapes and shapes[0] != shapes[1]:
        yield ArchitectureError(
            f"Tensor {parameter!r} has the shape {[*(shapes[0] or ())]} in {base.name} and "
            f"{[*(shapes[1] or ())]} in {unlearned.name}; the base must be the model that was "
            "unlearned."
        )


def _missing(tensor: str, holder: Checkpoint, other: Checkpoint) -> MissingTensorError:
    return MissingTensorError(
        f"Tensor {tensor!r} is in {holder.name} but not in {other.name}; the two must be "
        "checkpoints of one model."
    )


def _decide(
    architecture: Architecture,
    shard: str,
    info: TensorInfo,
    place: Place | None,
    mine: _Run,
    runs: Sequence[_Run],
) -> Operation:
    parameter = place.parameter if place else mine.tensor
    maps = architecture.linears.get(parameter, ())
    if not runs:
        reason = "the base has no tensor of its own for it (tied or derived)"
    elif place is None:
        reason = "transformers does not know it, or changes it at load"
    else:
        reason = _reason(architecture, parameter, info)
    pieces = tuple(_cut(mine, runs, () if reason else maps))
    if not reason and not any(piece.linear for piece in pieces):
        reason = "stored (in, out) and cut, so that no piece holds a whole input"
    return Operation(mine.tensor, shard, info, pieces, reason)


def _reason(architecture: Architecture, parameter: str, info: TensorInfo) -> str:
    """Why a tensor of `parameter` is not filtered; empty if it is."""
    if info.dtype not in FLOATS:
        return "not floating point"
    if parameter.startswith(architecture.outside):
        return "outside the language model"
    if parameter in architecture.linears:
        return ""
    if parameter == architecture.embedding:
        return "token embedding"
    if parameter == architecture.head:
        return "LM head"
    if parameter.endswith("bias"):
        return "bias"
    if len(info.shape) < 2:
        return "norm or other vector"
    return "not the weight of a linear layer"


def _cut(mine: _Run, runs: Sequence[_Run], maps: Sequence[Linear]) -> Iterator[Piece]:
    """Cut a tensor where the base's tensors or the linear maps end."""
    edges = {mine.start, mine.stop}
    ends = [(run.start, run.stop) for run in runs] + [(m.start, m.stop) for m in maps]
    edges |= {edge for end in ends for edge in end if mine.start < edge < mine.stop}
    ordered = sorted(edges)
    for start, stop in pairwise(ordered):
        run = next((r for r in runs if r.start <= start and stop <= r.stop), None)
        linear = next((m for m in maps if m.start <= start and stop <= m.stop), None)
        if (
            linear is not None
            and linear.transposed
            and not linear.diagonal
            and (start, stop) != (linear.start, linear.stop)
        ):
            linear = None  # its inputs are rows, and it takes all of them to filter
        yield Piece(
            start - mine.start,
            stop - mine.start,
            run.tensor if run else None,
            start - run.start if run else 0,
            linear,
            start - linear.start if linear else 0,
        )


def _sort_files(unlearned: Checkpoint) -> tuple[tuple[str, ...], dict[str, str]]:
    carried, left_behind = [], {}
    for name in sorted(unlearned.files.sizes):
        if name in unlearned.headers or name in (INDEX, "README.md", ".gitattributes"):
            continue  # written anew, or the Hub's own
        if name.startswith("sage/"):
            left_behind[name] = "the record of an earlier release"
        elif name.endswith(PICKLES):
            left_behind[name] = "a pickle"
        elif name.endswith(OTHER_WEIGHTS) or name.endswith(".safetensors.index.json"):
            left_behind[name] = "weights that were not sanitized"
        elif any(part.startswith(".") for part in name.split("/")):
            left_behind[name] = "a hidden file"  # .env and its like hold tokens
        elif name == "sage.yaml":
            left_behind[name] = "settings of this run"
        elif name.endswith(DATA):
            left_behind[name] = "data, not the model"  # it may be what had to be forgotten
        elif TRAINING.match(name):
            left_behind[name] = "of the training, not of the model"
        elif RESULTS.match(name):
            left_behind[name] = "results of another model than the release"
        else:
            carried.append(name)
    return tuple(carried), left_behind
