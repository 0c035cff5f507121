"""The pass over the weights: shard by shard, some rows and one site's statistics at a time."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sage_hub.checkpoint.tensorwriter import TensorWriter
from sage_hub.errors import NonFiniteError
from sage_hub.method.sage import Gains, profile, relative, sanitize_weight
from sage_hub.model.weights import widened
from sage_hub.repair.plan import Operation, Plan
from sage_hub.repair.stream import Block, is_finite, stream_blocks
from sage_hub.repair.update import Measurement, Update
from sage_hub.runtime.progress import SILENT, Progress
from sage_hub.runtime.threads import ahead


@dataclass(frozen=True)
class TensorRecord:
    """What was done with one tensor. Biases are relative to the base weight's, after rounding."""

    name: str
    shard: str
    action: str  # "filtered", "identical" or "copied"
    reason: str = ""
    rank: int | None = None  # the largest, where it holds several maps
    bias_before: float | None = None
    bias_after: float | None = None
    bias_kept: float | None = None  # after / before
    norm_ratio: float | None = None  # ‖D‖ / ‖Δ‖
    # Sums that the model's figures are made of; not relative, not rounded.
    retain_before: float = 0.0
    retain_after: float = 0.0
    retain_base: float = 0.0
    update_norm: float = 0.0  # ‖Δ‖²
    kept_norm: float = 0.0  # ‖D‖²
    rounding_norm: float = 0.0  # ‖W_b rounded to the unlearned side's type − W_b‖²
    profile: tuple[float, ...] = ()  # the retain bias at each of STRENGTHS, without a gain


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its SHA-256, and what was done with each tensor in it."""

    shard: str
    sha256: str
    tensors: tuple[TensorRecord, ...]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ShardRecord:
        """The record that `asdict` took apart."""
        tensors = tuple(
            TensorRecord(**{**tensor, "profile": tuple(tensor["profile"])})
            for tensor in record["tensors"]
        )
        return cls(record["shard"], record["sha256"], tensors)


def write_shards(
    update: Update,
    gains: Gains,
    folder: Path,
    todo: Sequence[str],
    progress: Progress = SILENT,
) -> Generator[ShardRecord, None, None]:
    """Write the sanitized shards `todo` into `folder`, and yield what was done.

    A shard has its name when it is yielded, and is whole. One that the base has byte for byte is
    not read and not written, but for its record. Raises NonFiniteError or
    CorruptCheckpointError.
    """
    plan, outputs = update.plan, update.statistics.outputs
    different = [shard for shard in todo if shard not in plan.equal]
    with ahead(stream_blocks(plan, different, "Sanitizing", progress)) as blocks:
        stream = iter(blocks)
        block = next(stream, None)
        for shard in todo:
            if shard in plan.equal:
                yield _untouched(plan, shard)
                continue
            records: list[TensorRecord] = []
            metadata = {**plan.unlearned.headers[shard].metadata, "format": "pt"}
            with TensorWriter(folder / shard, plan.layout(shard), metadata) as writer:
                for operation in plan.in_shard[shard]:
                    tally = _Tally(operation)
                    while block is not None and block.operation is operation:
                        writer.write(operation.name, _treat(block, update, gains, tally))
                        block = next(stream, None)
                    records.append(tally.record(operation.outputs(outputs)))
            yield ShardRecord(shard, writer.sha256, tuple(records))


def _untouched(plan: Plan, shard: str) -> ShardRecord:
    names = [operation.name for operation in plan.in_shard[shard]]
    records = tuple(TensorRecord(name, shard, "identical") for name in names)
    return ShardRecord(shard, plan.unlearned.files.sha256(shard), records)


def norm_matched_alpha(records: Sequence[TensorRecord]) -> float:
    """The α for which the control W_b + αΔ has an update of the sanitized one's size.

    Over all tensors, filtered or not: α = √(Σ‖D‖² / Σ‖Δ‖²).
    """
    kept = math.fsum(record.kept_norm for record in records)
    source = math.fsum(record.update_norm for record in records)
    return math.sqrt(kept / source) if source > 0 else 0.0


@dataclass
class _Tally:
    """What is known of a tensor so far; every figure is a sum over rows."""

    operation: Operation
    differs: bool = False
    measured: Measurement | None = None  # of the rows that are filtered
    after: float = 0.0  # their retain bias as they are stored
    update: float = 0.0  # ‖Δ‖²
    kept: float = 0.0  # ‖D‖²
    rounding: float = 0.0  # ‖W_b rounded to the unlearned side's type − W_b‖²

    def record(self, outputs: float) -> TensorRecord:
        """What is said of the tensor, the rows of which make so much of the base's outputs."""
        name, shard, found = self.operation.name, self.operation.shard, self.measured
        if not self.differs:
            return TensorRecord(name, shard, "identical")
        if found is None:
            reason = self.operation.reason or "what differs saw no input during calibration"
            return TensorRecord(
                name, shard, "copied", reason, update_norm=self.update, kept_norm=self.kept
            )
        return TensorRecord(
            name,
            shard,
            "filtered",
            rank=found.rank,
            bias_before=relative(found.retain, outputs),
            bias_after=relative(self.after, outputs),
            bias_kept=relative(self.after, found.retain),
            norm_ratio=math.sqrt(self.kept / self.update) if self.update else None,
            retain_before=found.retain,
            retain_after=self.after,
            retain_base=outputs,
            update_norm=self.update,
            kept_norm=self.kept,
            rounding_norm=self.rounding,
            profile=found.profile,
        )


