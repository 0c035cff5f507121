"""Choose the gain γ: in closed form, or by evaluating what a few of them would make.

The release is W_b + γD in the weights that are filtered. A γ is evaluated while the weights are
on their way into the model, without being written; each weight then has its own share of it, by
how much it forgets for what it disturbs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import NothingToDoError, ProxyError
from sage_hub.evaluation.evaluate import Study
from sage_hub.evaluation.scoring import Known
from sage_hub.evaluation.variants import Variant, evaluate_variants, room_for_a_block
from sage_hub.method.sage import Gains, gain_shares
from sage_hub.model.weights import Blend
from sage_hub.repair.bias import matching_gain_of
from sage_hub.repair.carrier import carried
from sage_hub.repair.search import (
    Goal,
    Level,
    around,
    guess_from,
    retain_at,
    search,
    short,
    spread,
)
from sage_hub.repair.update import Measurement, Update
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.run import Run
from sage_hub.settings import SEARCH_TOKENS, Settings

SOURCE_LEVEL = "the unlearned model's level"
# How well an answer is known, by the first of these that a set has.
LEVELS = ("probability", "accuracy", "loss")
FIRST = 4  # every n-th row is enough for a first look at every way
FEWEST = 40  # rows of a set that a look takes
STEP = 2.0  # between the gains of a first look
BOTH = ("forget", "retain")

Figures = Mapping[tuple[str, str], float]  # set and metric -> value


@dataclass(frozen=True)
class Chosen:
    """The gains, and how they were found."""

    gains: Gains
    search: dict[str, Any] | None = None
    levels: tuple[Level, Level] | None = None  # of what they make and of the source, if evaluated
    known: Mapping[str, Known] = field(default_factory=dict)  # what was seen of models, by name


@dataclass(frozen=True)
class Trial:
    """What a gain is tried on: how well each set is known, by whom it should be known how well."""

    proxies: Mapping[str, Proxy]
    settings: Settings
    reference: Checkpoint | None  # a model that never saw the forget set
    scratch: Path  # where hidden states may wait
    run: Run = field(default_factory=Run)

    def levels(
        self, update: Update, variants: Mapping[str, Blend | None], every: int = 1
    ) -> list[Level]:
        """How well variants of the unlearned side know both sets, by every n-th row of them."""
        return [level_of(one.figures) for one in self.looks(update, variants, BOTH, every)]

    def looks(
        self,
        update: Update,
        variants: Mapping[str, Blend | None],
        sets: Collection[str],
        every: int = 1,
    ) -> list[Variant]:
        """What variants of the unlearned side make of every n-th row of `sets`."""
        plan, study = update.plan, Study(self._sets(sets, every), update.plan.base)
        how = replace(self._asked, max_tokens=self._asked.max_tokens // every)
        found = evaluate_variants(
            plan.unlearned, plan.base, variants, study, how, self.scratch, self.run
        )
        return [*found.values()]

    def look(self, checkpoint: Checkpoint, name: str, tokens_of: Checkpoint) -> Variant:
        """What another model, called `name`, makes of both sets."""
        study, how = Study(self._sets(BOTH), tokens_of), self._asked
        found = evaluate_variants(
            checkpoint, checkpoint, {name: None}, study, how, self.scratch, self.run
        )
        return found[name]

    def _sets(self, sets: Collection[str], every: int = 1) -> dict[str, Proxy]:
        """Every n-th row of `sets`, but not fewer than FEWEST where there are so many."""
        proxies = {which: self.proxies[which] for which in sets}
        return {
            which: replace(proxy, rows=proxy.rows[:: max(1, min(every, len(proxy.rows) // FEWEST))])
            for which, proxy in proxies.items()
        }

    @property
    def _asked(self) -> Settings:
        most = min(self.settings.max_tokens, SEARCH_TOKENS)
        few = replace(self.settings, max_tokens=most, generate_rows=0)
        return replace(few, robustness=False, lm_eval=None, unseen=None)


def choose_gain(update: Update, trial: Trial) -> Chosen:
    """The gains that the settings ask for.

    Raises NothingToDoError if the filtered update does nothing on the forget proxy.
    """
    settings, note = trial.settings, trial.run.progress.note
    if settings.gain_rule == "number":
        return Chosen(Gains(1.0 if settings.gain == "auto" else float(settings.gain)))
    measured = update.measure(trial.run) if update.statistics.has("forget") else []
    if settings.gain_rule == "match":
        matching = closed_form(measured)
        if matching is None:
            raise NothingToDoError(
                "The filtered update does nothing on the forget proxy, so no gain can match it; "
                "check that --forget is the data that was unlearned."
            )
        if matching.search and matching.search["held_back"]:
            note(
                f"The gain is held at {matching.gains.model:.3g}: a larger one would disturb "
                "retained inputs more than the source does."
            )
        return matching
    if not measured:
        note(
            "The statistics have no forget set, so only one gain for all weights is tried; with "
            "those of `sage-hub stats --forget` each weight could have its share."
        )
    ways = [
        Way(shares, matching_gain_of(measured, shares))
        for shares in ([shares_of(measured), {}] if measured else [{}])
    ]
    return _by_evaluation(update, ways, trial)


def shares_of(measured: Sequence[Measurement]) -> dict[str, float]:
    """Each map's share of the model's gain; see `sage_hub.method.sage.gain_shares`."""
    known = [m for m in measured if m.forget_filtered is not None]
    shares = gain_shares(
        [m.forget_filtered or 0.0 for m in known], [m.retain_filtered for m in known]
    )
    return {m.module: short(share) for m, share in zip(known, shares, strict=True)}


def closed_form(measured: Sequence[Measurement]) -> Chosen | None:
    """One γ for all weights, with which the forgetting carrier keeps its size.

    Held back where it would make the retention bias larger than the source's, Σ B_r(γD) >
    Σ B_r(Δ). None where nothing is left of the carrier.
    """
    matching = matching_gain_of(measured)
    if matching is None:
        return None
    filtered = math.fsum(m.retain_filtered for m in measured)
    most = math.sqrt(math.fsum(m.retain for m in measured) / filtered) if filtered else math.inf
    gain = short(min(matching, most))
    return Chosen(Gains(gain), {"matching": matching, "held_back": matching > most})


@dataclass(frozen=True)
class Way:
    """A way to turn the update up, with each map's share or evenly."""

    shares: Mapping[str, float]
    start: float | None = None  # a γ to begin with

    def variant(self, gain: float) -> str:
        """What a model with this gain is called."""
        return f"γ = {gain:.4g}{' by shares' * bool(self.shares)}"


