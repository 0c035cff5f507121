"""The benchmark's peers against their definitions, in float64 on small matrices; its frontiers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pico import make_config, make_rows, make_tokenizer, write_rows
from torch import Tensor
from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "benchmarks" / "real_model"
sys.path.insert(0, str(FOLDER))

import data  # noqa: E402
import evaluate  # noqa: E402
import frontier  # noqa: E402
import methods  # noqa: E402
import pair  # noqa: E402
import points  # noqa: E402
import relearning  # noqa: E402
import robustness  # noqa: E402
import rounding  # noqa: E402
import sweep  # noqa: E402
import tables  # noqa: E402
import tofu  # noqa: E402
import train  # noqa: E402
from methods import Site  # noqa: E402

from sage_hub.method.spectra import Spectrum  # noqa: E402
from sage_hub.rows.encoding import Encoded, batches  # noqa: E402
from sage_hub.rows.sources import read_proxy  # noqa: E402

OUT, IN, TOKENS = 7, 5, 40


def _inputs(seed: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    return torch.randn(tokens, IN, generator=generator, dtype=torch.float64) * scales


def _spectrum(x: Tensor) -> Spectrum:
    """Of all directions, in float64."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values = values.flip(0).clamp(min=0)
    return Spectrum(vectors.flip(1).T.contiguous(), values, float(values.sum()), len(x))


@pytest.fixture
def delta() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(OUT, IN, generator=generator, dtype=torch.float64)


@pytest.fixture
def site() -> Site:
    return Site(_spectrum(_inputs(1)), _spectrum(_inputs(2)), 0.5, "model.layers.1.x")


def _isotropic() -> Spectrum:
    eye = torch.eye(IN, dtype=torch.float64)
    return Spectrum(eye, torch.ones(IN, dtype=torch.float64), float(IN), TOKENS)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_ridge_is_its_dual_form(delta: Tensor, site: Site) -> None:
    a, strength = _inputs(1), 3.0
    penalty = site.retain.mean_eigenvalue * len(a) / strength
    inner = a @ a.T + penalty * torch.eye(len(a), dtype=torch.float64)
    dual = delta - (delta @ a.T) @ torch.linalg.solve(inner, a)
    assert _same(methods.ridge(delta, site, strength=strength), dual)


def test_ridge_minimises_the_objective(delta: Tensor, site: Site) -> None:
    moment, strength = methods.normalized_moment(site.retain), 3.0
    found = methods.ridge(delta, site, strength=strength)
    gradient = 2 * (found - delta) + 2 * strength * found @ moment
    assert _same(gradient, torch.zeros_like(gradient))


def test_regmean_with_an_isotropic_forget_gram_is_ridge(delta: Tensor, site: Site) -> None:
    isotropic = replace(site, forget=_isotropic())
    found = methods.regmean(delta, isotropic, weight=3.0)
    assert _same(found, methods.ridge(delta, site, strength=3.0))


def test_regmean_minimises_its_objective(delta: Tensor, site: Site) -> None:
    """‖(D − Δ)X_f‖² + w‖DX_r‖², by the normalized moments."""
    forget, retain = (methods.normalized_moment(s) for s in (site.forget, site.retain))
    found = methods.regmean(delta, site, weight=2.0)
    gradient = (found - delta) @ forget + 2.0 * found @ retain
    assert _same(gradient, torch.zeros_like(gradient))


def test_regmean_is_the_limit_of_the_forget_anchored_form(delta: Tensor, site: Site) -> None:
    anchored = methods.forget_anchored(delta, site, strength=2e9, anchor=1e9)
    assert torch.allclose(anchored, methods.regmean(delta, site, weight=2.0), atol=1e-6)


def test_forget_anchored_without_an_anchor_is_ridge(delta: Tensor, site: Site) -> None:
    found = methods.forget_anchored(delta, site, strength=3.0, anchor=0.0)
    assert _same(found, methods.ridge(delta, site, strength=3.0))


def test_sage_without_a_cut_is_ridge(delta: Tensor, site: Site) -> None:
    found = methods.sage(delta, site, strength=3.0, energy=1.0)
    assert _same(found, methods.ridge(delta, site, strength=3.0))


