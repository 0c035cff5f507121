"""How fast a repair is undone: what it takes to hold out as its source does, and what predicts it.

Of each repair at several gains: forget and held-out probability, the forget rows that come back
when others are relearned (as in robustness.py), how far it lies from the base, and the losses on
the straight way there (arXiv 2505.22310 finds, in vision, that both predict relearning).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from evaluate import losses
from frontier import mean
from plan import LARGE, SCALED, Config
from robustness import matched, relearned
from sweep import Bench

WAY = (0.25, 0.5, 0.75)  # shares of the way from the base to the repair
MORE = (1.0, 1.25, 1.5)  # gains, in those that meet the fair level
REPAIRS = (
    Config("sage", {"strength": 100, "energy": 0.99}, LARGE, weigh=1.0),
    Config("sage", {"strength": 100, "energy": 0.99}, LARGE),
    Config("sage", {"strength": 10, "energy": 0.9}),
    Config("hard", {"energy": 0.9}),
)


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """The source, and each repair from its fair level on."""
    yield _measure(bench, SCALED, 1.0)
    for config in REPAIRS:
        gain = matched(bench, config)
        if gain is not None:
            for more in MORE:
                yield _measure(bench, config, round(gain * more, 3))


def _measure(bench: Bench, config: Config, gain: float) -> dict[str, Any]:
    about = bench.about(config, gain, "path")
    row = bench.ledger.get(about)
    if row is not None:
        return row
    began = time.perf_counter()
    update, _ = bench.update(config)
    bench.apply(config, update, gain)
    found = bench.core() | _distance(bench)
    ends = {name: p.detach().clone() for name, p in bench.weights.items()}
    for share in WAY:
        _go(bench, ends, share)
        for name, rows in bench.sets.items():
            found[f"{name} at {share}"] = mean(losses(bench.model, rows))
    _go(bench, ends, 1.0)
    found["relearned"] = relearned(bench)["forget"]
    return bench.ledger.put(about, found | {"seconds": [0, round(time.perf_counter() - began, 1)]})


@torch.no_grad()
def _go(bench: Bench, ends: dict[str, torch.Tensor], share: float) -> None:
    """Put what lies at `share` of the way from the base to `ends` into the model."""
    for name, weight in bench.weights.items():
        weight.copy_(torch.lerp(bench.base[name].float(), ends[name].float(), share))


@torch.no_grad()
def _distance(bench: Bench) -> dict[str, float]:
    """How far the model lies from the base, in ‖Δ‖ of its source."""
    now = before = 0.0
    for name, weight in bench.weights.items():
        now += float((weight.float() - bench.base[name].float()).square().sum())
        before += float(bench.delta[name].square().sum())
    return {"distance": (now / before) ** 0.5}
