"""Sets that a pair may go with, by its names, its cards and the files here: for people to check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sage_hub.checkpoint.pair import Pair
from sage_hub.record.metadata import read_card
from sage_hub.rows.sources import DATASET_SCHEME, FORMATS, format_of
from sage_hub.settings import SETS


class Guess(NamedTuple):
    """Settings that may fit, and why."""

    why: str
    values: dict[str, Any]


def guesses(pair: Pair, folder: Path) -> Iterator[Guess]:
    """What may be the sets of `pair`; paths are relative to `folder`."""
    here = {which: name for which in SETS if (name := _file_of(which, folder))}
    if here:
        yield Guess("Files that are here.", here)
    datasets = list(_datasets(pair))
    words = " ".join([*(side.name for side in pair.sides.values()), *datasets]).lower()
    known = [make(words) for pattern, make in BENCHMARKS.items() if re.search(pattern, words)]
    yield from known
    said = {value for guess in known for value in guess.values.values() if isinstance(value, str)}
    for dataset in datasets:
        address = f"{DATASET_SCHEME}{dataset}"
        if not any(value.startswith(address) for value in said):
            yield Guess("A data set that a card names; only you know as what.", {"retain": address})


def _file_of(which: str, folder: Path) -> str | None:
    """The first file of rows that is called like the set."""
    there = sorted(path.name for path in folder.glob(f"{which}.*") if path.is_file())
    return next((name for name in there if format_of(name) in FORMATS), None)


def _datasets(pair: Pair) -> Iterator[str]:
    """The data sets of the Hub that the cards of both sides name."""
    named: list[Any] = []
    for side in pair.sides.values():
        stated = read_card(side)[0].get("datasets") or []
        named += stated if isinstance(stated, list) else [stated]
    for name in dict.fromkeys(map(str, named)):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            yield name


def _tofu(words: str) -> Guess:
    found = re.search(r"forget(01|05|10)", words)
    share = int(found[1]) if found else 10
    tofu = f"{DATASET_SCHEME}locuslab/TOFU?config="
    values = {"retain": f"retain{100 - share}", "forget": f"forget{share:02}"}
    sets = {which: f"{tofu}{config}" for which, config in values.items()}
    sets |= {"heldout": f"{tofu}real_authors"}
    return Guess("TOFU, by the names.", {**sets, "bystanders": {"facts": f"{tofu}world_facts"}})


def _muse(words: str) -> Guess:
    about = "Books" if "books" in words else "News"
    muse = f"{DATASET_SCHEME}muse-bench/MUSE-{about}?config="
    sets = {
        "retain": f"{muse}raw&split=retain1",
        "forget": f"{muse}knowmem&split=forget_qa",
        "heldout": f"{muse}knowmem&split=retain_qa",
    }
    return Guess(f"MUSE {about}, by the names.", {**sets, "suite": "muse"})


def _wmdp(words: str) -> Guess:
    about = "cyber" if "cyber" in words else "bio"
    sets = {"forget": f"{DATASET_SCHEME}cais/wmdp?config=wmdp-{about}&split=test"}
    others = {"mmlu": f"{DATASET_SCHEME}cais/mmlu?config=all&split=validation"}
    return Guess("WMDP, by the names.", {**sets, "bystanders": others})


BENCHMARKS: dict[str, Callable[[str], Guess]] = {"tofu": _tofu, "muse": _muse, "wmdp": _wmdp}
