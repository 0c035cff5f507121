"""Figures from what models made of rows, and how models compare: with what certainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sage_hub.evaluation.bootstrap import Estimate, combine, estimate
from sage_hub.evaluation.membership import ATTACKS, membership_auc, privleak
from sage_hub.evaluation.metrics import (
    LEAKS,
    METRICS,
    Direction,
    Seen,
    direction,
    forget_quality,
    metric_called,
    model_utility,
    recovered,
)
from sage_hub.evaluation.relearning import BEFORE, ON_RETAIN, RECOVERING
from sage_hub.evaluation.sampling import SAMPLED
from sage_hub.evaluation.suites import EvaluationSet

UTILITY = ("probability", "rougeL_recall", "truth_ratio")
# (model, condition) -> set -> its rows as that model sees them.
Views = Mapping[tuple[str, str | None], Mapping[str, Sequence[Seen]]]


@dataclass(frozen=True, order=True)
class Key:
    """What a figure is of. Without a condition it is of the model as it is."""

    model: str
    set: str
    metric: str
    condition: str | None = None


@dataclass(frozen=True)
class Result:
    """A figure of one model, with the 95 % bootstrap interval over its rows if it has one."""

    model: str
    set: str
    metric: str
    condition: str | None
    value: float
    interval: tuple[float, float] | None
    direction: Direction
    rows: int
    source: str | None = None  # what measured it, if that was not sage-hub
    imported: bool = False  # read from the file `source`, not measured in this run


@dataclass(frozen=True)
class Difference:
    """`model` minus `other`, paired by row; better or worse only if it is more than noise."""

    model: str
    other: str
    set: str
    metric: str
    condition: str | None
    value: float
    interval: tuple[float, float]
    verdict: str  # "better", "worse" or "within noise"


def figures(
    sets: Sequence[EvaluationSet],
    seen: Views,
    seed: int,
    origin: str,
) -> tuple[dict[Key, Estimate], list[dict[str, str]]]:
    """All figures there are, and why others are not."""
    found: dict[Key, Estimate] = {}
    for (model, condition), views in seen.items():
        for one in sets:
            metrics = LEAKS if condition == SAMPLED else one.metrics
            for name in metrics if one.name in views else ():
                figure = mean_over_rows(name, views[one.name], seed)
                if figure is not None:
                    found[Key(model, one.name, name, condition)] = figure
    there = {(key.set, key.metric) for key in found if key.condition is None}
    absent = [  # of every model: what one of them lacks is said where that is known
        {"what": f"{name} on {one.name}", "reason": METRICS[name].lacking}
        for one in sets
        for name in one.metrics
        if (one.name, name) not in there
    ]
    by_name = {one.name: one for one in sets}
    for model in {model for model, condition in seen if condition is None}:
        found |= _utility(found, model)
    found |= _relearning(seen, seed, origin)
    found |= _membership(seen)
    derived, why = _against_reference(found, seen, by_name)
    return found | derived, absent + why


def mean_over_rows(name: str, rows: Sequence[Seen], seed: int) -> Estimate | None:
    """The metric `name` over `rows`; None if it has a value for none of them."""
    metric = metric_called(name)
    pairs = [(value, metric.weight(row)) for row in rows if (value := metric.of(row)) is not None]
    if not pairs:
        return None
    values, weights = zip(*pairs, strict=True)
    return estimate(values, weights, seed=seed, finish=metric.finish)


def _utility(found: Mapping[Key, Estimate], model: str) -> dict[Key, Estimate]:
    """TOFU's model utility, where there are all nine figures that it is made of."""
    retained = "heldout" if Key(model, "heldout", "probability") in found else "retain"
    parts = [
        found.get(Key(model, which, metric))
        for which in (retained, "real_authors", "world_facts")
        for metric in UTILITY
    ]
    if None in parts:
        return {}
    return {Key(model, "all", "model_utility"): model_utility([p for p in parts if p is not None])}


def _relearning(seen: Views, seed: int, origin: str) -> dict[Key, Estimate]:
    """The part of the way back to `origin` that relearning goes, on forget rows not taught."""
    found: dict[Key, Estimate] = {}

    def level(model: str, condition: str | None) -> Estimate | None:
        rows = seen.get((model, condition), {}).get("forget", ())
        return mean_over_rows("probability", rows, seed) if rows else None

    for model, condition in seen:
        if model == origin or condition not in RECOVERING:
            continue
        start = None if condition == ON_RETAIN else BEFORE
        base, before, after = level(origin, start), level(model, start), level(model, condition)
        if base and before and after and base.value > before.value:
            found[Key(model, "forget", "relearning_recovery", condition)] = combine(
                lambda b, x, y: (y - x) / (b - x), base, before, after
            )
    return found


