"""In which type models are run: what is chosen on either kind of machine; all go by it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import load_weights
from support.loopback_hub import LoopbackHub
from support.pico import make_pair, make_tokenizer, proxies
from support.reference import sanitized_reference
from transformers import AutoModelForCausalLM

from sage_hub.calibration.statistics import open_statistics
from sage_hub.cli.main import main
from sage_hub.model.compute import CLEARLY, TYPES, compute_type, faster, name_of, seconds

SHORT = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What a product takes on a CPU with units for bfloat16, and on one with AVX2 alone.
MACHINES = {
    "with units": {torch.float32: 6.0, torch.bfloat16: 1.0, torch.float16: 6.0},
    "AVX2": {torch.float32: 1.0, torch.bfloat16: 50.0, torch.float16: 45.0},
}


def on(machine: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sage_hub.model.compute.seconds", MACHINES[machine].__getitem__)
    patch.setattr("sage_hub.model.compute._machine", lambda: {"model": machine})


@given(st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_float32_is_taken_where_it_is_clearly_faster(of_stored: float, of_float32: float) -> None:
    chosen = faster(torch.bfloat16, of_stored, of_float32)
    assert (chosen == torch.float32) == (of_stored > CLEARLY * of_float32)
    assert chosen in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("stored", TYPES.values(), ids=TYPES)
def test_what_is_chosen(stored: torch.dtype, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(machine, monkeypatch)
    expected = torch.float32 if machine == "AVX2" else stored
    assert compute_type("auto", stored, "cpu") == expected
    assert compute_type("auto", stored, "cuda:0") == stored
    for name, dtype in TYPES.items():  # what is asked for is what is done
        assert compute_type(name, stored, "cpu") == dtype
        assert name_of(dtype) == name


def test_a_machine_is_asked_once(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run which was stopped goes on, however busy the machine is by then."""
    on("with units", monkeypatch)
    assert compute_type("auto", torch.bfloat16, "cpu") == torch.bfloat16
    busy = MACHINES["AVX2"]
    monkeypatch.setattr("sage_hub.model.compute.seconds", busy.__getitem__)
    assert compute_type("auto", torch.bfloat16, "cpu") == torch.bfloat16
    assert compute_type("auto", torch.float16, "cpu") == torch.float32  # another question
    on("AVX2", monkeypatch)  # and another machine
    assert compute_type("auto", torch.bfloat16, "cpu") == torch.float32


def test_the_probe_takes_any_type() -> None:
    assert all(seconds(dtype) > 0 for dtype in TYPES.values())


def run(pair: Path, out: str, *words: str) -> dict[str, Any]:
    both = [str(pair / "base"), str(pair / "unlearned"), *proxies(pair), "--quiet"]
    assert main(["sanitize", *both, "--output", str(pair / out), *words]) == 0
    found: dict[str, Any] = json.loads((pair / out / "sage" / "manifest.json").read_text())
    found["report"] = json.loads((pair / out / "sage" / "report.json").read_text())
    return found


@pytest.mark.parametrize("machine", MACHINES)
def test_a_release_says_in_which_type_it_was_computed(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(tmp_path)
    on(machine, monkeypatch)
    chosen = "float32" if machine == "AVX2" else "bfloat16"
    made = run(tmp_path, "out")
    assert made["settings"]["compute_dtype"] == chosen
    assert made["statistics"]["settings"]["compute_dtype"] == chosen
    # Elsewhere it is made again as it was, whatever is faster there.
    on("AVX2" if machine != "AVX2" else "with units", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "out", "--rebuild", "--quiet"]) == 0
    again = run(tmp_path, "again", "--compute-dtype", chosen)
    assert again["files"] == made["files"]
    other = run(tmp_path, "other")
    assert other["settings"]["compute_dtype"] != chosen
    assert other["files"] != made["files"]


