"""The gain without a forget set: the largest that keeps enough of what the source has lost.

Measured on guard rows, which neither calibration nor the person has: how much of the base's level
the release keeps there, of what the unlearned model has lost. A larger gain forgets more and keeps
less, so the largest that keeps the share that is asked for forgets as much as can be had for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sage_hub.errors import NothingToDoError, ProxyError
from sage_hub.evaluation.variants import Variant, room_for_a_block
from sage_hub.method.sage import Gains
from sage_hub.model.weights import Blend, part_of_the_way
from sage_hub.repair.carrier import carried
from sage_hub.repair.gain import Chosen, Trial, how_known
from sage_hub.repair.search import LARGEST, Goal, Level, search, spread
from sage_hub.repair.update import Update
from sage_hub.settings import GUARD

BEGIN, STEP = 16.0, 2.0  # the first gains to look at, and how far apart they are
ALL = 1e-6  # a share of what the source has lost: when no more of it is missing, all is kept
LEAST_GAIN = 2.0  # what is left of an update that is turned up no further forgets little
INSIST = "Give --forget and --retain, or insist with --gain 1."


def choose_by_keeping(update: Update, trial: Trial) -> Chosen:
    """The largest γ with which the share `settings.keep` of the loss on guard rows is kept.

    Raises NothingToDoError if the source has lost nothing there, or if no gain to speak of keeps
    the share, so that damage and forgetting are one.
    """
    keep, note = trial.settings.keep, trial.run.progress.note
    blends = carried(update, room_for_a_block(update.plan.unlearned, trial.settings))

    def known(looks: Sequence[Variant]) -> list[float]:
        return [how_known(one.figures, GUARD, -math.inf) for one in looks]

    def variants(gains: Sequence[float]) -> dict[str, Blend | None]:
        return {f"γ = {gain:.4g}": blends(Gains(gain)) for gain in gains}

    gains = spread(BEGIN, STEP)
    ends: dict[str, Blend | None] = {"the base": part_of_the_way(0), "the unlearned model": None}
    looks = trial.looks(update, {**ends, **variants(gains)}, (GUARD,))
    base, source, *first = known(looks)
    if not math.isfinite(base) or not math.isfinite(source):
        raise ProxyError(
            "The models make no number of any guard row, so no gain can be searched for; give "
            "--forget, or a --gain."
        )
    if source >= base:
        raise NothingToDoError(
            "The unlearned model knows what the base writes as well as the base does, so there is "
            f"no damage to repair. {INSIST}"
        )
    tried = dict(zip(gains, first, strict=True))

    def kept(gain: float) -> float:
        return (tried[gain] - source) / (base - source)

    def levels(gains: Sequence[float]) -> list[Level]:
        looks = trial.looks(update, variants(gains), (GUARD,))
        tried.update(zip(gains, known(looks), strict=True))
        return [_level(kept(gain)) for gain in gains]

    goal = Goal(-math.inf, _level(keep))
    gain, _, _ = search(levels, goal, BEGIN, {g: _level(kept(g)) for g in gains})
    if gain < LEAST_GAIN or kept(gain) < keep:
        raise NothingToDoError(
            f"No gain above {LEAST_GAIN:g} keeps {100 * keep:.0f} % of what the unlearned model "
            "has lost on rows that the base writes: damage and forgetting are one here, and a "
            f"release without a gain would know again what was to go. {INSIST}"
        )
    note(
        f"A gain of γ = {gain:.3g} keeps {100 * kept(gain):.1f} % of what the unlearned model has "
        f"lost on {len(trial.proxies[GUARD].rows)} guard rows ({len(tried)} evaluations). "
        "Forgetting was not measured."
    )
    return Chosen(
        Gains(gain),
        {
            "keep": keep,
            "kept": kept(gain),
            "outcome": "largest" if gain == LARGEST else "kept",
            "base": base,
            "source": source,
            "tried": [{"gain": g, "guard": value} for g, value in sorted(tried.items())],
        },
        known={"base": looks[0].known, "unlearned": looks[1].known},
    )


def _level(kept: float) -> Level:
    """How well guard rows are known, on the scale on which it is nearly straight in log γ.

    The share that is still missing grows as a power of γ (docs/results.md).
    """
    return Level(math.inf, -math.log(max(1 - kept, ALL)))
