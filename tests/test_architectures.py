"""Every architecture people have: the streaming pass equals a whole-model float64 reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pico import make_rows, make_tokenizer, write_rows
from safetensors.torch import load_file, save_file
from test_release import load_weights
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from sage_hub.cli import main

COMMON = {
    "vocab_size": 72,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "Qwen3": {**LLAMA, "head_dim": 8},
    "Mistral": LLAMA,
    "Gemma3Text": {**LLAMA, "head_dim": 8, "tie_word_embeddings": True},
    "Phi3": LLAMA,
    "Olmo2": LLAMA,
    "GPT2": {**COMMON, **GPT2},
    "GPTNeoX": {**COMMON, "intermediate_size": 48},
    "OPT": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Mixtral": {**EXPERTS, "num_local_experts": 4},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4},
    "DeepseekV3": {**EXPERTS, **DEEPSEEK},
    "GptOss": {**EXPERTS, "head_dim": 8, "num_local_experts": 4, "rope_scaling": None},
    "Llava": {
        "text_config": {"model_type": "llama", **LLAMA},
        "vision_config": {
            **{"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            **{"num_hidden_layers": 1, "num_attention_heads": 4},
        },
        "image_token_index": 71,
    },
    "Qwen2_5_VL": {
        "text_config": {**LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
        "vision_config": {
            **{"depth": 1, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
            **VISION,
        },
        "image_token_id": 71,
    },
}
SEEING = ("Llava", "Qwen2_5_VL")


def auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, **options
    )
    return model.eval()


def make_model(name: str) -> PreTrainedModel:
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def move(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.wte.weight",
)
Save = Callable[[PreTrainedModel, Path], None]


def sharded(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")


def single(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def fused(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, save_original_format=False)


def in_bfloat16(model: PreTrainedModel, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)


class Watch(TorchFunctionMode):
    """What every parameter, or expert of it, is multiplied with, whoever multiplies."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inputs: dict[tuple[str, int | None], list[torch.Tensor]] = {}
        self.transposed: set[str] = set()
        self.names: dict[int, tuple[str, int | None]] = {}
        for name, parameter in model.named_parameters():
            self.names[parameter.data_ptr()] = (name, None)
            for expert in range(len(parameter)) if parameter.ndim == 3 else ():
                self.names[parameter[expert].data_ptr()] = (name, expert)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("linear", "addmm", "matmul"):
            x, weight = args[1:3] if name == "addmm" else args[:2]
            key = self.names.get(weight.data_ptr())
            if key is not None:
                self.inputs.setdefault(key, []).append(x.reshape(-1, x.shape[-1]).double())
                if name != "linear":
                    self.transposed.add(key[0])
        return func(*args, **(kwargs or {}))


def reference(
    base: Path, unlearned: Path, rows: list[dict[str, str]], *, everything: bool = False
) -> dict[str, torch.Tensor]:
    """Parameter -> sanitized weight at λ=10, ρ=.9, in float64.

    With `everything` also of embedding, LM head, norms and biases.
    """
    sides = [
        load(folder, dtype=torch.float32, experts_implementation="eager")
        for folder in (base, unlearned)
    ]
    tokenizer = make_tokenizer()
    token_ids, norms = [], watch_norms(sides[0])
    with torch.no_grad(), Watch(sides[0]) as watch:
        for row in rows:
            text = f"Question: {row['question']}\nAnswer: {row['answer']}"
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            token_ids.append(ids[0])
            sides[0](input_ids=ids, attention_mask=torch.ones_like(ids))
    w_base, result = sides[0].double().state_dict(), sides[1].double().state_dict()
    for (name, expert), seen in watch.inputs.items():
        if name in HEADS and not everything:
            continue
        b, u = w_base[name], result[name]
        if expert is not None:
            b, u = b[expert], u[expert]
        x = torch.cat(seen)
        s, v = torch.linalg.eigh(x.T @ x / len(x))
        s, v = s.flip(0), v.flip(1)
        k = int((s.cumsum(0) < 0.9 * s.sum()).sum()) + 1
        g = torch.zeros_like(s)
        g[:k] = 10 * s[:k] / (s.mean() + 10 * s[:k])
        removed = v @ torch.diag(g) @ v.T
        delta = u - b
        u -= removed @ delta if name in watch.transposed else delta @ removed
    if everything:
        entry = next(n for n in w_base if n.endswith(("embed_tokens.weight", "wte.weight")))
        if (entry, None) not in watch.inputs:  # or it is the head too, which comes first
            counts = torch.bincount(torch.cat(token_ids), minlength=len(w_base[entry]))
            shrink(result[entry], w_base[entry], counts / counts.sum())
        for name, seen in norms.items():
            x = torch.cat(seen)
            shrink(result[name], w_base[name], (x * x).mean(0))
        for name in w_base:
            if name.endswith(".bias") and not name.startswith("model.visual"):
                result[name] -= 10 / 11 * (result[name] - w_base[name])  # λ s / (s + λ s)
    return result