def _membership(seen: Views) -> dict[Key, Estimate]:
    """How well each attack tells the forget rows from those that no model has seen."""
    return {
        Key(model, "forget", name): Estimate(
            membership_auc(views["forget"], views["unseen"], attack), len(views["forget"])
        )
        for (model, condition), views in seen.items()
        if condition is None and {"forget", "unseen"} <= views.keys()
        for name, attack in ATTACKS.items()
    }


def _against_reference(
    found: Mapping[Key, Estimate],
    seen: Views,
    sets: Mapping[str, EvaluationSet],
) -> tuple[dict[Key, Estimate], list[dict[str, str]]]:
    """The metrics that take a model which never saw the forget set, and why others are absent."""
    derived: dict[Key, Estimate] = {}
    forget, reference = sets.get("forget"), seen.get(("reference", None))
    if forget is None:
        return {}, []
    wanted = []
    if "truth_ratio" in forget.metrics and any(told.perturbed for told in forget.told):
        wanted.append("forget_quality")
    if "unseen" in sets:
        wanted.append("privleak")
    if reference is None:
        reason = "it takes a model that never saw the forget set (--reference)"
        return {}, [{"what": name, "reason": reason} for name in wanted]
    for (model, condition), views in seen.items():
        if condition is not None or model == "reference":
            continue
        rows, theirs = views["forget"], reference["forget"]
        if quality := forget_quality(rows, theirs):
            p, d = (Estimate(value, len(rows)) for value in quality)
            derived[Key(model, "forget", "forget_quality")] = p
            derived[Key(model, "forget", "forget_quality_D")] = d
        if "unseen" in sets:
            own, retrained = (
                found[Key(one, "forget", "mia_min_k")].value for one in (model, "reference")
            )
            leak = privleak(own, retrained)
            derived[Key(model, "forget", "privleak")] = Estimate(leak, len(rows))
    return derived, []


def result_of(key: Key, found: Estimate) -> Result:
    return Result(
        key.model,
        key.set,
        key.metric,
        key.condition,
        found.value,
        found.interval,
        direction(key.metric, key.set),
        found.rows,
    )


def differences(
    estimates: Mapping[Key, Estimate], compared: Sequence[tuple[str, str]]
) -> list[Difference]:
    found = []
    for model, other in compared:
        for key, mine in estimates.items():
            theirs = estimates.get(replace(key, model=other)) if key.model == model else None
            way = direction(key.metric, key.set)
            if theirs is None or way not in ("higher", "lower"):
                continue
            gap = combine(lambda a, b: a - b, mine, theirs)
            if gap.interval is None:
                continue
            found.append(
                Difference(
                    model,
                    other,
                    key.set,
                    key.metric,
                    key.condition,
                    gap.value,
                    gap.interval,
                    verdict(gap.interval, way),
                )
            )
    return found


def verdict(interval: tuple[float, float], way: Direction) -> str:
    """What an interval of differences says, if a `way` of change is the better one."""
    low, high = interval
    if low <= 0 <= high:
        return "within noise"
    return "better" if (low > 0) == (way == "higher") else "worse"


def retain_recovered(estimates: Mapping[Key, Estimate]) -> dict[str, Any] | None:
    """How much of the lost held-out probability came back."""
    metric = next((m for m in ("probability", "accuracy") if _held(estimates, m)), None)
    if metric is None:
        return None
    share = recovered(
        *(estimates[Key(model, "heldout", metric)] for model in ("base", "unlearned", "sanitized"))
    )
    if share is None:
        return None
    return {"metric": metric, "value": share.value, "interval": share.interval, "rows": share.rows}


def _held(estimates: Mapping[Key, Estimate], metric: str) -> bool:
    return all(
        Key(model, "heldout", metric) in estimates for model in ("base", "unlearned", "sanitized")
    )


def not_finite(estimates: Mapping[Key, Estimate]) -> list[dict[str, str]]:
    return [
        {
            "what": f"{key.metric} of {key.model} on {key.set}"
            + (f" ({key.condition})" if key.condition else ""),
            "reason": f"it came out as {found.value}",
        }
        for key, found in estimates.items()
        if not math.isfinite(found.value)
    ]
