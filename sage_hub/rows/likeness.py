"""Rows of two sets that say nearly the same, found by the words and pairs of words they share."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from sage_hub.rows.proxies import Row

# Of TOFU's forget10, put in quite other words, one row in eight is found, and of the 3,600 rows of
# retain90, about other people, 30 are taken for one of forget10: something to look at, no more.
ALIKE = 0.3
COMMON = 0.05  # of all rows: what more of them say makes no two of them alike


class Likeness(NamedTuple):
    """Two rows by their places, from 0, and how alike they are, up to 1."""

    first: int
    second: int
    share: float


def alike(one: Sequence[Row], other: Sequence[Row]) -> list[Likeness]:
    """The rows of `other` that are like one of `one`, each with the likest, in order.

    That is the cosine of their words and pairs of words, rare ones counting for more. Rows of the
    same words are not among them: they are the same row.
    """
    grams = [[_grams(row) for row in rows] for rows in (one, other)]
    counts = Counter(gram for rows in grams for own in rows for gram in own)
    total = len(one) + len(other)
    weights = {gram: math.log(1 + total / count) for gram, count in counts.items()}
    sizes = [[math.fsum(weights[gram] for gram in own) for own in rows] for rows in grams]
    telling = max(20, COMMON * total)
    holders: dict[str, list[int]] = defaultdict(list)
    for place, own in enumerate(grams[0]):
        for gram in own:
            if counts[gram] <= telling:
                holders[gram].append(place)
    same = {row.hash for row in one}
    found = []
    for place, own in enumerate(grams[1]):
        shared: dict[int, float] = defaultdict(float)
        for gram in sorted(own):  # so that a sum is the same in every run
            for holder in holders.get(gram, ()):
                shared[holder] += weights[gram]
        shares = {
            holder: weight / math.sqrt(sizes[0][holder] * sizes[1][place])
            for holder, weight in shared.items()
        }
        likest = max(shares, key=lambda holder: (shares[holder], -holder), default=None)
        if likest is not None and shares[likest] >= ALIKE and other[place].hash not in same:
            found.append(Likeness(likest, place, shares[likest]))
    return found


def asked(row: Row) -> str:
    """What comes before the answer, without the words that the plain form puts around it."""
    return " ".join(content for _, content in row.turns) or row.prompt


def _grams(row: Row) -> set[str]:
    """Its words and pairs of words, whatever the case."""
    words = re.findall(r"\w+", f"{asked(row)} {row.answer}".casefold())
    return {*words, *(" ".join(pair) for pair in pairwise(words))}