def shrink(u: torch.Tensor, b: torch.Tensor, energies: torch.Tensor) -> None:
    """Filter the rows of a map whose second moment is diagonal, in place."""
    s, order = energies.double().sort(descending=True, stable=True)
    k = int((s.cumsum(0) < 0.9 * s.sum()).sum()) + 1
    for value, row in zip(s[:k], order[:k], strict=True):
        u[row] -= 10 * value / (s.mean() + 10 * value) * (u[row] - b[row])


def watch_norms(model: PreTrainedModel) -> dict[str, list[torch.Tensor]]:
    """What every norm multiplies its weight with, by the textbook."""
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str, centred: bool) -> None:
        def hook(module: Any, args: Any) -> None:
            x = args[0].double()
            if centred:
                x = x - x.mean(-1, keepdim=True)
            eps = next(
                getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)
            )
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
            seen.setdefault(f"{name}.weight", []).append(x.reshape(-1, x.shape[-1]))

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if type(module).__name__.endswith("Norm"):
            note(name, isinstance(module, torch.nn.LayerNorm))
    return seen


def make_sides(folder: Path, base: PreTrainedModel, unlearned: PreTrainedModel) -> list[str]:
    """Save two models with tokenizer and proxy; the arguments of a run on them."""
    for side, model in (("base", base), ("unlearned", unlearned)):
        model.save_pretrained(folder / side)
        make_tokenizer().save_pretrained(folder / side)
    write_rows(folder / "retain.jsonl", make_rows(40, seed=0))
    arguments = [str(folder / "base"), str(folder / "unlearned"), "--quiet", "--retain"]
    return ["sanitize", *arguments, str(folder / "retain.jsonl"), "--output", str(folder / "out")]


def check_release(folder: Path, *, everything: bool = False) -> dict[str, dict[str, Any]]:
    """The release equals the reference; what was done with each tensor."""
    rows = [json.loads(line) for line in (folder / "retain.jsonl").read_text().splitlines()]
    expected = reference(folder / "base", folder / "unlearned", rows, everything=everything)
    found = load(folder / "out", dtype="auto").state_dict()
    assert found.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert torch.allclose(found[parameter].double(), tensor, rtol=1e-4, atol=1e-5), parameter
    manifest = json.loads((folder / "out" / "sage" / "manifest.json").read_text())
    return {tensor["name"]: tensor for tensor in manifest["tensors"]}


LAYOUTS = {
    "sharded": (sharded, single),
    "fused": (fused, fused),
    "fused base": (fused, sharded),
    "fused unlearned": (sharded, fused),
    "bfloat16 base": (in_bfloat16, sharded),
}


