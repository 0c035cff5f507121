"""What no rows, few rows and general texts bring back: the gain is the largest that keeps a share.

    python benchmarks/real_model/without_rows.py --tofu DIR --proxies none "own 25" general

The retain proxy is what the base writes (none), some rows of the right domain (own N), both of
these (both N), general texts, or what the base writes with forget rows among it (mixed N), as it is
or without what the unlearned model has lost far more of (filtered N). The gain is settled by guard
rows that the base wrote, and by nothing else; forget and held-out rows are for the figures. Models
are evaluated in bfloat16, as they are stored. With --robust also after rounding to int4, and on the
forget rows that are not relearned. Every evaluated gain is kept in --cache, so that a run goes on
where it was stopped. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train
from build import METHODS, Workshop
from data import SIZES, tokens
from evaluate import losses, probabilities, quantized
from frontier import mean
from robustness import RELEARN, RELEARNED
from sweep import Ledger

from sage_hub.calibration.calibrate import calibrate
from sage_hub.calibration.statistics import open_statistics
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.commands.rows import FAR, GUARD_ROWS, RETAIN_ROWS, SPARE
from sage_hub.evaluation.written import far_more_lost, write_rows
from sage_hub.method.sage import filter_update
from sage_hub.model.blocks import open_blocks
from sage_hub.model.weights import open_weights
from sage_hub.repair.update import Filter
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

GAINS = (12.0, 16.0, 20.0, 24.0, 30.0)
EVALUATED = 100  # rows of a set, at most
VERSION = 2  # of what is evaluated
SETTINGS = Settings(
    strength=100.0,
    energy=0.99,
    max_length=256,
    batch_size=10,
    device="cpu",
    compute_dtype="bfloat16",
    chat_template=False,
)


@dataclass(frozen=True)
class Figures:
    """Mean answer probabilities of a model."""

    forget: float
    heldout: float
    guard: float


@dataclass(frozen=True)
class Robust:
    """The mean forget probability after int4 rounding, and of rows that are not relearned."""

    int4: float
    relearned: float


def main() -> None:
    """Evaluate what is not evaluated yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tofu", metavar="DIR")
    parser.add_argument("--cache", type=Path, default=Path("real-model-cache"), metavar="DIR")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--sources", nargs="+", default=METHODS, metavar="METHOD[/LEVEL]")
    parser.add_argument("--proxies", nargs="+", default=["none"], metavar="PROXY")
    parser.add_argument("--keep", type=float, default=Settings().keep, metavar="SHARE")
    parser.add_argument("--robust", action="store_true")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    columns = ["source", "seed", "proxy", "γ", "forget: source → repaired"]
    columns += ["held-out: source → repaired", "at the source's forgetting"]
    columns += ["int4", "relearned"] * options.robust
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for seed in options.seeds:
        desk = Desk(Workshop(options.cache, SIZES[options.size], seed, options.tofu, "cpu", say))
        for source in options.sources:
            for proxy in options.proxies:
                cells = desk.line(source, proxy, options.keep, robust=options.robust)
                print(f"| {' | '.join(cells)} |", flush=True)


