"""What one model makes of all sets: as it is, and under what brings forgotten knowledge back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sage_hub.calibration.budget import RUNTIME
from sage_hub.calibration.estimate import cache_bytes, weight_bytes
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.evaluation.comparison import Result
from sage_hub.evaluation.harness import run_tasks
from sage_hub.evaluation.metrics import Seen
from sage_hub.evaluation.relearning import (
    BEFORE,
    Attack,
    choose_taught,
    on_forget,
    on_retain,
    relearn,
    training_bytes,
)
from sage_hub.evaluation.robustness import BITS, quantized
from sage_hub.evaluation.sampling import SAMPLED, sample_answers
from sage_hub.evaluation.scoring import ROWS_PER_BATCH, Known, Scored, answer, score
from sage_hub.evaluation.suites import SAMPLES, EvaluationSet, Told
from sage_hub.model.blocks import BlockModel, open_blocks
from sage_hub.model.compute import type_of
from sage_hub.model.weights import Blend, Weights, open_weights
from sage_hub.runtime.machine import GB
from sage_hub.runtime.progress import in_bytes
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: `side`, or what `blend` makes of the base's weights and of its own."""

    side: Checkpoint
    base: Checkpoint | None = None
    blend: Blend | None = None


@dataclass
class Look:
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
        sampled = next((one for one in self.sets if one.sampled), None)
        wanted = {"generated answers": asked, "sampled answers": sampled, "lm-eval": tasks}
        what = [name for name, there in wanted.items() if there]
        tokens = max((_generated(one, self.settings) for one in asked), default=0)
        needed = weight_bytes(model.model) + cache_bytes(model.model, tokens) + RUNTIME
        if not what or not self._fits(needed, *what):
            self.views[None] = self._scores(model, weights, self.sets)
            return
        with model.whole(weights) as whole:
            said = {one.name: self._answers(whole, one) for one in asked}
            self.views[None] = self._scores(whole, weights, self.sets, said)
            if sampled:
                self.views[SAMPLED] = {sampled.name: self._sampled(whole, sampled)}
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
        for attack, rest in self._attacks(forget):
            if not self._fits(training_bytes(model, attack.taught), attack.what):
                continue
            with model.whole(weights) as whole:
                for step in relearn(whole, attack.taught, self.settings.seed, attack.stops):
                    how = f"after {step} steps of {attack.what}"
                    views = self._scores(whole, weights, [rest], how=how)
                    self.views |= {name: views for name, at in attack.looks.items() if at == step}

    def _attacks(self, forget: EvaluationSet) -> Iterator[tuple[Attack, EvaluationSet]]:
        """What the model is taught, and the forget rows that show what comes back."""
        seed = self.settings.seed
        taught = choose_taught(len(forget.rows), seed)
        if taught:
            rest = _without(forget, taught)
            rows = enumerate(self.views[None]["forget"])
            before = [replace(seen, said=None) for place, seen in rows if place not in taught]
            self.views[BEFORE] = {"forget": before}
            yield on_forget([forget.told[place].answer for place in taught]), rest
        else:
            reason = "it takes two forget rows, one to teach and one to ask"
            self.not_run.append({"what": "relearning", "reason": reason})
        retained = [told.answer for one in self.sets if one.name == "retain" for told in one.told]
        if retained:
            yield on_retain(retained, seed), forget
        else:
            reason = "there are no retain rows"
            self.not_run.append({"what": "relearning on retained rows", "reason": reason})

    def _fits(self, needed: float, *what: str) -> bool:
        """Whether memory allows it; if not, `what` it is for is noted as not run."""
        limit = self.settings.memory * GB
        if needed > limit:
            reason = f"takes {in_bytes(needed)} of memory, and --memory allows {in_bytes(limit)}"
            self.not_run += [{"what": f"{one} of {self.name}", "reason": reason} for one in what]
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
        # A search does not ask for what attacks on membership take.
        known = {} if how or self.settings.unseen is not None else self.known
        found = {row: known[row] for row in rows if row in known}
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

    def _sampled(self, model: BlockModel, asked: EvaluationSet) -> list[Seen]:
        """The rows that are answered several times, with all of these answers."""
        kind = asked.answering
        assert kind is not None
        rows = {place: asked.told[place].answer for place in asked.sampled}
        what = f"{self.name} answers {asked.name}, {SAMPLES} times"
        found = sample_answers(
            model, self.tokens_of, rows, kind, self.settings, run=self.run, what=what
        )
        seen = self.views[None][asked.name]
        return [replace(seen[place], sampled=texts) for place, texts in found.items()]


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


def _generated(asked: EvaluationSet, settings: Settings) -> int:
    """How many tokens are in memory at most where answers of a set are generated."""
    kind = asked.answering
    longest = max(len(asked.told[place].answer.asked) for place in asked.answered)
    new = kind.max_new_tokens if kind else 0
    return ROWS_PER_BATCH * settings.batch_size * (longest + new)
