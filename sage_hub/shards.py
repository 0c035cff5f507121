"""The pass over the weights: shard by shard, some rows and one site's statistics at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.checkpoint import INDEX, SINGLE, open_shards, read_json
from sage_hub.errors import NonFiniteError
from sage_hub.moments import Spectrum
from sage_hub.plan import Operation, Piece, Plan
from sage_hub.progress import SILENT, Progress
from sage_hub.ranks import ALONE, Ranks
from sage_hub.sage import (
    Gains,
    filter_update,
    profile,
    project,
    relative,
    sanitize_weight,
    suppression,
)
from sage_hub.statistics import Statistics
from sage_hub.tensorfile import TensorWriter, file_sha256
from sage_hub.threads import ahead

# The λ at which the record says what bias would be left, to choose the next one by.
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-4, 9))

# Numbers in a block of rows: 4 MB in float32, so that a block stays in the cache while it is
# worked on. A larger one is slower and costs memory.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Filter:
    """How strongly each site is filtered: λ, ρ and the cap on k (see `sage_hub.sage`)."""

    strength: float
    energy: float
    rank: int | None

    def suppression(self, spectrum: Spectrum) -> Tensor:
        """g at one site, shape (k,)."""
        return suppression(spectrum, self.strength, self.energy, self.rank)


@dataclass(frozen=True)
class Measurement:
    """What the update of one weight does on retained and forgotten inputs.

    Biases are B = tr(D C Dᵀ); `base` is tr(W_b C W_bᵀ), which makes them relative. The forget
    figures are None without a forget proxy.
    """

    tensor: str
    module: str
    rank: int
    retain: float  # of the source's update Δ
    retain_filtered: float  # of D, with the gain not applied
    base: float
    norm: float  # ‖Δ‖²
    forget: float | None
    forget_filtered: float | None
    profile: tuple[float, ...]  # the retain bias at each of STRENGTHS

    def __add__(self, other: Measurement) -> Measurement:
        """Both together, of rows of one map: every figure is a sum over rows."""

        def both(one: float | None, two: float | None) -> float | None:
            return None if one is None or two is None else one + two

        return replace(
            self,
            retain=self.retain + other.retain,
            retain_filtered=self.retain_filtered + other.retain_filtered,
            base=self.base + other.base,
            norm=self.norm + other.norm,
            forget=both(self.forget, other.forget),
            forget_filtered=both(self.forget_filtered, other.forget_filtered),
            profile=tuple(a + b for a, b in zip(self.profile, other.profile, strict=True)),
        )


@dataclass(frozen=True)
class Block:
    """Some rows of one piece, read from both sides: what is in memory at a time."""

    operation: Operation
    piece: Piece
    base: Tensor | None
    unlearned: Tensor
    first: int  # the row of the map that it begins with
    outer: Tensor | None = None  # the update is this times the rows: R of an adapter's pair

    @property
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

    def seen_by(self, spectrum: Spectrum, g: Tensor, device: str) -> tuple[Spectrum, Tensor]:
        """The part of a spectrum and of its g that acts on these rows."""
        if spectrum.diagonal and self.transposed:
            spectrum, g = spectrum.inside(self.first, len(self.unlearned), g)
        basis = spectrum.basis.to(device)
        return replace(spectrum, basis=basis), g

    def oriented(self, tensor: Tensor, device: str) -> Tensor:
        """The rows as (out, in), in float32 at least."""
        wide = _wide(tensor.to(device))
        return wide.T.contiguous() if self.transposed else wide


@dataclass(frozen=True)
class TensorRecord:
    """What was done with one tensor. Biases are relative to the base weight's, after rounding."""

    name: str
    shard: str
    action: str  # "filtered", "identical" or "copied"
    reason: str = ""
    kind: str | None = None  # of map, if it was filtered
    rank: int | None = None  # the largest, where it holds several maps
    bias_before: float | None = None
    bias_after: float | None = None
    bias_kept: float | None = None  # after / before, also where the base weight is not read
    norm_ratio: float | None = None  # ‖D‖ / ‖Δ‖
    # Sums that the model's figures are made of; not relative, not rounded.
    retain_before: float = 0.0
    retain_after: float = 0.0
    retain_base: float = 0.0
    update_norm: float = 0.0  # ‖Δ‖²
    kept_norm: float = 0.0  # ‖D‖²
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


