"""The tables of docs/results.md, each from all points."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from data import BYSTANDERS
from frontier import Recovery, gain_at, mean
from points import DRAWS, USUAL, Row, Source, finished, is_like, point
from scipy.stats import ks_2samp

from sage_hub.evaluation.comparison import UTILITY

NAMES = {
    "scaled": "αΔ (WiSE-FT)",
    "sage": "SAGE",
    "hard": "hard projection (GPM)",
    "forget_anchored": "SAGE, forget-anchored",
    "sage_to_bias": "SAGE, λ per weight",
    "ridge": "ridge (RAIN)",
    "sap": "SAP complement",
    "null_space": "null space (AlphaEdit)",
    "per_parameter": "per-parameter (PerTA)",
    "regmean": "RegMean",
    "lines": "LiNeS",
    "trimmed": "magnitude trim (TIES)",
    "dare": "DARE",
    "low_rank": "truncated SVD",
}
SYMBOLS = {
    "strength": "λ",
    "energy": "ρ",
    "anchor": "μ",
    "kept": "bias kept",
    "threshold": "threshold",
    "alpha": "α",
    "weight": "w",
    "shallow": "first layer",
    "keep": "kept",
    "drop": "dropped",
    "rank": "rank",
}
TEN, SHARP = {"strength": 10, "energy": 0.9}, {"strength": 100, "energy": 0.99}
SHARES = {"weigh": 1.0}
BEST = (SHARP, 1.0)  # λ and ρ, and the power of the shares
PROXIES: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = (
    ("100 rows, λ=10 ρ=0.9", TEN, {}),
    ("25 of them", TEN, {"retain": "quarter"}),
    ("50 of them", TEN, {"retain": "half"}),
    ("all 140 of the proxy authors", TEN, {"retain": "most"}),
    ("questions about the world", TEN, {"retain": "facts"}),
    ("general-purpose texts", TEN, {"retain": "general"}),
    ("100 rows, λ=10 ρ=0.9, shares", TEN, SHARES),
    ("general-purpose texts", TEN, {"retain": "general", **SHARES}),
    ("100 rows, λ=100 ρ=0.99, shares", SHARP, SHARES),
    ("25 of them", SHARP, {"retain": "quarter", **SHARES}),
    ("general-purpose texts", SHARP, {"retain": "general", **SHARES}),
    ("100 rows, sketched, λ=10 ρ=0.9", TEN, {"retain": "sketched"}),
    ("100 rows, sketched, λ=100 ρ=0.99, shares", SHARP, {"retain": "sketched", **SHARES}),
)
PARTS: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = (
    ("λ=10 ρ=0.9, one gain", TEN, {}),
    ("the other parameters as in the base", TEN, {"others": "base"}),
    ("the other parameters filtered", TEN, {"others": "filtered"}),
    ("the worst tenth of the weights as in the base", TEN, {"drop": 0.1}),
    ("the worst three tenths", TEN, {"drop": 0.3}),
    ("shares to the power of ½", TEN, {"weigh": 0.5}),
    ("shares", TEN, SHARES),
    ("shares to the power of 2", TEN, {"weigh": 2.0}),
    ("λ=1 ρ=0.9, shares", {"strength": 1, "energy": 0.9}, SHARES),
    ("λ=10 ρ=0.99, shares", {"strength": 10, "energy": 0.99}, SHARES),
    ("λ=100 ρ=0.95, shares", {"strength": 100, "energy": 0.95}, SHARES),
    ("λ=100 ρ=0.99, shares", SHARP, SHARES),
    ("λ=1000 ρ=0.99, shares", {"strength": 1000, "energy": 0.99}, SHARES),
)


# Settings: a label, and the points of it that a source has


@dataclass(frozen=True)
class Setting:
    """One line of a table: how to repair any source."""

    label: str
    family: str
    # "none": its own strength alone; at whatever gain: one for "all" weights, or "shares" of it
    gain: str
    rows: Callable[[Source], list[Row]]


def settings(sources: Sequence[Source]) -> list[Setting]:
    """Every setting that any source has points of."""
    known: dict[str, tuple[str, dict[str, Any], float | None]] = {}
    for row in (row for source in sources for row in source.rows):
        weigh = row.get("weigh")
        if is_like(row, {**USUAL, "weigh": weigh}) and weigh in (None, 1.0):
            name = f"{row['method']} {json.dumps(row['strength'], sort_keys=True)} {weigh}"
            known.setdefault(name, (row["method"], row["strength"], weigh))
    found = []
    for family in dict.fromkeys(method for method, _, _ in known.values()):
        own = [(strength, weigh) for method, strength, weigh in known.values() if method == family]
        if family == "scaled":
            found.append(Setting(NAMES[family], family, "none", lambda s: s.points("scaled", {})))
            continue

        def plain(s: Source, family: str = family, own: Any = tuple(own)) -> list[Row]:
            rows = [
                row
                for strength, weigh in own
                if weigh is None
                for row in s.points(family, strength)
                if row["gain"] == 1
            ]
            return [s.unlearned, *rows] if rows else []

        found.append(Setting(f"{NAMES[family]}, any strength", family, "none", plain))
        found += [_with_gain(family, strength, weigh) for strength, weigh in own]
    return found


def _with_gain(method: str, strength: Mapping[str, Any], weigh: float | None) -> Setting:
    label = f"{NAMES[method]} {describe(strength)}{', shares' if weigh else ''}"
    return Setting(
        label,
        method,
        "shares" if weigh else "all",
        lambda s: s.points(method, strength, weigh=weigh),
    )


def describe(strength: Mapping[str, Any]) -> str:
    """The method's own strength in symbols."""
    named = ((symbol, strength.get(name)) for name, symbol in SYMBOLS.items())
    return " ".join(f"{symbol}={value:g}" for symbol, value in named if value is not None)


