"""The control: so much of the whole update, αΔ, as forgets what the release forgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sage_hub.errors import ArchitectureError
from sage_hub.evaluation.variants import room_for_a_block
from sage_hub.method.sage import Gains
from sage_hub.model.weights import Blend, part_of_the_way
from sage_hub.repair.carrier import carried
from sage_hub.repair.gain import Chosen, Trial
from sage_hub.repair.search import CLOSE, LARGEST, Goal, Level, around, search
from sage_hub.repair.update import Update


@dataclass(frozen=True)
class Control:
    """The α of W_b + αΔ, and in what it is the release's equal.

    "size": ‖αΔ‖ is ‖D‖, where forgetting was not measured; "source": α is 1, the unlearned model.
    """

    alpha: float
    by: Literal["forgetting", "size", "source"]


def choose_control(update: Update, chosen: Chosen, trial: Trial) -> Control | None:
    """The α ≤ 1 with which αΔ forgets as much as the release, to a factor of CLOSE.

    It is the source itself where the release forgets as much. None where that is not measured.
    """
    if not {"forget", "retain"} <= trial.proxies.keys() or trial.settings.low_disk:
        return None
    try:
        return _by_forgetting(update, chosen, trial)
    except ArchitectureError:  # as the base lacks a tensor, which the evaluation says
        return None


def _by_forgetting(update: Update, chosen: Chosen, trial: Trial) -> Control | None:
    release, source = chosen.levels or _levels(update, chosen.gains, trial)
    if not all(map(math.isfinite, (release.forget, source.forget))):
        return None
    if release.forget <= source.forget + (CLOSE - 1) * abs(source.forget):
        return Control(1.0, "source")

    def levels(steps: Sequence[float]) -> list[Level]:
        parts = [step / LARGEST for step in steps]
        return trial.levels(update, {f"α = {part:.3g}": part_of_the_way(part) for part in parts})

    # Nothing is too much harm for a control.
    goal = Goal(release.forget, Level(source.forget, -math.inf))
    steps = around(LARGEST / 2)
    step, _, _ = search(levels, goal, LARGEST / 2, dict(zip(steps, levels(steps), strict=True)))
    return Control(step / LARGEST, "forgetting")


def _levels(update: Update, gains: Gains, trial: Trial) -> tuple[Level, Level]:
    """Those of the release, and of its source."""
    blend = carried(update, room_for_a_block(update.plan.unlearned, trial.settings))(gains)
    variants: dict[str, Blend | None] = {"the release": blend, "the unlearned model": None}
    release, source = trial.levels(update, variants)
    return release, source
