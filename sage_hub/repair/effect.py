"""No release of nothing: whether an update, a plan and what was written do anything at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from sage_hub.checkpoint.dequantized import Dequantized, Dequantizing
from sage_hub.checkpoint.index import open_shards
from sage_hub.errors import NonFiniteError, NothingToDoError, QuantizedError
from sage_hub.repair.plan import Operation, Piece, Plan
from sage_hub.repair.write import TensorRecord
from sage_hub.settings import Settings

OPEN = 2  # shards of each side
NOISE = 1e-6  # of sums in float32
ROWS = 64  # of each tensor, for the rounding of a quantized base
MOSTLY = 0.5
FEW = 0.05  # of all linear maps


def no_update(plan: Plan) -> NothingToDoError:
    """The error for two sides that are one."""
    return NothingToDoError(
        f"{plan.base.name} and {plan.unlearned.name} hold the same weights; there is no update to "
        "sanitize. Check that both arguments are what you meant."
    )


def check_filters(plan: Plan, settings: Settings) -> None:
    """Raise NothingToDoError if the plan filters no tensor, or the settings no update."""
    if not plan.to_filter():
        reasons = plan.describe()["copy"]
        said = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
        raise NothingToDoError(
            f"No tensor of {plan.unlearned.name} can be filtered ({said}), so the release would be "
            "the unlearned model itself. Check that its tensors have the names that transformers "
            "gives them (--dry-run --verbose lists all)."
        )
    if settings.sharpness[0] == 0 and settings.gain == 1:
        raise NothingToDoError(
            "With --strength 0 and --gain 1 the release would be the unlearned model itself; give "
            "a larger strength, or another gain."
        )


def check_changes(plan: Plan) -> None:
    """Raise NothingToDoError unless the two sides differ in a tensor that is filtered.

    Both are read until they do, which is at the first such tensor as a rule.
    """
    if next(_changed_maps(plan), None) is None:
        raise NothingToDoError(
            f"{plan.unlearned.name} differs from {plan.base.name} in no weight that can be "
            "filtered, so the release would be the unlearned model itself. If it is a LoRA "
            "adapter, it may not have been trained; else what unlearning changed lies in "
            "embeddings, norms or the head, which sage-hub leaves alone."
        )


def check_breadth(plan: Plan) -> None:
    """Raise NothingToDoError if so few maps differ that damage shows nothing of forgetting.

    Both sides are read until enough of them do (docs/results.md, "Without rows").
    """
    maps = sum(map(len, plan.base.architecture.linears.values()))
    changed: set[str] = set()
    for name in _changed_maps(plan):
        changed.add(name)
        if len(changed) >= FEW * maps:
            return
    raise NothingToDoError(
        f"The two checkpoints differ in {len(changed)} of {maps} linear maps. So narrow an update, "
        "as RMU makes, loses what it forgets long before it loses what the base writes, so that "
        "without a forget set no gain can be chosen. Give --forget, or insist with --gain 1."
    )


def _changed_maps(plan: Plan) -> Iterator[str]:
    """The linear maps that differ between the two sides, read as they are asked for."""
    with ExitStack() as stack:
        base, unlearned = (
            stack.enter_context(open_shards(side, OPEN)) for side in (plan.base, plan.unlearned)
        )
        for operation in plan.to_filter():
            if operation.shard in plan.equal:
                continue
            if operation.pair is not None:  # of an adapter, whose update is B A
                b = unlearned(operation.shard).read(operation.pair.b)
                a = unlearned(operation.shard).read(operation.tensor)
                if a.any() and b.any():
                    yield from (linear.name for linear in operation.linears)
                continue
            for piece in operation.pieces:
                if piece.linear is not None and piece.base is not None:
                    ours = unlearned(operation.shard).read_rows(
                        operation.tensor, piece.start, piece.stop
                    )
                    theirs = base(plan.base.shard_of[piece.base]).read_rows(
                        piece.base, *_rows_of_base(piece)
                    )
                    if _differ(ours, theirs, operation):
                        yield piece.linear.name


def check_rounding(plan: Plan) -> float | None:
    """How much of ‖Δ‖² the rounding of a quantized base explains; None where none can be in it.

    By the first rows of each tensor that is filtered, where the sides differ. Raises QuantizedError
    where it is most of it: what was turned up would be that.
    """
    noise, size = 0.0, 0.0
    if not isinstance(plan.base.files, Dequantized):
        return None
    operations = [op for op in plan.to_filter() if op.pair is None]
    with (
        open_shards(plan.unlearned, 1) as unlearned,
        open_shards(plan.base, 1) as base,
    ):
        for operation in operations:
            for piece in operation.pieces[:1] if operation.linears else ():
                if piece.base is None:
                    continue
                stop = min(piece.stop, piece.start + ROWS)
                ours = unlearned(operation.shard).read_rows(operation.tensor, piece.start, stop)
                reader, start = base(plan.base.shard_of[piece.base]), piece.base_start
                theirs = reader.read_rows(piece.base, start, start + len(ours))
                if _differ(ours, theirs, operation) and isinstance(reader, Dequantizing):
                    noise += reader.rounding(piece.base, start, start + len(ours))
                size += float((ours.double() - theirs.double()).square().sum())
    if not size:
        return None
    share = noise / size
    if share > MOSTLY:
        raise QuantizedError(
            f"{plan.base.name} is {plan.base.files.reading}, and its rounding alone explains "
            f"{min(share, 1):.0%} of the difference from {plan.unlearned.name}; what unlearning "
            "did cannot be told from that. Pass the base in full precision."
        )
    return share


def check_written(records: Sequence[TensorRecord], plan: Plan) -> None:
    """Raise NothingToDoError if what was written is one of the two sides.

    Raises NonFiniteError where weights are so large that nothing can be measured of them.
    """
    for record in records:
        figures = (record.update_norm, record.kept_norm, record.retain_before, record.retain_after)
        if not all(map(math.isfinite, figures)):
            raise NonFiniteError(
                f"The weights of {record.name!r} are so large that what the update does there "
                f"cannot be measured; {plan.unlearned.name} is broken; pass one "
                "from before it broke."
            )
    filtered = [record for record in records if record.action == "filtered"]
    if not filtered:
        raise no_update(plan)
    if all(_is_source(record) for record in filtered):
        raise NothingToDoError(
            "The filter leaves every update as it was: the release would be the unlearned model "
            "itself. Raise --strength, --energy or --gain, or store it in a wider type "
            "(--out-dtype)."
        )
    if not any(record.kept_norm for record in filtered):
        raise NothingToDoError(
            "Nothing of the update is left in any weight: the release would be the base model in "
            "all that is filtered. Lower --strength or --energy, or raise --gain."
        )


def _is_source(record: TensorRecord) -> bool:
    """Whether D is Δ, by its size and by what it does on retained inputs."""
    pairs = (record.kept_norm, record.update_norm), (record.retain_after, record.retain_before)
    return all(math.isclose(one, other, rel_tol=NOISE) for one, other in pairs)


def _rows_of_base(piece: Piece) -> tuple[int, int]:
    return piece.base_start, piece.base_start + piece.stop - piece.start


def _differ(ours: torch.Tensor, theirs: torch.Tensor, operation: Operation) -> bool:
    """Whether they do as far as the type of the release can tell."""
    return not torch.equal(ours.to(operation.dtype), theirs.to(operation.dtype))
