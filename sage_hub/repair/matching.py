"""Match the two sides tensor by tensor, and decide from headers what becomes of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.architecture import Architecture, Linear, Place, unwrapped
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.notes import resized_vocabulary, shapes_of
from sage_hub.checkpoint.pair import Pair
from sage_hub.checkpoint.tensorfile import FLOATS, TensorInfo
from sage_hub.errors import ArchitectureError, MissingTensorError, NothingToDoError, SageHubError
from sage_hub.repair.beside import sort_files
from sage_hub.repair.plan import Operation, Piece, Plan


def make_plan(pair: Pair) -> Plan:
    """Match the two sides tensor by tensor and decide what happens to each.

    Its problems are an ArchitectureError for each shape that differs, a MissingTensorError for each
    tensor that only one side has, and a NothingToDoError if nothing is left to filter. Raises
    ArchitectureError for different models.
    """
    base, unlearned = pair.base, pair.unlearned
    if isinstance(unlearned, Adapter):
        plan = _plan_adapter(base, unlearned)
    else:
        plan = _plan_whole(base, unlearned)
    if plan.to_filter() or plan.problems:
        return plan
    reasons = dict.fromkeys(operation.reason for operation in plan.operations)
    nothing = NothingToDoError(
        f"Nothing of {unlearned.name} would be filtered ({', '.join(reasons)}), so that the "
        "release would be what it is already; pass an update of the layers between."
    )
    return replace(plan, problems=(nothing,))


def _plan_whole(base: Checkpoint, unlearned: Checkpoint) -> Plan:
    theirs, ours = base.architecture, unlearned.architecture
    if theirs.model_type != ours.model_type:
        if theirs.settings["model_type"] == ours.model_type:
            raise ArchitectureError(
                f"{unlearned.name} is the text part ({ours.model_type}) of a model such as "
                f"{base.name} ({theirs.model_type}); pass the text part of the base too, saved as "
                "a model of its own."
            )
        raise ArchitectureError(
            f"{base.name} is a {theirs.model_type} model and {unlearned.name} a "
            f"{ours.model_type} model; the base must be the model that was unlearned."
        )
    different, resized = _different_shapes(base, unlearned), resized_vocabulary(base, unlearned)
    problems: list[SageHubError] = [*dict.fromkeys(different.values())]
    theirs_at, ours_at = _rows_by_parameter(base), _rows_by_parameter(unlearned)
    for parameter, runs in theirs_at.items():
        # What the model of the base has no place for is nothing of the model.
        known = any(theirs.parameter(run.tensor) for run in runs)
        compared = parameter not in different and parameter not in resized
        if compared and known and not ours.may_be_absent(parameter):
            for lost in _uncovered(runs, _first_of(ours.twins(parameter), ours_at)):
                problems.append(_missing(lost, base, unlearned))
    operations = []
    for shard, header in unlearned.headers.items():
        for tensor, info in header.tensors.items():
            place = unlearned.places[tensor]
            parameter = place.parameter if place else unwrapped(tensor)
            # A base that ties its head to the embedding has the head there, or the other way.
            runs = _first_of(theirs.twins(parameter), theirs_at)
            mine = _Run(place.start if place else 0, place.stop if place else info.rows, tensor)
            compared = parameter not in different and parameter not in resized
            if compared and (runs or not theirs.may_be_absent(parameter)):
                for lost in _uncovered([mine], runs):
                    problems.append(_missing(lost, unlearned, base))
            decided = _decide(ours, shard, info, place, mine, runs)
            operations.append(replace(decided, named=unwrapped(tensor)))
    return Plan(base, unlearned, tuple(operations), *sort_files(unlearned), tuple(problems))


def _plan_adapter(base: Checkpoint, adapter: Adapter) -> Plan:
    """A is filtered, B stays; whole tensors are treated as those of a whole model are."""
    architecture = adapter.architecture
    base_at = _rows_by_parameter(base)
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
    return Plan(base, adapter, tuple(operations), *sort_files(adapter))


@dataclass(frozen=True, order=True)
class _Run:
    """Rows [start, stop) of a parameter, which `tensor` holds."""

    start: int
    stop: int
    tensor: str


def _rows_by_parameter(side: Checkpoint) -> dict[str, list[_Run]]:
    """Parameter -> the runs of its rows that `side` has, in order; a tensor of no parameter is
    one by its own name."""
    found: dict[str, list[_Run]] = {}
    for tensor, at in side.places.items():
        place = at or Place(unwrapped(tensor), 0, side.info(tensor).rows)
        found.setdefault(place.parameter, []).append(_Run(place.start, place.stop, tensor))
    return {parameter: sorted(runs) for parameter, runs in found.items()}


def _first_of(names: Sequence[str], runs: Mapping[str, list[_Run]]) -> list[_Run]:
    """The rows of the first of `names` that has any."""
    return next((runs[name] for name in names if name in runs), [])


def _uncovered(wanted: Sequence[_Run], there: Sequence[_Run]) -> Iterator[str]:
    """The tensors of `wanted` that have a row which none of `there` has."""
    for run in wanted:
        reached = run.start
        for other in there:
            if other.start <= reached < other.stop:
                reached = other.stop
        if reached < run.stop or not there:
            yield run.tensor


def _different_shapes(base: Checkpoint, unlearned: Checkpoint) -> dict[str, ArchitectureError]:
    """Parameter, or tensor of none, whose shape differs -> the error.

    Not where it is the vocabulary that has another size.
    """
    theirs, ours = shapes_of(base), shapes_of(unlearned)
    resized = resized_vocabulary(base, unlearned)
    found: dict[str, ArchitectureError] = {}
    for name, shape in theirs.items():
        other = ours.get(name, shape)
        if shape != other and name not in resized:
            found[name] = ArchitectureError(
                f"Tensor {name!r} has the shape {[*shape]} in {base.name} and {[*other]} in "
                f"{unlearned.name}; the base must be the model that was unlearned."
            )
    return found


def _missing(tensor: str, holder: Checkpoint, other: Checkpoint) -> MissingTensorError:
    if holder.architecture.parameter(tensor) is None:
        return MissingTensorError(
            f"Tensor {tensor!r} of {holder.name} has no place in its model, and {other.name} has "
            "it not, so nothing can be made of it; remove it from the checkpoint."
        )
    return MissingTensorError(
        f"Tensor {tensor!r} is in {holder.name} but not in {other.name}; the two must be "
        "checkpoints of one model. Pass the base that was unlearned."
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
