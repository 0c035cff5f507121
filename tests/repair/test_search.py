"""The search for a gain: the smallest that is enough, and few evaluations to find it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from sage_hub.repair.search import (
    CLOSE,
    LARGEST,
    Goal,
    Level,
    around,
    guess_from,
    retain_at,
    search,
    spread,
)

SOURCE = Level(forget=0.1, retain=0.5)
ROUNDED = 1.0005  # gains have four digits
RESULTS = Path(__file__).parents[2] / "benchmarks" / "real_model" / "results.json"


def falling(rate: float, harm: float = 0.0) -> Callable[[float], Level]:
    """A model that forgets with the gain, and that loses retention beyond γ = 1 / harm."""
    return lambda gain: Level(0.8 * math.exp(-rate * (gain - 1)), 0.9 - 0.4 * harm * gain)


@dataclass
class Asked:
    """What a search asked for."""

    level: Callable[[float], Level]
    passes: int = 0
    gains: int = 0

    def __call__(self, gains: Sequence[float]) -> list[Level]:
        self.passes += 1
        self.gains += len(gains)
        return [self.level(gain) for gain in gains]


def run(
    level: Callable[[float], Level], target: float, start: float
) -> tuple[float, str, dict[float, Level]]:
    return search(Asked(level), Goal(target, SOURCE), start)


@given(st.floats(0.05, 3), st.floats(0.01, 0.7), st.floats(1, 60))
def test_the_smallest_gain_that_reaches_the_target(
    rate: float, target: float, start: float
) -> None:
    gain, outcome, tried = run(falling(rate), target, start)
    exact = 1 + math.log(0.8 / target) / rate
    if exact > LARGEST:
        assert (gain, outcome) == (LARGEST, "largest")
        return
    assert outcome == "reached"
    assert exact <= gain * (1 + 1e-9)
    assert gain <= exact * CLOSE * ROUNDED
    assert len(tried) < 25


def test_a_target_that_is_reached_already_takes_no_gain() -> None:
    assert run(falling(1), 0.9, 5)[:2] == (1.0, "reached")


@given(st.floats(0.02, 1), st.floats(1, 60))
def test_no_gain_harms_retained_rows_more_than_the_source(harm: float, start: float) -> None:
    gain, outcome, tried = run(falling(0.01, harm), 0.01, start)
    assert outcome == "held back" if harm * LARGEST > 1 else "largest"
    assert gain == 1 or tried[gain].retain >= SOURCE.retain
    allowed = 1 / harm
    assert gain >= min(max(1.0, allowed / CLOSE), LARGEST) / ROUNDED


def test_a_gain_that_breaks_the_model_is_too_large() -> None:
    broken = Level(math.inf, -math.inf)  # NaN in what it says of both sets
    gain, outcome, _ = run(lambda g: broken if g > 4 else Level(1 / g, 1), 0.1, 8)
    assert outcome == "held back"
    assert 4 / CLOSE / ROUNDED <= gain <= 4


def test_where_the_filter_alone_harms_nothing_is_turned_up() -> None:
    gain, outcome, _ = run(lambda _: Level(0.9, SOURCE.retain - 0.1), 0.1, 8)
    assert (gain, outcome) == (1, "held back")


@given(
    st.dictionaries(
        st.floats(1, 64), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5
    ),
    st.floats(0, 1),
    st.floats(1, 64),
)
def test_whatever_the_levels_an_end_is_found(
    known: dict[float, tuple[float, float]], target: float, start: float
) -> None:
    """Levels that rise and fall as they like, as of a broken model."""
    levels = {gain: Level(*pair) for gain, pair in known.items()}
    asked = Asked(lambda gain: levels[min(levels, key=lambda other: abs(other - gain))])
    goal = Goal(target, SOURCE)
    gain, outcome, tried = search(asked, goal, guess_from(levels, goal, start))
    assert gain in tried
    assert 1 <= gain <= LARGEST
    assert asked.passes < 40
    if outcome == "reached":
        assert tried[gain].forget <= target
        assert not tried[gain].harms(SOURCE)
    elif gain > 1:
        assert not tried[gain].harms(SOURCE)


@given(st.floats(1, LARGEST))
def test_a_guess_is_asked_for_from_both_sides(guess: float) -> None:
    gains = around(guess)
    assert gains[-1] <= gains[0] * CLOSE * ROUNDED
    assert gains[0] <= guess * ROUNDED
    assert gains[-1] >= guess / ROUNDED
    assert {1.0, LARGEST} >= {gain for gain in spread(guess, 2.0) if not 1 < gain < LARGEST}


def test_retention_is_read_off_a_straight_line() -> None:
    known = {1.0: Level(1, 0.9), 4.0: Level(0.5, 0.7), 16.0: Level(0.1, 0.3)}
    found = {gain: retain_at(known, gain) for gain in (1.0, 2.0, 4.0, 8.0, 16.0, 64.0)}
    expected = {1.0: 0.9, 2.0: 0.8, 4.0: 0.7, 8.0: 0.5, 16.0: 0.3, 64.0: -0.1}
    assert found == pytest.approx(expected)
    assert retain_at({3.0: Level(1, 0.4)}, 9.0) == 0.4


def curve(values: dict[float, Sequence[float]], rows: Sequence[int], *, log: bool) -> Any:
    """A smooth curve through what was measured, over log γ; straight beyond."""
    gains = sorted(values)
    xs = [math.log(gain) for gain in gains]
    ys = [float(np.mean([values[gain][row] for row in rows])) for gain in gains]
    ys = [math.log(max(y, 1e-6)) for y in ys] if log else ys
    inside = PchipInterpolator(xs, ys)

    def at(gain: float) -> float:
        x = math.log(gain)
        end = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        y = float(inside(x)) if xs[0] <= x <= xs[-1] else ys[-1] + end * (x - xs[-1])
        y = ys[0] if x < xs[0] else y
        return math.exp(y) if log else y

    return at


def recorded() -> list[Any]:
    """Of real sources: the source's own rows, and by gain those of its repairs, row by row."""
    points = [
        p
        for p in json.loads(RESULTS.read_text())["points"]
        if p.get("method") in ("sage", "scaled") and {"forget", "heldout"} <= p.keys()
    ]
    sources = {p["made"]: p for p in points if p["method"] == "scaled" and p["gain"] == 1}
    curves: dict[tuple[Any, ...], dict[float, Any]] = defaultdict(dict)
    for p in points:
        if p["method"] == "sage" and p["made"] in sources:
            way = json.dumps([p["strength"], p.get("others"), p.get("retain"), p.get("what")])
            curves[p["made"], way][p["gain"]] = p
    found = []
    for (made, way), own in curves.items():
        means = [np.mean(own[gain]["forget"]) for gain in sorted(own)]
        if len(own) >= 4 and sorted(means, reverse=True) == means:
            name = f"{made.removeprefix('source-')} {way}"
            found.append(pytest.param(sources[made], own, id=name[:60]))
    return found