def test_hard_projection_is_sage_at_infinity(delta: Tensor, site: Site) -> None:
    found = methods.hard(delta, site, energy=0.9)
    assert _same(found, methods.sage(delta, site, strength=math.inf, energy=0.9))
    near = methods.sage(delta, site, strength=1e12, energy=0.9)
    assert torch.allclose(found, near, atol=1e-8)
    k = site.retain.rank_for(0.9)
    assert 1 <= k < IN
    assert _same(found @ site.retain.basis[:k].T, torch.zeros(OUT, k, dtype=torch.float64))


def test_per_parameter_weighs_each_entry_by_its_information(delta: Tensor, site: Site) -> None:
    forget, retain = torch.rand(2, OUT, IN, dtype=torch.float64)
    forget[0], retain[0] = 0.0, 0.0  # nothing known
    retain[1] = 0.0
    site = replace(site, fisher=lambda: (forget, retain))
    found = methods.per_parameter(delta, site, weight=3.0)
    assert not found[0].any()
    assert torch.equal(found[1], delta[1])
    assert _same(found[2:] * (forget + 3 * retain)[2:], delta[2:] * forget[2:])


def test_fisher_information_is_the_mean_squared_gradient_row_by_row() -> None:
    model = _tiny_model()
    found = train.fisher(model, ROWS)
    squares = []
    for row in ROWS:
        (batch,) = batches([row], 1)
        loss, count = evaluate.answer_logp(model, batch)
        (grad,) = torch.autograd.grad(-loss.sum() / count.sum(), model.lm_head.weight)
        squares.append(grad.square())
    assert torch.allclose(found["lm_head.weight"], torch.stack(squares).mean(dim=0))


def test_null_space_does_nothing_on_inputs_in_the_others(delta: Tensor) -> None:
    x = _inputs(1)
    x[:, 3:] = 0
    site = Site(_spectrum(x), _isotropic(), 0.0)
    found = methods.null_space(delta, site, threshold=1e-6)
    assert _same(found @ x.T, torch.zeros(OUT, TOKENS, dtype=torch.float64))
    assert _same(found[:, 3:], delta[:, 3:])
    assert _same(methods.null_space(delta, site, threshold=1e6), delta)


def test_sap_at_its_limits(delta: Tensor, site: Site) -> None:
    assert torch.allclose(methods.sap(delta, site, alpha=1e12), torch.zeros_like(delta), atol=1e-6)
    assert _same(methods.sap(delta, site, alpha=0.0), delta)
    moment = methods.normalized_moment(site.retain) / IN  # α = 1: the complement of C / tr C
    assert _same(methods.sap(delta, site, alpha=1.0), delta - delta @ moment)


@pytest.mark.parametrize("kept", [0.05, 0.3])
def test_strength_is_solved_for_the_bias(delta: Tensor, site: Site, kept: float) -> None:
    found = methods.sage_to_bias(delta, site, kept=kept, energy=1.0)
    before, after = (methods.bias(update, site.retain) for update in (delta, found))
    assert after == pytest.approx(kept * before, rel=1e-6)
    direct = (_inputs(1) @ found.T).square().sum() / TOKENS
    assert after == pytest.approx(float(direct), rel=1e-9)


def test_a_bias_out_of_reach_takes_the_hard_projection(delta: Tensor, site: Site) -> None:
    found = methods.sage_to_bias(delta, site, kept=1e-9, energy=0.9)
    assert _same(found, methods.hard(delta, site, energy=0.9))


def test_scaling_peers(delta: Tensor, site: Site) -> None:
    assert _same(methods.scaled(delta, site), delta)
    assert _same(methods.lines(delta, site, shallow=0.2), delta * 0.6)
    assert _same(methods.lines(delta, replace(site, depth=1.0), shallow=0.2), delta)


def test_dare_keeps_the_mean_and_repeats_itself(site: Site) -> None:
    ones = torch.ones(200, 200)
    found = methods.dare(ones, site, drop=0.75)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(found, methods.dare(ones, site, drop=0.75))


def test_trimming_keeps_the_largest(site: Site) -> None:
    update = torch.tensor([[1.0, -5.0, 2.0], [0.5, 4.0, -3.0]])
    found = methods.trimmed(update, site, keep=0.5)
    assert torch.equal(found, torch.tensor([[0.0, -5.0, 0.0], [0.0, 4.0, -3.0]]))


