"""Evaluate models on the same rows, one after the other."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ArchitectureError
from sage_hub.evaluation.comparison import (
    Difference,
    Result,
    differences,
    figures,
    not_finite,
    result_of,
    retain_recovered,
)
from sage_hub.evaluation.depth import depth_metric, unlearning_depth
from sage_hub.evaluation.fluency import fluency
from sage_hub.evaluation.look import Candidate, Look
from sage_hub.evaluation.membership import ATTACKS
from sage_hub.evaluation.metrics import LEAKS, METRICS, Seen
from sage_hub.evaluation.relearning import BEFORE, CURVE, ON_RETAIN, RECOVERING, RELEARNED
from sage_hub.evaluation.robustness import BITS
from sage_hub.evaluation.sampling import SAMPLED
from sage_hub.evaluation.scoring import Known
from sage_hub.evaluation.suites import ANSWERS, EvaluationSet, metrics_of, prepare
from sage_hub.rows.benchmark import SUITES as BENCHMARKS
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.run import Run
from sage_hub.settings import GUARD, SETS, Settings

ROBUST = ("base", "unlearned", "sanitized")  # the models that robustness is measured of


@dataclass(frozen=True)
class Evaluation:
    """All results, how they compare, the data that they are of, and what was not run and why."""

    results: list[Result] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    retain_recovered: dict[str, Any] | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: list[dict[str, str]] = field(default_factory=list)
    seen: dict[str, dict[str, list[Seen]]] = field(default_factory=dict)  # model -> set -> rows

    @classmethod
    def not_at_all(cls, reason: str) -> Evaluation:
        """No evaluation, and why."""
        return cls(not_run=[{"what": "all metrics", "reason": reason}])


@dataclass(frozen=True)
class Study:
    """What models are shown, and what of it is of interest."""

    proxies: Mapping[str, Proxy]  # set -> its rows
    tokens_of: Checkpoint  # all see rows as tokens of its tokenizer
    calibrated: Collection[str] = ()  # fingerprints of the sets that calibration has seen
    compared: Sequence[tuple[str, str]] = ()  # pairs of models whose difference is wanted
    robust: Collection[str] = ROBUST  # whose robustness is wanted, if any is
    origin: str = "base"  # the model that knew all, which relearning leads back to
    known: Mapping[str, Known] = field(default_factory=dict)  # of models, by their names


def evaluate(
    models: Mapping[str, Candidate],
    study: Study,
    settings: Settings,
    scratch: Path,
    run: Run = Run(),  # noqa: B008 - frozen
) -> Evaluation:
    """Evaluate `models` on the sets of `study`, never two of them in memory at once.

    Hidden states that memory has no room for wait in the folder `scratch`. A model named
    "reference" is one that never saw the forget set.
    """
    proxies, calibrated = study.proxies, study.calibrated
    # A benchmark's figures are those of all its rows.
    most = sys.maxsize if settings.suite in BENCHMARKS else settings.max_tokens
    sets, not_run = prepared(study, replace(settings, max_tokens=most))
    seen: dict[tuple[str, str | None], dict[str, list[Seen]]] = {}
    others: list[Result] = []
    for name, candidate in models.items() if sets else ():
        own = settings if name in study.robust else replace(settings, robustness=False)
        look = Look(name, sets, study.tokens_of, own, scratch, run, study.known.get(name, {}))
        try:
            look.at(candidate)
        except ArchitectureError as error:
            if name != "control":
                raise
            not_run.append({"what": "the control αΔ", "reason": str(error)})
            continue
        seen |= {(name, condition): views for condition, views in look.views.items()}
        not_run += look.not_run
        others += look.others
    if not settings.robustness:
        not_run.append(
            {
                "what": "robustness to quantization, relearning, sampling and other wordings",
                "reason": "--robustness was not given",
            }
        )
    for one in sets if settings.robustness else ():
        if one.forgotten and not one.sampled:
            reason = "--generate-rows is 0" if one.answering else "no row is answered in words"
            not_run.append({"what": f"{' and '.join(LEAKS)} on forget", "reason": reason})
    estimates, absent = figures(sets, seen, settings.seed, study.origin)
    if study.origin in models:
        reader = models[study.origin].side
        said = {name: v["forget"] for (name, how), v in seen.items() if not how and "forget" in v}
        estimates |= fluency(reader, said, study.tokens_of, settings, scratch, run)
    forget = next((one for one in sets if one.forgotten), None)
    if forget and "reference" in models and not settings.depth:
        absent.append({"what": "unlearning depth on forget", "reason": "--depth was not given"})
    elif forget and settings.depth:
        there = {name: one for name, one in models.items() if (name, None) in seen}
        tokens_of, origin = study.tokens_of, study.origin
        deep, why = unlearning_depth(there, origin, forget, tokens_of, settings, scratch, run)
        estimates, absent = estimates | deep, absent + why
    not_run += [*absent, *not_finite(estimates)]
    estimates = {key: found for key, found in estimates.items() if math.isfinite(found.value)}
    data = {one.name: _described(one, proxies[one.name], calibrated) for one in sets}
    return Evaluation(
        [*(result_of(key, found) for key, found in estimates.items()), *others],
        list(differences(estimates, study.compared)),
        retain_recovered(estimates),
        data,
        _unique(not_run),
        {name: views for (name, condition), views in seen.items() if condition is None},
    )


def prepared(study: Study, settings: Settings) -> tuple[list[EvaluationSet], list[dict[str, str]]]:
    """The sets as tokens, and what of them is not evaluated, with the reason."""
    sets = []
    for which, proxy in study.proxies.items():
        # What retention was calibrated on proves nothing of it, and generating takes long.
        vain = which == GUARD or (which == "retain" and proxy.fingerprint in study.calibrated)
        own = replace(settings, generate_rows=0) if vain else settings
        sets.append(prepare(which, proxy, study.tokens_of, own))
    reasons = {one.name: "every answer is cut away by --max-length" for one in sets if not one.rows}
    reasons |= {which: f"no --{which} was given" for which in SETS if which not in study.proxies}
    not_run = [{"what": f"{which} metrics", "reason": reason} for which, reason in reasons.items()]
    for one in sets:
        given, used = len(study.proxies[one.name].rows), len(one.rows)
        if 0 < used < given:
            reason = "they are beyond --max-tokens, or --max-length cuts their answers away"
            not_run.append(
                {"what": f"{given - used} of {given} rows of {one.name}", "reason": reason}
            )
    return [one for one in sets if one.rows], not_run


def _described(one: EvaluationSet, proxy: Proxy, calibrated: Collection[str]) -> dict[str, Any]:
    """What the figures of a set are from, for the record."""
    return {
        **proxy.describe(),
        "rows_used": len(one.rows),
        "rows_answered": len(one.answered),
        "answer_tokens": sum(t.answer.answer_tokens for t in one.told),
        "seen_by_calibration": proxy.fingerprint in calibrated,
    }


def expected_names(
    proxies: Mapping[str, Proxy], settings: Settings, models: Collection[str]
) -> Iterator[str]:
    """The names that the figures of an evaluation will have in gates, if all goes well."""
    for which, proxy in proxies.items():
        metrics = set(metrics_of(proxy.rows, settings.suite))
        if which in ("retain", GUARD) or not settings.generate_rows:
            metrics -= {*ANSWERS, "repetition"}
        if which == "forget" and metrics & ANSWERS.keys():
            metrics |= {"fluency"}
        if not any(row.perturbed for row in proxy.rows):
            metrics.discard("truth_ratio")
        if which == "forget" and "reference" in models:
            metrics |= {"forget_quality", "forget_quality_D"} if "truth_ratio" in metrics else set()
            metrics |= {"privleak"} if "unseen" in proxies else set()
        if which == "forget" and "unseen" in proxies:
            metrics |= ATTACKS.keys()
        if which == "forget" and settings.depth:
            metric = depth_metric(proxy.rows)
            yield from (f"{name}.forget.{metric}" for name in {*models} - {"base", "reference"})
            yield f"forget.{metric}"
        for metric in metrics:
            yield from (f"{name}.{which}.{metric}" for name in models)
            yield f"{which}.{metric}"
        if not (settings.robustness and which in ("forget", "heldout")):
            continue
        scored = {metric for metric in metrics if metric in METRICS and metric not in ANSWERS}
        conditions = [f"int{bits}" for bits in BITS]
        if which == "forget" and len(proxy.rows) > 1:
            conditions += [RELEARNED, BEFORE, *CURVE]
        if which == "forget" and "retain" in proxies:
            conditions.append(ON_RETAIN)
        if which == "forget" and any(row.asked_otherwise for row in proxy.rows):
            conditions.append("paraphrased")
        if which == "forget" and metrics & ANSWERS.keys():
            yield from (f"robustness.{SAMPLED}.{name}.forget.{m}" for name in ROBUST for m in LEAKS)
            yield from (f"robustness.{SAMPLED}.forget.{metric}" for metric in LEAKS)
        for condition in conditions:
            own = scored | ({"relearning_recovery"} if condition in RECOVERING else set())
            for metric in own:
                yield from (f"robustness.{condition}.{name}.{which}.{metric}" for name in ROBUST)
                yield f"robustness.{condition}.{which}.{metric}"
    if {"real_authors", "world_facts"} <= proxies.keys():
        yield from (f"{name}.all.model_utility" for name in models)
        yield "all.model_utility"


def _unique(entries: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({(entry["what"], entry["reason"]): entry for entry in entries}.values())
