"""The verdict on a release in words, for every way that it may come out."""

from __future__ import annotations

from typing import Any

import pytest

from sage_hub.record.verdict import said_again, verdict


def result(model: str, which: str, value: float) -> dict[str, Any]:
    way = "lower" if which == "forget" else "higher"
    about = {"condition": None, "interval": None, "direction": way, "rows": 9, "source": None}
    return {"model": model, "set": which, "metric": "probability", "value": value, **about}


def gap(which: str, said: str, other: str = "unlearned") -> dict[str, Any]:
    about = {"metric": "probability", "condition": None, "value": 0.1, "interval": [0.05, 0.2]}
    return {"model": "sanitized", "other": other, "set": which, "verdict": said, **about}


def report(**more: Any) -> dict[str, Any]:
    levels = {"base": (0.9, 0.95), "unlearned": (0.1, 0.5), "sanitized": (0.1, 0.9)}
    levels |= {"control": (0.1, 0.6)}
    results = [
        result(model, which, value)
        for model, own in levels.items()
        for which, value in zip(("forget", "heldout"), own, strict=True)
    ]
    back = {"metric": "probability", "value": 0.82, "interval": [0.7, 0.9], "rows": 9}
    return {
        "results": results,
        "differences": [gap("forget", "within noise"), gap("heldout", "better")],
        "retain_recovered": back,
        "control_by": "source",
        "control_alpha": 1.0,
        "gates": [],
        "not_run": [],
    } | more


def said(manifest: dict[str, Any] | None = None, **more: Any) -> list[tuple[str, str]]:
    return [(one.tone, one.text) for one in verdict(manifest or {}, report(**more))]


def without(which: str) -> list[dict[str, Any]]:
    return [one for one in report()["results"] if one["set"] != which]


def test_a_good_release() -> None:
    back, forgotten, gates = said()
    assert back[0] == "good"
    assert "82 % of the held-out probability that unlearning had cost came back" in back[1]
    assert "(95 % interval 70 to 90 %)" in back[1]
    assert "base 0.9500, unlearned 0.5000, sanitized 0.9000" in back[1]
    assert forgotten[0] == "good"
    assert forgotten[1].startswith("It forgets as much as its source")
    assert gates == ("unsure", "No gate was set, so nobody said beforehand what it must meet.")


@pytest.mark.parametrize(
    "back, tone, words",
    [
        ({"value": -0.2, "interval": [-0.3, -0.1]}, "bad", "Nothing came back"),
        ({"value": 0.2, "interval": [-0.1, 0.4]}, "unsure", "20 %"),
        ({"value": 0.2, "interval": None}, "unsure", "came back: held-out"),
        (None, "unsure", "Nothing of the held-out set was lost beyond noise"),
    ],
)
def test_what_came_back(back: dict[str, Any] | None, tone: str, words: str) -> None:
    found = None if back is None else {"metric": "probability", "rows": 9, **back}
    first = said(retain_recovered=found)[0]
    assert first[0] == tone
    assert words in first[1]


@pytest.mark.parametrize(
    "change, tone, words",
    [
        ("worse", "bad", "It forgets less than its source: some of what had to go is back"),
        ("better", "good", "It forgets more than its source"),
    ],
)
def test_what_is_forgotten(change: str, tone: str, words: str) -> None:
    second = said(differences=[gap("forget", change)])[1]
    assert second[0] == tone
    assert second[1].startswith(words)
    assert "95 % interval +0.0500 to +0.2000" in second[1]


def test_what_nobody_measured_is_said() -> None:
    assert "Nobody knows what came back" in said(results=without("heldout"), differences=[])[0][1]
    assert "Nobody knows what is forgotten" in said(results=without("forget"), differences=[])[1][1]
    assert said(differences=[])[1][0] == "unsure"
    missing = [{"what": "robustness", "reason": "it was not asked for"}]
    assert said(not_run=missing)[-1][1] == "Not run: robustness (it was not asked for)."
    many = [{"what": f"metric{n}", "reason": f"reason {n}"} for n in range(6)]
    last = said(not_run=many)[-1][1]
    assert last.endswith("metric3 (reason 3); and 2 more, which are listed below.")


@pytest.mark.parametrize("change, tone", [("better", "good"), ("within noise", "bad")])
def test_the_control_is_what_it_must_beat(change: str, tone: str) -> None:
    gaps = [gap("heldout", change, "control")]
    third = said(control_by="forgetting", control_alpha=0.4, differences=gaps)[2]
    assert third[0] == tone
    assert "αΔ (α = 0.4)" in third[1]
    assert "0.9000 against 0.6000" in third[1]


def test_gates_and_a_search_that_was_held_back() -> None:
    met = {"gate": "a >= b", "passed": True, "left": 2.0, "right": 1.0, "reason": None}
    failed = {"gate": "c >= d", "passed": False, "left": 1.0, "right": 2.0, "reason": None}
    assert ("good", "All 2 gates are met.") in said(gates=[met, met])
    assert ("bad", "1 of 2 gates is not met: c >= d (1 against 2).") in said(gates=[met, failed])
    held = {"gain_search": {"outcome": "held back", "of": "the unlearned model's level"}}
    assert any("ended before it reached the unlearned" in text for _, text in said(held))
    missed = {"gain_search": {"outcome": "largest", "of": "the unlearned model's level"}}
    assert any("does not reach the unlearned model's level" in text for _, text in said(missed))
    kept = {"gain_search": {"outcome": "largest", "keep": 0.89}}  # and 64 keeps it
    assert not any("does not reach" in text for _, text in said(kept))


def test_an_answer_that_is_the_base_s_again_is_bad_whatever_the_mean_says() -> None:
    rows = [
        {"set": "forget", "row": "row 1", "said": ["Ada  L.", "nobody", "ada l."]},
        {"set": "forget", "row": "row 2", "said": ["Ada", "Ada", "Ada"]},  # never forgotten
        {"set": "forget", "row": "row 3", "said": ["Ada", "nobody", "no idea"]},
        {"set": "forget", "row": "row 4", "said": ["", "nobody", ""]},
        {"set": "forget", "row": "row 5", "said": None},
        {"set": "heldout", "row": "row 1", "said": ["Bob", "nobody", "Bob"]},
    ]
    (remark,) = said_again(rows)
    assert remark.tone == "bad"
    assert remark.text.startswith("1 of 4 questions to forget")
    assert remark.text.endswith(": row 1.")
    assert not [*said_again(rows[1:])]
