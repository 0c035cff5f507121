"""The sets of rows as `sage-hub data` shows them to people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sage_hub.cli.terminal import Part
from sage_hub.record.tables import Cell, Table

NAMED = 3  # rows that a line names
SHOWN = 300  # characters of a prompt, and of an answer


def sets_text(found: Mapping[str, Any]) -> Iterator[Part]:
    """What was found, a table for each set, and then what is odd between them."""
    for about in found["sets"]:
        yield Table((), [*_lines(about, found["longest"])], gap=1)
        yield ""
    if found["tokenizer"] is None:
        yield "Rows as they are without a model; --tokenizer MODEL shows what a model sees of them."
    for pair in found["between"]:
        yield from _between(pair)
    for problem in found["problems"]:
        yield Table((), [[Cell("problem", "failed"), problem["message"]]], gap=1)


def _lines(about: Mapping[str, Any], longest: int | None) -> Iterator[Sequence[str | Cell]]:
    own = "" if about["set"] == about["name"] else about["set"]
    at = f"@{about['revision'][:12]}" if about["revision"] else ""
    yield [own or "file", f"{about['name']}{at}"]
    yield ["  form", about["form"]]
    yield ["  rows", f"{about['rows']}"]
    yield ["  words", _length(about["words"])]
    if tokens := about["tokens"]:
        yield ["  tokens", f"{_length(tokens)}; {tokens['answers']} are of answers"]
        if cut := tokens["cut"]:
            lost = (
                f"; {len(gone)} with their whole answer"
                if (gone := tokens["without_answer"])
                else ""
            )
            yield [
                Cell("  cut", "worse"),
                f"{_some(cut)}, at {longest} tokens (--max-length){lost}",
            ]
    if repeated := about["repeated"]:
        yield [Cell("  twice", "worse"), _some([f"{row} is {first}" for row, first in repeated])]
    for row in about["first"]:
        yield [f"  {row['place']}", f"{_short(row['prompt'])} ⇒ {_short(row['answer'])}"]


def _between(pair: Mapping[str, Any]) -> Iterator[Part]:
    first, second = pair["sets"]
    if same := pair["same"]:
        named = _some([f"{other} is {one}" for one, other in same])
        yield f"In {first} and in {second}, {len(same)} rows: {named}."
    if near := sorted(pair["alike"], key=lambda like: -like["share"]):
        what = "1 row" if len(near) == 1 else f"{len(near)} rows"
        yield (
            f"warning: {what} of {second} may ask what {first} asks, in other words, by the words "
            "and pairs of words that they share; the likest, one below the other:"
        )
        yield Table((), [line for like in near[:NAMED] for line in _alike(pair["sets"], like)])


def _alike(sets: Sequence[str], like: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Two rows, the end of each question above that of the other."""
    both = zip(sets, like["places"], like["asked"], like["answers"], strict=True)
    for number, (which, place, asked, answer) in enumerate(both):
        share = "" if number else f"  {100 * like['share']:.0f} %"
        told = f"{_end(asked.strip())} ⇒ " if asked.strip() else ""
        yield [share, f"{which}, {place}", f"{told}{_short(answer.strip())}"]


def _length(counts: Mapping[str, float]) -> str:
    return (
        f"{counts['total']} in all, {counts['shortest']} to {counts['longest']} a row, "
        f"{counts['median']:g} in the middle"
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _end(text: str) -> str:
    """The end of a long prompt, where the question is."""
    return text if len(text) <= SHOWN else f"… {text[-SHOWN:]}"


def _short(text: str) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