@dataclass(frozen=True)
class _Look:
    """What a few gains of one way do, by a part of the rows."""

    way: Way
    known: Mapping[float, Level]
    goal: Goal

    @property
    def guess(self) -> float:
        """Where the search is expected to end."""
        return guess_from(self.known, self.goal, self.way.start or STEP)

    @property
    def kept(self) -> float:
        """What is kept there; where harm ends the search, no more than the source does."""
        return retain_at(self.known, self.guess)


def _by_evaluation(update: Update, ways: Sequence[Way], trial: Trial) -> Chosen:
    """The γ that brings the forget set to its level, in the way that keeps the retain set best.

    The way is chosen by a first look at a part of the rows, at a few gains of each; its gain is
    then searched for on all of them. Several gains are evaluated in one pass over the weights.
    """
    blends = carried(update, room_for_a_block(update.plan.unlearned, trial.settings))
    known: dict[str, Known] = {}
    reference = None
    if trial.settings.target is None and trial.reference is not None:
        look = trial.look(trial.reference, "reference", update.plan.base)
        reference, known["reference"] = level_of(look.figures).forget, look.known

    def evaluated(
        asked: Sequence[tuple[Way, float]], *, every: int = 1, source: bool = False
    ) -> list[Level]:
        variants: dict[str, Blend | None] = {"the unlearned model": None} if source else {}
        variants |= {way.variant(gain): blends(Gains(gain, way.shares)) for way, gain in asked}
        looks = trial.looks(update, variants, BOTH, every)
        if source and every == 1:
            known["unlearned"] = looks[0].known
        return [level_of(one.figures) for one in looks]

    grid = [(way, gain) for way in ways for gain in spread(way.start or STEP, STEP)]
    source, *levels = evaluated(grid, every=FIRST, source=True)
    _check_finite(source, trial)
    goal, _ = _goal(source, trial.settings, reference)
    found = list(zip(grid, levels, strict=True))
    looks = [_Look(w, {g: level for (one, g), level in found if one is w}, goal) for w in ways]
    best = max(looks, key=lambda look: look.kept)  # the first of equals
    way, pair = best.way, around(best.guess)

    source, *levels = evaluated([(way, gain) for gain in pair], source=True)
    _check_finite(source, trial)
    goal, of = _goal(source, trial.settings, reference)
    gain, outcome, tried = search(
        lambda gains: evaluated([(way, gain) for gain in gains]),
        goal,
        best.guess,
        dict(zip(pair, levels, strict=True)),
    )
    spread_by = ", by each weight's share," if way.shares else ""
    ended = _words(tried[gain], outcome, source, of)
    looked = sum(len(look.known) for look in looks)
    trial.run.progress.note(
        f"A gain of γ = {gain:.3g}{spread_by} {ended} ({len(tried)} evaluations, after {looked} by "
        "a part of the rows)."
    )
    return Chosen(
        Gains(gain, way.shares),
        {
            "target": goal.target,
            "of": of,
            "outcome": outcome,
            "source": _recorded(source),
            "tried": _listed(tried),
            "first_looks": [
                {"shares": bool(look.way.shares), **entry}
                for look in looks
                for entry in _listed(look.known)
            ],
        },
        (tried[gain], source),
        known,
    )


