"""What is asked of a few repairs besides forgetting and retention: side effects, robustness.

A repair is taken at the gain where it forgets as much as its source, or as the retain-only model
where the source has forgotten more than that (the best one at both): read from the points of the
core sweep.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import train
from data import tokens
from evaluate import choices, losses, probabilities, quantized
from frontier import gain_at, mean
from plan import LARGE, SCALED, Config
from sweep import Bench
from torch import Tensor

RELEARNED = 20  # forget rows that come back to the training set
RELEARN = {"epochs": 2, "batch": 4, "rate": 3e-5}

CHOSEN = (
    Config("sage", {"strength": 100, "energy": 0.99}, LARGE, weigh=1.0, match=True),
    Config("sage", {"strength": 10, "energy": 0.9}, match=True),
    SCALED,
    Config("hard", {"energy": 0.9}),
)
PLAIN = Config("sage", {"strength": 1, "energy": 0.9})


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every measure on the source, on plain SAGE, and on chosen repairs at their gains.

    On the base, which is the source at α = 0, what does not concern forgetting.
    """
    yield from _measure(bench, SCALED, 1.0)
    yield from _measure(bench, SCALED, 0.0, ("bystanders",))
    for config in CHOSEN:
        gain = matched(bench, config)
        if gain is not None and (config, gain) != (SCALED, 1.0):
            yield from _measure(bench, config, gain)
    gain = matched(bench, CHOSEN[0], fair=False)
    if gain is not None:
        yield from _measure(bench, CHOSEN[0], gain)
    yield from _measure(bench, PLAIN, 1.0)


def matched(bench: Bench, config: Config, *, fair: bool = True) -> float | None:
    """The gain with which `config` forgets as much as is asked, if one of the plan's does.

    As much as the source, or if it is to be `fair`, no more than the retain-only model.
    """
    source, trained = (mean(row["forget"]) for row in (bench.unlearned, bench.plain("reference")))
    points = sorted(bench.run(config), key=lambda row: row["gain"])
    gain = gain_at(
        [row["gain"] for row in points],
        [(row["forget"], row["heldout"]) for row in points],
        max(source, trained) if fair else source,
    )
    return None if gain is None else round(gain, 3)


def _measure(
    bench: Bench, config: Config, gain: float, some: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """The measures named in `some`, or all."""
    update: dict[str, Tensor] | None = None
    for what, measure in MEASURES.items():
        if some and what not in some:
            continue
        about = bench.about(config, gain, what)
        row = bench.ledger.get(about)
        if row is None:
            began = time.perf_counter()
            if update is None:
                update, _ = bench.update(config)
            bench.apply(config, update, gain)
            row = bench.ledger.put(
                about, measure(bench) | {"seconds": [0, round(time.perf_counter() - began, 1)]}
            )
        yield row


def _core(bench: Bench) -> dict[str, Any]:
    return bench.core()


def _bystanders(bench: Bench) -> dict[str, Any]:
    """Choice probability of each question, and loss in nats per token of each passage."""
    rows, tokenizer = bench.shop.rows, bench.shop.tokenizer
    found = {
        name: [round(p, 5) for p in choices(bench.model, [tokens(q, tokenizer) for q in questions])]
        for name, questions in rows.choices.items()
    }
    return found | {
        "texts": [round(loss, 5) for loss in losses(bench.model, tokens(rows.texts, tokenizer))]
    }


def _rounded(bits: int) -> Callable[[Bench], dict[str, Any]]:
    def measure(bench: Bench) -> dict[str, Any]:
        linear = {name: bench.weights[name].data for name in bench.all_linear}
        with quantized(linear, bits):
            return bench.core()

    return measure


def relearned(bench: Bench) -> dict[str, Any]:
    """Forget rows that were not relearned, after relearning others; held-out rows too."""
    forget = list(bench.sets["forget"])
    random.Random(bench.shop.seed).shuffle(forget)
    with torch.enable_grad():
        for _ in train.learn(bench.model, forget[:RELEARNED], seed=bench.shop.seed, **RELEARN):
            pass
    return {"forget": [round(p, 5) for p in probabilities(bench.model, forget[RELEARNED:])]}


# Relearning is last: it leaves the model changed.
MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "matched": _core,
    "bystanders": _bystanders,
    "int8": _rounded(8),
    "int4": _rounded(4),
    "relearned": relearned,
}
