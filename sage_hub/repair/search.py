"""The search for a gain: where forgetting reaches its level, by as few evaluations as there can be.

Pure: what a gain does is asked of a function that is given, several gains at a time, as evaluating
them together costs one pass over the weights.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LARGEST = 64.0  # γ
CLOSE = 1.05  # two gains that are as near as this are one
_PAIR = CLOSE**0.475  # a guess is asked for from both sides, so that it may be the answer
_LEAP = 4.0  # how far beyond what was tried a guess may lie, as a factor
_NOTHING = 1e-9  # of a probability: what has no logarithm counts as so much


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


Levels = Callable[[Sequence[float]], Sequence[Level]]  # of gains, each evaluated


@dataclass(frozen=True)
class Goal:
    """What a gain has to do: bring forgetting to `target`, and harm no more than the `source`."""

    target: float
    source: Level

    def is_enough(self, level: Level) -> bool:
        """Whether a larger gain is of no use: the target is reached, or too much is harmed."""
        return level.forget <= self.target or level.harms(self.source)

    def crossing(self, one: tuple[float, Level], two: tuple[float, Level]) -> float | None:
        """The gain at which a straight line through both comes to an end of the search.

        Log forgetting against log γ is close to one; retention is taken as it is. None where
        they tell nothing of it.
        """
        (a, first), (b, second) = one, two
        way = math.log(b / a)
        found = []
        for start, stop, end in (
            (self._scaled(first.forget), self._scaled(second.forget), self._scaled(self.target)),
            (first.retain, second.retain, self.source.retain),
        ):
            if math.isfinite(start) and math.isfinite(stop) and stop < start:
                found.append(math.log(a) + way * (start - end) / (start - stop))
        return math.exp(min(min(found), 99.0)) if found else None

    def _scaled(self, forget: float) -> float:
        """A probability by its logarithm; the negative of a loss is one already."""
        return math.log(max(forget, _NOTHING)) if self.target > 0 else forget


def search(
    levels: Levels, goal: Goal, start: float, tried: Mapping[float, Level] = {}
) -> tuple[float, str, dict[float, Level]]:
    """The smallest γ ≥ 1 that forgets as much as the target, how it ended, and all that was tried.

    Within a factor of CLOSE, from the guess `start`. One at which retained rows are less known than
    by the source is too large whatever it forgets; where none reaches the target below that, the
    largest that is not too large is taken ("held back"). "largest" where even LARGEST is neither
    enough nor too large, "reached" otherwise.
    """
    known = dict(tried)

    def ask(*gains: float) -> None:
        new = [gain for gain in _asked(*gains) if gain not in known]
        known.update(zip(new, levels(new), strict=True))

    if not known:
        ask(*around(start))
    halved = False
    while True:
        high = min((g for g, level in known.items() if goal.is_enough(level)), default=math.inf)
        low = max((g for g in known if g < high), default=0.0)
        if high == 1.0 or low == LARGEST or high <= low * CLOSE:
            break
        width = math.log(high / low) if low and math.isfinite(high) else math.inf
        guess = _guess(known, goal, low, high, halve=halved)
        ask(*_around(guess, low, high))
        # A guess that has not at least halved the bracket is followed by a halving.
        inside = [g for g in known if low < g < high]
        parts = sorted([low, *inside, high])
        enough = [g for g in parts if g in known and goal.is_enough(known[g])]
        now = min(enough, default=math.inf)
        below = max((g for g in parts if g < now and g in known), default=0.0)
        left = math.log(now / below) if below and math.isfinite(now) else math.inf
        halved = math.isfinite(width) and left > width / 2
    if math.isinf(high):
        return low, "largest", known
    reached = known[high].forget <= goal.target and not known[high].harms(goal.source)
    if reached or not low:
        return high, "reached" if reached else "held back", known
    return low, "held back", known


def guess_from(known: Mapping[float, Level], goal: Goal, start: float) -> float:
    """Where the search would end by what is `known`, within what a guess may leap."""
    if not known:
        return start
    high = min((g for g, level in known.items() if goal.is_enough(level)), default=math.inf)
    low = max((g for g in known if g < high), default=0.0)
    return _guess(known, goal, low, high)


def retain_at(known: Mapping[float, Level], gain: float) -> float:
    """The retention at `gain`, by a straight line against log γ through the nearest two known."""
    gains = sorted(known)
    if len(gains) == 1:
        return known[gains[0]].retain
    place = min(max(bisect(gains, gain), 1), len(gains) - 1)
    below, above = gains[place - 1], gains[place]
    one, two = known[below].retain, known[above].retain
    share = math.log(gain / below) / math.log(above / below)
    return one + share * (two - one)


def around(guess: float) -> list[float]:
    """Two gains with `guess` between them, near enough for the larger to be the answer."""
    return _asked(guess / _PAIR, guess * _PAIR)


def spread(middle: float, step: float) -> list[float]:
    """Three gains, `middle` with a `step` on either side; fewer where they would be one."""
    return _asked(middle / step, middle, middle * step)


def _asked(*gains: float) -> list[float]:
    return sorted({short(min(max(gain, 1.0), LARGEST)) for gain in gains})


def short(gain: float) -> float:
    """To four digits, so that it does not depend on the order in which anything was summed."""
    return float(f"{gain:.4g}")


def _guess(
    known: Mapping[float, Level], goal: Goal, low: float, high: float, *, halve: bool = False
) -> float:
    """The next gain to look at: between `low` and `high`, or beyond what was tried."""
    gains = sorted(known)
    if low and math.isfinite(high):
        middle = math.sqrt(low * high)
        found = None if halve else goal.crossing((low, known[low]), (high, known[high]))
        return found if found is not None and low < found < high else middle
    near = gains[:2] if not low else gains[-2:]
    found = None
    if len(near) == 2:
        found = goal.crossing((near[0], known[near[0]]), (near[1], known[near[1]]))
    if not low:  # all that was tried is enough
        found = gains[0] / 2 if found is None else found
        return min(max(found, gains[0] / _LEAP), gains[0] / CLOSE)
    found = gains[-1] * 2 if found is None else found
    return max(min(found, gains[-1] * _LEAP), gains[-1] * CLOSE)


def _around(guess: float, low: float, high: float) -> tuple[float, float]:
    """A gain on either side of `guess`, both within the bracket."""
    one, two = guess / _PAIR, guess * _PAIR
    if low and one <= low:
        one = math.sqrt(low * guess)
    if two >= high:
        two = math.sqrt(guess * high)
    return one, two
