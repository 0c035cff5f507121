"""What no rows, few rows and general texts bring back: the gain is the largest that keeps a share.

    python benchmarks/real_model/without_rows.py --tofu DIR --proxies none "own 25" general

The retain proxy is what the base writes (none), some rows of the right domain (own N), general
texts, or what the base writes with forget rows among it (mixed N), as it is or without what the
unlearned model has lost far more of (filtered N). The gain is settled by guard rows that the base
wrote, and by nothing else; forget and held-out rows are for the figures. Every evaluated gain is
kept in --cache, so that a run goes on where it was stopped. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build import METHODS, Workshop
from data import CPU, tokens
from evaluate import losses, probabilities
from frontier import mean
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

GAINS = (8.0, 12.0, 16.0, 20.0, 24.0, 32.0)
EVALUATED = 40  # rows of a set
SETTINGS = Settings(
    strength=100.0,
    energy=0.99,
    max_length=256,
    batch_size=10,
    device="cpu",
    compute_dtype="float32",
    chat_template=False,
)


@dataclass(frozen=True)
class Figures:
    """Mean answer probabilities of a model."""

    forget: float
    heldout: float
    guard: float


def main() -> None:
    """Evaluate what is not evaluated yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tofu", metavar="DIR")
    parser.add_argument("--cache", type=Path, default=Path("real-model-cache"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--sources", nargs="+", default=METHODS, metavar="METHOD[/LEVEL]")
    parser.add_argument("--proxies", nargs="+", default=["none"], metavar="PROXY")
    parser.add_argument("--keep", type=float, default=Settings().keep, metavar="SHARE")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    print("| source | seed | proxy | γ | forget: source → repaired | held-out: source → repaired |")
    print("|---|---|---|---|---|---|")
    for seed in options.seeds:
        desk = Desk(Workshop(options.cache, CPU, seed, options.tofu, "cpu", say))
        for source in options.sources:
            for proxy in options.proxies:
                print(desk.line(source, proxy, options.keep), flush=True)


@dataclass(frozen=True)
class Desk:
    """The sources of one seed, and what is tried on them."""

    shop: Workshop

    def line(self, source: str, proxy: str, keep: float) -> str:
        """A row of the table: what the rule ends at, read off between the evaluated gains."""
        base, before, points = self.curve(source, proxy)
        kept = {
            g: (p.guard - before.guard) / (base.guard - before.guard) for g, p in points.items()
        }
        gains = np.array(sorted(points))
        shares = np.array([kept[gain] for gain in gains])
        enough = np.flatnonzero(shares >= keep)
        last = int(enough[-1]) if len(enough) else -1
        about = f"| {source} | {self.shop.seed} | {proxy} |"
        if last < 0 or last + 1 == len(gains):
            return f"{about} beyond {gains[0 if last < 0 else -1]:g} | | |"
        part = (shares[last] - keep) / (shares[last] - shares[last + 1])

        def between(one: float, two: float) -> float:
            return one + part * (two - one)

        low, high = points[gains[last]], points[gains[last + 1]]
        gain = float(np.exp(between(*np.log(gains[last : last + 2]))))
        forget, heldout = between(low.forget, high.forget), between(low.heldout, high.heldout)
        back = (heldout - before.heldout) / (base.heldout - before.heldout)
        return (
            f"{about} {gain:.3g} | {before.forget:.3f} → {forget:.3f} "
            f"({forget - before.forget:+.3f}) | {before.heldout:.3f} → {heldout:.3f}: "
            f"**{100 * back:.0f} %** back |"
        )

    def curve(self, source: str, proxy: str) -> tuple[Figures, Figures, dict[float, Figures]]:
        """What base, source, and the source repaired with each gain know."""
        ledger = Ledger(self.shop.base.parent / "without_rows.jsonl")
        about = {"source": source, "proxy": proxy, "version": 1}
        asked: list[dict[str, Any]] = [
            {"model": "base", "version": 1},
            {"model": "source", "source": source, "version": 1},
            *({**about, "gain": gain} for gain in GAINS),
        ]
        if any(ledger.get(one) is None for one in asked):
            with Repair(self, source, proxy) as repair:
                for one in asked:
                    if ledger.get(one) is None:
                        ledger.put(one, vars(self.figures(repair.model(one))))
                        self.shop.say(f"{source}, {proxy}: {one}")
        found = [
            Figures(*(row[name] for name in Figures.__annotations__))
            for row in map(ledger.get, asked)
            if row is not None
        ]
        return found[0], found[1], dict(zip(GAINS, found[2:], strict=True))

    def figures(self, model: Any) -> Figures:
        rows, tokenizer = self.shop.rows, self.shop.tokenizer
        sets = rows.forget, rows.heldout, self.written(guard=True)
        return Figures(
            *(mean(probabilities(model, tokens(one, tokenizer)[:EVALUATED])) for one in sets)
        )

    def written(self, *, guard: bool) -> Proxy:
        """Rows that the base wrote: those that the gain is settled by, or all others."""
        path = self.shop.base.parent / "written.json"
        if not path.is_file():
            base, many = open_checkpoint(str(self.shop.base)), round(SPARE * (RETAIN_ROWS + 40))
            with (
                open_weights(base) as weights,
                open_blocks(base, weights, "cpu", torch.float32) as model,
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
        mixed = (*written[: RETAIN_ROWS - many], *rows.forget.rows[:many])
        found = Proxy("retain", mixed)
        return self._fit(source, found, RETAIN_ROWS) if kind == "filtered" else found

    def _fit(self, source: str, proxy: Proxy, many: int) -> Proxy:
        """Without the rows that the source has lost far more of than of the others."""
        encoded = tokens(proxy, self.shop.tokenizer)
        folders = (self.shop.base, self._folder(source))
        before, after = (losses(self.shop.load(one).float(), encoded) for one in folders)
        far = far_more_lost([a - b for a, b in zip(after, before, strict=True)], FAR)
        left = [row for row, forgotten in zip(proxy.rows, far, strict=True) if not forgotten]
        self.shop.say(f"{source}: {sum(far)} of {len(far)} rows left out")
        return replace(proxy, rows=tuple(left[:many]))

    def _folder(self, source: str) -> Path:
        method, _, level = source.partition("/")
        return self.shop.source(method, level or "strong")


class Repair:
    """A source that is repaired in memory, in float32."""

    def __init__(self, desk: Desk, source: str, proxy: str) -> None:
        self.base, self.own = (
            desk.shop.load(folder).float() for folder in (desk.shop.base, desk._folder(source))
        )
        path = desk.shop.base.parent / f"moments-{source}-{proxy}.safetensors".replace("/", "-")
        if not path.is_file():
            checkpoint = open_checkpoint(str(desk.shop.base))
            rows = {path: {"retain": desk.proxy(source, proxy)}}
            calibrate(checkpoint, rows, SETTINGS, weights=checkpoint.fingerprint())
        self.path = path

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
        if about.get("model") == "base":
            return self.base
        origin = dict(self.base.named_parameters())
        for name, parameter in self.own.named_parameters():
            parameter.copy_(self.source[name])
            if "gain" in about and name in self.kept:
                parameter.copy_(origin[name] + about["gain"] * self.kept[name])
        return self.own


if __name__ == "__main__":
    main()
