"""Choose the gain γ: in closed form, or by evaluating what a few of them would make.

The release is W_b + γD in the weights that are filtered. A γ is evaluated while the weights are
on their way into the model, without being written; each weight then has its own share of it, by
how much it forgets for what it disturbs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import NothingToDoError, ProxyError
from sage_hub.evaluation.evaluate import Candidate, Study, evaluate
from sage_hub.method.sage import Gains, gain_shares, sanitize_weight
from sage_hub.model.weights import Blend, as_rows, widened
from sage_hub.repair.bias import matching_gain_of
from sage_hub.repair.update import Measurement, Update
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.run import Run
from sage_hub.settings import SEARCH_TOKENS, Settings

LARGEST = 64.0  # γ
SOURCE_LEVEL = "the unlearned model's level"
CLOSE = 1.05  # two gains that are as near as this are one
# How well an answer is known, by the first of these that a set has.
LEVELS = ("probability", "accuracy", "loss")


@dataclass(frozen=True)
class Level:
    """How well a model knows both sets; higher is better known.

    Of a set that it makes no numbers of, the worse for it: all is known that should not be (∞),
    nothing that should (−∞).
    """

    forget: float
    retain: float

    def harms(self, source: Level) -> bool:
        """Whether retained rows are less known than by `source`."""
        return self.retain < source.retain


@dataclass(frozen=True)
class Chosen:
    """The gains, and how they were found."""

    gains: Gains
    search: dict[str, Any] | None = None


@dataclass(frozen=True)
class Trial:
    """What a gain is tried on: how well each set is known, by whom it should be known how well."""

    proxies: Mapping[str, Proxy]
    settings: Settings
    reference: Checkpoint | None  # a model that never saw the forget set
    scratch: Path  # where hidden states may wait
    run: Run = field(default_factory=Run)

    def level(self, candidate: Candidate, name: str, tokens_of: Checkpoint) -> Level:
        """How well `candidate`, called `name`, knows the forget and the retain set."""
        found = evaluate(
            {name: candidate},
            Study({which: self.proxies[which] for which in ("forget", "retain")}, tokens_of),
            replace(
                self.settings,
                generate_rows=0,
                robustness=False,
                lm_eval=None,
                max_tokens=min(self.settings.max_tokens, SEARCH_TOKENS),
            ),
            self.scratch,
            self.run,
        )
        figures = {(result.set, result.metric): result.value for result in found.results}
        return Level(_level(figures, "forget", math.inf), _level(figures, "retain", -math.inf))


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
        _Way(shares, turned_up(update, shares), matching_gain_of(measured, shares))
        for shares in ([shares_of(measured), {}] if measured else [{}])
    ]
    return _by_evaluation(update, ways, trial)


def shares_of(measured: Sequence[Measurement]) -> dict[str, float]:
    """Each map's share of the model's gain; see `sage_hub.method.sage.gain_shares`."""
    known = [m for m in measured if m.forget_filtered is not None]
    shares = gain_shares(
        [m.forget_filtered or 0.0 for m in known], [m.retain_filtered for m in known]
    )
    return {m.module: _short(share) for m, share in zip(known, shares, strict=True)}


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
    gain = _short(min(matching, most))
    return Chosen(Gains(gain), {"matching": matching, "held_back": matching > most})


def search(
    level: Callable[[float], Level], target: float, source: Level, start: float
) -> tuple[float, str, dict[float, Level]]:
    """The smallest γ ≥ 1 that forgets as much as `target`, how it ended, and all that was tried.

    `level` evaluates a γ. One at which retained rows are less known than by the `source` is too
    large whatever it forgets; where none reaches the target below that, the largest that is not
    too large is taken ("held back"). "reached" otherwise.
    """
    tried: dict[float, Level] = {}

    def at(gain: float) -> Level:
        if gain not in tried:
            tried[gain] = level(gain)
        return tried[gain]

    def harms(gain: float) -> bool:
        return at(gain).harms(source)

    if at(1.0).forget <= target:
        return 1.0, "reached", tried
    if harms(1.0):
        return 1.0, "held back", tried
    low, high = 1.0, min(max(start, CLOSE), LARGEST)
    while at(high).forget > target and not harms(high) and high < LARGEST:
        low, high = high, min(2 * high, LARGEST)
    if at(high).forget > target and not harms(high):
        return high, "held back", tried
    # Between a gain that is too small and one that is enough, or too much.
    while high / low > CLOSE:
        middle = _short(math.sqrt(low * high))
        if at(middle).forget > target and not harms(middle):
            low = middle
        else:
            high = middle
    if at(high).forget <= target and not harms(high):
        return high, "reached", tried
    return low, "held back", tried


@dataclass(frozen=True)
class _Way:
    """A way to turn the update up, with each map's share or evenly."""

    shares: Mapping[str, float]
    with_gain: Callable[[float], Blend]
    start: float | None  # the γ to begin with


