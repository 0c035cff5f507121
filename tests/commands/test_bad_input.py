"""Every kind of bad input: one sentence on stderr, its own status, nothing written or published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoints import INDEX, change
from support.loopback_hub import LoopbackHub
from support.pico import make_config, make_rows, make_tokenizer, write_rows
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from sage_hub.cli.main import main
from sage_hub.publish import folder as output


def refused(
    capsys: pytest.CaptureFixture[str], pair: Path, *options: str, retain: bool = True
) -> tuple[int, str]:
    """Run `sanitize` on `pair`, which must fail cleanly; return the status and the sentence."""
    output = pair.parent / "output"
    before = sorted(pair.parent.rglob("*"))
    arguments = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--quiet"]
    if retain:
        arguments += ["--retain", str(pair / "retain.jsonl")]
    capsys.readouterr()
    status = main([*arguments, "--output", str(output), *options])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sage-hub: error: "), err
    assert err.count("\n") == 1, err
    assert sorted(pair.parent.rglob("*")) == before, "something was left behind"
    return status, err


def first_shard(side: Path) -> Path:
    return min(side.glob("*.safetensors"))


def edit_json(file: Path, changes: Mapping[str, object]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


WEIGHT = "model.layers.0.mlp.up_proj.weight"


def no_such_folder(pair: Path) -> None:
    shutil.rmtree(pair / "base")


def other_architecture(pair: Path) -> None:
    shutil.rmtree(pair / "base")
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=72, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(pair / "base")


def other_shape(pair: Path) -> None:
    shutil.rmtree(pair / "base")
    LlamaForCausalLM(make_config(intermediate_size=96)).save_pretrained(pair / "base")
    make_tokenizer().save_pretrained(pair / "base")


def unknown_architecture(pair: Path) -> None:
    edit_json(pair / "unlearned" / "config.json", {"model_type": "no-such-model"})


def missing_in_base(pair: Path) -> None:
    change(pair / "base", WEIGHT, lambda tensor: None)


def missing_in_unlearned(pair: Path) -> None:
    change(pair / "unlearned", WEIGHT, lambda tensor: None)


def same_weights(pair: Path) -> None:
    shutil.rmtree(pair / "unlearned")
    shutil.copytree(pair / "base", pair / "unlearned")


def nan_in_unlearned(pair: Path) -> None:
    change(pair / "unlearned", WEIGHT, lambda tensor: torch.full_like(tensor, torch.nan))


def inf_in_base(pair: Path) -> None:
    change(pair / "base", "lm_head.weight", lambda tensor: torch.full_like(tensor, torch.inf))


def pickled(pair: Path) -> None:
    for file in (*(pair / "base").glob("*.safetensors"), pair / "base" / INDEX):
        file.unlink()
    (pair / "base" / "pytorch_model.bin").write_bytes(b"never loaded")


def truncated(pair: Path) -> None:
    shard = first_shard(pair / "unlearned")
    shard.write_bytes(shard.read_bytes()[:-100])


def not_safetensors(pair: Path) -> None:
    first_shard(pair / "base").write_bytes(b"<html>not a model</html>")


def index_outside(pair: Path) -> None:
    edit_json(pair / "base" / INDEX, {"weight_map": {WEIGHT: "../unlearned/model.safetensors"}})


def index_to_nothing(pair: Path) -> None:
    first_shard(pair / "base").unlink()


def index_garbage(pair: Path) -> None:
    (pair / "base" / INDEX).write_text("[1, 2")


def empty_proxy(pair: Path) -> None:
    (pair / "retain.jsonl").write_text("")


def malformed_proxy(pair: Path) -> None:
    with (pair / "retain.jsonl").open("a") as file:
        file.write('{"question": "w1", "answer":\n')


def proxy_without_answers(pair: Path) -> None:
    write_rows(pair / "retain.jsonl", [*make_rows(3, 0), {"question": "w1", "answer": " "}])


def overlapping(pair: Path) -> None:
    rows = (pair / "retain.jsonl").read_text().splitlines()
    (pair / "heldout.jsonl").write_text(rows[6] + "\n")


def quantized(pair: Path) -> None:
    edit_json(pair / "unlearned" / "config.json", {"quantization_config": {"quant_method": "gptq"}})


def no_tokenizer(pair: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair / "base" / name).unlink()
        (pair / "unlearned" / name).unlink()


def adapter(pair: Path) -> None:
    for file in (*(pair / "unlearned").glob("*.safetensors"), pair / "unlearned" / INDEX):
        file.unlink()
    (pair / "unlearned" / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    "break_it, status, words",
    [
        (no_such_folder, 10, ["base", "does not exist"]),
        (other_architecture, 12, ["gpt2", "llama"]),
        (other_shape, 12, ["shape", "[32, 96]", "[32, 64]"]),
        (unknown_architecture, 12, ["no-such-model", "remote code is not run"]),
        (missing_in_base, 13, [WEIGHT, "not in base"]),
        (missing_in_unlearned, 13, [WEIGHT, "not in unlearned"]),
        (same_weights, 14, ["same weights"]),
        (nan_in_unlearned, 15, [WEIGHT, "unlearned", "NaN"]),
        (inf_in_base, 15, ["lm_head.weight", "base"]),
        (pickled, 16, ["pytorch_model.bin", "safetensors"]),
        (truncated, 17, ["corrupt or truncated"]),
        (not_safetensors, 17, ["corrupt or truncated"]),
        (index_outside, 17, ["../unlearned/model.safetensors"]),
        (index_to_nothing, 17, ["lacks model-00001"]),
        (index_garbage, 17, [INDEX, "JSON"]),
        (empty_proxy, 18, ["retain.jsonl", "empty"]),
        (malformed_proxy, 18, ["retain.jsonl, line 41"]),
        (proxy_without_answers, 18, ["retain.jsonl, row 4", "'answer'"]),
        (quantized, 20, ["gptq"]),
        (no_tokenizer, 10, ["base has no tokenizer", "--tokenizer"]),
        (adapter, 10, ["adapter_config.json, but no adapter_model.safetensors"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_input_is_refused(
    break_it: Callable[[Path], None],
    status: int,
    words: list[str],
    pair: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(pair)
    found, sentence = refused(capsys, pair)
    assert found == status, sentence
    for word in words:
        assert word in sentence


def test_a_row_in_two_sets(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlapping(pair)
    status, sentence = refused(capsys, pair, "--heldout", str(pair / "heldout.jsonl"))
    assert status == 19
    assert "Row 1 of the heldout set" in sentence
    assert "row 7 of the retain set" in sentence


def test_a_disk_too_small(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(pair)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    status, sentence = refused(capsys, pair)
    assert status == 21
    assert "are free" in sentence


def test_statistics_of_another_model(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = tmp_path / "statistics.safetensors"
    retain = ["--retain", str(pair / "retain.jsonl")]
    arguments = ["stats", str(pair / "unlearned"), *retain, "--output", str(statistics), "-q"]
    assert main(arguments) == 0
    status, sentence = refused(capsys, pair, "--stats", str(statistics), retain=False)
    assert status == 22
    assert "other weights than base" in sentence
    assert "taken of unlearned" in sentence


def test_a_weight_file_is_no_statistics_file(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, sentence = refused(
        capsys, pair, "--stats", str(first_shard(pair / "base")), retain=False
    )
    assert status == 22
    assert "not a statistics file" in sentence


def test_an_output_that_is_not_ours(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = pair.parent / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    status, sentence = refused(capsys, pair)
    assert status == 23
    assert "--force" in sentence
    assert (output / "thesis.tex").read_text() == "years of work"


def test_the_output_is_never_a_source_even_by_force(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = refused(capsys, pair, "--force", "--output", str(pair / "unlearned"))
    assert status == 23


@pytest.mark.parametrize(
    "options",
    [
        ["--strength", "-1"],
        ["--energy", "0"],
        ["--gain", "match"],
        ["--rank", "0"],
        ["--device", "abacus"],
        ["--strength", "nan"],
    ],
    ids=" ".join,
)
def test_a_setting_out_of_range(
    options: list[str], pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, sentence = refused(capsys, pair, *options)
    assert status == 2
    assert options[0].lstrip("-") in sentence


class TestOnTheHub:
    """The same for repos: what the Hub refuses is explained, and the target stays as it was."""

    def refused(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["push", *arguments, "--quiet", "--yes"])
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("sage-hub: error: "), err
        assert err.count("\n") == 1, err
        assert "hf_writer" not in err
        return status, err

    def test_a_repo_that_does_not_exist(
        self, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, sentence = self.refused(capsys, "org/unlearned", "org/nothing")
        assert status == 10
        assert "org/nothing" in sentence
        assert "hf auth login" in sentence

    def test_a_revision_that_does_not_exist(
        self, hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.add_repo("org/unlearned", pair / "unlearned")
        hub.add_repo("org/base", pair / "base")
        status, sentence = self.refused(capsys, "org/base@v9", "org/unlearned")
        assert status == 10
        assert "no revision 'v9'" in sentence

    def test_a_gated_repo(
        self, hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.add_repo("other/base", pair / "base", gated=True)
        hub.add_repo("org/unlearned", pair / "unlearned")
        status, sentence = self.refused(capsys, "other/base", "org/unlearned")
        assert status == 11
        assert "gated" in sentence

    def test_a_target_that_is_not_ours(
        self, hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.add_repo("org/base", pair / "base")
        hub.add_repo("org/unlearned", pair / "unlearned")
        head = hub.add_repo("org/precious", {"README.md": b"somebody's"})
        status, _ = self.refused(capsys, "org/base", "org/unlearned", "--to", "org/precious")
        assert status == 23
        assert hub.commits("org/precious")[-1].sha == head

    def test_a_target_we_may_not_write(
        self, hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, sentence = self.refused(
            capsys,
            *(str(pair / "base"), str(pair / "unlearned"), "--to", "stranger/model"),
            *("--retain", str(pair / "retain.jsonl")),
        )
        assert status == 11
        assert "alice is not a member of stranger" in sentence

    def test_a_target_that_moves_during_the_run(
        self,
        hub: LoopbackHub,
        pair: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from huggingface_hub import HfApi

        real = HfApi.create_commit

        def late(self: HfApi, repo: str, *arguments: object, **options: object) -> object:
            hub.add_commit(repo, {"intruder.txt": b"first"})
            return real(self, repo, *arguments, **options)

        monkeypatch.setattr(HfApi, "create_commit", late)
        status, sentence = self.refused(
            capsys,
            *(str(pair / "base"), str(pair / "unlearned"), "--to", "org/target"),
            *("--retain", str(pair / "retain.jsonl")),
        )
        assert status == 24
        assert "changed while" in sentence
        assert set(hub.files("org/target")) == {".gitattributes", "intruder.txt"}


@pytest.mark.parametrize("place", ["beside the weights", "a source", "a set"])
def test_a_name_that_is_not_utf8_is_refused_before_the_work(
    place: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"odd-\xff")
    sources, retain = {side: pair / side for side in ("base", "unlearned")}, pair / "retain.jsonl"
    if place == "beside the weights":
        (pair / "unlearned" / odd).write_text("")
    elif place == "a source":
        sources["base"] = sources["base"].rename(pair / odd)
    else:
        retain = retain.rename(pair / f"{odd}.jsonl")
    words = ["sanitize", *map(str, sources.values()), "--output", "out", "--retain", str(retain)]
    assert main([*words, "--dry-run"]) == 2
    assert r"The name odd-\udcff" in capsys.readouterr().err