# Tables


def table_sources(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """What there is to repair."""
    steps = {(s["method"], s["level"], s["seed"]): s for s in results["sources"]}
    lines = []
    for s in sources:
        about = steps[s.name, s.level, s.seed]
        lines.append(
            [
                s.name,
                s.level,
                str(s.seed),
                str(about["steps"]),
                *(_three(mean(s.unlearned[which])) for which in ("forget", "heldout")),
                *(_three(mean(s.reference[which])) for which in ("forget", "heldout")),
                *(_three(mean(s.base[which])) for which in ("forget", "heldout")),
            ]
        )
    head = ["method", "level", "seed", "steps", "forget", "held-out"]
    head += ["retain-only: forget", "held-out", "base: forget", "held-out"]
    return _table(head, lines)


def _recovered(level: str, slack: float, limit: str) -> Callable[..., str]:
    def table(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
        some = [s for s in sources if s.level == limit]
        columns = list(dict.fromkeys((s.name, s.level) for s in some))
        lines = []
        for setting in settings(some):
            if level == "source" and setting.gain == "none":
                continue  # without a gain nothing but the source itself forgets as much
            cells, seeds = [], []
            for column in columns:
                own = [s for s in some if (s.name, s.level) == column]
                found = [
                    s.recovery(rows, level, slack)
                    for s in own
                    if (rows := setting.rows(s))
                    and (setting.gain == "none" or finished(rows, s.level_of(level) + slack))
                ]
                cells.append(over_seeds(found))
                seeds.append(len(found))
            whole = [cell for cell in cells if cell is not None]
            if whole:
                reached = [cell for cell in whole if cell.value is not None]
                average = over_methods(reached) if len(reached) == len(columns) else None
                lines.append((setting, cells, average, _range([n for n in seeds if n])))
        lines = _best_of_each(lines)
        return _table(
            [
                "repair",
                "seeds",
                *(name for name, _ in columns),
                "average",
            ],
            [
                [s.label, seeds, *(_interval(c) for c in cells), _interval(average)]
                for s, cells, average, seeds in lines
            ],
        )

    return table


def _best_of_each(lines: list[Any], most: int = 2) -> list[Any]:
    """The best settings of each family by their average, gain-free ones first."""
    kept = []
    families: dict[tuple[str, str], list[Any]] = {}
    for line in lines:
        families.setdefault((line[0].gain, line[0].family), []).append(line)
    for (_gain, family), own in families.items():
        own.sort(key=lambda line: -_value(line[2]))
        kept += own[: len(own) if family in ("sage", "hard") else most]
    kept.sort(key=lambda line: (line[0].gain != "none", -_value(line[2])))
    return kept


def over_seeds(found: Sequence[Recovery]) -> Recovery | None:
    """The mean over seeds; its draws draw the seeds too. Not reached by any has no value.

    Not reached by some counts as nothing for these: that is the source itself.
    """
    if not found or all(one.value is None for one in found):
        return Recovery(None, np.empty(0)) if found else None
    draws = np.array([one.draws if len(one.draws) else np.zeros(DRAWS) for one in found])
    seeds = np.random.default_rng(0).integers(len(found), size=(len(found), DRAWS))
    drawn = np.take_along_axis(draws, seeds, axis=0).mean(axis=0)
    return Recovery(float(np.mean([one.value or 0.0 for one in found])), drawn)


def over_methods(found: Sequence[Recovery]) -> Recovery:
    """The mean over unlearning methods, all of which are reached."""
    value = float(np.mean([one.value for one in found if one.value is not None]))
    return Recovery(value, np.mean([one.draws for one in found], axis=0))


def table_compared(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """The best form of SAGE less each other setting, both with a gain, over the same drawn rows."""
    sources = [s for s in sources if s.level == "strong"]
    columns = list(dict.fromkeys((s.name, s.level) for s in sources))
    best = _with_gain("sage", *BEST)
    lines = []
    for setting in settings(sources):
        cells, seeds = [], []
        for column in columns:
            found = []
            for s in sources:
                rows, ours = setting.rows(s), best.rows(s)
                if (s.name, s.level) != column or not rows or not ours or rows == ours:
                    continue
                if setting.gain != "none" and not finished(rows, s.level_of("reference")):
                    continue
                one, other = s.recovery(ours, "reference"), s.recovery(rows, "reference")
                if one.value is not None and other.value is not None:
                    found.append(Recovery(one.value - other.value, one.draws - other.draws))
            cells.append(_interval(over_seeds(found)))
            seeds.append(len(found))
        if setting.gain != "none" and any(cells):
            lines.append([setting.label, _range([n for n in seeds if n]), *cells])
    return _table([f"{best.label} less", "seeds", *(name for name, _ in columns)], lines)


def table_gain(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """The closed-form gain against the one that meets the level."""
    lines = []
    for s in sources:
        for method, strength in (
            ("sage", {"strength": 1, "energy": 0.9}),
            ("sage", {"strength": 10, "energy": 0.9}),
            ("sage", {"strength": 100, "energy": 0.99}),
            ("hard", {"energy": 0.9}),
            ("null_space", {"threshold": 1.0}),
            ("sap", {"alpha": 1e3}),
        ):
            rows = s.points(method, strength)
            if not rows:
                continue
            kept = rows[0]["kept"]
            closed = [row for row in rows if row["gain"] == kept["match"]]
            wanted = [
                gain_at([r["gain"] for r in rows], [point(r) for r in rows], s.level_of(which))
                for which in ("source", "reference")
            ]
            lines.append(
                [
                    f"{s.name} {s.level}, seed {s.seed}",
                    f"{NAMES[method]} {describe(strength)}",
                    _share(kept["retain"]),
                    _share(kept["forget"]),
                    *(f"{kept[n]:.2f}" for n in ("match", "match_without_sinks", "match_median")),
                    *("" if g is None else f"{g:.2f}" for g in wanted),
                    *(
                        _three(mean(closed[0][which])) if closed else ""
                        for which in ("forget", "heldout")
                    ),
                ]
            )
    head = ["source", "repair", "bias kept", "carrier kept", "γ match", "without sinks", "median"]
    head += ["γ at source's level", "γ at fair level", "at match: forget", "held-out"]
    return _table(head, lines)


def table_robust(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """Side effects, rounding, relearning."""
    lines = []
    for s in sources:
        groups: dict[str, dict[str, Row]] = {}
        for row in s.rows:
            if row["what"] != "core":
                key = json.dumps(
                    [row[w] for w in ("method", "strength", "gain")] + [row.get("weigh")]
                )
                groups.setdefault(key, {})[row["what"]] = row
        for own in groups.values():
            row = own.get("bystanders")
            if row is None or ("int8" not in own and row["gain"] != 0):
                continue  # not all of it was measured
            label = _named(row)
            if row["method"] == "scaled":
                named = {0: "the base", 1: "the source"}
                label = named.get(row["gain"], f"αΔ, α={row['gain']:.2f}")
            lines.append(
                [
                    s.name,
                    label,
                    *(
                        f"{mean(own[w]['forget']):.3f} / {mean(own[w]['heldout']):.3f}"
                        if w in own
                        else ""
                        for w in ("matched", "int8", "int4")
                    ),
                    _three(mean(own["relearned"]["forget"])) if "relearned" in own else "",
                    *(_three(mean(row[w])) for w in ("world_facts", "real_authors", "texts")),
                ]
            )
    head = ["source", "repair", "bf16", "int8", "int4", "relearned", "world facts", "real authors"]
    return _table([*head, "text loss"], lines)


def _variants(
    lines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
) -> Callable[..., str]:
    """A table of forms of SAGE on the sources of the first seed that have more than the usual."""

    def table(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
        some = [
            s
            for s in _first_seed(sources)
            if any(s.points("sage", strength, **about) for _, strength, about in lines[1:])
        ]
        return _table(
            ["", *(head for s in some for head in (s.name, "γ=1: forget / held-out"))],
            [
                [
                    label,
                    *(
                        cell
                        for s in some
                        for cell in _recovered_and_plain(s, s.points("sage", strength, **about))
                    ),
                ]
                for label, strength, about in lines
            ],
        )

    return table


def _recovered_and_plain(source: Source, rows: Sequence[Row]) -> tuple[str, str]:
    plain = next((row for row in rows if row["gain"] == 1), None)
    return (
        _interval(source.recovery(rows, "reference"))
        if rows and finished(rows, source.level_of("reference"))
        else "",
        f"{mean(plain['forget']):.3f} / {mean(plain['heldout']):.3f}" if plain else "",
    )


def _first_seed(sources: Sequence[Source]) -> list[Source]:
    return [s for s in sources if s.level == "strong" and s.seed == min(t.seed for t in sources)]


def table_rounding(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """A repair in float32, rounded, and rounded with compensation."""
    lines = []
    for s in sources:
        for row in s.rows:
            if row["what"] in ("float32", "rounded", "compensated"):
                figures = [f"{mean(row[which]):.4f}" for which in ("forget", "heldout")]
                about = [s.name, describe(row["strength"]), f"{row['gain']:.3g}", row["what"]]
                lines.append([*about, f"{100 * row['bias']:.2f} %", *figures])
    return _table(["source", "SAGE", "γ", "stored", "bias", "forget", "held-out"], lines)


def table_relearning(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """What comes back by relearning, and what might foretell it."""
    lines = []
    for s in sources:
        for row in (row for row in s.rows if row["what"] == "path"):
            about = [s.name, "the source" if row["method"] == "scaled" else _repair(row)]
            figures = [mean(row[which]) for which in ("forget", "heldout", "relearned")]
            ways = [" ".join(_losses(row, which)) for which in ("forget", "heldout")]
            gain, distance = f"{row['gain']:.3g}", f"{row['distance']:.3g}"
            lines.append([*about, gain, *map(_three, figures), distance, *ways])
    head = ["source", "repair", "γ", "forget", "held-out", "relearned", "distance"]
    return _table([*head, "forget loss on the way", "held-out loss on the way"], lines)


def _losses(row: Row, which: str) -> Iterator[str]:
    for name, value in row.items():
        if name.startswith(f"{which} at "):
            yield f"{value:.2f}"


def table_tofu(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """Forget quality, and model utility with what it is made of."""
    plain = {
        (row["source"], row["seed"]): row
        for row in results["points"]
        if row["what"] == "tofu" and row["source"] in ("base", "reference")
    }
    lines = []
    for seed in dict.fromkeys(s.seed for s in sources):
        own = [s for s in sources if s.seed == seed]
        trained = plain.get(("reference", seed))
        if trained is None:
            continue
        lines.append(["", "the base", *_tofu(plain["base", seed], trained)])
        lines.append(["", "retain-only", *_tofu(trained, trained)])
        for s in own:
            rows = [row for row in s.rows if row["what"] == "tofu"]
            for row in sorted(rows, key=lambda row: row["method"] != "scaled"):
                name = "the source" if row["method"] == "scaled" else _named(row)
                lines.append([s.name, name, *_tofu(row, trained)])
    head = ["source", "repair", "forget quality", "D", "forget: probability", "ROUGE-L"]
    head += ["model utility", "held-out: probability, ROUGE-L, truth ratio"]
    return _table([*head, "real authors", "world facts"], lines)


def _tofu(row: Row, trained: Row) -> list[str]:
    """The cells of a row; forget quality is as TOFU has it, against the `trained` model."""
    test = ks_2samp(row["ratios"], trained["ratios"])
    found = {name: _three(value) for name, value in row["figures"].items()}
    parts = [
        ", ".join(found.get(f"{which}.{metric}", "–") for metric in UTILITY)
        for which in ("heldout", *BYSTANDERS[::-1])
    ]
    forget = (found[f"forget.{metric}"] for metric in UTILITY[:2])
    own = f"{test.pvalue:.2g}" if row is not trained else "", f"{test.statistic:.2f}"
    return [*own, *forget, found.get("all.model_utility", "–"), *parts]


def _named(row: Row) -> str:
    """The repair of a row, with its gain."""
    return f"{_repair(row)}, γ={row['gain']:.3g}"


def _repair(row: Row) -> str:
    """The repair of a row, whatever its gain."""
    shares = ", shares" if row.get("weigh") else ""
    return f"{NAMES[row['method']]} {describe(row['strength'])}".strip() + shares


def table_seconds(results: Mapping[str, Any], sources: Sequence[Source]) -> str:
    """What it took at least to make the updates, by the sources that change every weight."""
    found: dict[str, list[float]] = {}
    for s in sources:
        for row in s.rows if s.name != "RMU" else ():
            if row["what"] == "core" and row["seconds"][0] > 0:  # at the first gain of a sweep
                found.setdefault(_repair(row), []).append(row["seconds"][0])
    least = {label: min(seconds) for label, seconds in found.items() if len(seconds) >= 3}
    lines = [
        [label, f"{least[label]:.0f}", str(len(found[label]))]
        for label in sorted(least, key=lambda label: least[label])
    ]
    return _table(["repair", "s", "runs"], lines)


TABLES: dict[str, Callable[..., str]] = {
    "sources": table_sources,
    "recovered": _recovered("reference", 0.0, "strong"),
    "recovered-mild": _recovered("reference", 0.0, "mild"),
    "recovered-collapsed": _recovered("reference", 0.0, "collapsed"),
    "recovered-source": _recovered("source", 0.0, "strong"),
    "recovered-slack": _recovered("reference", 0.05, "strong"),
    "compared": table_compared,
    "gain": table_gain,
    "robustness": table_robust,
    "proxies": _variants(PROXIES),
    "parts": _variants(PARTS),
    "relearning": table_relearning,
    "rounding": table_rounding,
    "tofu": table_tofu,
    "seconds": table_seconds,
}


# Words


def _value(found: Recovery | None) -> float:
    return -1e9 if found is None or found.value is None else found.value


def _three(value: float) -> str:
    return f"{value:.3f}"


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least}" if least == most else f"{least} to {most}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(found: Recovery | None) -> str:
    if found is None:
        return ""
    if found.value is None:
        return "–"
    low, high = found.low or 0.0, found.high or 0.0
    return f"{100 * found.value:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
