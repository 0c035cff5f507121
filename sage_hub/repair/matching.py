"""Match the two sides tensor by tensor, and decide from headers what becomes of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.architecture import Architecture, Linear, Place
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.pair import Pair
from sage_hub.checkpoint.tensorfile import FLOATS, TensorInfo
from sage_hub.errors import ArchitectureError, MissingTensorError, SageHubError
from sage_hub.repair.beside import sort_files
from sage_hub.repair.plan import Operation, Piece, Plan


def make_plan(pair: Pair) -> Plan:
    """Match the two sides tensor by tensor and decide what happens to each.

    Its problems are an ArchitectureError for each shape that differs and a MissingTensorError for
    each tensor that only one side has. Raises ArchitectureError for different models.
    """
    base, unlearned = pair.base, pair.unlearned
    if isinstance(unlearned, Adapter):
        return _plan_adapter(base, unlearned)
    theirs, ours = base.architecture, unlearned.architecture
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
    return Plan(base, unlearned, tuple(operations), *sort_files(unlearned), tuple(problems))


def _plan_adapter(base: Checkpoint, adapter: Adapter) -> Plan:
    """A is filtered, B stays; whole tensors are treated as those of a whole model are."""
    architecture = adapter.architecture
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
    return Plan(base, adapter, tuple(operations), *sort_files(adapter), tuple(problems))


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
            and (start, stop) != (linear.start, linear.stop)
        ):
            linear = None  # its inputs are rows, and it takes all of them to filter
        yield Piece(
            start - mine.start,
            stop - mine.start,
            run.tensor if run else None,
            start - run.start if run else 0,
            linear,
        )
