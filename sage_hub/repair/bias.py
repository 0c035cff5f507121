"""How much an update disturbs what should be kept: activation bias per module and in all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sage_hub.method.sage import matching_gain, relative
from sage_hub.repair.update import STRENGTHS, Measurement


def summarize(measured: Sequence[Measurement], outputs: Mapping[str, float]) -> dict[str, Any]:
    """The audit as data, the modules with the largest part of the retention bias first.

    Biases are relative: `B / tr(W_b C W_bᵀ)`, which `outputs` has by module. `retain_after` is what
    the chosen λ would leave, `share` a module's part of the model's retention bias, `forget_kept`
    the part of the forgetting carrier that stays (without a gain).
    """
    total = math.fsum(m.retain for m in measured)
    whole = math.fsum(outputs[m.module] for m in measured)
    modules = [
        {
            "module": m.module,
            "rank": m.rank,
            "retain_before": relative(m.retain, outputs[m.module]),
            "retain_after": relative(m.retain_filtered, outputs[m.module]),
            "share": relative(m.retain, total),
            "forget_before": relative(m.forget, outputs[m.module]),
            "forget_kept": relative(m.forget_filtered, m.forget),
        }
        for m in sorted(measured, key=lambda m: (-m.retain, m.module))
    ]
    forget, forget_filtered = (
        _sum(m.forget for m in measured),
        _sum(m.forget_filtered for m in measured),
    )
    return {
        "model": {
            "weights": len(measured),
            "retain_before": relative(total, whole),
            "retain_after": relative(math.fsum(m.retain_filtered for m in measured), whole),
            "forget_kept": relative(forget_filtered, forget),
            "matching_gain": matching_gain_of(measured),
        },
        "modules": modules,
        "profile": profile_of([m.profile for m in measured], total),
    }


def matching_gain_of(
    measured: Sequence[Measurement], shares: Mapping[str, float] = MappingProxyType({})
) -> float | None:
    """The γ with which the forgetting carrier keeps its size, Σ B_f(γwD) = Σ B_f(Δ).

    w is a map's share of the gain, 1 if not said. None where nothing is left of the carrier, or
    it was not measured.
    """
    source = _sum(m.forget for m in measured)
    own = [(m.forget_filtered, shares.get(m.module, 1.0)) for m in measured]
    left = _sum(None if bias is None else share**2 * bias for bias, share in own)
    return matching_gain(source, left) if source and left else None


def profile_of(curves: Sequence[Sequence[float]], whole: float) -> list[dict[str, float]]:
    """What share of the source's retention bias `whole` each λ would leave, at γ = 1.

    `curves` holds the bias of each weight at each of STRENGTHS.
    """
    if not whole:
        return []
    return [
        {"strength": strength, "kept": math.fsum(one) / whole}
        for strength, one in zip(STRENGTHS, zip(*curves, strict=True), strict=True)
    ]


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None
