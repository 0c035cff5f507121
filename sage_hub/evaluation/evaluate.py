"""Evaluate models on the same rows, one after the other."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sage_hub.calibration.budget import RUNTIME
from sage_hub.calibration.estimate import weight_bytes
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
from sage_hub.evaluation.fluency import fluency
from sage_hub.evaluation.harness import run_tasks
from sage_hub.evaluation.membership import ATTACKS
from sage_hub.evaluation.metrics import METRICS, Seen
from sage_hub.evaluation.robustness import BITS, TRAINING_BYTES, choose_taught, quantized, relearn
from sage_hub.evaluation.scoring import Known, Scored, answer, score
from sage_hub.evaluation.suites import ANSWERS, EvaluationSet, Told, metrics_of, prepare
from sage_hub.model.blocks import BlockModel, open_blocks
from sage_hub.model.compute import type_of
from sage_hub.model.weights import Blend, Weights, open_weights
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.machine import GB
from sage_hub.runtime.progress import in_bytes
from sage_hub.runtime.run import Run
from sage_hub.settings import GUARD, SETS, Settings

ROBUST = ("base", "unlearned", "sanitized")  # the models that robustness is measured of


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: `side`, or what `blend` makes of the base's weights and of its own."""

    side: Checkpoint
    base: Checkpoint | None = None
    blend: Blend | None = None


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
    sets, not_run = prepared(study, settings)
    seen: dict[tuple[str, str | None], dict[str, list[Seen]]] = {}
    others: list[Result] = []
    for name, candidate in models.items() if sets else ():
        own = settings if name in study.robust else replace(settings, robustness=False)
        look = _Look(name, sets, study.tokens_of, own, scratch, run, study.known.get(name, {}))
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
                "what": "robustness to quantization, relearning and paraphrased questions",
                "reason": "--robustness was not given",
            }
        )
    estimates, absent = figures(sets, seen, settings.seed, study.origin)
    if study.origin in models:
        reader = models[study.origin].side
        said = {name: v["forget"] for (name, how), v in seen.items() if not how and "forget" in v}
        estimates |= fluency(reader, said, study.tokens_of, settings, scratch, run)
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
    """The sets as tokens, and those of which there is nothing to evaluate, with the reason."""
    sets = []
    for which, proxy in study.proxies.items():
        # What retention was calibrated on proves nothing of it, and generating takes long.
        vain = which == GUARD or (which == "retain" and proxy.fingerprint in study.calibrated)
        own = replace(settings, generate_rows=0) if vain else settings
        sets.append(prepare(which, proxy, study.tokens_of, own))
    reasons = {one.name: "every answer is cut away by --max-length" for one in sets if not one.rows}
    reasons |= {which: f"no --{which} was given" for which in SETS if which not in study.proxies}
    not_run = [{"what": f"{which} metrics", "reason": reason} for which, reason in reasons.items()]
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
        for metric in metrics:
            yield from (f"{name}.{which}.{metric}" for name in models)
            yield f"{which}.{metric}"
        if not (settings.robustness and which in ("forget", "heldout")):
            continue
        scored = {metric for metric in metrics if metric in METRICS and metric not in ANSWERS}
        conditions = [f"int{bits}" for bits in BITS]
        if which == "forget" and len(proxy.rows) > 1:
            conditions.append("relearned")
        if which == "forget" and any(row.asked_otherwise for row in proxy.rows):
            conditions.append("paraphrased")
        for condition in conditions:
            own = scored | ({"relearning_recovery"} if condition == "relearned" else set())
            for metric in own:
                yield from (f"robustness.{condition}.{name}.{which}.{metric}" for name in ROBUST)
                yield f"robustness.{condition}.{which}.{metric}"
    if {"real_authors", "world_facts"} <= proxies.keys():
        yield from (f"{name}.all.model_utility" for name in models)
        yield "all.model_utility"


