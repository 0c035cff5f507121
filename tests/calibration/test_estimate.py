"""What a run takes, said before it: from a config alone, and near what it then takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, make_model
from support.pico import make_config
from transformers import LlamaForCausalLM

from sage_hub.calibration.budget import expect_calibration
from sage_hub.calibration.estimate import Rates, Robustness, cache_bytes, estimate, weight_bytes
from sage_hub.calibration.journal import Journal
from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.cli.main import main
from sage_hub.settings import Settings

ONE = Rates(forward=1, generation=1, moments=1, sketches=1, float64=1, hashing=1)


def test_a_config_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_config(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8).save_pretrained(
        tmp_path
    )
    assert main(["plan", str(tmp_path), "--memory", "4", "--json", "--max-tokens", "5000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["widest"] == 14336
    assert found["sites"] == 8 * 4
    by_name = {mode["name"]: mode for mode in found["modes"]}
    assert by_name["exact"]["budget"]["total"] > 4e9
    assert by_name["exact"]["budget"]["sketched"] == 0
    assert by_name["auto"]["budget"]["sketched"] > 0
    assert by_name["rank 64"]["statistics"] < by_name["sketch"]["statistics"]
    assert main(["plan", str(tmp_path), "--memory", "4"]) == 0
    out = capsys.readouterr().out
    assert "1.81 billion parameters" in out
    assert "too much" in out


def test_the_flops_are_those_of_the_layers(tmp_path: Path) -> None:
    config = make_config(num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    model = Checkpoint(open_files(str(tmp_path)), {}).empty_model()
    layers = LlamaForCausalLM(config).model.layers
    weights = sum(parameter.numel() for parameter in layers.parameters())
    found = estimate(model, Settings(), tokens=100, longest=10, rates=ONE)
    auto, exact, sketch, _ = found.modes
    assert exact.forward == 2 * 100 * weights
    sizes = 3 * [32, 32, 32, 64]  # q k v, o, gate and up, down
    assert exact.moments == sum(1.125 * 100 * size**2 for size in sizes)
    assert sketch.moments == sum(4 * 100 * size * (size // 4) for size in sizes)
    assert auto.budget == exact.budget
    assert exact.statistics >= sum(4 * size**2 for size in sizes)
    assert found.modes[0].budget.total > weight_bytes(model) / 3


def test_a_forget_set_costs_as_much_again_where_calibration_looks_at_it(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    model = Checkpoint(open_files(str(tmp_path)), {}).empty_model()

    def costs(**given: Any) -> tuple[float, ...]:
        found = estimate(model, Settings(**given), tokens=100, longest=10, rates=ONE)
        mode = found.modes[1]
        return mode.forward, mode.moments, mode.decompositions, mode.statistics

    one = costs(retain="r")
    assert costs(retain="r", forget="f") == tuple(2 * cost for cost in one)
    assert costs(retain="r", forget="f", gain=1.0) == one


def test_rows_that_the_base_writes_take_their_time_too(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, rows in {"none": [], "given": ["--retain", str(pair / "retain.jsonl")]}.items():
        assert main(["plan", str(pair / "base"), "--json", "--gain", "1", *rows]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert main(["plan", str(pair / "base"), "--gain", "1", *rows]) == 0
        assert ("The base writes rows" in capsys.readouterr().out) == (name == "none")
    assert found["none"]["writing_seconds"] > 0
    assert found["given"]["writing_seconds"] == found["given"]["written_tokens"] == 0


def test_robustness_takes_its_time_where_it_is_wanted(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    forget = ["--forget", str(pair / "forget.jsonl"), "--max-tokens", "1000", "--max-length", "20"]
    robust = ["--robustness"]
    for name, words in {"none": forget, "rounded": robust, "all": [*forget, *robust]}.items():
        assert main(["plan", str(pair / "base"), "--json", "--gain", "1", *words]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert main(["plan", str(pair / "base"), "--gain", "1", *words]) == 0
        assert ("Robustness of 3 models" in capsys.readouterr().out) == (name != "none")
    assert found["none"]["robustness_seconds"] == 0 < found["rounded"]["robustness_seconds"]
    assert found["rounded"]["robustness"]["trained"] == 0
    # 100 steps of 4 rows in each attack: those of 20 rows, twenty times, and of 200 rows, twice.
    assert found["all"]["robustness"]["trained"] == 400 * 20 + 2 * 1000
    assert found["all"]["robustness"]["sampled"] == 8 * 40 * 200
    assert found["all"]["robustness"]["shown"] == (2 * 2 + 6) * 1000


def test_training_is_three_passes_forward_in_float32(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    model = Checkpoint(open_files(str(tmp_path)), {}).empty_model()
    given = {"tokens": 100, "longest": 10, "rates": replace(ONE, moments=ONE.forward / 2)}
    one = estimate(model, Settings(), robustness=Robustness(shown=60), **given)
    other = estimate(model, Settings(), robustness=Robustness(trained=10), **given)
    assert one.robustness_seconds == pytest.approx(other.robustness_seconds)
    said = estimate(model, Settings(), robustness=Robustness(sampled=60), **given)
    assert one.robustness_seconds == pytest.approx(said.robustness_seconds)
    assert estimate(model, Settings(), **given).robustness_seconds == 0


def test_depth_takes_a_pass_for_each_model_and_layer(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(pair / "base"), "--forget", str(pair / "forget.jsonl"), "--gain", "1"]
    for depth in ([], ["--depth"]):
        assert main([*words, *depth]) == 0
        line = "Unlearning depth, with 8 passes of the base over at most 40 forget rows"
        assert (line in capsys.readouterr().out) == bool(depth)
    make_config(num_hidden_layers=6).save_pretrained(tmp_path)
    model = Checkpoint(open_files(str(tmp_path)), {}).empty_model()
    given = {"tokens": 100, "longest": 10, "rates": ONE}
    found, none = (estimate(model, Settings(), deep=deep, **given) for deep in (300, 0))
    # Every model as it is, and four times half of six layers, six times.
    assert found.depth_seconds == pytest.approx((5 + 4 * 3) * 1.6 * found.modes[0].forward * 3)
    assert (found.patched_passes, none.patched_passes, none.depth_seconds) == (24, 0, 0)


@pytest.mark.parametrize("forget", [False, True], ids=["retain", "retain and forget"])
def test_the_disk_of_a_calibration_is_what_it_takes_at_its_end(
    forget: bool, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the statistics are written from the journal, both are there."""
    remove, taken = Journal.remove, list[int]()

    def watched(self: Journal) -> None:
        files = [p for p in tmp_path.rglob("*") if p.is_file() and pair not in p.parents]
        taken.append(sum(path.stat().st_size for path in files))
        remove(self)

    monkeypatch.setattr(Journal, "remove", watched)
    sets = ["--retain", str(pair / "retain.jsonl")]
    sets += ["--forget", str(pair / "forget.jsonl")] * forget
    output = str(tmp_path / "base.safetensors")
    words = ["stats", str(pair / "base"), *sets, "--energy", "1", "--output", output, "-q"]
    assert main(words) == 0
    settings = Settings(retain="r", forget="f" if forget else None, gain="match" if forget else 1.0)
    base = open_checkpoint(str(pair / "base"))
    kept = expect_calibration(base, replace(settings, energy=1.0))[2]
    assert kept < max(taken) < 2 * kept + 100_000  # names and sizes