def test_low_rank_is_the_best_approximation(delta: Tensor, site: Site) -> None:
    found = methods.low_rank(delta, site, rank=2)
    values = torch.linalg.svdvals(delta)
    assert int(torch.linalg.matrix_rank(found)) == 2
    error = (delta - found).square().sum()
    assert float(error) == pytest.approx(float(values[2:].square().sum()))
    assert _same(methods.low_rank(delta, site, rank=OUT), delta)


# Frontiers


def _points(*pairs: tuple[float, float]) -> list[tuple[list[float], list[float]]]:
    return [([forget], [heldout]) for forget, heldout in pairs]


def test_a_frontier_is_read_between_its_points() -> None:
    curve = frontier.Curve.of(_points((0.6, 0.9), (0.2, 0.5), (0.4, 0.8)))
    assert curve.at(0.5) == pytest.approx(0.85)
    assert curve.at(0.3) == pytest.approx(0.65)
    assert curve.at(0.6) == pytest.approx(0.9)
    assert curve.at(0.7) == pytest.approx(0.9)  # a point that forgets more is good enough
    assert curve.at(0.1) is None


def test_a_frontier_takes_the_best_of_the_points_that_forget_enough() -> None:
    curve = frontier.Curve.of(_points((0.6, 0.7), (0.4, 0.8), (0.2, 0.5)))
    assert curve.at(0.6) == pytest.approx(0.8)


def test_recovery_is_a_share_of_what_was_lost() -> None:
    source, base = ([0.1, 0.3], [0.4, 0.6]), ([0.9, 0.9], [0.8, 1.0])
    points = [([0.3, 0.5], [0.9, 0.9]), ([0.1, 0.1], [0.6, 0.8])]
    found = frontier.recovery(points, source, base, level="source", draws=0)
    # At the forget level .2 the curve from (.4, .9) to (.1, .7) is at .9 − .2·(.2/.3).
    at = 0.9 - 0.2 * (0.2 / 0.3)
    assert found.value == pytest.approx((at - 0.5) / (0.9 - 0.5))


def test_the_interval_is_paired_and_holds_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    source = ([0.2] * 30, torch.rand(50, generator=generator).mul(0.3).tolist())
    base = ([0.9] * 30, [p + 0.4 for p in source[1]])
    points = [([0.2] * 30, [p + 0.3 for p in source[1]])]
    found = frontier.recovery(points, source, base, level="source", draws=200)
    # Every row loses .4 and gets .3 back, so which rows are drawn cannot matter.
    assert found.value == pytest.approx(0.75)
    assert found.low == pytest.approx(0.75)
    assert found.high == pytest.approx(0.75)


def test_a_level_that_is_not_reached_has_no_recovery() -> None:
    source, base = ([0.1], [0.4]), ([0.9], [0.8])
    found = frontier.recovery([([0.5], [0.7])], source, base, level="source", draws=50)
    assert found.value is None


# Evaluation and training


def test_rounding_to_nearest_keeps_its_grid() -> None:
    weight = torch.tensor([[7.0, -3.2, 0.4, 1.0], [0.0, 0.0, 0.0, 0.0]])
    found = evaluate.round_to_nearest(weight, bits=4, group=4)
    assert torch.equal(found, torch.tensor([[7.0, -3.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    fine = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    step = fine.abs().amax(1, keepdim=True) / 127
    assert ((evaluate.round_to_nearest(fine, bits=8) - fine).abs() <= step / 2 + 1e-6).all()


def test_quantized_weights_come_back() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    with evaluate.quantized({"w": weight}, 4):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_compensated_rounding_is_on_the_grid_and_disturbs_less() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator) * torch.linspace(3, 0.05, 24)
    inputs = torch.randn(500, 24, generator=generator) @ mixing.T
    moment = inputs.T @ inputs / len(inputs)
    weight = torch.randn(16, 24, generator=generator)
    error = {}
    for name in ("rounded", "compensated"):
        stored = rounding.WAYS[name](weight, moment)
        assert torch.equal(stored.to(torch.bfloat16).float(), stored)
        error[name] = float(((stored - weight) @ moment @ (stored - weight).T).trace())
    assert error["compensated"] < 0.5 * error["rounded"]


def _tiny_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


ROWS = [Encoded((1, 2, 3, 4), 2), Encoded((5, 6, 7, 8, 9, 10), 3), Encoded((11, 12), 1)]


def test_batched_losses_are_those_of_each_row_alone() -> None:
    model = _tiny_model()
    found = evaluate.losses(model, ROWS, batch_size=2)
    for row, loss in zip(ROWS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, row.answer_start - 1 : -1]
        own = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.answer_start :]))
        assert loss == pytest.approx(float(own), rel=1e-5)


