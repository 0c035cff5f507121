"""The kept points, gathered and read back: sources with all that was tried on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from data import MAIN
from frontier import Point, Recovery, mean, recovery
from plan import ABOUT, STAGES

DRAWS = 1000
# What points are taken if nothing else is said.
USUAL = {"what": "core", "retain": MAIN, "others": "source", "drop": None, "weigh": None}
LEVELS = ("strong", "mild", "collapsed")
ORDER = ("NPO", "GradAscent", "GradDiff", "SimNPO", "RMU")

Row: TypeAlias = Mapping[str, Any]


def gather(cache: Path, size: str, earlier: Sequence[Row] = ()) -> dict[str, Any]:
    """All points of all seeds, and how the sources came about, those of `earlier` too."""
    points, made = [], {_which(source): source for source in earlier}
    for folder in sorted(cache.glob(f"{size}-*/")):
        for path in sorted((folder / "points").glob("*.jsonl")):
            points += [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("source-*/*/unlearning.json")):
            about = json.loads(path.read_text())
            source = {"seed": int(folder.name.rpartition("-")[2]), **about}
            made[_which(source)] = source
    sources = [made[which] for which in sorted(made)]
    return {"size": size, "points": [_shorter(point) for point in points], "sources": sources}


def _which(source: Row) -> tuple[int, str, str]:
    return source["seed"], source["method"], source["level"]


def _shorter(point: Row) -> dict[str, Any]:
    """Without its key, probabilities to four digits."""
    return {
        name: [round(x, 4) for x in value] if isinstance(value, list) else value
        for name, value in point.items()
        if name != "key"
    }


@dataclass(frozen=True)
class Source:
    """One unlearned model, with all that was tried on it."""

    name: str
    level: str
    seed: int
    rows: tuple[Row, ...]
    base: Row
    reference: Row

    def points(self, method: str, strength: Mapping[str, Any], **about: Any) -> list[Row]:
        """The points of one setting, by rising gain."""
        found = [
            row
            for row in self.rows
            if row["method"] == method
            and row["strength"] == dict(strength)
            and is_like(row, {**USUAL, **about})
        ]
        return sorted(found, key=lambda row: row["gain"])

    @cached_property
    def unlearned(self) -> Row:
        return next(row for row in self.points("scaled", {}) if row["gain"] == 1)

    @property
    def over(self) -> bool:
        """Whether it has forgotten more than the model that never saw the rows."""
        return mean(self.unlearned["forget"]) < mean(self.reference["forget"])

    def level_of(self, which: str) -> float:
        own = mean(self.unlearned["forget"])
        return max(own, mean(self.reference["forget"])) if which == "reference" else own

    def recovery(self, rows: Sequence[Row], level: str, slack: float = 0.0) -> Recovery:
        return recovery(
            [point(row) for row in rows],
            point(self.unlearned),
            point(self.base),
            level=level,
            reference=point(self.reference),
            slack=slack,
            draws=DRAWS,
            seed=self.seed,
        )


def read_sources(results: Mapping[str, Any]) -> list[Source]:
    """The sources whose own point is there."""
    points = results["points"]
    plain = {
        (row["source"], row["seed"]): row
        for row in points
        if row["source"] in ("base", "reference") and row["what"] == "core"
    }
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in points:
        if row["source"] not in ("base", "reference"):
            groups.setdefault((row["source"], row["level"], row["seed"]), []).append(row)
    found = [
        Source(name, level, seed, tuple(rows), plain["base", seed], plain["reference", seed])
        for (name, level, seed), rows in groups.items()
    ]
    found.sort(key=lambda s: (LEVELS.index(s.level), ORDER.index(s.name), s.seed))
    return found


def finished(rows: Sequence[Row], level: float) -> bool:
    """Whether `rows`, of one setting by rising gain, reach the level or the plan's largest gain."""
    if min(mean(row["forget"]) for row in rows) <= level:
        return True
    about = {name: rows[0][name] for name in ABOUT if name in rows[0]}
    configs = (config for stage in STAGES.values() for config in stage)
    planned = [config.gains[-1] for config in configs if config.about == about]
    return bool(rows[-1]["gain"] >= max(planned, default=0))


def is_like(row: Row, about: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in about.items())


def point(row: Row) -> Point:
    return row["forget"], row["heldout"]