@dataclass
class _Look:
    """Shows all sets to one model, and keeps what comes of it."""

    name: str
    sets: Sequence[EvaluationSet]
    tokens_of: Checkpoint
    settings: Settings
    scratch: Path
    run: Run
    known: Known
    views: dict[str | None, dict[str, list[Seen]]] = field(default_factory=dict)  # by condition
    others: list[Result] = field(default_factory=list)  # of lm-eval
    not_run: list[dict[str, str]] = field(default_factory=list)

    def at(self, candidate: Candidate) -> None:
        """Look at `candidate` as it is and, if wanted, under what brings knowledge back."""
        settings, side = self.settings, candidate.side
        dtype = type_of(settings.compute_dtype)
        with (
            open_weights(side, candidate.base, candidate.blend) as weights,
            open_blocks(side, weights, settings.device, dtype) as model,
        ):
            self._as_it_is(model, weights)
            if settings.robustness:
                self._treated(model, weights)

    def _as_it_is(self, model: BlockModel, weights: Weights) -> None:
        asked = [one for one in self.sets if one.answered]
        tasks = self.settings.lm_eval if self.run.ranks.first else None
        what = " and ".join(["generated answers"] * bool(asked) + ["lm-eval"] * bool(tasks))
        if not what or not self._fits(what, weight_bytes(model.model) + RUNTIME):
            self.views[None] = self._scores(model, weights, self.sets)
            return
        with model.whole(weights) as whole:
            said = {one.name: self._answers(whole, one) for one in asked}
            self.views[None] = self._scores(whole, weights, self.sets, said)
            if tasks:
                self.run.progress.note(f"lm-eval: {tasks} on {self.name} …")
                size, seed = self.settings.batch_size, self.settings.seed
                self.others = run_tasks(
                    self.name, whole, self.tokens_of, tasks, batch_size=size, seed=seed
                )

    def _treated(self, model: BlockModel, weights: Weights) -> None:
        tested = [one for one in self.sets if one.name in ("forget", "heldout")]
        for bits in BITS:
            coarse, how = quantized(weights, model, bits), f"int{bits}"
            self.views[how] = self._scores(model, coarse, tested, how=how)
        forget = next((one for one in tested if one.forgotten), None)
        if forget is None:
            return
        self.views["paraphrased"] = _paraphrased(self.views[None]["forget"])
        parameters = sum(p.numel() for p in model.model.parameters())
        taught = choose_taught(len(forget.rows), self.settings.seed)
        if not taught or not self._fits("relearning", TRAINING_BYTES * parameters + RUNTIME):
            return
        rest = _without(forget, taught)
        with model.whole(weights) as whole:
            relearn(whole, [forget.told[place].answer for place in taught], self.settings.seed)
            self.views["relearned"] = self._scores(whole, weights, [rest], how="after relearning")

    def _fits(self, what: str, needed: float) -> bool:
        """Whether memory allows it; if not, it is noted as not run."""
        limit = self.settings.memory * GB
        if needed > limit:
            reason = f"takes {in_bytes(needed)} of memory, and --memory allows {in_bytes(limit)}"
            self.not_run.append({"what": f"{what} of {self.name}", "reason": reason})
        return needed <= limit

    def _scores(
        self,
        model: BlockModel,
        weights: Weights,
        sets: Sequence[EvaluationSet],
        said: Mapping[str, Mapping[int, str]] = {},
        how: str = "",
    ) -> dict[str, list[Seen]]:
        rows = [one for part in sets for told in part.told for one in told]
        found = {} if how else {row: self.known[row] for row in rows if row in self.known}
        left = [row for row in rows if row not in found]
        what = f"Evaluating {self.name} {how}".strip()
        own, scratch = self.settings, self.scratch
        if left:
            scored = score(model, weights, left, own, scratch, run=self.run, what=what)
            found |= dict(zip(left, scored, strict=True))
        return seen_by(sets, [found[row] for row in rows], said)

    def _answers(self, model: BlockModel, asked: EvaluationSet) -> dict[int, str]:
        kind = asked.answering
        assert kind is not None
        rows = [asked.told[place].answer for place in asked.answered]
        what = f"{self.name} answers {asked.name}"
        size = self.settings.batch_size
        texts = answer(model, self.tokens_of, rows, kind, size, run=self.run, what=what)
        return dict(zip(asked.answered, texts, strict=True))


def seen_by(
    sets: Sequence[EvaluationSet],
    scored: Sequence[Scored],
    said: Mapping[str, Mapping[int, str]] = {},
) -> dict[str, list[Seen]]:
    """The rows of each set as a model sees them: `scored`, in order, and what it `said`."""
    scores = iter(scored)
    return {
        part.name: [
            Seen(
                part.rows[place],
                told.map(lambda _: next(scores)),
                said.get(part.name, {}).get(place),
                part.forgotten,
                part.counted[place],
            )
            for place, told in enumerate(part.told)
        ]
        for part in sets
    }


def _paraphrased(seen: Sequence[Seen]) -> dict[str, list[Seen]]:
    """The forget rows with their questions in other words, where the data has them."""
    rows = [
        replace(one, told=Told(one.told.asked_otherwise), said=None)
        for one in seen
        if one.told.asked_otherwise is not None and one.told.asked_otherwise.tokens
    ]
    return {"forget": rows} if rows else {}


def _without(one: EvaluationSet, taught: Collection[int]) -> EvaluationSet:
    """The rows of a set that were not taught again."""
    others = [place for place in range(len(one.rows)) if place not in taught]
    return replace(
        one,
        rows=tuple(one.rows[place] for place in others),
        told=tuple(one.told[place] for place in others),
        counted=tuple(one.counted[place] for place in others),
        answered=(),
    )


def _unique(entries: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({(entry["what"], entry["reason"]): entry for entry in entries}.values())