def test_choices_are_shares_of_their_candidates() -> None:
    model = _tiny_model()
    (share,) = evaluate.choices(model, [ROWS[:2]])
    right, wrong = evaluate.probabilities(model, ROWS[:2])
    assert share == pytest.approx(right / (right + wrong), rel=1e-5)


def _step() -> train.Batches:
    (batch,) = batches(ROWS, 3)
    return train.Batches(batch, batch)


def test_graddiff_on_equal_rows_cancels() -> None:
    assert float(train.grad_diff(_tiny_model(), _step()).detach()) == pytest.approx(0, abs=1e-6)


def test_npo_starts_at_its_value_for_an_unchanged_model() -> None:
    """At π = π_ref the loss is (2/β) log 2, and its gradient that of gradient ascent on log π."""
    model = _tiny_model()
    (batch,) = batches(ROWS, 3)
    logp, _ = evaluate.answer_logp(model, batch)
    reference = torch.zeros(3)
    reference[list(batch.rows)] = logp.detach()
    loss = train.npo(reference)(model, _step())
    assert float(loss) == pytest.approx(2 / train.NPO_BETA * math.log(2), rel=1e-5)
    loss.backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    evaluate.answer_logp(model, batch)[0].mean().backward()
    assert torch.allclose(found, model.lm_head.weight.grad, atol=1e-5)


def test_simnpo_weighs_by_the_mean_over_tokens() -> None:
    model = _tiny_model()
    step = _step()
    logp, count = evaluate.answer_logp(model, step.forget)
    beta = train.SIMNPO_BETA
    expected = (2 / beta * torch.log1p(torch.exp(beta * logp / count))).mean()
    assert float(train.simnpo(model, step).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_rmu_trains_three_projections_and_is_zero_on_what_is_kept() -> None:
    model, frozen = _tiny_model(), _tiny_model()
    rmu = train.Rmu.of(frozen, ROWS, seed=0)
    loss = rmu(model, _step())
    loss.backward()
    trained = rmu.parameters(model)
    assert len(trained) == 3
    assert all(p.grad is not None and p.grad.any() for p in trained)
    (batch,) = batches(ROWS, 3)
    hidden = train._hidden(model, rmu.layer, batch)[batch.mask.bool()]
    steered = (hidden - rmu.target).square().mean()
    assert float(loss) == pytest.approx(float(steered), rel=1e-5)


def test_the_optimizer_moves_a_bfloat16_model_by_less_than_its_rounding() -> None:
    """What the float32 copies are for: steps far under one part in 256 add up."""
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = train.Optimizer([weight], rate=1e-3)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight[0].detach()) == pytest.approx(0.98, abs=0.004)


def test_batches_of_an_epoch_hold_every_row_once() -> None:
    import random

    rows = [Encoded(tuple(range(1, 3 + n % 5)), 1) for n in range(37)]
    found = train.shuffled(rows, 4, random.Random(0))
    places = [place for batch in found for place in batch.rows]
    assert sorted(places) == list(range(37))
    for batch in found:
        for line, place in enumerate(batch.rows):
            assert int(batch.mask[line].sum()) == len(rows[place].ids)


ELSEWHERE = """
import torch
from support.pretend_device import NAME, appear, pretending
appear()
from test_real_model import ROWS, _inputs, _spectrum, _step, _tiny_model
from test_real_model import evaluate, methods, rounding, train
from plan import STAGES

def spectrum(seed):
    made = _spectrum(_inputs(seed))
    return methods.Spectrum(made.basis.float(), made.values, made.trace, made.tokens)

fisher = torch.rand(2, 7, 5)
site = methods.Site(spectrum(1), spectrum(2), 0.5, "model.layers.1.x", lambda: tuple(fisher))
moment = methods.moment(site.retain)
strengths = {one.method: one.strength for stage in STAGES.values() for one in stage}
assert strengths.keys() <= methods.METHODS.keys()
with pretending():
    delta = torch.randn(7, 5).to(NAME)
    for name, strength in strengths.items():
        own = {**strength, "rank": 2} if name == "low_rank" else strength
        found = methods.METHODS[name](delta, site, **own)
        assert found.device.type == NAME, name
        assert methods.bias(found, site.forget) >= 0
    for store in rounding.WAYS.values():
        assert store(delta, moment.to(delta)).device.type == NAME

    model = _tiny_model().requires_grad_(False)
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own |= {name: tensor.to(NAME) for name, tensor in own.items() if tensor is not None}
    reference = -torch.tensor(evaluate.losses(model, ROWS))
    rmu = train.Rmu.of(model, ROWS, seed=0)
    for loss in (train.npo(reference), train.simnpo, train.ascend, train.grad_diff, rmu):
        assert loss(model, _step()).device.type == NAME, loss
"""


