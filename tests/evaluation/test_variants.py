"""Variants of a model in one pass over its weights are what each of them is alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.adapters import make_adapter
from support.architectures import make_model, make_sides, move
from support.pico import make_rows, write_rows
from torch import Tensor

from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.checkpoint.pair import open_unlearned
from sage_hub.evaluation.evaluate import Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.evaluation.variants import evaluate_variants, room_for_a_block
from sage_hub.model.weights import Blend, open_blends, open_weights, part_of_the_way
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings

VARIANTS: Mapping[str, Blend | None] = {
    "whole": None,
    "half": part_of_the_way(0.5),
    "beyond": part_of_the_way(3.0),
    "nothing": part_of_the_way(0.0),
}


@pytest.fixture(params=["Llama", "GPT2", "Mixtral", "adapter"])
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    if request.param == "adapter":
        make_adapter(tmp_path, "Llama")
    else:
        base, unlearned = make_model(request.param), make_model(request.param)
        move(unlearned)
        make_sides(tmp_path, base, unlearned)
    first = open_checkpoint(str(tmp_path / "base"))
    return first, open_unlearned(str(tmp_path / "unlearned"), first)


@pytest.mark.parametrize("memory", [0.61, 4.0])  # hidden states wait on disk, or do not
def test_figures(sides: tuple[Checkpoint, Checkpoint], memory: float, tmp_path: Path) -> None:
    base, unlearned = sides
    files = {
        which: write_rows(tmp_path / f"{which}.jsonl", make_rows(9, seed))
        for seed, which in enumerate(("forget", "retain"))
    }
    sets = {which: read_proxy(str(file)) for which, file in files.items()}
    settings = Settings(batch_size=4, generate_rows=0, memory=memory, device="cpu")
    study = Study(sets, base)
    found = evaluate_variants(unlearned, base, VARIANTS, study, settings, tmp_path)
    models = {name: Candidate(unlearned, base, blend) for name, blend in VARIANTS.items()}
    alone = evaluate(models, study, settings, tmp_path)
    expected: dict[str, dict[tuple[str, str], float]] = {name: {} for name in VARIANTS}
    for one in alone.results:
        expected[one.model][one.set, one.metric] = one.value
    assert found.keys() == expected.keys()
    for name, figures in expected.items():
        assert found[name].figures == pytest.approx(figures, rel=1e-6), name
    assert len({one.figures["forget", "probability"] for one in found.values()}) == 4


def test_what_is_known_is_not_scored_again(
    sides: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    """But for what it is known of: another model's rows, and other rows, are scored."""
    base, unlearned = sides
    forget, retain = (
        read_proxy(str(write_rows(tmp_path / f"{seed}.jsonl", make_rows(9, seed))))
        for seed in range(2)
    )
    settings = Settings(batch_size=4, generate_rows=0, device="cpu")
    study = Study({"forget": forget}, base)
    half = evaluate_variants(unlearned, base, VARIANTS, study, settings, tmp_path)["half"].known
    assert len(half) == len(forget.rows)
    models = {name: Candidate(unlearned) for name in ("told", "fresh")}
    both = Study({"forget": forget, "retain": retain}, base, known={"told": half})
    values = {
        (one.model, one.set): one.value
        for one in evaluate(models, both, settings, tmp_path).results
        if one.metric == "probability"
    }
    assert values["told", "forget"] != pytest.approx(values["fresh", "forget"], rel=1e-3)
    assert values["told", "retain"] == pytest.approx(values["fresh", "retain"], rel=1e-6)


@pytest.mark.parametrize("room", [0.0, 3e3, 1e9])
def test_weights(sides: tuple[Checkpoint, Checkpoint], room: float) -> None:
    """However much is kept of what was read, and in whatever order they are asked for."""
    base, unlearned = sides
    names = [*base.empty_model().state_dict()]
    order = torch.randperm(3 * len(names), generator=torch.Generator().manual_seed(0)).tolist()
    expected: dict[str, list[Tensor]] = {}
    for variant, blend in VARIANTS.items():
        with open_weights(unlearned, base, blend) as weights:
            expected[variant] = [weights(name).clone() for name in names]
    with open_blends(unlearned, base, [*VARIANTS.values()], room) as several:
        for place in [*range(len(names)), *(n % len(names) for n in order)]:
            for variant, weights in zip(VARIANTS, several, strict=True):
                assert torch.equal(weights(names[place]), expected[variant][place])


def test_no_more_is_kept_than_a_block(sides: tuple[Checkpoint, Checkpoint]) -> None:
    """So that the plan's figure for memory holds, however much is allowed."""
    _, unlearned = sides
    counts = [p.numel() for p in unlearned.of_model.empty_model().parameters()]
    assert 4 * max(counts) <= room_for_a_block(unlearned, Settings(memory=64.0)) < 4 * sum(counts)
    assert room_for_a_block(unlearned, Settings(memory=1e-9)) < 1
