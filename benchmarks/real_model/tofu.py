"""TOFU's own figures of a few repairs: forget quality, and model utility with its nine parts.

As `sage-hub eval` counts them with `suite: auto`: in the plain form that the models have learned,
without a token that ends an answer, which they were never taught. The retained rows are those of
TOFU's retain_perturbed that the base has learned and no repair has seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from plan import LARGE, SCALED, Config
from robustness import matched
from sweep import Bench

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.commands.here import settle
from sage_hub.evaluation.evaluate import Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.evaluation.metrics import wrong_to_right
from sage_hub.runtime.ranks import Ranks
from sage_hub.settings import Settings

SETTINGS = Settings(chat_template=False, max_length=256, generate_rows=40)
REPAIRS = (
    Config("sage", {"strength": 100, "energy": 0.99}, LARGE, weigh=1.0),
    Config("sage", {"strength": 100, "energy": 0.99}, LARGE),
)


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """The source, and each repair that forgets as much as it; base and retain-only model beside."""
    for name in ("base", "reference"):
        bench.plain(name, "tofu", lambda folder: figures(bench, folder))
    yield _measure(bench, SCALED, 1.0)
    for config in REPAIRS:
        gain = matched(bench, config)
        if gain is not None:
            yield _measure(bench, config, gain)


def _measure(bench: Bench, config: Config, gain: float) -> dict[str, Any]:
    about = bench.about(config, gain, "tofu")
    row = bench.ledger.get(about)
    if row is not None:
        return row
    update, _ = bench.update(config)
    bench.apply(config, update, gain)
    with tempfile.TemporaryDirectory() as folder:
        bench.model.save_pretrained(folder)
        bench.shop.tokenizer.save_pretrained(folder)
        return bench.ledger.put(about, figures(bench, Path(folder)))


def figures(bench: Bench, folder: Path) -> dict[str, Any]:
    """The ratio R of every forget row, and each mean that model utility is made of."""
    sets = bench.shop.rows.perturbed
    model = open_checkpoint(str(folder))
    settings = settle(replace(SETTINGS, device=bench.shop.device), model, Ranks())
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(sets, tokens_of=model, origin="")
        found = evaluate({"model": Candidate(model)}, study, settings, Path(scratch))
    ratios = [wrong_to_right(seen) for seen in found.seen["model"]["forget"]]
    parts = {f"{one.set}.{one.metric}": round(one.value, 5) for one in found.results}
    return {"ratios": [round(r, 5) for r in ratios if r is not None], "figures": parts}
