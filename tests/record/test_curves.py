"""What is drawn of a release, as data, and the card's picture of it."""

from __future__ import annotations

from typing import Any

import pytest

from sage_hub.record.curves import bias_of_layers, gain_path, relearning
from sage_hub.record.pictures import tradeoff


def searched(**more: Any) -> dict[str, Any]:
    tried = [{"gain": g, "forget": 1 / g, "retain": 1 - g / 50} for g in (4.0, 2.0)]
    looks = [{"gain": 3.0, "shares": True, "forget": None, "retain": 0.9}]
    about = {"target": 0.3, "source": {"forget": 0.3, "retain": 0.5}}
    return {"gain": 2.0, "gain_search": {"tried": tried, "first_looks": looks, **about, **more}}


def results(metric: str) -> dict[str, Any]:
    return {
        "results": [
            {"model": m, "set": s, "metric": metric, "condition": None, "value": 0.5}
            for m in ("base", "unlearned", "sanitized")
            for s in ("forget", "retain")
        ]
    }


def test_the_path_of_gains_is_in_their_order_and_holds_what_has_a_level() -> None:
    path = gain_path(searched(), results("probability"))
    assert path is not None
    assert [one["gain"] for one in path["tried"]] == [2.0, 4.0]
    assert path["first_looks"] == []
    assert path["along"] == ["base", "unlearned"]


def test_losses_are_on_the_scale_of_the_searched() -> None:
    path = gain_path(searched(), results("loss"))
    assert path is not None
    assert path["metric"] == "−loss"
    assert path["models"]["base"] == {"forget": -0.5, "retain": -0.5}


@pytest.mark.parametrize("manifest", [{}, {"gain_search": None}, {"gain_search": {"matching": 3}}])
def test_without_a_search_there_is_none(manifest: dict[str, Any]) -> None:
    assert gain_path(manifest, {"results": []}) is None


def test_bias_is_the_median_of_a_kind_in_a_layer() -> None:
    tensors = [
        {"name": f"m.3.experts.{e}.up_proj.weight", "bias_before": b, "bias_after": b / 2}
        for e, b in enumerate((1.0, 2.0, 9.0))
    ]
    (one,) = bias_of_layers(tensors)
    assert (one["kind"], one["layer"], one["weights"], one["before"]) == ("up_proj", 3, 3, 2.0)


def test_the_card_draws_the_path_beside_the_models() -> None:
    report = results("probability")
    kept = [{**one, "set": "heldout"} for one in report["results"] if one["set"] == "retain"]
    report["results"] = [{**one, "interval": None} for one in (*report["results"], *kept)]
    alone = tradeoff({}, report)
    assert alone is not None
    assert len(alone.axes) == 1
    both = tradeoff(searched(), report)
    assert both is not None
    _, path = both.axes
    lines = {str(line.get_label()): list(line.get_xdata()) for line in path.lines}
    assert lines["gains tried: γ 2 to 4"] == [0.5, 0.25]
    assert lines["αΔ, α from 0 to 1"] == [0.5, 0.5]


def attacked(model: str, *steps: int, metric: str = "probability") -> list[dict[str, Any]]:
    about = {"model": model, "set": "forget", "metric": metric, "interval": None}
    return [about | {"condition": f"relearned_{step}", "value": step / 100} for step in steps]


def test_the_curve_of_relearning_is_in_the_order_of_its_steps() -> None:
    whole = [
        *attacked("base", 0),
        *attacked("unlearned", 100, 0, 10),
        *attacked("sanitized", 0, 25),
    ]
    others = attacked("sanitized", 0, 10, metric="loss")
    curve = relearning({"results": [*results("probability")["results"], *others, *whole]})
    assert curve is not None
    assert (curve["metric"], curve["base"]) == ("probability", 0.0)
    steps = {one["model"]: [point["steps"] for point in one["points"]] for one in curve["models"]}
    assert steps == {"unlearned": [0, 10, 100], "sanitized": [0, 25]}


@pytest.mark.parametrize("only", [[], attacked("unlearned", 0, 10), attacked("sanitized", 0)])
def test_there_is_no_curve_of_a_release_that_was_not_attacked(only: list[dict[str, Any]]) -> None:
    assert relearning({"results": [*results("probability")["results"], *only]}) is None
