"""The figures of a report as the lines of tables, for the card, the page and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MODELS = {
    "base": "base",
    "unlearned": "unlearned",
    "control": "control αΔ",
    "reference": "reference",
    "sanitized": "sanitized",
}


def number(value: float | None, signed: bool = False) -> str:
    """A figure as tables show it: four digits behind the point, or four in all if it is large."""
    if value is None:
        return "–"
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"
    return f"+{text}" if signed and value > 0 else text


def models_of(report: Mapping[str, Any]) -> dict[str, str]:
    """The models of a release that the report has figures of, and what tables call them.

    The reference, which most releases have not, is there only if it was evaluated.
    """
    there = {result["model"] for result in report["results"]}
    return {name: shown for name, shown in MODELS.items() if name in there or name != "reference"}


def metric_table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per set and metric: the value of each model, and how sanitized and unlearned differ.

    For the card, the page and the terminal; what was held out of calibration comes first.
    """
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for result in report["results"]:
        if result["condition"] is None:
            line = lines.setdefault((result["set"], result["metric"]), _line(result))
            line[result["model"]] = result["value"]
    for gap in report["differences"]:
        if gap["other"] == "unlearned" and gap["condition"] is None:
            lines[gap["set"], gap["metric"]]["difference"] = gap
    order = {"heldout": 0, "forget": 1, "all": 2, "retain": 9}
    return sorted(lines.values(), key=lambda line: order.get(line["set"], 5))


def robustness_table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per condition, set and metric, with the models as they are under it."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    main = {line["metric"] for line in main_lines(report)} | {"relearning_recovery"}
    for result in report["results"]:
        condition = result["condition"]
        if condition is not None and result["metric"] in main:
            key = (condition, result["set"], result["metric"])
            line = lines.setdefault(key, _line(result) | {"condition": condition})
            line[result["model"]] = result["value"]
    for gap in report["differences"]:
        key = (gap["condition"], gap["set"], gap["metric"])
        if gap["other"] == "unlearned" and key in lines:
            lines[key]["difference"] = gap
    return list(lines.values())


def highlights(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines that a reader wants first: the main metric of what is kept and what is to go."""
    for line in main_lines(report):
        known = None not in (line["unlearned"], line["sanitized"])
        if line["set"] in ("heldout", "forget") and known:
            yield line


def main_lines(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The first metric of each set."""
    done: set[str] = set()
    for line in metric_table(report):
        if line["set"] not in done:
            done.add(line["set"])
            yield line


def not_run(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was not run, and why: a metric that one reason keeps from several sets is one entry."""
    sets: dict[tuple[str, str], list[str]] = {}
    for entry in report["not_run"]:
        metric, _, where = entry["what"].partition(" on ")
        sets.setdefault((metric, entry["reason"]), []).append(where)
    return [
        {"what": f"{what} on {_listed(where)}" if where[0] else what, "reason": reason}
        for (what, reason), where in sets.items()
    ]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(", ".join(words).rsplit(", ", 1))


def _line(result: Mapping[str, Any]) -> dict[str, Any]:
    about = {key: result[key] for key in ("set", "metric", "direction", "rows", "source")}
    return {**about, "difference": None, **dict.fromkeys(MODELS)}
