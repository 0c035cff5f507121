"""What an update does on retained and forgotten inputs, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sage_hub.calibration.statistics import Statistics
from sage_hub.method.sage import filter_update, profile, project, suppression
from sage_hub.method.spectra import Spectrum
from sage_hub.repair.plan import Plan
from sage_hub.repair.stream import Block, check_finite, stream_blocks
from sage_hub.runtime.progress import Progress
from sage_hub.runtime.run import Run
from sage_hub.runtime.threads import ahead

# The λ at which the record says what bias would be left, to choose the next one by.
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-4, 9))


@dataclass(frozen=True)
class Filter:
    """How strongly each site is filtered: λ, ρ and the cap on k (see `sage_hub.method.sage`)."""

    strength: float
    energy: float
    rank: int | None

    def suppression(self, spectrum: Spectrum) -> Tensor:
        """g at one site, shape (k,)."""
        return suppression(spectrum, self.strength, self.energy, self.rank)


@dataclass(frozen=True)
class Measurement:
    """What the update of one weight does on retained and forgotten inputs.

    Biases are B = tr(D C Dᵀ). The forget figures are None without a forget proxy.
    """

    module: str
    rank: int
    retain: float  # of the source's update Δ
    retain_filtered: float  # of D, with the gain not applied
    norm: float  # ‖Δ‖²
    profile: tuple[float, ...]  # the retain bias at each of STRENGTHS
    forget: float | None = None
    forget_filtered: float | None = None

    def __add__(self, other: Measurement) -> Measurement:
        """Both together: every figure is a sum over rows, but for the rank, of which the larger."""

        def both(one: float | None, two: float | None) -> float | None:
            return None if one is None or two is None else one + two

        return replace(
            self,
            rank=max(self.rank, other.rank),
            retain=self.retain + other.retain,
            retain_filtered=self.retain_filtered + other.retain_filtered,
            norm=self.norm + other.norm,
            profile=tuple(a + b for a, b in zip(self.profile, other.profile, strict=True)),
            forget=both(self.forget, other.forget),
            forget_filtered=both(self.forget_filtered, other.forget_filtered),
        )


@dataclass(frozen=True)
class Seen:
    """A block that is filtered, along the directions of its site; weights are (out, in)."""

    spectrum: Spectrum
    g: Tensor
    base: Tensor
    unlearned: Tensor
    update: Tensor  # what it does to the outputs, but for a rotation of these
    along: Tensor  # that times the directions
    measured: Measurement


@dataclass(frozen=True)
class Update:
    """The update of a plan, with what calibration saw, how it is filtered, and where."""

    plan: Plan
    statistics: Statistics
    filter: Filter
    device: str = "cpu"

    def see(self, block: Block) -> Seen | None:
        """`block` along the directions of its site; None if it is not filtered, or has no update.

        Raises NonFiniteError for NaN or Inf on either side.
        """
        linear = block.piece.linear
        if linear is None or block.base is None or not block.changed:
            check_finite(block, self.plan)
            return None
        spectrum = self.statistics.spectrum("retain", self.statistics.site_of[linear.name])
        spectrum = replace(spectrum, basis=spectrum.basis.to(self.device))
        g = self.filter.suppression(spectrum)
        base = block.oriented(block.base, self.device)
        unlearned = block.oriented(block.unlearned, self.device)
        update = block.update(unlearned, base)
        along = project(update, spectrum.basis)
        own = profile(update, spectrum.basis, along)
        if not math.isfinite(own.norm):
            # It has seen every number of both sides, which spares a look of its own at each.
            check_finite(block, self.plan)
        measured = Measurement(
            module=linear.name,
            rank=len(g),
            retain=own.bias(spectrum),
            retain_filtered=own.bias(spectrum, g),
            norm=own.norm,
            profile=tuple(own.biases(spectrum, STRENGTHS, len(g)).tolist()),
        )
        return Seen(spectrum, g, base, unlearned, update, along, measured)

    def measure(self, run: Run) -> list[Measurement]:
        """Measure every weight that would be filtered, on the forget proxy too if there is one.

        Nothing is written. With several ranks each takes a part of the shards, and has the
        measurements of all.
        """
        different = [shard for shard in self.plan.unlearned.shards if shard not in self.plan.equal]
        own = self._measure(run.ranks.mine(different), run.progress)
        everything = {place: found for part in run.ranks.all(own) for place, found in part.items()}
        found: dict[str, Measurement] = {}
        # Always in this order, because sums depend on it.
        for place in sorted(everything, key=lambda place: different.index(place[0])):
            name, here = place[1], everything[place]
            found[name] = found[name] + here if name in found else here
        return list(found.values())

    def _measure(
        self, shards: Sequence[str], progress: Progress
    ) -> dict[tuple[str, str], Measurement]:
        """Shard and map -> what the rows of the map in that shard do."""
        found: dict[tuple[str, str], Measurement] = {}
        with ahead(stream_blocks(self.plan, shards, "Measuring", progress)) as blocks:
            for block in blocks:
                seen = self.see(block)
                if seen is None:
                    continue
                measured = self._with_forget(seen)
                place = block.operation.shard, measured.module
                found[place] = found[place] + measured if place in found else measured
        return found

    def _with_forget(self, seen: Seen) -> Measurement:
        """What was measured, with what Δ and D do on the forget proxy."""
        if not self.statistics.has("forget"):
            return seen.measured
        site = self.statistics.site_of[seen.measured.module]
        forget = self.statistics.spectrum("forget", site)
        forget = replace(forget, basis=forget.basis.to(self.device))
        filtered = filter_update(seen.update, seen.spectrum.basis, seen.g)
        return replace(
            seen.measured,
            forget=profile(seen.update, forget.basis).bias(forget),
            forget_filtered=profile(filtered, forget.basis).bias(forget),
        )
