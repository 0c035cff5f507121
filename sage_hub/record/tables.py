"""The figures of a report as the lines of tables, for the card, GitHub and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sage_hub.evaluation.metrics import LEAKS
from sage_hub.evaluation.relearning import CURVE

MODELS = {
    "base": "base",
    "unlearned": "unlearned",
    "control": "control αΔ",
    "reference": "reference",
    "sanitized": "sanitized",
}
_ORDER = {"heldout": 0, "forget": 1, "all": 2, "retain": 9}  # of sets; others are 5


class Cell(NamedTuple):
    """A text, and the verdict in it, for those who show one by more than the word."""

    text: str
    verdict: str = ""


def as_cell(content: str | Cell) -> Cell:
    """A text alone has no verdict."""
    return content if isinstance(content, Cell) else Cell(content)


@dataclass(frozen=True)
class Table:
    """Rows under a header, or labels and values without one; the first `keys` tell rows apart."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    keys: int = 1
    gap: int = 2  # blanks between two columns, where they are lined up by blanks

    @property
    def cells(self) -> list[list[Cell]]:
        """The header, if there is one, and the rows."""
        return [[as_cell(one) for one in row] for row in (self.header, *self.rows) if row]


def number(value: float | None, signed: bool = False) -> str:
    """A figure as tables show it: four digits behind the point, or four in all if it is large."""
    if value is None:
        return "–"
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"
    return f"+{text}" if signed and value > 0 else text


def short(value: float | None) -> str:
    """A number of any size in four digits."""
    return "-" if value is None else f"{value:.4g}"


def interval(ends: Sequence[float] | None, scale: float = 1) -> str:
    """Where a figure may lie, to be put behind it."""
    if ends is None:
        return ""
    low, high = (f"{scale * end:.3g}" for end in ends)
    return f" [{low}, {high}]"


def models_of(report: Mapping[str, Any]) -> dict[str, str]:
    """The models of a release that the report has figures of, and what tables call them.

    The reference, which most releases have not, is there only if it was evaluated.
    """
    there = {result["model"] for result in report["results"]}
    return {
        name: shown
        for name, shown in MODELS.items()
        if name in there or name not in ("reference", "control")
    }


def metric_table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per set and metric: the value of each model, and how sanitized and unlearned differ.

    What was held out of calibration comes first.
    """
    lines = (line for line in _lines(report) if line["condition"] is None)
    return sorted(lines, key=lambda line: _ORDER.get(line["set"], 5))


def robustness_table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per condition, set and metric, with the models as they are under it.

    Of a curve the main metric alone.
    """
    main = {line["metric"] for line in main_lines(report)}
    # By whether it is of a curve.
    wanted = {True: main, False: main | {"relearning_recovery", *LEAKS}}
    return [
        line
        for line in _lines(report)
        if line["condition"] and line["metric"] in wanted[line["condition"] in CURVE]
    ]


def main_lines(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first metric of each set."""
    first: dict[str, dict[str, Any]] = {}
    for line in metric_table(report):
        first.setdefault(line["set"], line)
    return list(first.values())


def highlights(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that a reader wants first: the main metric of what is kept and what is to go."""
    return [
        line
        for line in main_lines(report)
        if line["set"] in ("heldout", "forget")
        and None not in (line["unlearned"], line["sanitized"])
    ]


def figures(
    lines: Sequence[Mapping[str, Any]], models: Mapping[str, str], change: str, told: str
) -> Table:
    """`lines` with the figures of `models` and a last column `change`, `told` in a format.

    Where that has no name, the change of each model is told behind its figure.
    """
    keys = {"set": "set", "metric": "metric"}
    if any(line["condition"] for line in lines):
        keys = {"condition": "treated by", **keys}

    def tell(gap: Mapping[str, Any] | None, form: str = "{}") -> Cell:
        if gap is None:
            return Cell("")
        value, sure = number(gap["value"], True), interval(gap["interval"])
        text = told.format(value=value, interval=sure, verdict=gap["verdict"])
        return Cell(form.format(text), gap["verdict"])

    rows: list[list[str | Cell]] = []
    for line in lines:
        row = [line[key] for key in (*keys, "direction")]
        for model in models:
            behind = Cell("") if change else tell(line["gaps"].get(model), " ({})")
            row.append(Cell(number(line["values"].get(model)) + behind.text, behind.verdict))
        rows.append([*row, tell(line["difference"])] if change else row)
    header = [*keys.values(), "better", *models.values(), *([change] if change else [])]
    return Table(header, rows, keys=len(keys))


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


def _lines(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All figures, those of the same condition, set and metric in one line."""
    lines: dict[tuple[str | None, str, str], dict[str, Any]] = {}
    about = ("condition", "set", "metric", "direction", "rows", "source")
    for result in report["results"]:
        line = {**{key: result[key] for key in about}, "values": {}, "gaps": {}, "difference": None}
        line = lines.setdefault((result["condition"], result["set"], result["metric"]), line)
        line["values"][result["model"]] = result["value"]
    for gap in report["differences"]:
        line = lines[gap["condition"], gap["set"], gap["metric"]]
        line["gaps"][gap["model"]] = gap
        if gap["other"] == "unlearned":
            line["difference"] = gap
    for line in lines.values():  # those of a release by their own name, too, for templates
        yield line | {model: line["values"].get(model) for model in MODELS}
