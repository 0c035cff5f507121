"""Conditions that a release must meet: a small language over its record, no more than arithmetic.

    heldout.probability >= base - 0.02
    forget.probability <= unlearned + 0.01
    retain_recovered >= 0.5
    bias.relative <= 0.001
    robustness.int4.forget.probability <= unlearned

`SET.METRIC` is the sanitized model's figure, `MODEL.SET.METRIC` another's, and a MODEL alone the
same figure of that model. `robustness.CONDITION.` in front of a figure is of a model treated so;
a MODEL alone is then treated so, too.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sage_hub.errors import UsageError
from sage_hub.settings import SETS

MODELS = ("base", "unlearned", "control", "sanitized", "reference")
_COMPARE: Mapping[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
}
_COMBINE: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# Figures that every record has, or says why it hasn't.
ALWAYS_KNOWN = (
    "bias.relative",
    "bias.before",
    "bias.after",
    "bias.kept",
    "gain",
    "control_alpha",
    "retain_recovered",
)
_MOST = 500  # characters of a gate


@dataclass(frozen=True)
class Gate:
    """One condition, parsed."""

    text: str
    left: ast.expr
    compare: Callable[[float, float], bool]
    right: ast.expr

    @property
    def names(self) -> list[str]:
        """All names in it, a model alone written out as the figure that it stands for."""
        return [
            self._written_out(name) for side in (self.left, self.right) for name in _names(side)
        ]

    def _written_out(self, name: str) -> str:
        if name not in MODELS:
            return name
        (own,) = _names(self.left)
        own = own.partition(".")[2] if own.partition(".")[0] in MODELS else own
        if own.startswith("robustness."):
            _, condition, figure = own.split(".", 2)
            return f"robustness.{condition}.{name}.{figure}"
        return f"{name}.{own}"

    def check(self, facts: Mapping[str, float]) -> Outcome:
        """Whether `facts` (name -> value) meet it. One that takes an unknown fact is not met."""
        try:
            left, right = (
                _value(side, self._written_out, facts) for side in (self.left, self.right)
            )
        except KeyError as error:
            reason = f"{error.args[0]} was not measured"
            if error.args[0] == "retain_recovered":
                reason += ", or nothing was lost"
            return Outcome(self.text, False, None, None, reason)
        except ZeroDivisionError:
            return Outcome(self.text, False, None, None, "it divides by zero")
        return Outcome(self.text, self.compare(left, right), left, right)


@dataclass(frozen=True)
class Outcome:
    """How a gate came out: both sides as numbers, or why there are none."""

    gate: str
    passed: bool
    left: float | None
    right: float | None
    reason: str | None = None

    def sentence(self) -> str:
        """For a person who has to know why."""
        if self.reason:
            return f"{self.gate} ({self.reason})"
        return f"{self.gate} ({self.left:.4g} against {self.right:.4g})"


def parse(text: str) -> Gate:
    """Read a condition. Raises UsageError with what is wrong in it."""
    if len(text) > _MOST:
        raise UsageError(f"The gate {text[:40]!r}… is longer than {_MOST} characters.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refused(text, "it is not a condition") from None
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1:
        raise _refused(text, "it does not compare two things")
    compare = _COMPARE.get(type(tree.ops[0]))
    if compare is None:
        raise _refused(text, "it must compare by >=, <=, > or <")
    gate = Gate(text.strip(), tree.left, compare, tree.comparators[0])
    for side in (gate.left, gate.right):
        _check(side, text)
    alone = [name for name in _names(gate.right) if name in MODELS]
    if any(name in MODELS for name in _names(gate.left)):
        raise _refused(text, "a model alone stands on the right")
    if alone and len(list(_names(gate.left))) != 1:
        raise _refused(text, f"it takes one figure on the left for {alone[0]!r} to be the same of")
    return gate


def check_names(gates: Sequence[Gate], known: Collection[str], tasks: Collection[str] = ()) -> None:
    """Raise UsageError for a name that the record of this run will not have, with suggestions.

    Figures of the lm-eval `tasks` are not known by name before they have run.
    """
    for gate in gates:
        for name in gate.names:
            if name in known or set(name.split(".")[:3]) & set(tasks):
                continue
            shown = name.removeprefix("sanitized.")
            which = next((one for one in SETS if one in name.split(".")), None)
            if which and not any(which in one.split(".") for one in known):
                raise UsageError(
                    f"The gate {gate.text!r} takes {shown!r}, which needs --{which}; give it."
                )
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = (
                f"did you mean {' or '.join(close)}?"
                if close
                else f"this run measures {', '.join(sorted(known)[:12])}, …"
            )
            raise UsageError(
                f"The gate {gate.text!r} takes {shown!r}, which this run does not measure; {hint}"
            )


def facts_of(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, float]:
    """All that a gate may name, from the record of a release."""
    found: dict[str, float | None] = {
        "bias.relative": manifest["bias"]["after"],
        "bias.before": manifest["bias"]["before"],
        "bias.after": manifest["bias"]["after"],
        "bias.kept": manifest["bias"]["kept"],
        "gain": manifest["gain"],
        "control_alpha": report["control_alpha"],
        "retain_recovered": (report["retain_recovered"] or {}).get("value"),
    }
    same = {"unlearned": ["control"]} if report.get("control_by") == "source" else {}
    for result in report["results"]:
        figure = f"{result['set']}.{result['metric']}"
        before = f"robustness.{result['condition']}." if result["condition"] else ""
        for model in (result["model"], *same.get(result["model"], ())):
            found[f"{before}{model}.{figure}"] = result["value"]
        if result["model"] == "sanitized":
            found[f"{before}{figure}"] = result["value"]
    return {name: float(value) for name, value in found.items() if value is not None}


def _check(side: ast.expr, text: str) -> None:
    for node in ast.walk(side):
        if isinstance(node, ast.BinOp) and type(node.op) in _COMBINE:
            continue
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            continue
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            continue
        if isinstance(node, (ast.Name, ast.Attribute, ast.operator, ast.unaryop, ast.Load)):
            continue
        raise _refused(text, "it may hold numbers, names and + - * / only")


def _names(side: ast.expr) -> Iterator[str]:
    if isinstance(side, ast.BinOp):
        yield from _names(side.left)
        yield from _names(side.right)
    elif isinstance(side, ast.UnaryOp):
        yield from _names(side.operand)
    elif isinstance(side, (ast.Name, ast.Attribute)):
        yield ast.unparse(side)


def _value(side: ast.expr, written_out: Callable[[str], str], facts: Mapping[str, float]) -> float:
    if isinstance(side, ast.BinOp):
        left, right = (_value(part, written_out, facts) for part in (side.left, side.right))
        return _COMBINE[type(side.op)](left, right)
    if isinstance(side, ast.UnaryOp):
        return -_value(side.operand, written_out, facts)
    if isinstance(side, ast.Constant):
        return float(side.value)  # type: ignore[arg-type]
    return facts[written_out(ast.unparse(side))]


def _refused(text: str, reason: str) -> UsageError:
    return UsageError(
        f"The gate {text!r} cannot be read: {reason}. One looks like "
        "'heldout.probability >= base - 0.02'."
    )
