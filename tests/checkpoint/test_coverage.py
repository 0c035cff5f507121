"""No weight is made up: whatever a checkpoint lacks is named before any work, in every command."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.architectures import ARCHITECTURES, LLAMA, make_model, make_sides, move, single
from support.checkpoints import load_weights
from support.mutations import edit_config, remap, rename
from support.pico import proxies
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sage_hub.checkpoint.architecture import unwrapped
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.cli.main import main
from sage_hub.errors import CorruptCheckpointError, MissingTensorError

UP = "model.layers.0.mlp.up_proj.weight"
HEAD = "lm_head.weight"


def drop(lost: str) -> Callable[[Path], None]:
    return lambda side: rename(side, lambda name: None if name == lost else name)


def call(old: str, new: str) -> Callable[[Path], None]:
    return lambda side: rename(side, lambda name: new if name == old else name)


def before_all(prefix: str) -> Callable[[Path], None]:
    return lambda side: rename(side, lambda name: prefix + name)


def emptied(side: Path) -> None:
    remap(side, lambda tensors: {name: tensor[:0] for name, tensor in tensors.items()})


def one_emptied(side: Path) -> None:
    remap(side, lambda own: {n: t[:0] if n == UP else t for n, t in own.items()})


def without_head(side: Path) -> None:
    """As AutoModel saves: other names too."""
    rename(side, lambda name: None if name == HEAD else name.removeprefix("model."))


def with_an_adapter(side: Path) -> None:
    rename(side, lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))


def too_few_layers(side: Path) -> None:
    rename(side, lambda name: None if ".layers.1." in name else name)


def too_many_promised(side: Path) -> None:
    edit_config(side, num_hidden_layers=5)


LOSSES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a weight": (drop(UP), [UP, "save the whole model again"]),
    "a head": (drop(HEAD), [HEAD, "without its head"]),
    "names of another model": (without_head, [HEAD, "without its head"]),
    "another name for the head": (call(HEAD, "score.weight"), [HEAD, "'score.weight'"]),
    "another name for a weight": (call(UP, "model.layers.0.mlp.w3"), [UP, "mlp.w3"]),
    "a wrapper": (before_all("base_model.model."), ["20 more", "'base_model.model.'"]),
    "a trainer": (before_all("actor."), ["begin with 'actor.'"]),
    "an adapter in it": (with_an_adapter, ["merge_and_unload"]),
    "ZeRO-3": (emptied, ["is empty", "20 more", "gather"]),
    "ZeRO-3, one": (one_emptied, [UP, "is empty", "gather"]),
    "layers": (too_few_layers, ["layers.1.", "promises 2 layers", "those of 1"]),
    "promises": (too_many_promised, ["layers.2.", "promises 5 layers", "those of 2"]),
}


def refused(words: list[str], capsys: pytest.CaptureFixture[str], says: list[str]) -> None:
    """The command fails with one sentence, and leaves nothing."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    status = main([*words, "--quiet"])
    out, sentence = capsys.readouterr()
    assert status == 13, sentence
    assert out == ""
    assert sentence.count("\n") == 1
    for word in says:
        assert word in sentence
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("side", ["base", "unlearned"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_that_lacks_a_weight_is_refused(
    loss: str, side: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lose, says = LOSSES[loss]
    lose(pair / side)
    sides = [str(pair / "base"), str(pair / "unlearned")]
    retain = ["--retain", str(pair / "retain.jsonl")]
    refused(["sanitize", *sides, *retain, "--output", "out"], capsys, [side, *says])
    refused(["sanitize", *sides, *retain, "--output", "out", "--dry-run"], capsys, says)
    refused(["audit", *sides, *retain], capsys, says)


@pytest.mark.parametrize("loss", LOSSES)
def test_both_sides_lack_the_same(
    loss: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lose, says = LOSSES[loss]
    for side in ("base", "unlearned"):
        lose(pair / side)
    sides = [str(pair / "base"), str(pair / "unlearned")]
    refused(["push", *sides, *proxies(pair), "--to", "org/t", "--yes"], capsys, ["base", *says])


@pytest.mark.parametrize("loss", LOSSES)
def test_one_model_that_lacks_a_weight_is_refused(
    loss: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lose, says = LOSSES[loss]
    lose(pair / "unlearned")
    one, retain = str(pair / "unlearned"), ["--retain", str(pair / "retain.jsonl")]
    refused(["stats", one, *retain, "--output", "st"], capsys, says)
    refused(["eval", one, "--forget", str(pair / "forget.jsonl")], capsys, says)
    refused(["plan", one], capsys, says)
    whole = [str(pair / "base"), str(pair / "base")]
    words = ["sanitize", *whole, *retain, "--output", "out", "--reference", one]
    refused(words, capsys, says)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_tensor_of_any_architecture(name: str, tmp_path: Path) -> None:
    """Every tensor of the language model, lost, emptied or renamed by chance, is missed."""
    model = make_model(name)
    single(model, tmp_path)
    whole = open_checkpoint(str(tmp_path))
    outside, chance = whole.architecture.outside, random.Random(name)
    own = [t for t, at in whole.places.items() if at and not at.parameter.startswith(outside)]
    saved = (tmp_path / "model.safetensors").read_bytes()
    for tensor in chance.sample(own, 4):
        loss = chance.choice(
            [
                drop(tensor),
                call(tensor, tensor.replace("weight", "wait") + "_"),
                lambda side, lost=tensor: remap(  # type: ignore[misc]
                    side, lambda all_: {n: t[:0] if n == lost else t for n, t in all_.items()}
                ),
            ]
        )
        loss(tmp_path)
        with pytest.raises(MissingTensorError):
            open_checkpoint(str(tmp_path))
        (tmp_path / "model.safetensors").write_bytes(saved)
    open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: (
            "_fsdp_wrapped_module." + name.replace(".mlp", "._checkpoint_wrapped_module.mlp")
        ),
    ],
    ids=["compile", "parallel", "both", "twice", "a layer", "fsdp"],
)
@pytest.mark.parametrize("wrapped", [("base",), ("unlearned",), ("base", "unlearned")])
@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_what_wrappers_put_into_names_is_taken_out(
    name: str, wrapped: tuple[str, ...], wrap: Callable[[str], str], tmp_path: Path
) -> None:
    model = make_model(name)
    words = make_sides(tmp_path, model, model)
    move(model)
    single(model, tmp_path / "unlearned")
    assert main(words) == 0
    plain = load_weights(tmp_path / "out")
    for side in wrapped:
        rename(tmp_path / side, wrap)
    assert main([*words[:-1], str(tmp_path / "again")]) == 0
    # The release has names that transformers finds.
    expected = (
        {unwrapped(wrap(n)): t for n, t in plain.items()} if "unlearned" in wrapped else plain
    )
    found = load_weights(tmp_path / "again")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())


def test_one_weight_under_two_names(tmp_path: Path) -> None:
    make_model("Llama").save_pretrained(tmp_path)
    remap(tmp_path, lambda own: {**own, f"_orig_mod.{UP}": own[UP] + 1})
    with pytest.raises(CorruptCheckpointError, match="under two names"):
        open_checkpoint(str(tmp_path))


def make_tied() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("by_head", [("base",), ("unlearned",), ("base", "unlearned")])
def test_a_tied_weight_is_stored_under_either_name(
    by_head: tuple[str, ...], tmp_path: Path
) -> None:
    model = make_tied()
    words = make_sides(tmp_path, model, model)
    move(model)
    model.save_pretrained(tmp_path / "unlearned")
    assert main(words) == 0
    plain = load_weights(tmp_path / "out")
    for side in by_head:
        call(EMBEDDING, HEAD)(tmp_path / side)
    assert main([*words[:-1], str(tmp_path / "again")]) == 0
    found = load_weights(tmp_path / "again")
    if "unlearned" in by_head:
        plain[HEAD] = plain.pop(EMBEDDING)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[n], tensor) for n, tensor in plain.items())


