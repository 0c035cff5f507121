"""Every metric against a case worked out by hand, or an independent computation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from sage_hub.evaluation.bootstrap import Estimate, combine, estimate
from sage_hub.evaluation.comparison import mean_over_rows, verdict
from sage_hub.evaluation.metrics import (
    METRICS,
    Seen,
    accuracy,
    direction,
    exact_memorization,
    extraction_strength,
    forget_quality,
    model_utility,
    probability,
    recovered,
    truth_ratio,
)
from sage_hub.evaluation.scoring import Scored
from sage_hub.evaluation.suites import Told, metrics_of
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Row


def scored(*logprobs: float, hits: Any = None) -> Scored:
    found = np.array(logprobs, np.float32)
    return Scored(found, np.array(hits if hits is not None else [True] * len(logprobs)))


def seen(answer: Scored, said: str | None = None, forgotten: bool = False, **told: Any) -> Seen:
    return Seen(Row("Where?", " in Oslo"), Told(answer, **told), said, forgotten)


HALF, QUARTER = scored(-math.log(2)), scored(-math.log(4))


def test_probability_is_the_geometric_mean_over_tokens() -> None:
    assert probability(seen(scored(math.log(0.5), math.log(0.125)))) == pytest.approx(0.25)


def test_probability_of_a_fact_is_relative_to_wrong_answers() -> None:
    # .5 / (.5 + .25 + .25); with another wording of the answer, it is TOFU's plain one.
    wrong = (QUARTER, QUARTER)
    assert probability(seen(HALF, perturbed=wrong)) == pytest.approx(0.5)
    assert probability(seen(HALF, perturbed=wrong, paraphrased=HALF)) == pytest.approx(0.5)
    assert probability(seen(QUARTER, perturbed=(HALF,))) == pytest.approx(1 / 3)
    assert probability(seen(QUARTER, perturbed=(HALF,), paraphrased=HALF)) == pytest.approx(0.25)


def test_truth_ratio_by_hand() -> None:
    # R = exp(−(ln 2 + ln 8) / 2) / (1/2) = (1/4) / (1/2) = 1/2
    told = {"paraphrased": HALF, "perturbed": (HALF, scored(-math.log(8)))}
    assert truth_ratio(seen(QUARTER, **told)) == pytest.approx(0.5)
    assert truth_ratio(seen(QUARTER, forgotten=True, **told)) == pytest.approx(0.5)
    turned = {"paraphrased": QUARTER, "perturbed": (HALF,)}  # R = 2
    assert truth_ratio(seen(HALF, **turned)) == 0
    assert truth_ratio(seen(HALF, forgotten=True, **turned)) == pytest.approx(0.5)
    assert truth_ratio(seen(HALF)) is None


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_ratios_of_a_model_that_ran_away_are_the_benchmarks(scale: float) -> None:
    # Every likelihood is 0 in floating point, which a divisor of 1e-10 more makes a 0 of each.
    right, near, far = (scored(-1000.0 * scale - nats) for nats in (0.0, 16.0, 1e5))
    assert probability(seen(right, perturbed=(right, far))) == 0
    assert probability(seen(far, choices=(right, near, far))) == 0
    assert truth_ratio(seen(right, forgotten=True, perturbed=(far,))) == 0
    assert truth_ratio(seen(far, forgotten=True, perturbed=(right,))) == 0
    assert truth_ratio(seen(right, perturbed=(far,))) == 1
    # Wrong answers that it finds impossible too are far more likely than the 0 beside 1e-10.
    assert truth_ratio(seen(far, perturbed=(HALF,))) == 0


def test_what_no_numbers_make_is_undefined_and_no_error() -> None:
    nothing = scored(math.nan)
    for told in ({"perturbed": (nothing,)}, {"choices": (nothing, nothing)}):
        assert math.isnan(probability(seen(nothing, **told)))
    for forgotten in (False, True):
        found = truth_ratio(seen(nothing, forgotten=forgotten, perturbed=(nothing,)))
        assert found is not None
        assert math.isnan(found)
    perplexity = mean_over_rows("perplexity", [seen(scored(-1e5))] * 2, 0)
    assert perplexity is not None
    assert perplexity.value == math.inf


def test_the_choice_of_a_model_without_numbers_is_undefined() -> None:
    (row,) = parse_rows([{"question": "2+2?", "choices": ["3", "4"], "answer": 1}], "facts")
    nothing = scored(math.nan)
    found = accuracy(Seen(row, Told(nothing, choices=(nothing, HALF))))
    assert found is not None
    assert math.isnan(found)


@pytest.mark.parametrize(
    "hits, strength, exact",
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 1, 0, 1], 0.25, 0.75),
        ([1, 1, 1, 0], 0.25, 0.75),  # open-unlearning's prefix leaves one token at least
        ([0, 0, 0, 0], 0.25, 0.0),
    ],
)
def test_extraction_and_memorization(hits: list[int], strength: float, exact: float) -> None:
    one = seen(scored(-1, -1, -1, -1, hits=[bool(hit) for hit in hits]))
    assert extraction_strength(one) == pytest.approx(strength)
    assert exact_memorization(one) == pytest.approx(exact)


def test_accuracy_goes_by_the_sum_and_the_first_of_equals() -> None:
    (row,) = parse_rows([{"question": "2+2?", "choices": ["3", "4"], "answer": 1}], "facts")
    assert [choice.answer for choice in row.choices] == [" A", " B"]
    assert row.prompt == "2+2?\nA. 3\nB. 4\nAnswer:"
    low, high = scored(-3.0), scored(-0.5, -0.6)
    assert accuracy(Seen(row, Told(high, choices=(low, high)))) == 1
    assert accuracy(Seen(row, Told(low, choices=(high, low)))) == 0
    assert accuracy(Seen(row, Told(low, choices=(low, low)))) == 0
    assert accuracy(seen(HALF)) is None


@pytest.mark.parametrize("answer", [1, "B", "4"])
def test_the_right_choice_by_number_letter_or_text(answer: object) -> None:
    (row,) = parse_rows([{"question": "2+2?", "choices": ["3", "4"], "answer": answer}], "facts")
    assert row.answer == " B"


def test_rouge_of_the_answer() -> None:
    rows = [seen(HALF, "It is in Oslo, Norway"), seen(HALF, "Bergen"), seen(HALF)]
    recall = mean_over_rows("rougeL_recall", rows, 0)
    assert recall is not None
    assert (recall.value, recall.rows) == (0.5, 2)  # "in Oslo" and nothing; the third was not asked
    f1 = mean_over_rows("knowmem", rows, 0)
    assert f1 is not None
    assert f1.value == pytest.approx((2 * 1 * (2 / 5) / (1 + 2 / 5)) / 2)


def test_loss_weighs_by_tokens_and_perplexity_is_its_exponential() -> None:
    rows = [seen(scored(-1.0)), seen(scored(-2.0, -2.0, -2.0))]
    loss, perplexity = (mean_over_rows(name, rows, 0) for name in ("loss", "perplexity"))
    assert loss is not None
    assert perplexity is not None
    assert loss.value == pytest.approx(7 / 4)
    assert perplexity.value == pytest.approx(math.exp(7 / 4))


def _ratio_rows(ratios: list[float]) -> list[Seen]:
    return [seen(HALF, paraphrased=scored(0.0), perturbed=(scored(math.log(r)),)) for r in ratios]


def test_repetition_is_of_four_words_in_a_row() -> None:
    def of(text: str | None) -> float | None:
        return METRICS["repetition"].of(replace(seen(HALF), said=text))

    assert of("one two three four five") == 0
    # One two three four, two three four one, three four one two, four one two three, and again one.
    assert of("one two three four one two three four") == pytest.approx(1 - 4 / 5)
    assert of("No no no no no NO") == pytest.approx(1 - 1 / 3)
    assert of("three words only") == 0
    assert of(None) is None


def test_forget_quality_is_the_ks_test_of_the_ratios() -> None:
    one, two = [0.1, 0.2, 0.5, 0.9, 1.5], [0.3, 0.6, 1.1, 2.0, 2.5]
    found = forget_quality(_ratio_rows(one), _ratio_rows(two))
    expected = ks_2samp(one, two)
    assert found == pytest.approx((expected.pvalue, expected.statistic))
    assert forget_quality(_ratio_rows(one), _ratio_rows(one)) == (1.0, 0.0)
    # The floor of p that the docstring states.
    far = forget_quality(_ratio_rows([0.1] * 5), _ratio_rows([2.0] * 5))
    assert far == pytest.approx((2 / math.comb(10, 5), 1.0))
    assert forget_quality([seen(HALF)], [seen(HALF)]) is None


def test_utility_is_a_harmonic_mean_and_zero_counts() -> None:
    parts = [estimate([value] * 4, seed=0) for value in (0.5, 1.0, 0.25)]
    assert model_utility(parts).value == pytest.approx(3 / (2 + 1 + 4))
    assert model_utility([*parts, estimate([0.0, 0.0], seed=0)]).value == 0


def test_recovered_is_a_share_of_what_was_lost() -> None:
    base, unlearned, sanitized = (estimate([v, v], seed=0) for v in (0.9, 0.5, 0.8))
    share = recovered(base, unlearned, sanitized)
    assert share is not None
    assert share.value == pytest.approx(0.75)
    assert recovered(unlearned, base, sanitized) is None


# Directions


@pytest.mark.parametrize("name", METRICS)
def test_forgetting_turns_directions_round_but_for_what_is_no_knowledge(name: str) -> None:
    ways = {direction(name, "heldout"), direction(name, "forget")}
    alike = {"truth_ratio": {"higher"}, "repetition": {"lower"}}
    assert ways == alike.get(name, {"higher", "lower"})


def test_a_verdict_takes_more_than_noise() -> None:
    assert verdict((-0.1, 0.2), "higher") == "within noise"
    assert verdict((0.1, 0.2), "higher") == "better"
    assert verdict((0.1, 0.2), "lower") == "worse"
    assert verdict((-0.2, -0.1), "lower") == "better"


def test_suites_go_by_the_columns() -> None:
    always = ("extraction_strength", "exact_memorization")
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"question": "a?", "answer": "b"}, "auto", "rougeL_recall"),
        ({"question": "a?", "answer": "b"}, "muse", "knowmem"),
        ({"prompt": "a", "gt": "b"}, "muse", "verbmem"),
        ({"question": "a?", "choices": ["x", "y"], "answer": 0}, "auto", "accuracy"),
        ({"text": "a b"}, "auto", "perplexity"),
    ]
    for record, suite, metric in cases:
        names = metrics_of(parse_rows([record], "rows"), suite)
        assert metric in names
        assert names[-2:] == always


# The bootstrap

VALUES = st.lists(st.floats(-5, 5), min_size=2, max_size=30)


@given(VALUES, st.integers(0, 3))
def test_an_interval_holds_means_of_rows(values: list[float], seed: int) -> None:
    found = estimate(values, seed=seed)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    assert found.interval is not None
    low, high = found.interval
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert estimate(values, seed=seed).interval == found.interval  # the same draws


@given(VALUES)
def test_differences_are_paired(values: list[float]) -> None:
    # Shifted by a constant, every draw differs by just that: no noise is left.
    one, two = estimate(values, seed=0), estimate([v + 1 for v in values], seed=0)
    gap = combine(lambda a, b: a - b, two, one)
    assert gap.interval == pytest.approx((1, 1))


def test_the_interval_is_about_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = estimate(values.tolist(), seed=0)
    assert found.interval is not None
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)


def test_one_row_has_no_interval() -> None:
    assert estimate([0.5], seed=0).interval is None
    assert combine(np.add, estimate([0.5, 1], seed=0), Estimate(1.0, 1)).interval is None


def test_tellings_come_back_in_their_order() -> None:
    told = Told(1, 2, (4, 5), 3, (6, 7))
    numbers = itertools.count(1)
    assert list(told) == [1, 2, 3, 4, 5, 6, 7]
    assert told.map(lambda _: next(numbers)) == told
