"""No release of nothing: plans, updates and filters without effect are refused, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import ADAPTER, make_adapter
from support.pico import make_config, make_tokenizer

from sage_hub.cli.main import main


def refused(pair: Path, capsys: pytest.CaptureFixture[str], *options: str, status: int = 14) -> str:
    capsys.readouterr()
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    sides = [str(pair / "base"), str(pair / "unlearned")]
    assert main(["sanitize", *sides, "--output", str(pair / "out"), *retain, *options]) == status
    assert not (pair / "out").exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def change(side: Path, how: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    for file in side.glob("*.safetensors"):
        tensors = {name: how(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def take_from_base(pair: Path, kept: Callable[[str], bool]) -> None:
    """Have the unlearned side differ from the base in what is `kept` alone."""
    base = {
        k: v for file in (pair / "base").glob("*.safetensors") for k, v in load_file(file).items()
    }
    change(pair / "unlearned", lambda name, tensor: tensor if kept(name) else base[name])


@pytest.mark.parametrize("only", ["embed_tokens", "lm_head", "norm"])
def test_an_update_of_what_is_not_filtered(
    only: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take_from_base(pair, lambda name: only in name)
    assert "in no weight that can be filtered" in refused(pair, capsys)


def test_an_update_of_one_weight_is_enough(pair: Path) -> None:
    take_from_base(pair, lambda name: name == "model.layers.1.mlp.down_proj.weight")
    sides = [str(pair / "base"), str(pair / "unlearned"), "--output", str(pair / "out")]
    assert main(["sanitize", *sides, "--retain", str(pair / "retain.jsonl"), "--quiet"]) == 0
    done = json.loads((pair / "out" / "sage" / "manifest.json").read_text())["counts"]
    assert done["filtered"] == 1


def test_weights_too_large_to_be_measured(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finite, in the type that they are stored in, and no figure of the record could hold them."""
    large = ("model.norm.weight", "model.layers.0.mlp.down_proj.weight")
    change(pair / "unlearned", lambda name, t: torch.full_like(t, 3e38) if name in large else t)
    capsys.readouterr()
    words = [str(pair / "base"), str(pair / "unlearned"), "--retain", str(pair / "retain.jsonl")]
    assert main(["sanitize", *words, "--output", str(pair / "out"), "-q"]) == 15
    assert "Internal error" not in capsys.readouterr().err
    assert not (pair / "out").exists()


def test_an_adapter_that_was_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path, "Llama")
    file = tmp_path / "unlearned" / ADAPTER
    tensors = {k: v * ("lora_B" not in k) for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert "adapter" in refused(tmp_path, capsys)


def test_settings_with_which_nothing_happens(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--strength", "0", "--gain", "1"]
    assert "the unlearned model itself" in refused(pair, capsys, *words)
    assert "the unlearned model itself" in refused(pair, capsys, *words, "--dry-run")


def test_a_filter_that_rounding_swallows(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leaves every update as it was" in refused(
        pair, capsys, "--strength", "1e-30", "--gain", "1"
    )


def test_a_gain_with_which_nothing_is_left(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Nothing of the update is left" in refused(pair, capsys, "--gain", "1e-9")


def test_an_audit_of_what_cannot_be_filtered(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where every name has a prefix that transformers does not know."""
    for side in ("base", "unlearned"):
        shutil.rmtree(pair / side)
        make_embedding_alone(pair / side)
    words = [str(pair / "base"), str(pair / "unlearned"), "--retain", str(pair / "retain.jsonl")]
    assert main(["audit", *words, "--quiet"]) != 0
    assert "Internal error" not in capsys.readouterr().err


def make_embedding_alone(folder: Path) -> None:
    make_config().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tensor = torch.randn(72, 32)
    save_file({"model.embed_tokens.weight": tensor}, folder / "model.safetensors")


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("float32", "float16")])
def test_what_rounding_alone_explains(types: tuple[str, str], pair: Path) -> None:
    """The base in float32, and the unlearned side trained from it and saved in half of that."""
    wide, narrow = (getattr(torch, name) for name in types)
    generator = torch.Generator().manual_seed(0)
    noise, size = 0.0, 0.0

    def widen(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(wide) * (1 + torch.rand(tensor.shape, generator=generator) / 100)

    change(pair / "base", widen)
    base = {k: v for f in (pair / "base").glob("*.safetensors") for k, v in load_file(f).items()}

    def trained(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal noise, size
        moved = base[name] + 0.01 * torch.randn(tensor.shape, generator=generator)
        if "proj" in name:
            noise += float((base[name].to(narrow).float() - base[name]).square().sum())
            size += float((moved.to(narrow).float() - base[name]).square().sum())
        return moved.to(narrow)

    change(pair / "unlearned", trained)
    words = [str(pair / "base"), str(pair / "unlearned"), "--retain", str(pair / "retain.jsonl")]
    assert main(["sanitize", *words, "--output", str(pair / "out"), "--quiet"]) == 0
    found = json.loads((pair / "out" / "sage" / "manifest.json").read_text())
    assert found["rounding_share"] == pytest.approx(noise / size, rel=1e-3)
    written = load_file(next((pair / "out").glob("*.safetensors")))
    assert {tensor.dtype for tensor in written.values()} == {narrow}
