"""A set of rows: what comes before, what the loss is taken over, and where they came from."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sage_hub.errors import OverlapError, about
from sage_hub.settings import GUARD, SETTINGS


@dataclass(frozen=True)
class Row:
    """One example: what comes before, and what the loss is taken over.

    `turns` holds chat messages (role, content) for question and messages rows, () otherwise;
    `prompt` is the same as plain text, with the separator at its end. The other fields are the
    same row told otherwise, where the data has that, and serve to evaluate only.
    """

    prompt: str
    answer: str
    turns: tuple[tuple[str, str], ...] = ()
    paraphrased: Row | None = None  # the same question, the answer in other words
    perturbed: tuple[Row, ...] = ()  # the same question, wrong answers
    asked_otherwise: Row | None = None  # the question in other words, the same answer
    choices: tuple[Row, ...] = ()  # of a multiple-choice row: all answers, the right one among them
    # JSON of its messages and tools, where these say more than `turns` can; no part of what most
    # rows are, so neither of their representation.
    chat: str = field(default="", repr=False)
    # Turns that are shown before all of it, as examples; other rows, so no part of what it is.
    shots: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    entity: str = field(default="", repr=False)  # the part of the answer that says what had to go
    place: str = field(
        default="", repr=False, compare=False
    )  # "row 4", or "row 4 (line 6)" of its file
    form: str = field(default="", repr=False, compare=False)  # the columns that it was read from

    @property
    def hash(self) -> str:
        """The same for rows with the same words, whatever the case and the white space."""
        words = " ".join(f"{self.prompt} {self.answer} {self.chat}".casefold().split())
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    @property
    def tellings(self) -> Iterator[Row]:
        """The row itself, and the same told otherwise."""
        yield self
        yield from (row for row in (self.paraphrased, self.asked_otherwise) if row is not None)
        yield from self.perturbed
        yield from self.choices


class Hashes(NamedTuple):
    """The rows of a set by their hashes, to compare it with others."""

    name: str
    hashes: Sequence[str]
    places: Sequence[str] = ()  # of the rows, where they are known

    def place(self, number: int) -> str:
        """Where row `number`, from 0, is."""
        return self.places[number] if self.places else f"row {number + 1}"


@dataclass(frozen=True)
class Proxy:
    """A set of rows and where they came from; `name` is fit to publish (no local path)."""

    name: str
    rows: tuple[Row, ...]
    revision: str | None = None  # the dataset's commit SHA, if it is on the Hub
    builtin: bool = False

    @property
    def row_hashes(self) -> list[str]:
        """The hash of each row, in order."""
        return [row.hash for row in self.rows]

    @property
    def places(self) -> list[str]:
        """Where each row is: its number from 1, and its line where that is another."""
        return [row.place or f"row {number}" for number, row in enumerate(self.rows, 1)]

    @property
    def hashes(self) -> Hashes:
        """Its rows, to compare them with those of other sets."""
        return Hashes(self.name, self.row_hashes, self.places)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over the rows, whatever their order."""
        hashes = sorted(
            hashlib.sha256(f"{row!r}{row.chat}{row.shots or ''}{row.entity}".encode()).hexdigest()
            for row in self.rows
        )
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the record says of this set."""
        return {
            "name": self.name,
            "revision": self.revision,
            "rows": len(self.rows),
            "fingerprint": self.fingerprint,
        }


def about_set(which: str) -> AbstractContextManager[None]:
    """What is raised in here is about the setting that names the set `which`."""
    if which == GUARD:  # which nobody names
        return nullcontext()
    name = which if which in SETTINGS else "bystanders"
    return about(name, SETTINGS[name].option)


def check_disjoint(sets: Mapping[str, Hashes]) -> None:
    """Raise OverlapError if a row is in two of `sets` ("retain", …), naming both and the row."""
    for (first, one), (second, other) in itertools.combinations(sets.items(), 2):
        where = {row: number for number, row in enumerate(one.hashes)}
        for number, row in enumerate(other.hashes):
            if row in where:
                raise OverlapError(
                    f"{other.place(number).capitalize()} of the {second} set ({other.name}) is "
                    f"also {one.place(where[row])} of the {first} set ({one.name}); rows must be "
                    "in one set only, or the metrics prove nothing. Remove it from one of them."
                )