def test_an_expert_costs_what_is_routed_to_it(tmp_path: Path) -> None:
    make_model("Mixtral").save_pretrained(tmp_path)  # 2 of 4 experts for a token
    model = open_checkpoint(str(tmp_path)).empty_model()
    state = model.state_dict(keep_vars=True)
    layers = {name: t for name, t in state.items() if ".layers." in name}
    experts = sum(t.numel() for t in layers.values() if t.ndim == 3)
    others = sum(t.numel() for t in layers.values() if t.ndim < 3)
    found = estimate(model, Settings(), tokens=10, longest=10, rates=ONE)
    assert found.modes[0].forward == 2 * 10 * (experts / 2 + others)
    assert torch.float32 == model.dtype


def test_plan_of_two_sides_is_a_dry_run_with_its_price(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(pair.rglob("*"))
    sides = [str(pair / "base"), str(pair / "unlearned")]
    assert main(["plan", *sides, "--retain", str(pair / "retain.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "tensors can be filtered" in out
    assert "Calibration on at most 131072 tokens" in out
    assert main(["plan", *sides, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {
        "plan",
        "settings",
        "problems",
        "warnings",
        "local",
        "estimate",
        "memory",
    } == found.keys()
    assert sorted(pair.rglob("*")) == before


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_keys_and_values_take_no_more_than_that(name: str) -> None:
    model = make_model(name)
    language = getattr(model, "language_model", None) or model
    ids = torch.randint(3, 60, (3, 8))
    kept = language(input_ids=ids, use_cache=True).past_key_values
    held = sum(
        tensor.nbytes
        for layer in kept.layers
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    )
    found = cache_bytes(model, ids.numel())
    assert 0 < held <= found
    if name == "Llama":
        assert held == found
