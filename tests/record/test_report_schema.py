"""The schema that ships with sage-hub holds for every report it writes, and refuses broken ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from support.pico import make_pair

import sage_hub
from sage_hub.evaluation.relearning import BEFORE, CURVE, ON_RETAIN

SCHEMA = Path(sage_hub.__file__).parent / "data" / "report.schema.json"
Report = dict[str, Any]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schema")
    make_pair(folder)
    return folder


def settings(sources: Path, *sets: str, **others: Any) -> sage_hub.Settings:
    given = {name: str(sources / f"{name}.jsonl") for name in sets}
    return sage_hub.Settings(**given, **{"generate_rows": 0, "batch_size": 32, **others})


def written(sources: Path, name: str, own: sage_hub.Settings) -> Report:
    """sage/report.json of a release that is made with the settings `own`."""
    folder = sources / name
    sage_hub.sanitize(
        str(sources / "base"), str(sources / "unlearned"), folder, settings=own, force=True
    )
    found: Report = json.loads((folder / "sage" / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def full(sources: Path) -> Report:
    """A report with robustness, a gate that is met, and imported results."""
    results = sources / "TOFU_SUMMARY.json"
    results.write_text(json.dumps({"forget_Q_A_Prob": 0.1, "unknown": 1}), encoding="utf-8")
    own = settings(
        sources,
        "retain",
        "forget",
        "heldout",
        robustness=True,
        generate_rows=3,
        gates=(
            "bias.kept <= 1",
            "robustness.int4.forget.probability <= 2",
            "robustness.relearned.forget.probability <= unlearned + 1",
            "robustness.relearned_100.forget.probability <= base + 1",
            "robustness.relearned_retain.forget.probability <= 2",
            "robustness.sampled.forget.leak_at_8 <= unlearned + 1",
        ),
        results={"sanitized": str(results)},
    )
    return written(sources, "full", own)


def test_a_full_report_is_valid(validator: Draft202012Validator, full: Report) -> None:
    validator.validate(full)
    conditions = {result["condition"] for result in full["results"]}
    assert conditions == {None, "int8", "int4", "sampled", "relearned", *CURVE, BEFORE, ON_RETAIN}
    assert [gate["passed"] for gate in full["gates"]] == [True] * 6
    assert {r["direction"] for r in full["results"] if r["source"]} == {"lower", "not stated"}
    assert full["differences"]


def test_a_report_of_the_retain_set_alone_is_valid(
    validator: Draft202012Validator, sources: Path
) -> None:
    report = written(sources, "bare", settings(sources, "retain"))
    validator.validate(report)
    assert report["retain_recovered"] is None
    assert report["gates"] == []


def test_a_report_with_a_gate_that_is_not_met_is_valid(
    validator: Draft202012Validator, sources: Path
) -> None:
    own = settings(sources, "retain", "heldout", gates=("bias.kept >= 2", "retain_recovered >= 9"))
    with pytest.raises(sage_hub.SageHubError):
        written(sources, "stopped", own)
    report = json.loads((sources / "stopped" / "sage" / "report.json").read_text(encoding="utf-8"))
    validator.validate(report)
    assert [gate["passed"] for gate in report["gates"]] == [False, False]


def test_what_eval_prints_is_valid(validator: Draft202012Validator, sources: Path) -> None:
    models = [str(sources / "base"), str(sources / "unlearned")]
    report = sage_hub.evaluate_models(models, settings=settings(sources, "forget", generate_rows=2))
    validator.validate(json.loads(json.dumps(report)))
    assert report["models"] == dict.fromkeys(models)


def _set(*path: Any, to: Any) -> Callable[[Report], None]:
    def change(report: Report) -> None:
        part: Any = report
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = to

    return change


def _drop(*path: Any) -> Callable[[Report], None]:
    def change(report: Report) -> None:
        part: Any = report
        for step in path[:-1]:
            part = part[step]
        del part[path[-1]]

    return change


BROKEN = {
    "another version": _set("format_version", to=1),
    "a field that nobody knows": _set("score", to=1),
    "a field of a result that nobody knows": _set("results", 0, "stderr", to=0.1),
    "no results": _drop("results"),
    "no reason": _drop("not_run", 0, "reason"),
    "no interval": _drop("results", 0, "interval"),
    "text for a value": _set("results", 0, "value", to="0.5"),
    "one end of an interval": _set("results", 0, "interval", to=[0.1]),
    "three ends of an interval": _set("results", 0, "interval", to=[0.1, 0.2, 0.3]),
    "a direction that is none": _set("results", 0, "direction", to="up"),
    "a condition that is none": _set("results", 0, "condition", to="int2"),
    "a verdict that is none": _set("differences", 0, "verdict", to="good"),
    "a difference without an interval": _set("differences", 0, "interval", to=None),
    "rows in parts": _set("results", 0, "rows", to=1.5),
    "a fingerprint that is none": _set("data", "forget", "fingerprint", to="abc"),
    "a set without its rows": _drop("data", "forget", "rows_used"),
    "a gate met without numbers": _set("gates", 0, "left", to=None),
    "a gate met for a reason": _set("gates", 0, "reason", to="it was not measured"),
    "a negative time": _set("seconds", "evaluate", to=-1),
    "a host": _set("hardware", "host", to="here"),
    "a path on the card": _set("card", "path", to="/home/somebody"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_report_is_refused(
    validator: Draft202012Validator, full: Report, change: Callable[[Report], None]
) -> None:
    broken = copy.deepcopy(full)
    change(broken)
    with pytest.raises(ValidationError):
        validator.validate(broken)


def test_every_field_is_described() -> None:
    """A schema that says nothing of a field leaves its reader to guess."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))

    def described(part: Any) -> bool:
        if "description" in part:
            return True
        name = part.get("$ref", "").rpartition("/")[2]
        return bool(name) and described(schema["$defs"][name])

    def check(part: Any, place: str) -> None:
        if not isinstance(part, dict):
            return
        for name, own in part.get("properties", {}).items():
            assert described(own), f"{place}.{name}"
        for name, own in part.items():
            if name not in ("if", "then", "else"):
                check(own, f"{place}.{name}")

    check(schema, "report")