def _check_finite(source: Level, trial: Trial) -> None:
    for which in ("forget", "retain"):
        if not math.isfinite(getattr(source, which)):
            raise ProxyError(
                f"The unlearned model makes no number of any answer of the {which} set "
                f"({trial.proxies[which].name}), so no gain can be searched for: all are cut off "
                "by --max-length, or it gives NaN. Use shorter rows, or give the --gain."
            )


def _goal(source: Level, settings: Settings, reference: float | None) -> tuple[Goal, str]:
    """The level that the forget set is brought to, and whose it is."""
    if settings.target is not None:
        return Goal(settings.target, source), "--target"
    if reference is not None and reference > source.forget:
        return Goal(reference, source), "the reference's level"
    return Goal(source.forget, source), SOURCE_LEVEL


def _words(level: Level, outcome: str, source: Level, of: str) -> str:
    """How the search ended, for a person."""
    if outcome == "reached":
        return f"brings forgetting to {of}"
    if outcome == "largest":
        return (
            f"is the largest that is tried, and misses {of}: the filter leaves too little of the "
            "update. A softer one leaves more (a smaller --strength or --energy)"
        )
    if level.harms(source):
        return f"knows retained rows less than the source does; nothing is turned up to {of}"
    return f"is as far as it goes without harming retained rows; it misses {of}"


def level_of(figures: Figures) -> Level:
    """How well both sets are known by the figures of a model, the worse where there is none."""
    return Level(how_known(figures, "forget", math.inf), how_known(figures, "retain", -math.inf))


def how_known(figures: Figures, which: str, otherwise: float) -> float:
    """How well `which` is known, `otherwise` if there is no figure of it."""
    for metric in LEVELS:
        value = figures.get((which, metric), math.nan)
        if math.isfinite(value):
            return -value if metric == "loss" else value
    return otherwise


def _listed(known: Mapping[float, Level]) -> list[dict[str, float | None]]:
    return [{"gain": gain, **_recorded(level)} for gain, level in sorted(known.items())]


def _recorded(level: Level) -> dict[str, float | None]:
    """`level` for the record; JSON has no infinity."""
    return {
        which: value if math.isfinite(value) else None for which, value in asdict(level).items()
    }