def test_repairs_and_losses_are_computed_where_their_model_lies() -> None:
    """On a GPU, with rows and second moments on the CPU: on a device that is pretended."""
    found = os.pathsep.join([str(Path(__file__).parent), str(FOLDER), *sys.path])
    told = [sys.executable, "-c", ELSEWHERE, "long"]
    environment = {**os.environ, "PYTHONPATH": found}
    run = subprocess.run(told, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


# The ledger


def test_a_point_is_found_again_by_all_that_it_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "points" / "x.jsonl"
    about = {"method": "sage", "strength": {"energy": 0.9}, "gain": 1.0}
    sweep.Ledger(path).put(about, {"forget": [0.5]})
    again = sweep.Ledger(path)
    assert again.get(dict(reversed(about.items())))["forget"] == [0.5]
    assert again.get({**about, "gain": 2.0}) is None
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 1


# The report


def test_means_over_seeds_count_what_was_not_reached_as_the_source() -> None:
    import numpy as np

    reached = frontier.Recovery(0.8, np.full(points.DRAWS, 0.8))
    missed = frontier.Recovery(None, np.empty(0))
    found = tables.over_methods([reached, frontier.Recovery(0.4, np.full(points.DRAWS, 0.4))])
    assert (found.value, found.high) == pytest.approx((0.6, 0.6))
    # The draws of a mean over seeds draw the seeds as well.
    found = tables.over_seeds([reached, missed])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.0, 0.8))
    nothing = tables.over_seeds([missed])
    assert nothing is not None
    assert nothing.value is None
    assert tables.over_seeds([]) is None


def test_a_sweep_that_was_stopped_is_not_taken_for_one_that_fell_short() -> None:

    about = {"method": "hard", "strength": {"energy": 0.9}, "retain": "retain", "others": "source"}
    row = {**about, "gain": 2.0, "forget": [0.5]}
    assert not points.finished([row], 0.1)
    assert points.finished([row], 0.6)
    assert points.finished([row, {**row, "gain": 12.0}], 0.1)


def _write_tofu(folder: Path, counts: dict[str, int]) -> None:
    """Files of made-up rows under TOFU's names, each with as many as is asked."""
    folder.mkdir()
    for seed, (name, count) in enumerate(counts.items()):
        rows = make_rows(count, seed)
        write_rows(folder / f"{name}.json", rows)
        perturbed = "retain" if name.startswith("retain") else name
        _write_perturbed(folder, perturbed, rows[:400], name not in data.BYSTANDERS)


def _write_perturbed(folder: Path, name: str, rows: list[dict[str, Any]], reworded: bool) -> None:
    told = [
        row
        | {"perturbed_answer": ["w1", "w2 w3"]}
        | ({"paraphrased_answer": row["answer"]} if reworded else {})
        for row in rows
    ]
    write_rows(folder / f"{name}_perturbed.json", told)


@pytest.mark.parametrize("name", data.SIZES)
def test_every_size_is_drawn_from_files_as_large_as_tofus(name: str, tmp_path: Path) -> None:
    size = data.SIZES[name]
    forget, retain = int(size.forget[-2:]) * 40, int(size.retain[-2:]) * 40
    counts = {size.forget: forget, size.retain: retain, "real_authors": 100, "world_facts": 117}
    _write_tofu(tmp_path / "tofu", counts)
    rows = data.read_rows(str(tmp_path / "tofu"), size, 0)
    assert {len(rows.forget.rows), len(rows.perturbed["forget"].rows)} == {forget}
    assert len(rows.heldout.rows) == 20 * size.heldout_authors
    assert {len(questions) for questions in rows.choices.values()} == {size.bystanders}
    assert all(len(proxy.rows) for proxy in rows.proxies.values())
    seen = {row.prompt for row in rows.proxies[data.MAIN].rows}
    learned = {row.prompt for row in (*rows.keep.rows, *rows.heldout.rows)}
    if "heldout" in rows.perturbed:
        assert {row.prompt for row in rows.perturbed["heldout"].rows} <= learned - seen