Rows = Sequence[Sequence[int]]  # of the forget and of the held-out set


def levels_of(
    source: Any, own: dict[float, Any], rows: Rows
) -> tuple[Level, Callable[[float], Level]]:
    """The source's level, and that at any gain, by some of the rows."""
    sets = [*zip(("forget", "heldout"), rows, strict=True)]
    level = Level(*(float(np.mean([source[which][row] for row in some])) for which, some in sets))
    forget, retain = (
        curve({g: p[which] for g, p in own.items()}, some, log=which == "forget")
        for which, some in sets
    )
    return level, lambda gain: Level(forget(gain), retain(gain))


def test_on_curves_of_real_sources() -> None:
    """From a first look at a quarter of the rows: right, by few passes over the weights."""
    spent = []
    for case in recorded():
        source, own = case.values
        counts = [len(source[which]) for which in ("forget", "heldout")]
        rough, look = levels_of(source, own, [range(0, count, 4) for count in counts])
        exact, level = levels_of(source, own, [range(count) for count in counts])
        goal = Goal(exact.forget, exact)
        grid = np.exp(np.linspace(0, math.log(LARGEST), 4000))
        right = next((gain for gain in grid if goal.is_enough(level(gain))), LARGEST)
        for start in (2.0, 5.0, 10.0):
            first = {gain: look(gain) for gain in spread(start, 2.0)}
            guess = guess_from(first, Goal(rough.forget, rough), start)
            asked = Asked(level)
            gain, _, tried = search(asked, goal, guess)
            assert right / CLOSE / 1.005 <= gain <= right * CLOSE * 1.005, case.id
            assert not tried[gain].harms(exact), case.id
            # Two ways are looked at by a quarter of the rows; the source is evaluated twice too.
            spent.append((1 + asked.passes, (2 * 3 + 1) / 4 + 1 + asked.gains))
    passes, work = np.array(spent).T
    assert len(spent) > 60
    assert np.mean(passes <= 3) > 0.8
    assert np.mean(work) < 7