def measure(
    plan: Plan,
    statistics: Statistics,
    how: Filter,
    *,
    device: str,
    ranks: Ranks = ALONE,
    progress: Progress = SILENT,
) -> list[Measurement]:
    """Measure every weight that would be filtered, writing nothing.

    With several `ranks` each takes a part of the shards, and has the measurements of all.
    """
    different = [shard for shard in plan.unlearned.shards if shard not in plan.equal]
    own = _measure(plan, statistics, how, ranks.mine(different), device, progress)
    everything = {place: found for part in ranks.all(own) for place, found in part.items()}
    found: dict[str, Measurement] = {}
    # Always in this order, because sums depend on it.
    for place in sorted(everything, key=lambda place: different.index(place[0])):
        name, here = place[1], everything[place]
        found[name] = found[name] + here if name in found else here
    return list(found.values())


def _measure(
    plan: Plan,
    statistics: Statistics,
    how: Filter,
    shards: Sequence[str],
    device: str,
    progress: Progress,
) -> dict[tuple[str, str], Measurement]:
    """Shard and map -> what the rows of the map in that shard do."""
    found: dict[tuple[str, str], Measurement] = {}
    sites = statistics.site_of
    with ahead(_blocks(plan, shards, "Measuring", progress)) as blocks:
        for block in blocks:
            _check_finite(block, plan)
            linear = block.piece.linear
            if linear is None or block.base is None or not block.changed:
                continue
            site = sites[linear.name]
            whole = statistics.spectrum("retain", site)
            g = how.suppression(whole)
            rank = len(g)
            spectrum, g = block.seen_by(whole, g, device)
            b, u = block.oriented(block.base, device), block.oriented(block.unlearned, device)
            update = block.update(u, b)
            along = profile(update, spectrum.basis)
            forget = forget_filtered = None
            if statistics.has("forget"):
                other = statistics.spectrum("forget", site)
                forget_spectrum, _ = block.seen_by(other, other.values, device)
                filtered = filter_update(update, spectrum.basis, g)
                forget = profile(update, forget_spectrum.basis).bias(forget_spectrum)
                forget_filtered = profile(filtered, forget_spectrum.basis).bias(forget_spectrum)
            measured = Measurement(
                tensor=block.operation.tensor,
                module=linear.name,
                rank=rank,
                retain=along.bias(spectrum),
                retain_filtered=along.bias(spectrum, g),
                base=profile(b, spectrum.basis).bias(spectrum),
                norm=along.norm,
                forget=forget,
                forget_filtered=forget_filtered,
                profile=tuple(along.biases(spectrum, STRENGTHS, len(g)).tolist()),
            )
            place = block.operation.shard, linear.name
            found[place] = found[place] + measured if place in found else measured
    return found


def write_shards(
    plan: Plan,
    statistics: Statistics,
    how: Filter,
    gains: Gains,
    folder: Path,
    todo: Sequence[str],
    *,
    device: str,
    progress: Progress = SILENT,
) -> Generator[ShardRecord, None, None]:
    """Write the sanitized shards `todo` into `folder`, and yield what was done.

    A shard has its name when it is yielded, and is whole. One that the base has byte for byte is
    not read and not written, but for its record. Raises NonFiniteError or
    CorruptCheckpointError.
    """
    sites = statistics.site_of
    different = [shard for shard in todo if shard not in plan.equal]
    with ahead(_blocks(plan, different, "Sanitizing", progress)) as blocks:
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
                        site = sites.get(block.piece.linear.name) if block.piece.linear else None
                        spectrum = statistics.spectrum("retain", site) if site else None
                        writer.write(
                            operation.tensor,
                            _treat(block, plan, spectrum, how, gains, device, tally),
                        )
                        block = next(stream, None)
                    records.append(tally.record())
            yield ShardRecord(shard, writer.sha256, tuple(records))


def _untouched(plan: Plan, shard: str) -> ShardRecord:
    names = [operation.tensor for operation in plan.in_shard[shard]]
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
    rank: int | None = None
    before: float = 0.0
    after: float = 0.0
    base: float = 0.0
    update: float = 0.0  # ‖Δ‖²
    kept: float = 0.0  # ‖D‖²
    profile: Tensor = field(default_factory=lambda: torch.zeros(len(STRENGTHS)).double())

    def record(self) -> TensorRecord:
        name, shard = self.operation.tensor, self.operation.shard
        if not self.differs:
            return TensorRecord(name, shard, "identical")
        if self.rank is None:
            reason = self.operation.reason or "what differs saw no input during calibration"
            return TensorRecord(
                name, shard, "copied", reason, update_norm=self.update, kept_norm=self.kept
            )
        return TensorRecord(
            name,
            shard,
            "filtered",
            kind=self.operation.linears[0].kind,
            rank=self.rank,
            bias_before=relative(self.before, self.base),
            bias_after=relative(self.after, self.base),
            bias_kept=relative(self.after, self.before),
            norm_ratio=math.sqrt(self.kept / self.update) if self.update else None,
            retain_before=self.before,
            retain_after=self.after,
            retain_base=self.base,
            update_norm=self.update,
            kept_norm=self.kept,
            profile=tuple(self.profile.tolist()),
        )


