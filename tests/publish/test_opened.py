"""A finished release is opened as its users will; one that cannot be is kept, and goes nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.adapters import CONFIGS, make_adapter
from support.architectures import ARCHITECTURES, make_model
from support.checkpoints import INDEX, change
from support.loopback_hub import LoopbackHub

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.cli.main import main
from sage_hub.commands import push
from sage_hub.errors import PublishError
from sage_hub.publish.opened import open_as_user


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_that_transformers_saved_opens(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    open_as_user(tmp_path / "model", open_checkpoint(str(tmp_path / "model")))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_that_peft_saved_opens(name: str, tmp_path: Path) -> None:
    make_adapter(tmp_path, name)
    open_as_user(tmp_path / "unlearned", open_checkpoint(str(tmp_path / "base")))


def renamed(side: Path) -> None:
    """All names as torch.compile leaves them, which `from_pretrained` does not look through."""
    index = json.loads((side / INDEX).read_text())
    for shard in side.glob("*.safetensors"):
        tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    index["weight_map"] = {f"_orig_mod.{n}": shard for n, shard in index["weight_map"].items()}
    (side / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "break_it, says",
    [
        (renamed, "its model fails: no tensor is its model.embed_tokens.weight"),
        (
            lambda side: change(side, "model.norm.weight", lambda _: None),
            "its model fails: no tensor is its model.norm.weight",
        ),
        (
            lambda side: change(side, "model.norm.weight", lambda old: old[:9].clone()),
            "its model fails: model.norm.weight has the shape [9], and not [32]",
        ),
        (lambda side: (side / "config.json").write_text("{}"), "its model fails: "),
        (lambda side: (side / "tokenizer.json").write_text("{}"), "its tokenizer fails: "),
        (
            lambda side: (side / "generation_config.json").write_text("["),
            "its generation config fails: ",
        ),
    ],
)
def test_what_does_not_open_is_named(
    break_it: Callable[[Path], Any], says: str, pair: Path
) -> None:
    break_it(pair / "unlearned")
    with pytest.raises(PublishError, match=re.escape(says)):
        open_as_user(pair / "unlearned", open_checkpoint(str(pair / "base")))


def test_an_adapter_that_lacks_a_module_saved_whole_is_named(tmp_path: Path) -> None:
    make_adapter(tmp_path, "whole modules")
    file = tmp_path / "unlearned" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "lm_head" not in n}, file)
    with pytest.raises(PublishError, match=r"no tensor is its .*lm_head"):
        open_as_user(tmp_path / "unlearned", open_checkpoint(str(tmp_path / "base")))


def test_shards_that_are_sent_and_gone_are_compared_by_name(pair: Path) -> None:
    side, base = pair / "unlearned", open_checkpoint(str(pair / "base"))
    for shard in side.glob("*.safetensors"):
        shard.unlink()
    open_as_user(side, base)
    index = json.loads((side / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (side / INDEX).write_text(json.dumps(index))
    with pytest.raises(PublishError, match=r"no tensor is its lm_head\.weight"):
        open_as_user(side, base)


def test_a_release_that_does_not_open_is_kept_and_not_published(
    on_hub: LoopbackHub,
    pair: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = push.carry_files

    def broken(plan: Any, folder: Path, dtype: str | None) -> dict[str, str]:
        hashes = real(plan, folder, dtype)
        (folder / "tokenizer.json").write_text("{}")
        return hashes

    monkeypatch.setattr(push, "carry_files", broken)
    words = ["org/base", "org/unlearned", "--retain", str(pair / "retain.jsonl"), "--quiet"]
    assert main(["push", *words, "--to", "org/out", "--yes"]) == PublishError.status
    said = capsys.readouterr().err
    assert "cannot be opened as its users would; its tokenizer fails: " in said
    assert "sage/manifest.json" not in on_hub.files("org/out")
    kept = re.search(r"It is kept in (\S+),", said)
    assert kept is not None
    assert list(Path(kept[1]).glob("*.safetensors"))
    assert main(["sanitize", *words, "--output", "out"]) == PublishError.status
    assert not Path("out").exists()
