"""Adapters by PEFT's own rules: what it would ignore is refused, and so is what does nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import ADAPTER, CONFIGS, load_merged, make_adapter, sanitize
from support.checkpoints import load_weights
from support.loopback_hub import LoopbackHub
from torch import Tensor
from transformers import AutoModelForCausalLM

from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.checkpoint.pair import open_unlearned
from sage_hub.cli.main import main
from sage_hub.errors import CorruptCheckpointError, SageHubError
from sage_hub.model.weights import open_weights
from sage_hub.runtime import limits

How = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def edit(folder: Path, how: How, **config: object) -> None:
    file = folder / "unlearned" / ADAPTER
    tensors = {name: tensor.contiguous() for name, tensor in how(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    settings = folder / "unlearned" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))


def renamed(old: str, new: str) -> How:
    return lambda own: {name.replace(old, new, 1): tensor for name, tensor in own.items()}


def same(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return own


def prefixed(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": tensor for name, tensor in own.items()}


def zero(end: str) -> How:
    return lambda own: {n: t * 0 if end in n else t for n, t in own.items()}


def emptied(end: str) -> How:
    return lambda own: {n: torch.empty(0) if n.endswith(end) else t for n, t in own.items()}


ALL = ["down_proj", "q_proj", "v_proj"]
REFUSED: dict[str, tuple[How, dict[str, Any], int, str]] = {
    "no prefix": (renamed("base_model.model.", ""), {}, 28, "does not begin with"),
    "half a prefix": (renamed("base_model.model.", "base_model."), {}, 28, "the model calls it"),
    "compiled": (prefixed, {}, 28, "does not begin with"),
    "its own name": (renamed(".weight", ".default.weight"), {}, 28, "save_pretrained gives"),
    "another name": (renamed(".weight", ".other.weight"), {}, 28, "save_pretrained gives"),
    "not a target": (same, {"target_modules": ["q_proj", "v_proj"]}, 28, "down_proj"),
    "by a pattern": (same, {"target_modules": ".*(q|v)_proj"}, 28, "down_proj"),
    "excluded": (same, {"exclude_modules": ["v_proj"]}, 28, "v_proj"),
    "layers": (same, {"layers_to_transform": [1]}, 28, "layers.0."),
    "saved": (same, {"modules_to_save": ["q_proj"]}, 28, "q_proj"),
    "zero B": (zero("lora_B"), {}, 14, "leaves base as it is"),
    "zero A": (zero("lora_A"), {}, 14, "leaves base as it is"),
    "empty": (emptied(".weight"), {}, 13, "gather the weights"),
    "empty B": (emptied("lora_B.weight"), {}, 13, "gather the weights"),
    "not a pattern": (same, {"target_modules": "("}, 17, "no usable target_modules"),
}


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["", "merge"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_would_ignore_is_refused(
    kind: str, merge: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how, config, status, says = REFUSED[kind]
    make_adapter(tmp_path, "Llama")
    edit(tmp_path, how, **config)
    words = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--output", "out", *merge]
    for dry in ([], ["--dry-run"]):
        capsys.readouterr()
        assert main(["sanitize", *words, "-q", *dry]) == status
        sentence = capsys.readouterr().err
        assert says in sentence
        assert sentence.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r"([\w.]+)+!"},
        {"exclude_modules": r"([\w.]+)+!"},
        {"modules_to_save": [r"([\w.]+)+!"]},
        {"rank_pattern": {r"([\w.]+)+!": 4}},
    ],
    ids=str,
)
def test_a_pattern_that_never_ends_is_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    make_adapter(tmp_path, "Llama")
    edit(tmp_path, same, **config)
    side = open_unlearned(str(tmp_path / "unlearned"), open_checkpoint(str(tmp_path / "base")))
    assert isinstance(side, Adapter)
    with pytest.raises(
        CorruptCheckpointError, match=r"has no usable (target_modules|rank_pattern)"
    ):
        side.changes  # noqa: B018 - raises


@pytest.mark.parametrize(
    "how, config",
    [
        (same, {"target_modules": ".*_proj"}),
        (same, {"target_modules": "all-linear"}),
        (same, {"target_modules": [*ALL, "model.layers.0.mlp.up_proj"]}),
        (same, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
        (same, {"exclude_modules": "nothing"}),
    ],
)
def test_what_peft_takes_is_taken(how: How, config: dict[str, Any], tmp_path: Path) -> None:
    make_adapter(tmp_path, "Llama")
    plain = load_weights(sanitize(tmp_path))
    (tmp_path / "out").rename(tmp_path / "plain")
    edit(tmp_path, how, **config)
    found = load_weights(sanitize(tmp_path))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_either_peft_and_we_make_the_same_of_it_or_it_is_refused(name: str, tmp_path: Path) -> None:
    """Whatever chance does to names and settings."""
    make_adapter(tmp_path, name)
    saved = {f: f.read_bytes() for f in (tmp_path / "unlearned").iterdir()}
    chance = random.Random(name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    targets = CONFIGS[name][1]["target_modules"]
    hows: list[tuple[How, dict[str, Any]]] = [
        (same, {}),
        (renamed("base_model.", ""), {}),
        (renamed(".weight", ".default.weight"), {}),
        (same, {"target_modules": targets[:1]}),
        (same, {"layers_to_transform": chance.choice([0, [1], [0, 1]])}),
        (same, {"exclude_modules": chance.choice([targets[:1], f".*{targets[-1]}"])}),
        (same, {"target_modules": f".*1.*({'|'.join(targets)})"}),
    ]
    taken = 0
    for how, config in hows:
        edit(tmp_path, how, **config)
        whole = open_checkpoint(str(tmp_path / "base"))
        try:
            side = open_unlearned(str(tmp_path / "unlearned"), whole)
            with open_weights(side) as weights:
                ours = {n: weights(n).clone() for n in base.state_dict()}
        except SageHubError:
            pass
        else:
            taken += 1
            theirs = load_merged(tmp_path / "base", tmp_path / "unlearned").state_dict()
            for parameter, tensor in ours.items():
                assert torch.allclose(theirs[parameter], tensor, atol=1e-5), parameter
        for file, content in saved.items():
            file.write_bytes(content)
    assert taken


def test_an_adapter_of_a_base_with_more_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path, "head and embedding")

    def longer(own: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in own.items():
            dim = {72: 0}.get(tensor.shape[0], 1)
            more = tensor.narrow(dim, 0, 3)
            found[name] = torch.cat([tensor, more], dim) if 72 in tensor.shape else tensor
        return found

    edit(tmp_path, longer)
    words = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--output", "out", "-q"]
    assert main(["sanitize", *words]) == 12
    assert "a base of 75 tokens" in capsys.readouterr().err


def test_a_stray_file_beside_an_adapter(tmp_path: Path) -> None:
    make_adapter(tmp_path, "Llama")
    plain = load_file(sanitize(tmp_path) / ADAPTER)
    (tmp_path / "out").rename(tmp_path / "plain")
    save_file({"x": torch.ones(1)}, tmp_path / "unlearned" / "model_before.safetensors")
    found = load_file(sanitize(tmp_path) / ADAPTER)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_an_adapter_that_names_another_base(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path, "Llama")
    edit(tmp_path, same, base_model_name_or_path="org/before")
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", tmp_path / side)
    words = ["org/base", "org/unlearned", "--retain", str(tmp_path / "retain.jsonl")]
    assert main(["push", *words, "--dry-run"]) == 0
    assert "was trained on another base; its release names org/base" in capsys.readouterr().err
