"""LoRA adapters as the unlearned side: the result is the one of the merged models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import ADAPTER, CONFIGS, load_merged, make_adapter, sanitize
from support.architectures import make_model, reference
from support.loopback_hub import LoopbackHub
from support.pico import make_config, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.checkpoint.pair import open_unlearned
from sage_hub.cli.main import main
from sage_hub.evaluation.scoring import score
from sage_hub.model.blocks import open_blocks
from sage_hub.model.weights import open_weights
from sage_hub.rows.encoding import Encoded
from sage_hub.settings import Settings


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sanitized_adapter_is_that_of_the_merged_models(name: str, tmp_path: Path) -> None:
    make_adapter(tmp_path, name)
    out = sanitize(tmp_path)

    # The same adapter but for A, and PEFT loads it.
    ours, source = load_file(out / ADAPTER), load_file(tmp_path / "unlearned" / ADAPTER)
    assert [(n, t.shape, t.dtype) for n, t in ours.items()] == [
        (n, t.shape, t.dtype) for n, t in source.items()
    ]
    config = "adapter_config.json"
    assert (out / config).read_bytes() == (tmp_path / "unlearned" / config).read_bytes()
    changed = {n for n in ours if not torch.equal(ours[n], source[n])}
    assert changed
    for tensor in changed:
        assert tensor.endswith(".lora_A.weight") or "up_proj" in tensor

    rows = [json.loads(line) for line in (tmp_path / "retain.jsonl").read_text().splitlines()]
    expected = reference(tmp_path / "base", tmp_path / "merged", rows)
    found = load_merged(tmp_path / "base", out).state_dict()
    for parameter, tensor in expected.items():
        assert torch.allclose(found[parameter].double(), tensor, rtol=1e-4, atol=1e-5), parameter

    manifest = json.loads((out / "sage" / "manifest.json").read_text())
    assert {t["name"] for t in manifest["tensors"] if t["action"] == "filtered"} == changed
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert "PeftModel.from_pretrained" in card.text


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "head and embedding"])
def test_merge_writes_the_whole_model(name: str, tmp_path: Path) -> None:
    make_adapter(tmp_path, name)
    out = sanitize(tmp_path, "--merge")
    names = {p.name for p in (tmp_path / "base").glob("*.safetensors")}
    assert {p.name for p in out.glob("*.safetensors")} == names
    rows = [json.loads(line) for line in (tmp_path / "retain.jsonl").read_text().splitlines()]
    expected = reference(tmp_path / "base", tmp_path / "merged", rows)
    found = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    for parameter, tensor in expected.items():
        assert torch.allclose(found[parameter].double(), tensor, rtol=1e-4, atol=1e-5), parameter


@pytest.mark.parametrize("gain", ["match", "auto"])
def test_bias_and_metrics_are_those_of_the_merged_models(gain: str, tmp_path: Path) -> None:
    make_adapter(tmp_path, "Llama")
    both = ["--forget", str(tmp_path / "forget.jsonl"), "--gain", gain]
    records = {}
    for kind in ("adapter", "merged"):
        if kind == "merged":
            shutil.rmtree(tmp_path / "unlearned")
            (tmp_path / "merged").rename(tmp_path / "unlearned")
        out = sanitize(tmp_path, *both)
        manifest = json.loads((out / "sage" / "manifest.json").read_text())
        report = json.loads((out / "sage" / "report.json").read_text())
        records[kind] = (manifest, report)
        shutil.rmtree(out)
    (adapter, adapter_report), (merged, merged_report) = records["adapter"], records["merged"]
    assert adapter["gain"] == pytest.approx(merged["gain"], rel=1e-4)
    assert adapter["gain_shares"] == pytest.approx(merged["gain_shares"], rel=1e-3)
    assert merged["bias"]["before"] > 0
    assert adapter["bias"] == pytest.approx(merged["bias"], rel=1e-4)
    assert adapter_report["control_alpha"] == pytest.approx(
        merged_report["control_alpha"], rel=1e-4
    )
    for one, two in zip(adapter_report["results"], merged_report["results"], strict=True):
        near = {key: pytest.approx(two[key], rel=1e-4) for key in ("value", "interval")}
        assert one == {**two, **near}


def test_a_bfloat16_adapter_of_a_float32_base_stays_bfloat16(tmp_path: Path) -> None:
    make_adapter(tmp_path, "Llama", torch.bfloat16)
    out = sanitize(tmp_path)
    assert {t.dtype for t in load_file(out / ADAPTER).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change, status, says",
    [
        ({"use_dora": True}, 28, "uses use_dora"),
        ({"peft_type": "IA3"}, 28, "of the type IA3"),
        ({"init_lora_weights": "pissa"}, 28, "init_lora_weights=pissa"),
        ({"layer_replication": [[0, 1]]}, 28, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, 28, "target_parameters"),
        ({"a_field_of_tomorrow": 1}, 28, "a_field_of_tomorrow"),
        ({"r": 8}, 17, "the rank 8"),
        ({"r": 0}, 17, "no usable r"),
        ({"lora_alpha": None}, 17, "lora_alpha"),
        ({"lora_alpha": math.inf}, 15, "NaN or Inf"),
        ({"rank_pattern": {"(": 4}}, 17, "rank_pattern"),
        ({"alpha_pattern": [1]}, 17, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, 17, "lora_alpha"),
        ({"init_lora_weights": [1]}, 28, "init_lora_weights"),
    ],
)
def test_other_adapters_are_refused_by_name(
    change: dict[str, object],
    status: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_adapter(tmp_path, "Llama")
    file = tmp_path / "unlearned" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refuse(tmp_path, status, says, capsys)


def refuse(
    folder: Path, status: int, says: str, capsys: pytest.CaptureFixture[str], *options: str
) -> None:
    capsys.readouterr()
    arguments = [str(folder / "base"), str(folder / "unlearned"), "--output", str(folder / "out")]
    arguments += ["--retain", str(folder / "retain.jsonl"), "--quiet", *options]
    assert main(["sanitize", *arguments]) == status
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


def test_an_adapter_without_its_base_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path, "Llama")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tmp_path / "unlearned", tmp_path / "base")
    refuse(tmp_path, 10, "only the unlearned side may be one", capsys)
    shutil.rmtree(tmp_path / "base")
    make_model("GPT2").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    refuse(tmp_path, 13, "check that it was trained on this base", capsys)
    shutil.rmtree(tmp_path / "unlearned")
    (tmp_path / "whole").rename(tmp_path / "unlearned")
    refuse(tmp_path, 2, "--merge is for adapters", capsys, "--merge")


def test_half_a_pair_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(tmp_path, "Llama")
    file = tmp_path / "unlearned" / ADAPTER
    whole = load_file(file)
    for end in ("lora_A.weight", "lora_B.weight"):
        lost = next(name for name in whole if name.endswith(end))
        save_file({n: t for n, t in whole.items() if n != lost}, file, metadata={"format": "pt"})
        refuse(tmp_path, 17, "has no partner", capsys)


def test_merging_into_one_of_two_tied_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIGS["tied embedding"] = ("Gemma3Text", {"target_modules": ["embed_tokens"]})
    try:
        make_adapter(tmp_path, "tied embedding")
    finally:
        del CONFIGS["tied embedding"]
    refuse(tmp_path, 28, "Leave out --merge", capsys, "--merge")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_of_two_tied_weights_is_evaluated_as_peft_has_it(
    target: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(make_config(tie_word_embeddings=True)).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[target])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "unlearned", save_embedding_layers=False)
    rows = [Encoded((9, 12, 30, 31, 8), 1), Encoded((20, 50, 7, 60), 1)]
    with torch.no_grad():
        expected = [model(torch.tensor([row.ids])).logits[0].log_softmax(-1) for row in rows]
    whole = open_checkpoint(str(base))
    side = open_unlearned(str(tmp_path / "unlearned"), whole)
    with open_weights(side) as weights, open_blocks(whole, weights, "cpu") as in_blocks:
        settings = Settings(batch_size=2)
        found = [score(in_blocks, weights, rows, settings, tmp_path)]
        with in_blocks.whole(weights) as in_memory:
            found.append(score(in_memory, weights, rows, settings, tmp_path))
    for scored in found:
        for row, one, logprobs in zip(rows, scored, expected, strict=True):
            wanted = logprobs[torch.arange(len(row.ids) - 1), list(row.ids[1:])]
            assert one.logprobs == pytest.approx(wanted.numpy(), abs=1e-4)


def test_push_an_adapter_from_hub_to_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    make_adapter(tmp_path, "rsLoRA")
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", tmp_path / side)
    arguments = ["--yes", "--quiet", "--retain", str(tmp_path / "retain.jsonl")]
    assert main(["push", "org/base", "org/unlearned", *arguments]) == 0
    card = ModelCard(hub.files("org/unlearned-sage")["README.md"].decode())
    assert card.data.base_model == ["org/base"]
    assert card.data.base_model_relation == "adapter"
    base = AutoModelForCausalLM.from_pretrained("org/base", dtype=torch.float32)
    PeftModel.from_pretrained(base, "org/unlearned-sage")


def test_merge_with_low_disk_keeps_no_whole_base(hub: LoopbackHub, tmp_path: Path) -> None:
    make_adapter(tmp_path, "Llama")
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", tmp_path / side)
    arguments = ["--yes", "--quiet", "--retain", str(tmp_path / "retain.jsonl"), "--merge"]
    assert main(["push", "org/base", "org/unlearned", *arguments, "--low-disk"]) == 0
    assert {path.name for path in Path(HF_HUB_CACHE).rglob("*.safetensors")} <= {ADAPTER}
    piecewise = hub.files("org/unlearned-sage")
    assert main(["push", "org/base", "org/unlearned", *arguments, "--to", "org/whole"]) == 0
    shards = [name for name in piecewise if name.startswith("model")]
    assert len(shards) > 2
    assert all(piecewise[name] == hub.files("org/whole")[name] for name in shards)