def _treat(
    block: Block,
    plan: Plan,
    spectrum: Spectrum | None,
    how: Filter,
    gains: Gains,
    device: str,
    tally: _Tally,
) -> Tensor:
    """The rows as they are stored in the release; what is to be said of them goes to `tally`."""
    base, unlearned = block.base, block.unlearned
    changed = block.changed
    if spectrum is None or base is None or not changed:
        _check_finite(block, plan)
    if not changed:
        return _rounded(unlearned, block)
    tally.differs = True
    linear = block.piece.linear
    if spectrum is None or base is None or linear is None:
        if base is not None:
            norm = float(block.update(_wide(unlearned), _wide(base)).square().sum())
            tally.update += norm
            tally.kept += norm
        return _rounded(unlearned, block)
    g = how.suppression(spectrum)
    tally.rank = max(tally.rank or 0, len(g))
    spectrum, g = block.seen_by(spectrum, g, device)
    b, u = block.oriented(base, device), block.oriented(unlearned, device)
    update = block.update(u, b)
    # One product for both, as two small ones take longer.
    both = project(torch.cat([update, b]), spectrum.basis)
    along, base_along = both[: len(update)], both[len(update) :]
    known = along if block.outer is None else None
    gain = gains.of(linear.name)
    stored = sanitize_weight(b, u, spectrum.basis, g, gain, known).to(block.operation.dtype)
    # Measured on what is stored, because rounding to bfloat16 is an update too.
    before = profile(update, spectrum.basis, along)
    after = profile(block.update(stored.to(b), b), spectrum.basis)
    reference = profile(b, spectrum.basis, base_along)
    if not math.isfinite(before.norm + after.norm + reference.norm):
        # The norms have seen every number, which spares a look of its own at each.
        _check_finite(block, plan)
        _check_stored(stored, block)
    tally.before += before.bias(spectrum)
    tally.profile += before.biases(spectrum, STRENGTHS, len(g))
    tally.after += after.bias(spectrum)
    tally.base += reference.bias(spectrum)
    tally.update += before.norm
    tally.kept += after.norm
    return (stored.T.contiguous() if block.transposed else stored).cpu()


def _blocks(
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
                        first = piece.first + start - piece.start
                        yield Block(operation, piece, base, unlearned, first, outer)
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
        whole = operation.pair is not None or (
            linear is not None and linear.transposed and not linear.diagonal
        )
        step = max(1, piece.stop - piece.start) if whole else rows
        for start in range(piece.start, piece.stop, step):
            yield piece, start, min(start + step, piece.stop)


def _rounded(rows: Tensor, block: Block) -> Tensor:
    """`rows` in the type of the release. Raises NonFiniteError if that cannot hold them."""
    stored = rows.to(block.operation.dtype)
    if rows.dtype != stored.dtype:
        _check_stored(stored, block)
    return stored


def _check_stored(stored: Tensor, block: Block) -> None:
    if stored.is_floating_point() and not _finite(stored):
        raise NonFiniteError(
            f"The sanitized {block.operation.tensor!r} overflows {stored.dtype}; lower --gain, "
            "or choose a wider type with --out-dtype."
        )


def _check_finite(block: Block, plan: Plan) -> None:
    """Raise NonFiniteError for NaN or Inf on either side."""
    name = block.operation.tensor
    for tensor, tensor_name, side in (
        (block.unlearned, name, plan.unlearned),
        (block.base, block.piece.base or name, plan.base),
        (block.outer, name, plan.unlearned),
    ):
        if tensor is not None and tensor.is_floating_point() and not _finite(tensor):
            raise NonFiniteError(
                f"Tensor {tensor_name!r} of {side.name} holds NaN or Inf; that checkpoint is "
                "broken."
            )


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are; by the largest, which NaN is too, as that is the fast way."""
    return not tensor.numel() or bool(torch.isfinite(tensor.abs().max()))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def write_index(plan: Plan, folder: Path) -> dict[str, str]:
    """Write the index of the shards into `folder`, if there is to be one; its name and SHA-256."""
    unlearned = plan.unlearned
    if SINGLE in unlearned.shards or INDEX not in unlearned.files.sizes:
        return {}
    metadata: dict[str, Any] = dict(read_json(unlearned.files, INDEX).get("metadata") or {})
    metadata["total_size"] = sum(
        info.nbytes for shard in unlearned.shards for info in plan.layout(shard).values()
    )
    index = {"metadata": metadata, "weight_map": dict(sorted(unlearned.shard_of.items()))}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    return {INDEX: file_sha256(folder / INDEX)}