# The whole of it, in small


def test_the_benchmark_runs_from_rows_to_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import build
    from plan import SCALED, Config

    def small_model() -> tuple[Any, Any]:
        model = LlamaForCausalLM(make_config(num_hidden_layers=3, tie_word_embeddings=True))
        return model, make_tokenizer()

    monkeypatch.setattr(robustness, "RELEARNED", 5)
    few = {"forget01": 20, "retain99": 60, "real_authors": 6, "world_facts": 6}
    _write_tofu(tmp_path / "tofu", few)
    monkeypatch.setattr(build, "load_smollm2", small_model)
    monkeypatch.setattr(build, "LEARN", {"epochs": 1, "batch": 8, "rate": 1e-2})
    monkeypatch.setattr(build, "MOST_STEPS", 4)
    size = data.Size("small", "forget01", "retain99", 2, 1, 16, 10, 3)
    shop = build.Workshop(tmp_path / "cache", size, 0, str(tmp_path / "tofu"), say=lambda _: None)

    sage = {"strength": 10, "energy": 0.9}
    configs = [
        Config("sage", sage, (1.0, 3.0), match=True),
        Config("sage", sage, (2.0,), retain="general"),
        Config("sage", sage, (2.0,), others="base"),
        Config("sage", sage, (2.0,), others="filtered"),
        Config("sage", sage, (2.0,), drop=0.5),
    ]
    with sweep.Bench(shop, "GradDiff", "strong") as bench:
        rows = [bench.plain("base"), bench.plain("reference"), bench.unlearned]
        for config in (SCALED, *configs):
            rows += list(bench.run(config))
        ways = [row["what"] for row in rounding.run(bench, [1.0])]
        assert ways == list(rounding.WAYS)
        undone = list(relearning.run(bench))
        assert len(undone) > 3
        assert undone[0]["distance"] == pytest.approx(1)
        assert undone[0]["forget"] == bench.unlearned["forget"]
        assert [row["distance"] for row in undone[1:4]] == sorted(
            row["distance"] for row in undone[1:4]
        )
        own = list(tofu.run(bench))
        assert {row["what"] for row in own} == {"tofu"}
        assert own[0]["figures"]["all.model_utility"] >= 0
        assert len(own[0]["ratios"]) == 20
        # What stays as it was, and what a repair is made of.
        source, kept = bench.unlearned, [bench.update(config)[1] for config in configs]
        bench.apply(SCALED, bench.update(SCALED)[0], 1.0)
        assert bench.core() == {which: source[which] for which in ("forget", "heldout")}
        assert kept[-1]["retain"] < kept[0]["retain"]
    assert {len(point["forget"]) for point in rows} == {10}
    pair.lay_out(shop, "GradDiff", "strong", tmp_path / "pair")
    assert (tmp_path / "pair" / "unlearned").resolve() == shop.source("GradDiff", "strong")
    laid = {"retain": shop.rows.proxies["retain"], "forget": shop.rows.forget}
    for name, proxy in {**laid, "heldout": shop.rows.heldout}.items():
        read = read_proxy(str(tmp_path / "pair" / f"{name}.jsonl"))
        assert read.row_hashes == proxy.row_hashes
    found = points.gather(tmp_path / "cache", "small")
    (only,) = points.read_sources(found)
    assert [row["gain"] for row in only.points("sage", sage, retain="general")] == [2.0]
    assert 1.0 in [row["gain"] for row in only.points("sage", sage)]
    for table in tables.TABLES.values():
        assert table(found, [only])

    # On another machine a run goes on from what is published.
    sweep.restore(found, tmp_path / "other")
    again = points.gather(tmp_path / "other", "small", found["sources"])
    assert again == found
    ledger = sweep.Ledger(tmp_path / "other" / "small-0" / "points" / "GradDiff-strong.jsonl")
    assert ledger.rows.keys() == bench.ledger.rows.keys()
