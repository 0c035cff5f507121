"""The sanitized update on its way into a model, turned up by any gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sage_hub.checkpoint.architecture import Linear
from sage_hub.method.sage import Gains, filter_update
from sage_hub.model.weights import Blend, as_rows, remembered, widened
from sage_hub.repair.update import Update


def carried(update: Update, room: float) -> Callable[[Gains], Blend]:
    """Gains -> W_b + γwD in the weights that are filtered; all others are the unlearned side's.

    What `write_shards` writes, but weight by weight for a model that is run on the update's device.
    D is computed once for all gains, as long as `room` bytes of it are enough for a block.
    """
    plan, statistics = update.plan, update.statistics
    filtered = {linear.name for op in plan.operations for linear in op.linears}
    maps = {
        parameter: [linear for linear in linears if linear.name in filtered]
        for parameter, linears in plan.base.architecture.linears.items()
    }
    sites = statistics.site_of

    def carrier(name: str, base: Tensor, unlearned: Tensor) -> Tensor:
        """D in the rows that are filtered, Δ in others."""
        origin, own = widened(base.to(update.device), unlearned.to(update.device))
        delta = own - origin
        rows = as_rows(delta)
        for linear in maps[name]:
            part = rows[linear.start : linear.stop]
            spectrum = statistics.spectrum("retain", sites[linear.name])
            g = update.filter.suppression(spectrum)
            wide = part.T if linear.transposed else part
            kept = filter_update(wide, spectrum.basis.to(wide), g.to(wide))
            part.copy_(kept.T if linear.transposed else kept)
        return delta

    carriers = remembered(carrier, room)

    def blend_of(gains: Gains) -> Blend:
        def blend(name: str, base: Tensor, unlearned: Tensor) -> Tensor:
            if not maps.get(name):
                return unlearned
            delta = carriers(name, base, unlearned)
            (made,) = widened(base.to(update.device, copy=True))
            for linear in maps[name]:
                own = slice(linear.start, linear.stop)
                as_rows(made)[own].add_(as_rows(delta)[own], alpha=gains.of(linear.name))
            others = _besides(maps[name], len(as_rows(made)))
            for own in others:
                as_rows(made)[own].add_(as_rows(delta)[own])
            return made

        return blend

    return blend_of


def _besides(maps: Sequence[Linear], rows: int) -> list[slice]:
    """The rows of a parameter that none of `maps` has."""
    edges = [0, *(edge for linear in maps for edge in (linear.start, linear.stop)), rows]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
