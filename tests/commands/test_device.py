"""On a device other than the CPU: one that is pretended (see pretend_device.py), or a real one.

    SAGE_HUB_TEST_DEVICE=cuda pytest tests/commands/test_device.py

The variable also shows GPUs to all other tests, which without it do not see them (conftest.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.architectures import check_release, make_model, make_sides, move, single
from support.checkpoints import load_weights
from support.pico import make_pair, make_rows, proxies, update, write_rows
from transformers import LlamaForCausalLM

from sage_hub.cli.main import main

TESTS = Path(__file__).parents[1]
REAL = os.environ.get("SAGE_HUB_TEST_DEVICE")


def far_away(numbers: str, *commands: list[str]) -> str:
    """Run commands there; what they say on stdout."""
    pretended = ["support.pretend_device", numbers, *map(json.dumps, commands)]
    real = [["sage_hub", *command, "--device", str(REAL)] for command in commands]
    found = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": found}
    said = ""
    for words in real if REAL else [pretended]:
        told = [sys.executable, "-m", *words]
        run = subprocess.run(told, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        said += run.stdout
    return said


@pytest.mark.parametrize(
    "numbers, names", [("long", ["Llama", "Mixtral"]), ("short", ["GPT2", "GptOss"])]
)
def test_streaming_equals_the_whole_model(numbers: str, names: list[str], tmp_path: Path) -> None:
    commands = []
    for name in names:
        model = make_model(name)
        arguments = make_sides(tmp_path / name, model, model)
        move(model)
        single(model, tmp_path / name / "unlearned")
        commands.append([*arguments, "--gain", "1"])
    far_away(numbers, *commands)
    for folder in tmp_path.iterdir():
        check_release(folder)


def shorten(pair: Path) -> None:
    """Leave few rows: nothing is fast there."""
    for seed, name in enumerate(("retain", "forget", "heldout")):
        write_rows(pair / f"{name}.jsonl", make_rows(8, seed))


def test_the_whole_job(tmp_path: Path) -> None:
    make_pair(tmp_path, dtype=torch.float32)
    shorten(tmp_path)
    sides = [str(tmp_path / "base"), str(tmp_path / "unlearned")]
    sets = proxies(tmp_path)
    there = []
    for moments, some in (("exact", sets), ("sketch", [*sets[:2], "--gain", "1"])):
        here = tmp_path / moments
        job = ["sanitize", *sides, *some, "-q", "--moments", moments, "--generate-rows", "0"]
        assert main([*job, "--output", str(here / "near"), "--device", "cpu"]) == 0
        there.append([*job, "--output", str(here / "far")])
    far_away("short", *there)
    for moments in ("exact", "sketch"):
        check_alike(tmp_path / moments / "near", tmp_path / moments / "far")


def test_states_of_one_model_are_put_into_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path, dtype=torch.float32)
    shorten(tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    update(reference, seed=2, size=0.1)
    reference.save_pretrained(tmp_path / "reference")
    job = ["eval", str(tmp_path / "base"), str(tmp_path / "unlearned"), "--depth", "--json", "-q"]
    job += ["--forget", str(tmp_path / "forget.jsonl"), "--generate-rows", "0"]
    job += ["--reference", str(tmp_path / "reference")]
    assert main([*job, "--device", "cpu"]) == 0
    reports = [json.loads(said) for said in (capsys.readouterr().out, far_away("short", job))]
    assert [report["hardware"]["device"] for report in reports] == ["cpu", "far"]
    near, far = (
        next(one["value"] for one in report["results"] if one["metric"] == "uds_answer")
        for report in reports
    )
    assert 0 < near < 1
    assert far == pytest.approx(near, abs=1e-4)


def check_alike(near: Path, far: Path) -> None:
    """Two releases differ by rounding only."""
    expected, found = load_weights(near), load_weights(far)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    reports = [json.loads((out / "sage" / "report.json").read_text()) for out in (near, far)]
    assert [report["hardware"]["device"] for report in reports] == ["cpu", REAL or "far"]
    losses = [
        [one["value"] for one in report["results"] if one["metric"] == "loss"] for report in reports
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_other_commands(pair: Path, tmp_path: Path) -> None:
    sides = [str(pair / "base"), str(pair / "unlearned")]
    sets = proxies(pair)
    shorten(pair)
    far_away(
        "short",
        ["audit", *sides, *sets[:4]],
        ["plan", sides[0]],
        # Nothing can be trained where it is only pretended.
        ["eval", *sides, *sets, "--generate-rows", "2", *(["--robustness"] if REAL else [])],
    )
