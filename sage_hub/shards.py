"""The pass over the weights: shard by shard, one tensor and one site's statistics at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from sage_hub.errors import NonFiniteError, NothingToDoError
from sage_hub.moments import Spectrum
from sage_hub.plan import Operation, Plan
from sage_hub.progress import SILENT, Progress
from sage_hub.sage import (
    filter_update,
    matching_gain,
    profile,
    sanitize_weight,
    suppression,
)
from sage_hub.statistics import Statistics
from sage_hub.tensorfile import TensorReader, TensorWriter


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


@dataclass(frozen=True)
class TensorRecord:
    """What was done with one tensor. Biases are relative to the base weight's, after rounding."""

    name: str
    shard: str
    action: str  # "filtered", "identical" or "copied"
    reason: str = ""
    rank: int | None = None
    bias_before: float | None = None
    bias_after: float | None = None
    norm_ratio: float | None = None  # ‖D‖ / ‖Δ‖
    # Sums that the model's figures are made of; not relative, not rounded.
    retain_before: float = 0.0
    retain_after: float = 0.0
    retain_base: float = 0.0
    update_norm: float = 0.0  # ‖Δ‖²
    kept_norm: float = 0.0  # ‖D‖²


def measure(
    plan: Plan, statistics: Statistics, how: Filter, *, device: str, progress: Progress = SILENT
) -> list[Measurement]:
    """Measure every weight that would be filtered, writing nothing."""
    found = []
    sites = statistics.site_of
    for operation, base, unlearned in _pairs(plan, "Measuring", progress):
        if operation.module is None or base is None or _equal(base, unlearned):
            continue
        site = sites[operation.module]
        spectrum = _on(statistics.spectrum("retain", site), device)
        b, u = _oriented(base, operation, device), _oriented(unlearned, operation, device)
        g = how.suppression(spectrum)
        along = profile(u - b, spectrum.basis)
        forget = forget_filtered = None
        if statistics.has("forget"):
            forget_spectrum = _on(statistics.spectrum("forget", site), device)
            filtered = filter_update(u - b, spectrum.basis, g)
            forget = profile(u - b, forget_spectrum.basis).bias(forget_spectrum)
            forget_filtered = profile(filtered, forget_spectrum.basis).bias(forget_spectrum)
        found.append(
            Measurement(
                tensor=operation.tensor,
                module=operation.module,
                rank=len(g),
                retain=along.bias(spectrum),
                retain_filtered=along.bias(spectrum, g),
                base=profile(b, spectrum.basis).bias(spectrum),
                norm=along.norm,
                forget=forget,
                forget_filtered=forget_filtered,
            )
        )
    return found


def gain_that_matches(measured: list[Measurement]) -> float:
    """The one γ for the model with which the forgetting carrier keeps its size.

    Raises NothingToDoError if the update does nothing on the forget proxy.
    """
    source = math.fsum(m.forget or 0.0 for m in measured)
    filtered = math.fsum(m.forget_filtered or 0.0 for m in measured)
    try:
        return matching_gain(source, filtered)
    except ValueError:
        raise NothingToDoError(
            "The filtered update does nothing on the forget proxy, so no gain can match it; "
            "check that --forget is the data that was unlearned."
        ) from None


def write_shards(
    plan: Plan,
    statistics: Statistics,
    how: Filter,
    gain: float,
    folder: Path,
    *,
    device: str,
    progress: Progress = SILENT,
) -> tuple[list[TensorRecord], dict[str, str]]:
    """Write the sanitized shards and their index into `folder`.

    Returns what was done with each tensor and the SHA-256 of each weight file. Raises
    NonFiniteError, CorruptCheckpointError, or NothingToDoError if no weight differed.
    """
    records: list[TensorRecord] = []
    hashes: dict[str, str] = {}
    sites = statistics.site_of
    with closing(_pairs(plan, "Sanitizing", progress)) as pairs:
        for shard, header in plan.unlearned.headers.items():
            metadata = {**header.metadata, "format": "pt"}
            with TensorWriter(folder / shard, header.tensors, metadata) as writer:
                for _ in header.tensors:
                    operation, base, unlearned = next(pairs)
                    site = sites.get(operation.module or "")
                    spectrum = _on(statistics.spectrum("retain", site), device) if site else None
                    tensor, record = _treat(operation, base, unlearned, spectrum, how, gain, device)
                    writer.write(operation.tensor, tensor)
                    records.append(record)
            hashes[shard] = writer.sha256
    if all(record.action == "identical" for record in records):
        raise NothingToDoError(
            f"{plan.base.name} and {plan.unlearned.name} hold the same weights; there is no "
            "update to sanitize. Check that both arguments are what you meant."
        )
    if plan.unlearned.shards != [SINGLE]:
        _write_index(plan.unlearned, folder)
    return records, hashes