@dataclass(frozen=True)
class _Found:
    """Where the search ended in one way, and all that it tried."""

    way: _Way
    gain: float
    outcome: str
    tried: Mapping[float, Level]

    def words(self, source: Level, of: str) -> str:
        """How it ended, for a person."""
        if self.outcome == "reached":
            return f"brings forgetting to {of}"
        if self.tried[self.gain].harms(source):
            return f"knows retained rows less than the source does; nothing is turned up to {of}"
        return f"is as far as it goes without harming retained rows; it misses {of}"

    @property
    def merit(self) -> tuple[bool, float]:
        """What the ways are compared by: the target first, then what is kept."""
        return self.outcome == "reached", self.tried[self.gain].retain


def _by_evaluation(update: Update, ways: Sequence[_Way], trial: Trial) -> Chosen:
    """The γ that brings the forget set to its level, in the way that keeps the retain set best."""
    base, unlearned = update.plan.base, update.plan.unlearned

    def known(candidate: Candidate, name: str) -> Level:
        return trial.level(candidate, name, base)

    source = known(Candidate(unlearned), "unlearned")
    for which in ("forget", "retain"):
        if not math.isfinite(getattr(source, which)):
            raise ProxyError(
                f"The unlearned model makes no number of any answer of the {which} set "
                f"({trial.proxies[which].name}), so no gain can be searched for: all are cut off "
                "by --max-length, or it gives NaN. Use shorter rows, or give the --gain."
            )
    target, of = _target(source, trial, known)

    def searched(way: _Way) -> _Found:
        def level(gain: float) -> Level:
            return known(Candidate(unlearned, base, way.with_gain(gain)), f"γ = {gain:.3g}")

        return _Found(way, *search(level, target, source, _short(way.start or 2.0)))

    found = [searched(way) for way in ways]
    best = max(found, key=lambda one: one.merit)  # the first of equals
    spread = ", by each weight's share," if best.way.shares else ""
    count = sum(len(one.tried) for one in found)
    ended = best.words(source, of)
    trial.run.progress.note(f"γ = {best.gain:.3g}{spread} {ended} ({count} evaluations).")
    return Chosen(
        Gains(best.gain, best.way.shares),
        {
            "target": target,
            "of": of,
            "outcome": best.outcome,
            "source": _recorded(source),
            "tried": [
                {"shares": bool(one.way.shares), "gain": gain, **_recorded(level)}
                for one in found
                for gain, level in sorted(one.tried.items())
            ],
        },
    )


def _target(
    source: Level, trial: Trial, known: Callable[[Candidate, str], Level]
) -> tuple[float, str]:
    """The level that the forget set is brought to, and whose it is."""
    if trial.settings.target is not None:
        return trial.settings.target, "--target"
    if trial.reference is not None:
        reference = known(Candidate(trial.reference), "reference").forget
        if reference > source.forget:
            return reference, "the reference's level"
    return source.forget, SOURCE_LEVEL


def turned_up(update: Update, shares: Mapping[str, float]) -> Callable[[float], Blend]:
    """γ -> W_b + γwD in the weights that are filtered, w from `shares`; all others are the
    unlearned side's.

    What `write_shards` writes, but weight by weight for a model that is run on the update's device.
    """
    plan, statistics = update.plan, update.statistics
    filtered = {linear.name for op in plan.operations for linear in op.linears}
    maps = {
        parameter: [linear for linear in linears if linear.name in filtered]
        for parameter, linears in plan.base.architecture.linears.items()
    }
    sites = statistics.site_of

    def with_gain(gain: float) -> Blend:
        gains = Gains(gain, shares)

        def blend(name: str, base: Tensor, unlearned: Tensor) -> Tensor:
            if not maps.get(name):
                return unlearned
            origin, found = widened(base.to(update.device), unlearned.to(update.device))
            rows = as_rows(found)
            for linear in maps[name]:
                own = slice(linear.start, linear.stop)
                spectrum = statistics.spectrum("retain", sites[linear.name])
                b, u = as_rows(origin)[own], rows[own]
                b, u = (b.T, u.T) if linear.transposed else (b, u)
                g = update.filter.suppression(spectrum)
                new = sanitize_weight(b, u, spectrum.basis, g, gains.of(linear.name))
                rows[own] = new.T if linear.transposed else new
            return found

        return blend

    return with_gain


def _short(gain: float) -> float:
    """To four digits, so that it does not depend on the order in which anything was summed."""
    return float(f"{gain:.4g}")


def _level(figures: Mapping[tuple[str, str], float], which: str, otherwise: float) -> float:
    """How well `which` is known, `otherwise` if there is no figure of it."""
    for metric in LEVELS:
        if (which, metric) in figures:
            value = figures[which, metric]
            return -value if metric == "loss" else value
    return otherwise


def _recorded(level: Level) -> dict[str, float | None]:
    """`level` for the record; JSON has no infinity."""
    return {
        which: value if math.isfinite(value) else None for which, value in asdict(level).items()
    }