@dataclass(frozen=True)
class Desk:
    """The sources of one seed, and what is tried on them."""

    shop: Workshop

    def line(self, source: str, proxy: str, keep: float, *, robust: bool) -> list[str]:
        """A row of the table: what the rule ends at, read off between the evaluated gains."""
        base, before, points = self.curve(source, proxy)
        gains = np.array(sorted(points))
        known = [points[gain] for gain in gains]
        about = [source, str(self.shop.seed), proxy]

        def back(heldout: float) -> str:
            return f"**{100 * (heldout - before.heldout) / (base.heldout - before.heldout):.0f} %**"

        # What is missing of the loss grows as a power of γ.
        missing = [(base.guard - p.guard) / (base.guard - before.guard) for p in known]
        gain = _crossing(gains, missing, 1 - keep)
        level = max(before.forget, min(p.forget for p in known))
        matched = _crossing(gains, [1 / p.forget for p in known], 1 / level)
        at = f"{_read(gains, [p.heldout for p in known], matched):.3f}" if matched else ""
        there = f"{at}: {back(float(at))} back" if at else "beyond"
        if gain is None:
            return [*about, "beyond", "", "", there, *["", ""] * robust]
        forget, heldout = (
            _read(gains, values, gain)
            for values in ([p.forget for p in known], [p.heldout for p in known])
        )
        cells = [
            f"{gain:.3g}",
            f"{before.forget:.3f} → {forget:.3f} ({forget - before.forget:+.3f})",
            f"{before.heldout:.3f} → {heldout:.3f}: {back(heldout)} back",
            there,
        ]
        if robust:
            cells += self.robust(source, proxy, round(gain, 2))
        return [*about, *cells]

    def curve(self, source: str, proxy: str) -> tuple[Figures, Figures, dict[float, Figures]]:
        """What base, source, and the source repaired with each gain know."""
        about = {"source": source, "proxy": proxy}
        asked: list[dict[str, Any]] = [
            {"model": "base"},
            {"model": "source", "source": source},
            *({**about, "gain": gain} for gain in GAINS),
        ]
        found = [Figures(**row) for row in self._rows(source, proxy, asked, self.figures)]
        return found[0], found[1], dict(zip(GAINS, found[2:], strict=True))

    def robust(self, source: str, proxy: str, gain: float) -> list[str]:
        """The source's figures and those with `gain`, of each measure."""
        asked: list[dict[str, Any]] = [
            {"model": "source", "source": source, "robust": True},
            {"source": source, "proxy": proxy, "gain": gain, "robust": True},
        ]
        before, after = (Robust(**row) for row in self._rows(source, proxy, asked, self.shaken))
        return [
            f"{before.int4:.3f} → {after.int4:.3f}",
            f"{before.relearned:.3f} → {after.relearned:.3f}",
        ]

    def _rows(
        self,
        source: str,
        proxy: str,
        asked: list[dict[str, Any]],
        measure: Callable[[Any], Figures | Robust],
    ) -> list[dict[str, float]]:
        """What `measure` says of each model that is asked for, now or in an earlier run."""
        ledger = Ledger(self.shop.base.parent / "without_rows.jsonl")
        asked = [{**one, "version": VERSION} for one in asked]
        if any(ledger.get(one) is None for one in asked):
            with Repair(self, source, proxy) as repair:
                for one in asked:
                    if ledger.get(one) is None:
                        ledger.put(one, vars(measure(repair.model(one))))
                        self.shop.say(f"{source}, {proxy}: {one}")
        rows = [row for row in map(ledger.get, asked) if row is not None]
        return [
            {key: value for key, value in row.items() if key not in {"key", *one}}
            for row, one in zip(rows, asked, strict=True)
        ]

    def shaken(self, model: Any) -> Robust:
        """How well `model` knows forget rows under what brings knowledge back; it is spoilt."""
        rows = tokens(self.shop.rows.forget, self.shop.tokenizer)
        linear = {
            name: parameter.data
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2 and "embed" not in name
        }
        with torch.no_grad(), quantized(linear, 4):
            int4 = mean(probabilities(model, rows))
        random.Random(self.shop.seed).shuffle(rows)
        model.requires_grad_(True)
        for _ in train.learn(model, rows[:RELEARNED], seed=self.shop.seed, **RELEARN):
            pass
        model.requires_grad_(False)
        return Robust(int4, mean(probabilities(model, rows[RELEARNED:])))

    def figures(self, model: Any) -> Figures:
        rows, tokenizer = self.shop.rows, self.shop.tokenizer
        sets = rows.forget, rows.heldout, self.written(guard=True)
        return Figures(
            *(mean(probabilities(model, tokens(one, tokenizer)[:EVALUATED])) for one in sets)
        )

    def written(self, *, guard: bool) -> Proxy:
        """Rows that the base wrote: those that the gain is settled by, or all others."""
        path = self.shop.base.parent / f"written-{VERSION}.json"
        if not path.is_file():
            base = open_checkpoint(str(self.shop.base))
            many = round(SPARE * (RETAIN_ROWS + GUARD_ROWS))
            with (
                open_weights(base) as weights,
                open_blocks(base, weights, "cpu", torch.bfloat16) as model,
                model.whole(weights) as whole,
            ):
                path.write_text(json.dumps(write_rows(whole, base, many, SETTINGS, Run())))
        rows = json.loads(path.read_text())
        return Proxy("written", parse_rows(rows[:GUARD_ROWS] if guard else rows[GUARD_ROWS:], ""))

    def proxy(self, source: str, name: str) -> Proxy:
        """The retain proxy of this name, as `source` sees it."""
        kind, _, number = name.partition(" ")
        rows, many = self.shop.rows, int(number or RETAIN_ROWS)
        written = self.written(guard=False).rows
        if kind == "own":
            return Proxy("retain", rows.keep.rows[:many])
        if kind == "general":
            return rows.proxies["general"]
        if kind == "none":
            return self._fit(source, Proxy("retain", written), RETAIN_ROWS)
        if kind == "both":
            return Proxy("retain", (*rows.keep.rows[:many], *written[: RETAIN_ROWS - many]))
        mixed = (*written[: RETAIN_ROWS - many], *rows.forget.rows[:many])
        found = Proxy("retain", mixed)
        return self._fit(source, found, RETAIN_ROWS) if kind == "filtered" else found

    def _fit(self, source: str, proxy: Proxy, many: int) -> Proxy:
        """Without the rows that the source has lost far more of than of the others."""
        encoded = tokens(proxy, self.shop.tokenizer)
        folders = (self.shop.base, self._folder(source))
        before, after = (losses(self.shop.load(one), encoded) for one in folders)
        far = far_more_lost([a - b for a, b in zip(after, before, strict=True)], FAR)
        left = [row for row, forgotten in zip(proxy.rows, far, strict=True) if not forgotten]
        self.shop.say(f"{source}: {sum(far)} of {len(far)} rows left out")
        return replace(proxy, rows=tuple(left[:many]))

    def _folder(self, source: str) -> Path:
        method, _, level = source.partition("/")
        return self.shop.source(method, level or "strong")


