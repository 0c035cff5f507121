"""Sets that a pair may go with, by its names, its cards and the files here: for people to check."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sage_hub.checkpoint.pair import Pair
from sage_hub.commands.benchmarks import benchmark_settings
from sage_hub.record.metadata import read_card
from sage_hub.rows.sources import DATASET_SCHEME, FORMATS, format_of
from sage_hub.settings import SETS


class Guess(NamedTuple):
    """Settings that may fit, and why."""

    why: str
    values: dict[str, Any]


def guesses(pair: Pair, folder: Path) -> Iterator[Guess]:
    """What may be the sets of `pair`; paths are relative to `folder`."""
    yield from _files(pair, folder)
    datasets = list(_datasets(pair))
    words = " ".join([*(side.name for side in pair.sides.values()), *datasets]).lower()
    values: dict[str, Any] = {}
    if (benchmark := _benchmark_of(words)) is not None:
        values = yaml.safe_load(benchmark_settings(benchmark, pair.base.name))
        yield Guess(f"By the names, what --benchmark {benchmark} prescribes.", values)
    said = {value for value in values.values() if isinstance(value, str)}
    for dataset in datasets:
        address = f"{DATASET_SCHEME}{dataset}"
        if not any(value.startswith(address) for value in said):
            yield Guess("A data set that a card names; only you know as what.", {"retain": address})


def _files(pair: Pair, folder: Path) -> Iterator[Guess]:
    """Files that are called like the sets, here and beside what of the pair is on this machine."""
    places = {os.path.abspath(folder): "Files that are here."}
    for side in pair.sides.values():
        if (own := side.files.location.folder) is not None:
            beside = os.path.dirname(os.path.abspath(own))
            places.setdefault(beside, f"Files that lie beside {side.name}; look whether they fit.")
    missing = list(SETS)
    for place, why in places.items():
        found = {which: name for which in missing if (name := _file_of(which, Path(place)))}
        paths = {n: os.path.relpath(os.path.join(place, file), folder) for n, file in found.items()}
        paths = {which: path for which, path in paths.items() if path.isprintable()}  # in a line
        if paths:
            yield Guess(why, paths)
            missing = [which for which in missing if which not in paths]


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


def _benchmark_of(words: str) -> str | None:
    """The benchmark that names like these speak of."""
    if "tofu" in words:
        found = re.search(r"forget(01|05|10)", words)
        return f"tofu/{found[0] if found else 'forget10'}"
    for family, (usual, other) in {"muse": ("news", "books"), "wmdp": ("bio", "cyber")}.items():
        if family in words:
            return f"{family}/{other if other in words else usual}"
    return None
