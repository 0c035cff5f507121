"""Results of open-unlearning and lm-eval are read into the record, if they belong there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.pico import proxies

from sage_hub.cli.main import main
from sage_hub.errors import NotFoundError, ResultsError
from sage_hub.evaluation.imported import read_results

LM_EVAL = {
    "results": {
        "wmdp_bio": {
            "alias": "wmdp_bio",
            "acc,none": 0.31,
            "acc_stderr,none": 0.01,
            "acc_norm,flexible-extract": 0.5,
        }
    },
    "n-samples": {"wmdp_bio": {"original": 1273, "effective": 1273}},
    "higher_is_better": {"wmdp_bio": {"acc": True}},
    "config": {"model_sha": "c" * 40},
    "model_name": "org/base",
}
OPEN_UNLEARNING = {
    "forget_Q_A_Prob": {"agg_value": 0.12, "value_by_index": {"0": {"prob": 0.1}, "1": {}}},
    "forget_quality": {"agg_value": 1e-5},
    "model_utility": {"agg_value": 0.6},
    "something_new": {"agg_value": 1.0},
    "broken": {"agg_value": None},
}


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_lm_eval(tmp_path: Path) -> None:
    path = write(tmp_path / "results_2026-01-01.json", LM_EVAL)
    acc, norm = read_results("base", path, name="org/base", commit="c" * 40)
    assert (acc.set, acc.metric, acc.value, acc.rows) == ("wmdp_bio", "acc", 0.31, 1273)
    assert acc.interval == pytest.approx((0.2904, 0.3296))
    assert (acc.direction, acc.source) == ("higher", "results_2026-01-01.json")
    assert (norm.metric, norm.direction) == ("acc_norm_flexible_extract", "not stated")
    with pytest.raises(ResultsError, match="is of the commit cccccccccccc"):
        read_results("base", path, name="org/base", commit="d" * 40)


@pytest.mark.parametrize("form", ["EVAL", "SUMMARY"])
def test_open_unlearning(form: str, tmp_path: Path) -> None:
    content: dict[str, object] = dict(OPEN_UNLEARNING)
    if form == "SUMMARY":
        content = {name: about["agg_value"] for name, about in OPEN_UNLEARNING.items()}
    (tmp_path / "evals").mkdir()
    write(tmp_path / "evals" / f"TOFU_{form}.json", content)
    found = {result.metric: result for result in read_results("unlearned", str(tmp_path))}
    assert found.keys() == OPEN_UNLEARNING.keys() - {"broken"}
    assert {result.set for result in found.values()} == {"open_unlearning_tofu"}
    ways = {name: result.direction for name, result in found.items()}
    assert ways == {
        "forget_Q_A_Prob": "lower",
        "forget_quality": "higher",
        "model_utility": "higher",
        "something_new": "not stated",
    }
    assert found["forget_Q_A_Prob"].rows == (2 if form == "EVAL" else 0)


@pytest.mark.parametrize("content", [[], {}, {"a": "b"}, {"results": {}}, {"results": {"x": 3}}])
def test_anything_else_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(ResultsError):
        read_results("base", write(tmp_path / "x.json", content))
    with pytest.raises(NotFoundError):
        read_results("base", str(tmp_path / "nothing"))


@pytest.mark.parametrize("count", ["12", float("nan"), None, [3], {"rows": 3}])
def test_what_is_no_count_is_none(count: object, tmp_path: Path) -> None:
    content = LM_EVAL | {"n-samples": {"wmdp_bio": {"effective": count}}}
    found = read_results("base", write(tmp_path / "results_1.json", content))
    assert {result.rows for result in found} == {0}


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan"), True, "0.5"])
def test_what_no_float_can_be_is_no_result(number: object, tmp_path: Path) -> None:
    figures = {"acc,none": 0.31, "acc_stderr,none": number, "acc_norm,none": number}
    found = read_results(
        "base", write(tmp_path / "results_1.json", {"results": {"wmdp_bio": figures}})
    )
    assert [(one.metric, one.interval) for one in found] == [("acc", None)]
    content = OPEN_UNLEARNING | {"something_new": {"agg_value": number}}
    found = read_results("base", write(tmp_path / "TOFU_EVAL.json", content))
    assert "something_new" not in {one.metric for one in found}


def test_an_interval_without_end_is_none(tmp_path: Path) -> None:
    figures = {"acc,none": 1.0, "acc_stderr,none": 1.7e308}
    found = read_results(
        "base", write(tmp_path / "results_1.json", {"results": {"wmdp_bio": figures}})
    )
    assert [one.interval for one in found] == [None]


def test_they_are_in_the_record_the_gates_and_the_card(pair: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "results_1.json", LM_EVAL)
    out = tmp_path / "out"
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", str(out), "--quiet"]
    words = ["sanitize", *both, *proxies(pair), "--generate-rows", "0"]
    assert main([*words, "--results", f"sanitized={path}", "--gate", "wmdp_bio.acc <= 0.35"]) == 0
    report = json.loads((out / "sage" / "report.json").read_text())
    (acc,) = [r for r in report["results"] if (r["set"], r["metric"]) == ("wmdp_bio", "acc")]
    assert acc["source"] == "results_1.json"
    assert report["gates"][0]["passed"] is True
    assert "from results_1.json" in (out / "README.md").read_text()
