"""What is drawn of a release, as data: for the card's pictures and for the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from sage_hub.evaluation.relearning import BEFORE, CURVE

MAIN = ("probability", "accuracy", "knowmem", "verbmem", "rougeL_recall")
LEVELS = ("probability", "accuracy", "loss")  # what the search for a gain goes by
ALONG = ("base", "control", "unlearned")  # αΔ from α = 0 to 1

Result = Mapping[str, Any]  # of a report
Record = Mapping[str, Any]


def points(
    report: Record, kept: str, metrics: Sequence[str] = MAIN
) -> tuple[str, dict[str, dict[str, Result]]] | None:
    """The first of `metrics` that the release has on the forget set and on the set `kept`.

    With it, for each model that has both, its results by set. None if there is no such metric.
    """
    for metric in metrics:
        found: dict[str, dict[str, Result]] = {}
        for result in report["results"]:
            if result["metric"] == metric and result["condition"] is None:
                found.setdefault(result["model"], {})[result["set"]] = result
        found = {name: own for name, own in found.items() if {"forget", kept} <= own.keys()}
        if "sanitized" in found:
            return metric, found
    return None


def gain_path(manifest: Record, report: Record) -> dict[str, Any] | None:
    """Every gain that was tried by evaluating, and where the models are on the same two sets.

    `tried` on all rows and `first_looks` on a part of them, each with `gain`, `forget`, `retain`;
    `models` the same of the report's; `along` the names of αΔ's from α = 0 to 1. None where no
    gain was searched for on a forget set.
    """
    search = manifest.get("gain_search") or {}
    if "first_looks" not in search:
        return None
    found = points(report, "retain", LEVELS)
    metric, models = found or ("level", {})
    sign = -1 if metric == "loss" else 1
    placed = {
        name: {which: sign * own[which]["value"] for which in ("forget", "retain")}
        for name, own in models.items()
    }
    return {
        "metric": "−loss" if sign < 0 else metric,
        "target": search["target"],
        "gain": manifest["gain"],
        "source": search["source"],
        "tried": _whole(search["tried"]),
        "first_looks": _whole(search["first_looks"]),
        "models": placed,
        "along": [name for name in ALONG if name in placed],
    }


def relearning(report: Record) -> dict[str, Any] | None:
    """How forget rows that are not taught come back, step by step of the training on others.

    `models` have their points each, and `base` is what the base knows of these rows. None where
    the release was not attacked so.
    """
    steps = {BEFORE: 0, **CURVE}
    for metric in MAIN:
        found: dict[str, list[dict[str, Any]]] = {}
        for result in report["results"]:
            if (result["set"], result["metric"]) == ("forget", metric) and (
                result["condition"] in steps
            ):
                point = {"steps": steps[result["condition"]]}
                point |= {key: result[key] for key in ("value", "interval")}
                found.setdefault(result["model"], []).append(point)
        base = found.pop("base", [])
        if len(found.get("sanitized", ())) > 1:
            return {
                "metric": metric,
                "base": next((point["value"] for point in base if point["steps"] == 0), None),
                "models": [
                    {"model": name, "points": sorted(points, key=lambda point: point["steps"])}
                    for name, points in found.items()
                ],
            }
    return None


def _whole(entries: Sequence[Record]) -> list[Record]:
    """Those that have both levels, in the order of their gains."""
    there = [one for one in entries if None not in (one["forget"], one["retain"])]
    return sorted(there, key=lambda one: one["gain"])


def bias_of_layers(tensors: Sequence[Record]) -> list[dict[str, Any]]:
    """Retention activation bias by kind of module and layer, each the median of its weights."""
    gathered: dict[tuple[str, int], list[Record]] = {}
    for tensor in tensors:
        layer = re.search(r"\.(\d+)\.", tensor["name"])
        if layer and tensor.get("bias_before") and tensor.get("bias_after"):
            words = [w for w in tensor["name"].split(".") if not w.isdigit() and "lora_" not in w]
            kind = words[-2] if words[-1] in ("weight", "bias") else words[-1]
            gathered.setdefault((kind, int(layer[1])), []).append(tensor)
    return [
        {
            "kind": kind,
            "layer": layer,
            "weights": len(own),
            "before": median(one["bias_before"] for one in own),
            "after": median(one["bias_after"] for one in own),
        }
        for (kind, layer), own in sorted(gathered.items())
    ]