def norm_matched_alpha(records: list[TensorRecord]) -> float:
    """The α for which the control W_b + αΔ has an update of the sanitized one's size.

    Over all tensors, filtered or not: α = √(Σ‖D‖² / Σ‖Δ‖²).
    """
    kept = math.fsum(record.kept_norm for record in records)
    source = math.fsum(record.update_norm for record in records)
    return math.sqrt(kept / source) if source > 0 else 0.0


def _treat(
    operation: Operation,
    base: Tensor | None,
    unlearned: Tensor,
    spectrum: Spectrum | None,
    how: Filter,
    gain: float,
    device: str,
) -> tuple[Tensor, TensorRecord]:
    """One tensor of the release, and what to say of it."""
    name, shard = operation.tensor, operation.shard
    if base is not None and _equal(base, unlearned):
        return unlearned, TensorRecord(name, shard, "identical")
    if spectrum is None or base is None:
        norm = 0.0 if base is None else float((_wide(unlearned) - _wide(base)).square().sum())
        return unlearned, TensorRecord(
            name, shard, "copied", operation.reason, update_norm=norm, kept_norm=norm
        )
    b, u = _oriented(base, operation, device), _oriented(unlearned, operation, device)
    g = how.suppression(spectrum)
    stored = sanitize_weight(b, u, spectrum.basis, g, gain).to(unlearned.dtype)
    if not torch.isfinite(stored).all():
        raise NonFiniteError(
            f"The sanitized {name!r} overflows {unlearned.dtype}; lower --gain, or store the "
            "unlearned model in a wider type."
        )
    # Measured on what is stored, because rounding to bfloat16 is an update too.
    before, after = profile(u - b, spectrum.basis), profile(stored.to(b) - b, spectrum.basis)
    whole = profile(b, spectrum.basis).bias(spectrum)
    record = TensorRecord(
        name,
        shard,
        "filtered",
        rank=len(g),
        bias_before=_ratio(before.bias(spectrum), whole),
        bias_after=_ratio(after.bias(spectrum), whole),
        norm_ratio=math.sqrt(after.norm / before.norm) if before.norm else None,
        retain_before=before.bias(spectrum),
        retain_after=after.bias(spectrum),
        retain_base=whole,
        update_norm=before.norm,
        kept_norm=after.norm,
    )
    return (stored.T if operation.transposed else stored).cpu(), record


def _pairs(
    plan: Plan, what: str, progress: Progress
) -> Generator[tuple[Operation, Tensor | None, Tensor], None, None]:
    """Each operation with its tensors, in the order of the unlearned side's bytes.

    Raises NonFiniteError at the first NaN or Inf on either side.
    """
    with ExitStack() as stack, progress.counter(what, plan.unlearned.weight_bytes, "B") as bar:
        base_readers: dict[str, TensorReader] = {}
        operations = iter(plan.operations)
        for shard, header in plan.unlearned.headers.items():
            with plan.unlearned.open_shard(shard) as reader:
                for _ in header.tensors:
                    operation = next(operations)
                    unlearned = reader.read(operation.tensor)
                    _check_finite(unlearned, operation.tensor, plan.unlearned)
                    base = None
                    if operation.base is not None:
                        place = plan.base.shard_of[operation.base]
                        if place not in base_readers:
                            # Open readers hold no memory, only a file handle.
                            base_readers[place] = stack.enter_context(plan.base.open_shard(place))
                        base = base_readers[place].read(operation.base)
                        _check_finite(base, operation.base, plan.base)
                    yield operation, base, unlearned
                    bar.update(operation.info.nbytes)


def _check_finite(tensor: Tensor, name: str, side: Checkpoint) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteError(
            f"Tensor {name!r} of {side.name} holds NaN or Inf; that checkpoint is broken."
        )


def _equal(base: Tensor, unlearned: Tensor) -> bool:
    """Whether the two store the same weights, as far as the unlearned side's type can tell."""
    return torch.equal(base.to(unlearned.dtype), unlearned)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _oriented(tensor: Tensor, operation: Operation, device: str) -> Tensor:
    """The weight as (out, in), in float32 at least."""
    wide = _wide(tensor.to(device))
    return wide.T.contiguous() if operation.transposed else wide


def _on(spectrum: Spectrum, device: str) -> Spectrum:
    return Spectrum(spectrum.basis.to(device), spectrum.values, spectrum.trace, spectrum.tokens)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _write_index(unlearned: Checkpoint, folder: Path) -> None:
    metadata: dict[str, Any] = dict(read_json(unlearned.files, INDEX).get("metadata") or {})
    metadata["total_size"] = sum(
        info.nbytes for header in unlearned.headers.values() for info in header.tensors.values()
    )
    index = {"metadata": metadata, "weight_map": dict(sorted(unlearned.shard_of.items()))}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