@pytest.mark.parametrize(
    "name, layout",
    [(name, "sharded") for name in ARCHITECTURES]
    + [("Llama", "bfloat16 base")]
    + [
        (n, way) for n in ("Mixtral", "Qwen3Moe", "DeepseekV3") for way in LAYOUTS if "fused" in way
    ],
)
def test_streaming_equals_the_whole_model(name: str, layout: str, tmp_path: Path) -> None:
    save_base, save_unlearned = LAYOUTS[layout]
    model = make_model(name)
    save_base(model, tmp_path / "base")
    model.float()
    move(model)
    save_unlearned(model, tmp_path / "unlearned")
    for side in ("base", "unlearned"):
        make_tokenizer().save_pretrained(tmp_path / side)
    if layout == "bfloat16 base":  # the same weights for both, but stored in two types
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    write_rows(tmp_path / "retain.jsonl", make_rows(40, seed=0))
    arguments = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--quiet", "--retain"]
    arguments += [str(tmp_path / "retain.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["sanitize", *arguments]) == 0

    manifest = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    assert manifest["statistics"]["data"]["retain"]["experts_shown_block_input"] == []
    # Names, order, shapes and types are those of the unlearned side.
    ours, source = load_weights(tmp_path / "out"), load_weights(tmp_path / "unlearned")
    assert [(n, t.shape, t.dtype) for n, t in ours.items()] == [
        (n, t.shape, t.dtype) for n, t in source.items()
    ]
    done = check_release(tmp_path)
    if name in SEEING:
        eyes = {n for n in done if n.startswith(("vision_tower", "visual", "multi_modal"))}
        assert eyes
        assert {done[n]["reason"] for n in eyes} == {"outside the language model"}


def test_experts_that_see_few_tokens_are_shown_the_input_of_their_block(tmp_path: Path) -> None:
    model = make_model("Mixtral")
    arguments = make_sides(tmp_path, model, model)
    move(model)
    single(model, tmp_path / "unlearned")
    write_rows(tmp_path / "retain.jsonl", make_rows(3, seed=0))  # 42 tokens for 4 experts
    assert main(arguments) == 0
    manifest = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    shown = manifest["statistics"]["data"]["retain"]["experts_shown_block_input"]
    assert any("down_proj" in name for name in shown)
    assert manifest["counts"]["filtered"] == 2 * (4 + 1 + 4 * 3)


def make_tied(tied: bool) -> PreTrainedModel:
    """The same model either way, but for whether its head is a weight of its own."""
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    )
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("base_is_tied", [True, False])
def test_one_side_ties_its_head_and_the_other_does_not(base_is_tied: bool, tmp_path: Path) -> None:
    base, unlearned = make_tied(base_is_tied), make_tied(not base_is_tied)
    move(unlearned)
    assert main(make_sides(tmp_path, base, unlearned)) == 0
    head = ["lm_head.weight" in load_weights(tmp_path / s) for s in ("base", "unlearned", "out")]
    assert head == [not base_is_tied, base_is_tied, base_is_tied]
    done = check_release(tmp_path)
    assert done["model.embed_tokens.weight"]["reason"] == "token embedding"
    if base_is_tied:
        assert done["lm_head.weight"]["reason"] == "LM head"


@pytest.mark.parametrize("old", [("base",), ("unlearned",), ("base", "unlearned")])
def test_names_of_before_a_prefix_that_transformers_knows(
    old: tuple[str, ...], tmp_path: Path
) -> None:
    base = make_model("GPT2")
    arguments = make_sides(tmp_path, base, base)
    move(base)
    base.save_pretrained(tmp_path / "unlearned")
    for side in old:
        file = tmp_path / side / "model.safetensors"
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
        assert "wte.weight" in tensors
        save_file(tensors, file, metadata={"format": "pt"})
    assert main(arguments) == 0
    done = check_release(tmp_path)
    assert set(done) == set(load_file(tmp_path / "unlearned" / "model.safetensors"))
    assert sum(tensor["action"] == "filtered" for tensor in done.values()) == 2 * 4


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen3", "Gemma3Text", "GPT2", "Olmo2", "Mixtral", "Qwen2_5_VL"]
)
def test_all_parameters(name: str, tmp_path: Path) -> None:
    base, unlearned = make_model(name), make_model(name)
    move(unlearned)
    arguments = make_sides(tmp_path, base, unlearned)
    assert main([*arguments, "--parameters", "all"]) == 0
    done = check_release(tmp_path, everything=True)
    kinds = {tensor.get("kind") for tensor in done.values()}
    expected = {"linear", "norm"}
    if name in ("Gemma3Text", "GPT2"):
        expected |= {"LM head, tied to the embedding"}
    else:
        expected |= {"LM head", "token embedding"}
    if name in ("Llama", "GPT2", "Qwen2_5_VL"):
        expected |= {"bias"}
    assert expected <= kinds
    left = {t["reason"] for t in done.values() if t["action"] == "copied"}
    assert left <= {"outside the language model", "not the weight of a linear layer"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_another_type_for_the_release(dtype: str, tmp_path: Path) -> None:
    base, unlearned = make_model("Llama"), make_model("Llama")
    move(unlearned)
    arguments = make_sides(tmp_path, base, unlearned)
    assert main([*arguments, "--out-dtype", dtype]) == 0
    wanted = getattr(torch, dtype)
    assert {t.dtype for t in load_weights(tmp_path / "out").values()} == {wanted}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    rows = [json.loads(line) for line in (tmp_path / "retain.jsonl").read_text().splitlines()]
    expected = reference(tmp_path / "base", tmp_path / "unlearned", rows)
    found = load(tmp_path / "out", dtype="auto").state_dict()
    for parameter, tensor in expected.items():
        rtol = 2**-8 if dtype == "bfloat16" else 1e-4
        assert found[parameter].dtype == wanted
        assert torch.allclose(found[parameter].double(), tensor, rtol=rtol, atol=1e-5), parameter


def test_a_type_that_cannot_hold_the_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, unlearned = make_model("Llama"), make_model("Llama")
    move(unlearned)
    with torch.no_grad():
        unlearned.lm_head.weight[0, 0] = 1e6
    arguments = make_sides(tmp_path, base, unlearned)
    assert main([*arguments, "--out-dtype", "float16"]) == 15
    assert "'lm_head.weight' overflows torch.float16" in capsys.readouterr().err
