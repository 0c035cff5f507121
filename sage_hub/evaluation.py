"""Evaluate the four models of a release, one after the other, on the same rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_hub.blocks import open_blocks
from sage_hub.budget import GB
from sage_hub.checkpoint import Checkpoint
from sage_hub.encoding import Encoded, take_rows
from sage_hub.errors import ArchitectureError
from sage_hub.metrics import Result, evaluate
from sage_hub.plan import Plan
from sage_hub.progress import SILENT, Progress
from sage_hub.proxies import Proxy
from sage_hub.ranks import ALONE, Ranks
from sage_hub.settings import SETS, Settings
from sage_hub.spill import Spill
from sage_hub.weights import model_of, open_weights


@dataclass(frozen=True)
class Evaluation:
    """All results, the data that they are of, and what was not run and why."""

    results: list[Result]
    data: dict[str, dict[str, Any]]
    not_run: list[dict[str, str]]

    @classmethod
    def not_at_all(cls, reason: str) -> Evaluation:
        """No evaluation, and why."""
        return cls([], {}, [{"what": "all metrics", "reason": reason}])


def evaluate_release(
    plan: Plan,
    sanitized: Checkpoint,
    alpha: float,
    proxies: Mapping[str, Proxy],
    settings: Settings,
    calibrated: Collection[str],
    scratch: Path,
    ranks: Ranks = ALONE,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate base, unlearned, the control W_b + αΔ and `sanitized` on the sets there are.

    `calibrated` holds the fingerprints of the sets that calibration has seen; hidden states that
    memory has no room for wait in the folder `scratch`. The same rows and the base's tokenizer
    for all, one block of one model in memory at a time.
    """
    sets: dict[str, list[Encoded]] = {}
    data: dict[str, dict[str, Any]] = {}
    for which, proxy in proxies.items():
        sets[which], _ = take_rows(proxy, plan.base, settings)
        data[which] = {
            **proxy.describe(),
            "rows_used": len(sets[which]),
            "seen_by_calibration": proxy.fingerprint in calibrated,
        }
    not_run = [
        {"what": f"{which} metrics", "reason": f"no --{which} was given"}
        for which in SETS
        if which not in proxies
    ]
    not_run.append(
        {
            "what": "robustness to quantization and relearning",
            "reason": "this version of sage-hub does not measure it",
        }
    )
    models = {
        "base": (plan.base, 1.0),
        "unlearned": (plan.unlearned, 1.0),
        "control": (plan.unlearned, alpha),
        "sanitized": (sanitized, 1.0),
    }
    results: list[Result] = []
    for name, (side, scale) in models.items() if sets else ():
        try:
            with (
                open_weights(side, plan.base, scale) as weights,
                open_blocks(model_of(side), weights, settings.device) as model,
                Spill(scratch, settings.memory * GB / 4) as hidden,
            ):
                results += evaluate(
                    name,
                    model,
                    weights,
                    sets,
                    batch_size=settings.batch_size,
                    hidden=hidden,
                    ranks=ranks,
                    progress=progress,
                )
        except ArchitectureError as error:
            if name != "control":
                raise
            not_run.append({"what": "the norm-matched control", "reason": str(error)})
    for result in results:
        if not math.isfinite(result.value):
            what = f"{result.metric} of {result.model} on {result.set}"
            not_run.append({"what": what, "reason": f"it came out as {result.value}"})
    return Evaluation([r for r in results if math.isfinite(r.value)], data, not_run)
