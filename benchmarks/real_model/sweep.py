"""Repairs one source in memory at every point of a plan, and evaluates it; each point is kept.

A point is a line of a JSON Lines file per source, named by all that it depends on, so that a sweep
goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import methods
import torch
from build import Workshop
from data import MAIN, tokens
from evaluate import probabilities
from frontier import mean
from plan import ABOUT, SCALED, Config
from safetensors import safe_open
from torch import Tensor

from sage_hub.calibration.statistics import Statistics, open_statistics
from sage_hub.method.sage import matching_gain
from sage_hub.method.spectra import Spectrum

VERSION = 1
# All that a point is named by.
DEPENDS = {"seed", "size", "source", "level", "made", "what", *ABOUT, "gain", "version"}
BIAS_ENERGY = 0.99  # directions beyond it count as their mean in a bias, as in the product


class Ledger:
    """The points of one source that were evaluated, by key, in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = {row["key"]: row for row in map(json.loads, lines)}

    def get(self, about: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.rows.get(_key(about))

    def put(self, about: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        row = {"key": _key(about), **about, **found}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["key"]] = row
        return row


def _key(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def restore(results: Mapping[str, Any], cache: Path) -> None:
    """Put the points of `results` into the ledgers of `cache` that are not there.

    So a run on another machine goes on from what is published, to its four digits.
    """
    found: dict[Path, list[Mapping[str, Any]]] = {}
    for row in results["points"]:
        name = "-".join([row["source"], *([row["level"]] if "level" in row else [])])
        folder = cache / f"{results['size']}-{row['seed']}" / "points"
        found.setdefault(folder / f"{name}.jsonl", []).append(row)
    for path, rows in found.items():
        if not path.exists():
            ledger = Ledger(path)
            for row in rows:
                about = {name: row[name] for name in DEPENDS if name in row}
                ledger.put(about, {name: row[name] for name in row.keys() - DEPENDS})


class Bench:
    """One source of one seed, ready to be repaired and evaluated."""

    def __init__(self, shop: Workshop, method: str, level: str) -> None:
        self.shop, self.method, self.level = shop, method, level
        self.folder = shop.source(method, level)
        path = shop.base.parent / "points" / f"{method}-{level}.jsonl"
        self.ledger = Ledger(path)
        self.open = ExitStack()
        self.files: dict[str, Statistics] = {}
        self.biases: dict[str, tuple[float, float]] = {}  # of Δ: forget, retain

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.close()

    def statistics(self, proxy: str) -> Statistics:
        """The open file of a retain proxy."""
        if proxy not in self.files:
            path = self.shop.statistics(proxy)
            self.files[proxy] = self.open.enter_context(open_statistics(path))
        return self.files[proxy]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        model = self.shop.load(self.shop.base)
        return {name: p.detach() for name, p in model.named_parameters()}

    @cached_property
    def model(self) -> Any:
        """The model that is repaired in place."""
        return self.shop.load(self.folder)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @cached_property
    def delta(self) -> dict[str, Tensor]:
        """Δ of each parameter, in float32."""
        return {
            name: p.detach().float() - self.base[name].float() for name, p in self.weights.items()
        }

    @cached_property
    def information(self) -> Any:
        return self.open.enter_context(safe_open(self.shop.fisher(), framework="pt"))

    @cached_property
    def all_linear(self) -> list[str]:
        """The weights of all linear maps but the head."""
        statistics = self.statistics(MAIN)
        sites = statistics.site_of.items()
        return [f"{module}.weight" for module, site in sites if not site.expert]

    @cached_property
    def linear(self) -> dict[str, Any]:
        """Parameter -> site, of the linear maps that the source has changed."""
        statistics = self.statistics(MAIN)
        return {
            name: statistics.site_of[name.removesuffix(".weight")]
            for name in self.all_linear
            if self.delta[name].any()
        }

    @cached_property
    def sets(self) -> dict[str, Any]:
        rows, tokenizer = self.shop.rows, self.shop.tokenizer
        most = self.shop.size.evaluated
        return {
            "forget": tokens(rows.forget, tokenizer)[:most],
            "heldout": tokens(rows.heldout, tokenizer)[:most],
        }

    # Updates

    def site(self, name: str, retain: str) -> methods.Site:
        own, statistics = self.linear[name], self.statistics(retain)
        forget = statistics if statistics.has("forget") else self.statistics(MAIN)
        layer = int(name.split(".layers.")[1].split(".")[0])
        return methods.Site(
            retain=statistics.spectrum("retain", own),
            forget=forget.spectrum("forget", own),
            depth=layer / (self.model.config.num_hidden_layers - 1),
            name=name,
            fisher=lambda: self.fisher(name),
        )

    def fisher(self, name: str) -> tuple[Tensor, Tensor]:
        """The Fisher information of a weight's entries, on forget and on retain rows."""
        forget, retain = (f"{name}.{what}" for what in ("forget", "retain"))
        return self.information.get_tensor(forget), self.information.get_tensor(retain)

    def update(self, config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """D of each linear map, and what it keeps of Δ: norm, biases and the gains by them."""
        repair = methods.METHODS[config.method]
        found: dict[str, Tensor] = {}
        table = []
        for name in self.linear:
            site, delta = self.site(name, config.retain), self.delta[name]
            found[name] = repair(delta, site, **config.strength)
            # Shares are by the proxy that the filter is from; what is reported is by the main one,
            # so that it compares.
            main = self.site(name, MAIN)
            forget, retain = truncated(main.forget), truncated(main.retain)
            biases = self._source_bias(name, forget, retain)
            table.append(
                {
                    "norm": float(found[name].square().sum()),
                    "source_norm": float(delta.square().sum()),
                    "forget": methods.bias(found[name], forget),
                    "retain": methods.bias(found[name], retain),
                    "source_forget": biases[0],
                    "source_retain": biases[1],
                    "top": float(forget.values[0]) / forget.trace,
                    "worth": _worth(found[name], site) if config.weigh or config.drop else 1.0,
                }
            )
        for name, row, share in zip(found, table, _shares(config, table), strict=True):
            found[name] *= share
            row |= {what: share**2 * row[what] for what in ("norm", "forget", "retain")}
        return found, _kept(table)

    def _source_bias(self, name: str, forget: Spectrum, retain: Spectrum) -> tuple[float, float]:
        if name not in self.biases:
            one, other = (methods.bias(self.delta[name], s) for s in (forget, retain))
            self.biases[name] = one, other
        return self.biases[name]

    @torch.no_grad()
    def apply(self, config: Config, update: Mapping[str, Tensor], gain: float) -> None:
        """Put W_b + γD into the model; αΔ and LiNeS scale everything, others linear maps."""
        whole = config.method in ("scaled", "lines")
        for name, weight in self.weights.items():
            base = self.base[name]
            if name in update:
                weight.copy_(base.float().add(update[name], alpha=gain))
            elif config.others == "base":
                weight.copy_(base)
            else:
                weight.copy_(base.float().add(self.delta[name], alpha=gain if whole else 1.0))

    # Points

    def about(self, config: Config, gain: float, what: str = "core") -> dict[str, Any]:
        """What a point depends on."""
        return {
            "seed": self.shop.seed,
            "size": self.shop.size.name,
            "source": self.method,
            "level": self.level,
            "made": self.folder.parent.name,
            "what": what,
            **config.about,
            "gain": gain,
            "version": VERSION,
        }

    def core(self) -> dict[str, Any]:
        """Probability of every forget and held-out row."""
        return self._known_by(self.model)

    def run(self, config: Config) -> Iterator[dict[str, Any]]:
        """Evaluate `config` at its gains, rising, until it forgets as much as is asked.

        That is as much as the source, or as the retain-only model if the source is below that;
        with a closed-form gain to compare with, as much as the source in any case.
        """
        target = 0.0
        if config.method != "scaled":
            levels = [mean(row["forget"]) for row in (self.unlearned, self.plain("reference"))]
            target = levels[0] if config.match else max(levels)
        update: dict[str, Tensor] = {}
        kept: dict[str, Any] = {}

        def point(gain: float) -> dict[str, Any]:
            nonlocal update, kept
            about = self.about(config, gain)
            row = self.ledger.get(about)
            if row is not None:
                kept = row["kept"]
                return row
            began = time.perf_counter()
            if not update:
                update, kept = self.update(config)
            built = time.perf_counter() - began
            self.apply(config, update, gain)
            found = self.core()
            seconds = [round(built, 1), round(time.perf_counter() - began - built, 1)]
            return self.ledger.put(about, found | {"kept": kept, "seconds": seconds})

        for gain in config.gains:
            row = point(gain)
            yield row
            if mean(row["forget"]) <= target:
                break
        if config.match and kept["match"] is not None:
            yield point(kept["match"])

    @property
    def unlearned(self) -> dict[str, Any]:
        """The source itself."""
        (row,) = self.run(replace(SCALED, gains=(1.0,)))
        return row

    def plain(
        self, name: str, what: str = "core", measure: Callable[[Path], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The "base" or the "reference", by `measure` of its folder; else as `core` has it."""
        folder = getattr(self.shop, name)
        ledger = Ledger(self.ledger.path.with_name(f"{name}.jsonl"))
        about = {
            "seed": self.shop.seed,
            "size": self.shop.size.name,
            "source": name,
            "made": folder.name,
            "what": what,
            "version": VERSION,
        }
        row = ledger.get(about)
        return row or ledger.put(about, (measure or self._core_of)(folder))

    def _core_of(self, folder: Path) -> dict[str, Any]:
        return self._known_by(self.shop.load(folder))

    def _known_by(self, model: Any) -> dict[str, Any]:
        return {
            name: [round(p, 5) for p in probabilities(model, rows)]
            for name, rows in self.sets.items()
        }


def truncated(spectrum: Spectrum) -> Spectrum:
    """The directions that hold BIAS_ENERGY, the rest as their mean."""
    k = spectrum.rank_for(BIAS_ENERGY)
    return replace(spectrum, basis=spectrum.basis[:k], values=spectrum.values[:k])


def _worth(update: Tensor, site: methods.Site) -> float:
    """What an update does on forget inputs for what it does on retained ones."""
    forget, retain = (methods.bias(update, truncated(s)) for s in (site.forget, site.retain))
    return forget / retain if retain else 0.0


def _shares(config: Config, table: Sequence[Mapping[str, float]]) -> list[float]:
    """What each weight's update is multiplied with, by how much it forgets for what it disturbs."""
    worth = [row["worth"] for row in table]
    least = sorted(worth)[round(config.drop * len(worth))]
    typical = sorted(worth)[len(worth) // 2]
    return [(one / typical) ** config.weigh if one >= least else 0.0 for one in worth]


def _kept(table: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What an update keeps of its source, in shares, and closed-form gains."""

    def total(name: str, rows: Sequence[Mapping[str, float]] = table) -> float:
        return sum(row[name] for row in rows)

    def match(rows: Sequence[Mapping[str, float]]) -> float | None:
        source, now = total("source_forget", rows), total("forget", rows)
        return round(matching_gain(source, now), 4) if now > 0 and source > 0 else None

    singles = sorted(
        matching_gain(row["source_forget"], row["forget"]) for row in table if row["forget"] > 0
    )
    return {
        "norm": round((total("norm") / total("source_norm")) ** 0.5, 5),
        "retain": total("retain") / total("source_retain"),
        "forget": total("forget") / total("source_forget"),
        "match": match(table),
        "match_without_sinks": match([row for row in table if row["top"] < 0.5]),
        "match_median": round(singles[len(singles) // 2], 4) if singles else None,
    }