def test_a_tied_weight_in_neither_name_is_missed(tmp_path: Path) -> None:
    make_tied().save_pretrained(tmp_path)
    drop(EMBEDDING)(tmp_path)
    with pytest.raises(MissingTensorError, match="nor is 1 more"):
        open_checkpoint(str(tmp_path))


def test_tied_is_what_the_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two matrices in the file are two weights, whatever config.json says."""
    model = make_tied()
    words = make_sides(tmp_path, model, model)
    move(model)
    model.save_pretrained(tmp_path / "unlearned")
    found = []
    for tied in (False, True):
        for number, side in enumerate(("base", "unlearned")):
            torch.manual_seed(number)
            head = 0.2 * torch.randn(72, 32)
            remap(tmp_path / side, lambda own, head=head: {**own, HEAD: head})  # type: ignore[misc]
            edit_config(tmp_path / side, tie_word_embeddings=tied)
        out = tmp_path / f"out-{tied}"
        assert main([*words[:-1], str(out)]) == 0
        rows = ["--forget", str(tmp_path / "retain.jsonl")]
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "base"), *rows, "--json", "--quiet"]) == 0
        found.append((load_weights(out), json.loads(capsys.readouterr().out)["results"]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.lm_head.weight, load_weights(tmp_path / "base")[HEAD])
    (first, figures), (second, same) = found
    assert figures == same
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
