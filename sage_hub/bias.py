"""How much an update disturbs what should be kept: activation bias per module and in all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sage_hub.sage import matching_gain, relative
from sage_hub.shards import STRENGTHS, Measurement


def summarize(measured: Sequence[Measurement]) -> dict[str, Any]:
    """The audit as data, the modules with the largest part of the retention bias first.

    Biases are relative: `B / tr(W_b C W_bᵀ)`. `retain_after` is what the chosen λ would leave,
    `share` a module's part of the model's retention bias, `forget_kept` the part of the
    forgetting carrier that stays (without a gain).
    """
    total = math.fsum(m.retain for m in measured)
    whole = math.fsum(m.base for m in measured)
    modules = [
        {
            "module": m.module,
            "rank": m.rank,
            "retain_before": relative(m.retain, m.base),
            "retain_after": relative(m.retain_filtered, m.base),
            "share": relative(m.retain, total),
            "forget_before": relative(m.forget, m.base),
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
            "matching_gain": (
                matching_gain(forget, forget_filtered) if forget and forget_filtered else None
            ),
        },
        "modules": modules,
        "profile": profile_of([m.profile for m in measured], total),
    }


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
