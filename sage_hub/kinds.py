"""The values that a setting may take: how to tell them, in words, and as JSON Schema."""

from __future__ import annotations

import math
import operator
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from sage_hub.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """What is true of all values of a setting."""

    metavar: str  # what stands for one in the help
    wanted: str  # what they are, behind "must be"
    schema: Mapping[str, Any]  # the same as JSON Schema
    fits: Callable[[Any], bool]
    convert: Callable[[str], Any] = str  # from the text of the command line, if it is no word of it


_BOUNDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (operator.ge, "of at least"),
    "exclusiveMinimum": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
}


def number(metavar: str, *words: str, kind: type[float] = float, **bounds: float) -> Kind:
    """A number within bounds, which are called as in JSON Schema, or one of the words."""

    def fits(value: Any) -> bool:
        if isinstance(value, (str, bool)):  # Python takes a truth for a number
            return value in words
        return (
            isinstance(value, (int, kind))
            and (-math.inf < value < math.inf or (value == math.inf and "inf" in words))
            and all(_BOUNDS[name][0](value, bound) for name, bound in bounds.items())
        )

    noun, name = ("a whole number", "integer") if kind is int else ("a number", "number")
    said = " and ".join(f"{_BOUNDS[name][1]} {bound:g}" for name, bound in bounds.items())
    schema: dict[str, Any] = {"type": name, **bounds}
    if words:
        schema = {"anyOf": [schema, {"enum": list(words)}]}
    wanted = _either(f"{noun} {said}".rstrip(), *map(repr, words))
    return Kind(metavar, wanted, schema, fits, kind)


def whole(least: int, metavar: str = "N") -> Kind:
    """A whole number."""
    return number(metavar, kind=int, minimum=least)


def choice(*words: str) -> Kind:
    """One of some words."""
    return Kind("", _either(*words), {"enum": list(words)}, lambda value: value in words)


def text(metavar: str) -> Kind:
    """Any text that is not empty."""
    return Kind(metavar, "text", {"type": "string", "minLength": 1}, _is_text)


def files_of(metavar: str, names: str, pattern: str) -> Kind:
    """Files by name; `names` says which names match `pattern`."""

    def fits(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and re.fullmatch(pattern, name) and _is_text(file)
            for name, file in value.items()
        )

    schema = {
        "type": "object",
        "propertyNames": {"pattern": f"^({pattern})$"},
        "additionalProperties": {"type": "string", "minLength": 1},
    }
    return Kind(metavar, f"a mapping of {names} to files", schema, fits)


def texts(metavar: str, noun: str) -> Kind:
    """A list of texts that are not empty."""
    return Kind(
        metavar,
        f"a list of {noun}",
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_date(value: str) -> bool:
    try:
        return len(value) == 10 and bool(date.fromisoformat(value))
    except ValueError:
        return False


def _either(*words: str) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


PROXY = text("PROXY")
SWITCH = Kind("", "true or false", {"type": "boolean"}, lambda value: isinstance(value, bool))
DATE = Kind(
    "DATE",
    "a date like '2026-01-31'",
    {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
    lambda value: isinstance(value, str) and _is_date(value),
)


# The settings that a command has as options: a group, or one by name; "-" leaves one out.
OPTIONS_OF = {
    "push": "data release evaluation record method computation",
    "sanitize": "data release evaluation record method computation",
    "plan": "data method computation robustness depth reference",
    "stats": "forget energy rank moments computation",
    "audit": "data -heldout method -gain -target computation",
    "eval": "data evaluation computation",
    "data": "data unseen bystanders tokenizer chat_template template date max_length",
    "init": "merge tokenizer pickled_weights",
    "card": "card_template",
    "demo": "method computation",
}


@dataclass(frozen=True)
class Setting:
    """What is declared of a setting."""

    name: str
    default: Any  # None: it may be left away, and then is None
    group: str
    kind: Kind
    help: str
    option: str  # of the command line
    usual: str = ""  # what the default means, where its value does not say it

    @property
    def commands(self) -> list[str]:
        """The commands that have it as an option."""
        has = {command: set(words.split()) for command, words in OPTIONS_OF.items()}
        mine = {self.group, self.name}
        return [name for name in has if mine & has[name] and f"-{self.name}" not in has[name]]

    @property
    def default_words(self) -> str:
        """The default as people write it; empty where it is nothing."""
        return self.usual or ("" if self.default in (None, (), {}) else str(self.default).lower())

    def check(self, value: Any) -> None:
        """Raises UsageError for a value that it does not take."""
        if value == "":
            raise UsageError(f"{self.name} is empty; leave it away or give it a value.")
        if not (self.kind.fits(value) or (value is None and self.default is None)):
            shown = reprlib.repr(value)[:99]  # a few lines of YAML can hold terabytes
            raise UsageError(f"{self.name} must be {self.kind.wanted}, not {shown}.")
