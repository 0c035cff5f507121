"""`sage-hub data`: how rows will be read, before anything is run on them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import NetworkError, SageHubError, UsageError
from sage_hub.rows.encoding import Encoded, Encoder, dated, encoder_of, spoken
from sage_hub.rows.likeness import alike, asked
from sage_hub.rows.proxies import Proxy, about_set, check_disjoint
from sage_hub.rows.sources import is_dataset, read_proxy
from sage_hub.settings import Settings


def look(
    files: Sequence[str], settings: Settings, first: int = 3
) -> tuple[dict[str, Any], list[SageHubError]]:
    """What is in `files` and in the sets of the settings, and what is wrong with it.

    The tokenizer of the settings makes tokens of the rows; without one only words are counted.
    `first` rows of each are shown. Returns that as JSON has it, and the errors of which each would
    stop a run.
    """
    sources = {**dict(zip(files, files, strict=True)), **settings.sets}
    if not sources:
        raise UsageError("There are no rows to look at; give a file or a set, as --retain FILE.")
    encoder = None if settings.tokenizer is None else _encoder(settings.tokenizer, settings)
    about, proxies = [], {}
    problems: list[SageHubError] = []
    for which, source in sources.items():
        if is_dataset(source) and any(isinstance(one, NetworkError) for one in problems):
            continue  # nobody would answer for it either
        try:
            with about_set(which) if which in settings.sets else nullcontext():
                proxies[which] = read_proxy(source)
                about.append({"set": which, **_describe(proxies[which], encoder, first)})
        except SageHubError as error:
            problems.append(error)
    try:  # files without a role may hold the same rows
        check_disjoint({n: p.hashes for n, p in proxies.items() if n in settings.sets})
    except SageHubError as error:
        problems.append(error)
    found = {
        "tokenizer": settings.tokenizer,
        "longest": encoder and encoder.max_length,
        "sets": about,
        "between": [pair for pair in _between(proxies) if pair["same"] or pair["alike"]],
    }
    return found, problems


def _encoder(model: str, settings: Settings) -> Encoder:
    """How a model's tokenizer makes tokens of rows; of the model no more is read."""
    checkpoint = Checkpoint(open_files(model), {})
    return encoder_of(checkpoint, dated(checkpoint, settings))


def _describe(proxy: Proxy, encoder: Encoder | None, first: int) -> dict[str, Any]:
    rows = proxy.rows
    words = [len(f"{row.prompt} {row.answer}".split()) for row in rows]
    encoded = encoder.rows(proxy) if encoder else []
    if encoder:
        shown = [spoken(row, encoder.tokenizer) for row in encoded[:first]]
    else:
        shown = [(row.prompt, row.answer) for row in rows[:first]]
    return {
        "name": proxy.name,
        "revision": proxy.revision,
        "form": rows[0].form,
        "rows": len(rows),
        "words": _lengths(words),
        "tokens": _tokens(encoded, proxy) if encoder else None,
        "repeated": _repeated(proxy),
        "first": [
            {"place": place, "prompt": prompt, "answer": answer}
            for place, (prompt, answer) in zip(proxy.places, shown, strict=False)
        ],
    }


def _tokens(encoded: Sequence[Encoded], proxy: Proxy) -> dict[str, Any]:
    places = proxy.places
    return {
        **_lengths([len(row.ids) for row in encoded]),
        "answers": sum(row.answer_tokens for row in encoded),
        "cut": [place for place, row in zip(places, encoded, strict=True) if row.truncated],
        "without_answer": [
            place for place, row in zip(places, encoded, strict=True) if not row.answer_tokens
        ],
    }


def _lengths(counts: Sequence[int]) -> dict[str, float]:
    return {
        "total": sum(counts),
        "shortest": min(counts),
        "median": median(counts),
        "longest": max(counts),
    }


def _repeated(proxy: Proxy) -> list[list[str]]:
    """Each row that is there already, and the first one that it repeats."""
    first: dict[str, str] = {}
    return [
        [place, first[row]]
        for row, place in zip(proxy.row_hashes, proxy.places, strict=True)
        if first.setdefault(row, place) != place
    ]


def _between(proxies: Mapping[str, Proxy]) -> list[dict[str, Any]]:
    """For each two sets the rows that are in both, and those of one that are like the other's."""
    found = []
    for (first, one), (second, other) in itertools.combinations(proxies.items(), 2):
        places, others = one.places, other.places
        where = dict(zip(one.row_hashes, places, strict=True))
        same = [
            [where[row], place]
            for row, place in zip(other.row_hashes, others, strict=True)
            if row in where
        ]
        near = [
            {
                "places": [places[like.first], others[like.second]],
                "share": round(like.share, 3),
                "asked": [asked(row) for row in both],
                "answers": [row.answer for row in both],
            }
            for like in alike(one.rows, other.rows)
            for both in [(one.rows[like.first], other.rows[like.second])]
        ]
        found.append({"sets": [first, second], "same": same, "alike": near})
    return found
