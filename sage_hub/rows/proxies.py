"""A set of rows: what comes before, what the loss is taken over, and where they came from."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sage_hub.errors import OverlapError


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

    @property
    def hash(self) -> str:
        """The same for rows with the same words, whatever the case and the white space."""
        words = " ".join(f"{self.prompt} {self.answer}".casefold().split())
        return hashlib.sha256(words.encode()).hexdigest()[:16]


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
    def fingerprint(self) -> str:
        """A SHA-256 over the rows, whatever their order."""
        hashes = sorted(hashlib.sha256(repr(row).encode()).hexdigest() for row in self.rows)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the record says of this set."""
        return {
            "name": self.name,
            "revision": self.revision,
            "rows": len(self.rows),
            "fingerprint": self.fingerprint,
        }


def check_disjoint(sets: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Raise OverlapError if a row is in two of `sets`, naming the sets and the row.

    `sets` maps a set ("retain") to its name and the hashes of its rows.
    """
    for (first, (one, hashes)), (second, (other, others)) in itertools.combinations(
        sets.items(), 2
    ):
        where = {row: number for number, row in enumerate(hashes, 1)}
        for number, row in enumerate(others, 1):
            if row in where:
                raise OverlapError(
                    f"Row {number} of the {second} set ({other}) is also row {where[row]} of the "
                    f"{first} set ({one}); rows must be in one set only, or the metrics prove "
                    "nothing. Remove it from one of them."
                )
