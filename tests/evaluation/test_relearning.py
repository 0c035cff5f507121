"""Relearning against a plain loop over the model, and what is said of it."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from support.pico import make_pair, make_rows, write_rows
from transformers import AutoModelForCausalLM

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.commands.eval import evaluate_models
from sage_hub.evaluation.evaluate import expected_names
from sage_hub.evaluation.relearning import CURVE, RECIPE, choose_taught, training_bytes
from sage_hub.model.blocks import open_blocks
from sage_hub.model.weights import open_weights
from sage_hub.rows.encoding import Encoded, encoder_of
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings

ROWS = 13  # forget rows, an odd number
Row = tuple[list[int], int]  # tokens, and where the answer begins
Figures = dict[tuple[str, str | None, str], float]  # model, condition, metric


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relearning")
    make_pair(folder, dtype=torch.float32)
    write_rows(folder / "forget.jsonl", make_rows(ROWS, seed=1))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adam = torch.optim.AdamW(base.parameters(), 3e-3)
    for _ in range(20):  # so that it knows some of them
        sum(losses(base, row).mean() for row in rows_of(folder / "forget.jsonl")).backward()
        adam.step()
        adam.zero_grad()
    base.save_pretrained(folder / "base")
    return folder


def measured(folder: Path, size: int, **how: Any) -> Figures:
    """The figures of both models on the forget set."""
    settings = Settings(
        forget=str(folder / "forget.jsonl"),
        retain=str(folder / "retain.jsonl"),
        robustness=True,
        generate_rows=0,
        batch_size=size,
        device="cpu",
        **how,
    )
    sides = [str(folder / "base"), str(folder / "unlearned")]
    report = evaluate_models(sides, settings=settings)
    return {
        (Path(one["model"]).name, one["condition"], one["metric"]): one["value"]
        for one in report["results"]
        if one["set"] == "forget"
    }


@pytest.fixture(scope="module")
def found(models: Path) -> Figures:
    return measured(models, 3)


def rows_of(path: Path) -> list[Row]:
    encoder = encoder_of(open_checkpoint(str(path.parent / "base")), Settings())
    return [(list(row.ids), row.answer_start) for row in encoder.rows(read_proxy(str(path)))]


def losses(model: Any, row: Row) -> torch.Tensor:
    """Of each token of the answer, without padding."""
    ids, start = row
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([-logprobs[at - 1, ids[at]] for at in range(start, len(ids))])


@torch.no_grad()
def probability(model: Any, rows: list[Row]) -> float:
    return mean(float((-losses(model, row).mean()).exp()) for row in rows)


def plainly(folder: Path, side: str, taught: list[Row], asked: list[Row]) -> dict[int, float]:
    """After each step the mean probability of the rows that are `asked`."""
    model = AutoModelForCausalLM.from_pretrained(folder / side).float()
    adam, after = torch.optim.AdamW(model.parameters(), 2e-5, weight_decay=0), dict[int, float]()
    order = random.Random(0)
    waiting: list[int] = []
    for step in range(1, 101):
        if not waiting:
            waiting = list(range(len(taught)))
            order.shuffle(waiting)
        own, waiting = [taught[place] for place in waiting[:4]], waiting[4:]
        torch.cat([losses(model, row) for row in own]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        if step in (4, 10, 25, 50, 100):
            after[step] = probability(model, asked)
    return after


@pytest.mark.parametrize("side", ["base", "unlearned"])
def test_the_curve_is_that_of_a_plain_loop(side: str, models: Path, found: Figures) -> None:
    rows = rows_of(models / "forget.jsonl")
    places = choose_taught(len(rows), 0)
    others = [row for place, row in enumerate(rows) if place not in places]
    assert (len(places), len(others)) == (6, 7)
    after = plainly(models, side, [rows[place] for place in places], others)
    model = AutoModelForCausalLM.from_pretrained(models / side)
    expected = {"relearned_0": probability(model, others), "relearned": after[4]}
    expected |= {f"relearned_{step}": after[step] for step in (10, 25, 50, 100)}
    for condition, value in expected.items():
        assert found[side, condition, "probability"] == pytest.approx(value, rel=1e-4)
    assert len({round(value, 6) for value in expected.values()}) == len(expected)


def test_retained_rows_alone_are_taught_in_the_other_attack(models: Path, found: Figures) -> None:
    forget, retain = rows_of(models / "forget.jsonl"), rows_of(models / "retain.jsonl")
    taught = random.Random(0).sample(retain, 40)
    after = plainly(models, "unlearned", taught, forget)
    value = found["unlearned", "relearned_retain", "probability"]
    assert value == pytest.approx(after[100], rel=1e-4)


def test_recovery_is_the_part_of_the_way_back_on_the_same_rows(
    found: Figures,
) -> None:
    starts = {"relearned_retain": None}
    conditions = ["relearned", "relearned_retain", *CURVE]
    for condition in conditions:
        start = starts.get(condition, "relearned_0")
        base, before = (found[side, start, "probability"] for side in ("base", "unlearned"))
        after = found["unlearned", condition, "probability"]
        recovery = found["unlearned", condition, "relearning_recovery"]
        assert recovery == pytest.approx((after - before) / (base - before), rel=1e-6)
    assert not any(side == "base" for side, _, metric in found if metric == "relearning_recovery")


def test_no_figure_depends_on_the_batch_size(models: Path, found: Figures) -> None:
    other = measured(models, 16)
    assert other.keys() == found.keys()
    for key, value in found.items():
        assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_gates_know_all_of_it_beforehand(models: Path, found: Figures) -> None:
    proxies = {
        which: read_proxy(str(models / f"{name}.jsonl"))
        for which, name in {"forget": "forget", "retain": "retain"}.items()
    }
    settings = Settings(robustness=True, generate_rows=0)
    names = {*expected_names(proxies, settings, ["base", "unlearned", "sanitized"])}
    measured = {f"robustness.{c}.{side}.forget.{metric}" for side, c, metric in found if c}
    assert measured <= names
    assert {name for name in names if name.startswith("robustness.relearned")} - measured <= {
        f"robustness.{c}.{model}forget.{metric}"
        for _, c, metric in found
        for model in ("", "base.", "sanitized.")
    }
    alone = {*expected_names({"forget": proxies["forget"]}, settings, ["base"])}
    assert not any("relearned_retain" in name for name in alone)


def test_the_memory_of_training_is_no_less_than_what_is_kept_for_the_way_back(
    models: Path,
) -> None:
    checkpoint, rows = open_checkpoint(str(models / "base")), [Encoded(tuple(range(3, 60)), 1)] * 4
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with open_weights(checkpoint) as weights, open_blocks(checkpoint, weights, "cpu") as model:
        alone = training_bytes(model, [Encoded((1,), 0)])
        estimate = training_bytes(model, rows) - alone
    whole = AutoModelForCausalLM.from_pretrained(models / "base")
    own = {p.untyped_storage().data_ptr() for p in whole.parameters()}
    ids = torch.tensor([row.ids for row in rows])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = whole(input_ids=ids, labels=ids, use_cache=False).loss
    measured = sum(size for place, size in kept.items() if place not in own)
    loss.backward()
    assert measured / 2 < estimate < 3 * measured
    assert alone > 18 * sum(p.numel() for p in whole.parameters())
    assert RECIPE.batch_size == len(rows)