def _treat(block: Block, update: Update, gains: Gains, tally: _Tally) -> Tensor:
    """The rows as they are stored in the release; what is to be said of them goes to `tally`."""
    seen = update.see(block)
    if seen is None:
        if block.changed:
            tally.differs = True
            if block.base is not None:
                wide = block.update(*widened(block.unlearned, block.base)).double()
                norm = float(wide.square().sum())
                tally.update += norm
                tally.kept += norm
        return _rounded(block)
    measured, basis = seen.measured, seen.spectrum.basis
    tally.differs = True
    tally.measured = measured if tally.measured is None else tally.measured + measured
    known = seen.along if block.outer is None else None
    gain = gains.of(measured.module)
    stored = sanitize_weight(seen.base, seen.unlearned, basis, seen.g, gain, known)
    stored = stored.to(block.operation.dtype)
    # Measured on what is stored, because rounding to bfloat16 is an update too.
    after = profile(block.update(stored.to(seen.base), seen.base), basis)
    if not math.isfinite(after.norm):
        _check_stored(stored, block)
    tally.after += after.bias(seen.spectrum)
    tally.update += measured.norm
    tally.rounding += _rounding(block)
    tally.kept += after.norm
    return (stored.T.contiguous() if block.transposed else stored).cpu()


def _rounding(block: Block) -> float:
    """How much of ‖Δ‖² the unlearned side's type explains, where the base is stored otherwise."""
    base, dtype = block.base, block.unlearned.dtype
    if base is None or base.dtype == dtype:
        return 0.0
    (rounded, exact) = widened(base.to(dtype), base)
    return float((rounded - exact).square().sum())


def rounding_share(records: Sequence[TensorRecord]) -> float | None:
    """The share of Σ‖Δ‖² over filtered weights that rounding alone explains, if there is any."""
    filtered = [record for record in records if record.action == "filtered"]
    noise = math.fsum(record.rounding_norm for record in filtered)
    return relative(noise, math.fsum(r.update_norm for r in filtered)) if noise else None


def _rounded(block: Block) -> Tensor:
    """The rows in the type of the release. Raises NonFiniteError if that cannot hold them."""
    stored = block.unlearned.to(block.operation.dtype)
    if block.unlearned.dtype != stored.dtype:
        _check_stored(stored, block)
    return stored


def _check_stored(stored: Tensor, block: Block) -> None:
    if stored.is_floating_point() and not is_finite(stored):
        raise NonFiniteError(
            f"The sanitized {block.operation.tensor!r} overflows {stored.dtype}; lower --gain, "
            "or choose a wider type with --out-dtype."
        )