@pytest.mark.parametrize("stored", SHORT)
def test_float32_is_the_exact_one(stored: str, tmp_path: Path) -> None:
    """The weights come out as the float64 reference has them, which the stored type misses."""
    make_pair(tmp_path, dtype=SHORT[stored])
    rows = [json.loads(line) for line in (tmp_path / "retain.jsonl").read_text().splitlines()]
    how: dict[str, Any] = {"strength": 10, "energy": 0.9, "gain": 1, "shares": {}}
    for side in ("base", "unlearned"):  # the same numbers, for the reference to run in float32
        model = AutoModelForCausalLM.from_pretrained(tmp_path / side, dtype=torch.float32)
        model.save_pretrained(tmp_path / "wide" / side)
        make_tokenizer().save_pretrained(tmp_path / "wide" / side)
    wide = tmp_path / "wide"
    expected = sanitized_reference(wide / "base", wide / "unlearned", rows, **how)
    source = load_weights(tmp_path / "unlearned")
    missed = {}
    for computed in ("float32", stored):
        words = ["--strength", "10", "--energy", "0.9", "--gain", "1", "--out-dtype", "float32"]
        run(tmp_path, computed, *words, "--compute-dtype", computed, "--generate-rows", "0")
        found = load_weights(tmp_path / computed)
        way = math.hypot(*(float((source[n].double() - t).norm()) for n, t in expected.items()))
        far = math.hypot(*(float((found[n].double() - t).norm()) for n, t in expected.items()))
        missed[computed] = far / way  # of what the filter does
    assert missed["float32"] < 1e-4
    assert missed["float32"] < missed[stored] / 3


@pytest.mark.parametrize("computed", TYPES)
def test_evaluation_is_that_of_a_model_of_this_type(computed: str, tmp_path: Path) -> None:
    make_pair(tmp_path)
    made = run(tmp_path, "out", "--compute-dtype", computed, "--gain", "1")
    loss = {
        r["model"]: r["value"]
        for r in made["report"]["results"]
        if (r["set"], r["metric"]) == ("heldout", "loss")
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=TYPES[computed])
    assert loss["base"] == pytest.approx(_loss(model, tmp_path), rel=2e-4)


def _loss(model: Any, pair: Path) -> float:
    """Per answer token, over all rows."""
    tokenizer, total, count = make_tokenizer(), 0.0, 0
    for line in (pair / "heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        before = f"Question: {row['question']}\nAnswer:"
        ids = tokenizer(f"{before} {row['answer']}", return_tensors="pt")["input_ids"]
        start = len(tokenizer(before)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].float()
        spread = logits[start - 1 : -1].log_softmax(-1)
        total -= float(spread.gather(1, ids[0, start:, None]).sum())
        count += ids.shape[1] - start
    return total / count


def test_statistics_of_another_type_are_used_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path)
    file = tmp_path / "base.safetensors"
    words = [str(tmp_path / "base"), "--retain", str(tmp_path / "retain.jsonl"), "--quiet"]
    assert main(["stats", *words, "--output", str(file), "--compute-dtype", "float32"]) == 0
    with open_statistics(file) as made:
        assert made.origin.settings["compute_dtype"] == "float32"
    both = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--stats", str(file)]
    both += ["--compute-dtype", "bfloat16", "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["sanitize", *both]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert 'were made with compute_dtype "float32"; this run has "bfloat16".' in said
    manifest = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    assert manifest["settings"]["compute_dtype"] == "bfloat16"
    assert manifest["statistics"]["settings"]["compute_dtype"] == "float32"


def test_the_plan_says_it_and_counts_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(tmp_path)
    both = ["sanitize", str(tmp_path / "base"), str(tmp_path / "unlearned"), "--dry-run"]
    both += ["--retain", str(tmp_path / "retain.jsonl"), "--output", str(tmp_path / "out")]
    needed = {}
    for machine in MACHINES:
        on(machine, monkeypatch)
        capsys.readouterr()
        assert main([*both, "--json"]) == 0
        out, err = capsys.readouterr()
        needed[machine] = json.loads(out)["memory"]["weights"]
        told = "on cpu in float32 (the base is stored in bfloat16)"
        assert (told in " ".join(err.split())) == (machine == "AVX2")
    assert needed["AVX2"] == 2 * needed["with units"]
