"""Calibration within a budget: what gives way, and a model larger than all the memory there is."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import make_model
from support.pico import make_config, make_rows, make_tokenizer, write_rows
from support.soak import soak
from transformers import LlamaForCausalLM

from sage_hub.calibration.budget import RUNTIME, Budget, plan_memory
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.cli.main import main
from sage_hub.errors import OutOfMemoryError
from sage_hub.model.blocks import cut
from sage_hub.model.sites import find_sites
from sage_hub.runtime.machine import GB
from sage_hub.settings import Settings

# transformers imports some libraries wherever they are installed, as lm-eval's are for the tests.
ALONE = (
    "import sys; sys.modules.update(dict.fromkeys(('sklearn', 'scipy', 'accelerate', 'peft'))); "
    "from sage_hub.cli.main import main; sys.exit(main())"
)
LIMIT = 1_100_000_000  # bytes of address space, of which the libraries take about 770 MB


def write_large(folder: Path, size: int) -> None:
    """A Llama of at least `size` bytes, all of whose layers are alike, a shard for each."""
    torch.manual_seed(0)
    wide: dict[str, Any] = {"hidden_size": 1536, "intermediate_size": 3072}
    one = LlamaForCausalLM(make_config(**wide, num_hidden_layers=1)).to(torch.bfloat16)
    layer = {n: t for n, t in one.state_dict().items() if n.startswith("model.layers.0.")}
    layers = size // sum(tensor.nbytes for tensor in layer.values()) + 1
    make_config(**wide, num_hidden_layers=layers, dtype="bfloat16").save_pretrained(folder)
    shards = {"rest.safetensors": {n: t for n, t in one.state_dict().items() if n not in layer}}
    for number in range(layers):
        shards[f"layer-{number}.safetensors"] = {
            name.replace(".0.", f".{number}.", 1): tensor for name, tensor in layer.items()
        }
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("times", [1.3, soak(3)])
def test_a_model_larger_than_the_memory(times: float, tmp_path: Path) -> None:
    write_large(tmp_path / "base", int(times * LIMIT))
    write_rows(tmp_path / "retain.jsonl", make_rows(20, seed=0))
    words = ["stats", "./base", "--retain", "retain.jsonl", "--output", "base.st", "--memory", "1"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", ALONE, *words, "--moments", "sketch", "--rank", "8"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            # Every thread of glibc reserves 64 MB of addresses, used or not.
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
            check=False,
        )
        layers = len(list((tmp_path / "base").glob("layer-*")))
    finally:
        shutil.rmtree(tmp_path / "base")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "base.st")
    assert sum(name.endswith("down_proj/basis") for name in found) == layers
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.fixture
def base(tmp_path: Path) -> str:
    make_model("Mixtral").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "retain.jsonl", make_rows(20, seed=0))
    return str(tmp_path / "base")


def budget_of(base: str, gigabytes: float, **changes: Any) -> Budget:
    settings, model = Settings(memory=gigabytes, **changes), open_checkpoint(base).empty_model()
    return plan_memory(cut(model), find_sites(model), settings, tokens=10_000, longest=100)


def test_hidden_states_give_way_first_and_then_the_moments(base: str) -> None:
    plenty, least = budget_of(base, 8), budget_of(base, 8, moments="sketch")
    assert (plenty.sketched, plenty.spilled) == (frozenset(), 0)
    without_hidden = (plenty.total - plenty.hidden) / GB
    some = budget_of(base, without_hidden + 1000 / GB)
    assert some.sketched == frozenset()
    assert some.hidden == pytest.approx(1000)
    assert some.spilled == pytest.approx(plenty.hidden - 1000)
    tight = budget_of(base, without_hidden - 1000 / GB)
    assert frozenset() < tight.sketched < least.sketched
    assert tight.total <= without_hidden * GB - 1000
    tight.check()
    with pytest.raises(OutOfMemoryError, match="lower --batch-size or --rank"):
        budget_of(base, without_hidden - 1000 / GB, moments="exact").check()
    with pytest.raises(OutOfMemoryError):
        budget_of(base, (least.total - least.hidden - 1000) / GB).check()


def test_hidden_states_on_disk_give_the_same_statistics(base: str, tmp_path: Path) -> None:
    least = budget_of(base, 8)
    tight = (least.total - least.hidden) / GB  # the rows of the proxy are shorter than 100 tokens
    files = []
    for gigabytes in (8.0, tight):
        files.append(tmp_path / f"{gigabytes}.st")
        words = [base, "--retain", str(tmp_path / "retain.jsonl"), "--output", str(files[-1])]
        assert main(["stats", *words, "-q", "--memory", str(gigabytes)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_too_little_memory_is_said_before_any_work(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [base, "--retain", str(tmp_path / "retain.jsonl"), "--output", str(tmp_path / "st")]
    assert main(["stats", *words, "-q", "--memory", str(RUNTIME / GB)]) == 26
    error = capsys.readouterr().err
    assert "--memory allows 600 MB" in error
    assert not (tmp_path / "st").exists()