class Repair:
    """A source that is repaired in memory, in float32, and shown as it would be stored."""

    def __init__(self, desk: Desk, source: str, proxy: str) -> None:
        self.base, self.own = (
            desk.shop.load(folder).float() for folder in (desk.shop.base, desk._folder(source))
        )
        path = desk.shop.base.parent / f"moments-{source}-{proxy}.safetensors".replace("/", "-")
        if not path.is_file():
            checkpoint = open_checkpoint(str(desk.shop.base))
            rows = {path: {"retain": desk.proxy(source, proxy)}}
            calibrate(checkpoint, rows, SETTINGS, weights=checkpoint.fingerprint())
        self.path, self.shown = path, desk.shop.load(desk.shop.base)

    def __enter__(self) -> Repair:
        own = {name: p.detach().clone() for name, p in self.own.named_parameters()}
        origin = dict(self.base.named_parameters())
        self.source, self.kept = own, dict(self._filtered(own, origin))
        return self

    def __exit__(self, *error: Any) -> None:
        self.path.unlink()

    def _filtered(self, own: Any, origin: Any) -> Iterator[tuple[str, torch.Tensor]]:
        how = Filter(SETTINGS.sharpness[0], SETTINGS.sharpness[1], None)
        with torch.no_grad(), open_statistics(self.path) as statistics:
            for module, site in statistics.site_of.items():
                name = f"{module}.weight"
                delta = own[name] - origin[name]
                if delta.any():
                    spectrum = statistics.spectrum("retain", site)
                    yield name, filter_update(delta, spectrum.basis, how.suppression(spectrum))

    @torch.no_grad()
    def model(self, about: dict[str, Any]) -> Any:
        """The base, the source, or the source repaired with the gain that `about` says."""
        origin = dict(self.base.named_parameters())
        for name, parameter in self.shown.named_parameters():
            if about.get("model") == "base":
                parameter.copy_(origin[name])
            elif "gain" in about and name in self.kept:
                parameter.copy_(origin[name] + about["gain"] * self.kept[name])
            else:
                parameter.copy_(self.source[name])
        return self.shown


def _crossing(gains: np.ndarray, values: Sequence[float], level: float) -> float | None:
    """Where `values`, which grow with the gain as a power of it, come to `level`."""
    above = np.flatnonzero(np.array(values) >= level)
    if not len(above) or above[0] == 0:
        return None
    place = slice(above[0] - 1, above[0] + 1)
    return float(np.exp(np.interp(np.log(level), np.log(values[place]), np.log(gains[place]))))


def _read(gains: np.ndarray, values: Sequence[float], gain: float) -> float:
    """What `values` are at `gain`, by a straight line in its logarithm."""
    return float(np.interp(np.log(gain), np.log(gains), values))


if __name__ == "__main__":
    main()
