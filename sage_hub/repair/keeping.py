"""The gain without a forget set: the largest that keeps enough of what the source has lost.

Measured on guard rows, which neither calibration nor the person has: how much of the base's level
the release keeps there, of what the unlearned model has lost. A larger gain forgets more and keeps
less, so the largest that keeps the share that is asked for forgets as much as can be had for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sage_hub.errors import NothingToDoError, ProxyError
from sage_hub.evaluation.variants import room_for_a_block
from sage_hub.method.sage import Gains
from sage_hub.model.weights import Blend, part_of_the_way
from sage_hub.repair.carrier import carried
from sage_hub.repair.gain import Chosen, Trial, how_known
from sage_hub.repair.search import LARGEST, Goal, Level, search, spread
from sage_hub.repair.update import Update
from sage_hub.settings import GUARD

BEGIN, STEP = 8.0, 2.0  # the first gains to look at, and how far apart they are
LEAST_GAIN = 2.0  # what is left of an update that is turned up no further forgets little
INSIST = "Give --forget and --retain, or insist with --gain 1."


def choose_by_keeping(update: Update, trial: Trial) -> Chosen:
    """The largest γ with which the share `settings.keep` of the loss on guard rows is kept.

    Raises NothingToDoError if the source has lost nothing there, or if no gain to speak of keeps
    the share, so that damage and forgetting are one.
    """
    keep, note = trial.settings.keep, trial.run.progress.note
    blends = carried(update, room_for_a_block(update.plan.unlearned, trial.settings))

    def known(variants: dict[str, Blend | None]) -> list[float]:
        found = trial.figures(update, variants, (GUARD,))
        return [how_known(figures, GUARD, -math.inf) for figures in found]

    def levels(gains: Sequence[float]) -> list[Level]:
        variants: dict[str, Blend | None] = {f"γ = {g:.4g}": blends(Gains(g)) for g in gains}
        return [Level(math.inf, one) for one in known(variants)]

    gains = spread(BEGIN, STEP)
    ends: dict[str, Blend | None] = {"the base": part_of_the_way(0), "the unlearned model": None}
    base, source, *first = known({**ends, **{f"γ = {g:.4g}": blends(Gains(g)) for g in gains}})
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
    least = source + keep * (base - source)
    goal = Goal(-math.inf, Level(math.inf, least))
    tried = {g: Level(math.inf, one) for g, one in zip(gains, first, strict=True)}
    gain, _, tried = search(levels, goal, BEGIN, tried)
    kept = {g: (level.retain - source) / (base - source) for g, level in tried.items()}
    if gain < LEAST_GAIN or kept[gain] < keep:
        raise NothingToDoError(
            f"No gain above {LEAST_GAIN:g} keeps {100 * keep:.0f} % of what the unlearned model "
            "has lost on rows that the base writes: damage and forgetting are one here, and a "
            f"release without a gain would know again what was to go. {INSIST}"
        )
    note(
        f"γ = {gain:.3g} keeps {100 * kept[gain]:.1f} % of what the unlearned model has lost on "
        f"{len(trial.proxies[GUARD].rows)} guard rows ({len(tried)} evaluations). Forgetting was "
        "not measured."
    )
    return Chosen(
        Gains(gain),
        {
            "keep": keep,
            "kept": kept[gain],
            "outcome": "largest" if gain == LARGEST else "kept",
            "base": base,
            "source": source,
            "tried": [{"gain": g, "guard": level.retain} for g, level in sorted(tried.items())],
        },
    )
