"""A quantized base is read as the numbers that it stands for, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.adapters import ADAPTER, make_adapter
from support.architectures import make_model, make_sides, move
from support.checkpoints import INDEX, change, load_weights
from support.loopback_hub import LoopbackHub
from support.mutations import remap
from support.pico import make_pair, update
from support.quantizers import NF4, QUANTIZERS, Parts, float8_rows, int8, nf4, nf4_twice, quantize
from torch import Tensor
from transformers import LlamaForCausalLM

from sage_hub.checkpoint.index import open_checkpoint, open_shards
from sage_hub.checkpoint.packed import FourBit, Scaled
from sage_hub.cli.main import main

Quantizer = Callable[[Tensor], tuple[Parts, Tensor]]
each = pytest.mark.parametrize("how", QUANTIZERS, ids=lambda how: how.__name__)
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    make_adapter(tmp_path, "Llama")
    return tmp_path


def run(base: Path, unlearned: Path, out: Path, *words: str) -> int:
    rows = str(base.parent / "retain.jsonl")
    own = ["sanitize", str(base), str(unlearned), "--output", str(out), "--retain", rows, "--quiet"]
    return main([*own, *words])


@each
def test_an_adapter_of_it_is_sanitized_as_of_what_it_stands_for(
    how: Quantizer, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = quantize(lora / "base", how)
    assert run(lora / "base", lora / "unlearned", lora / "out") == 0
    assert "is quantized (" not in capsys.readouterr().out
    assert run(clean, lora / "unlearned", lora / "clean") == 0
    for tensor, value in load_file(lora / "clean" / ADAPTER).items():
        found = load_file(lora / "out" / ADAPTER)[tensor]
        assert torch.allclose(found, value, rtol=1e-4, atol=1e-5), tensor
    manifest = json.loads((lora / "out" / "sage" / "manifest.json").read_text())
    assert manifest["sources"]["base"]["weights"].startswith("quantized (")
    assert main(["verify", str(lora / "out"), "--quiet"]) == 0


@each
def test_every_command_reads_it(
    how: Quantizer, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = quantize(lora / "base", how)
    rows = ["--retain", str(lora / "retain.jsonl"), "--quiet"]
    found = []
    for base in (lora / "base", clean):
        both = [str(base), str(lora / "unlearned"), *rows, "--json"]
        capsys.readouterr()
        assert main(["audit", *both]) == 0
        told = json.loads(capsys.readouterr().out)
        bias = [one["share"] for one in told["modules"]]
        assert main(["eval", *both]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        found.append((bias, [result["value"] for result in results]))
        out = str(lora / f"{base.name}.safetensors")
        assert main(["stats", str(base), *rows, "--output", out]) == 0
        assert main(["plan", *both]) == 0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


@each
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(how: Quantizer, data: st.DataObject) -> None:
    out, columns = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 45))
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(out * columns))
    parts, stands = how(weight)
    tensors = {f"m.{part}": tensor for part, tensor in parts.items()}

    def read(tensor: str, start: int, stop: int) -> Tensor:
        whole = tensors[tensor]
        rows = whole.reshape(-1, whole.shape[-1] if whole.ndim > 1 else 1)
        return rows[start : len(rows) if stop < 0 else stop].clone()

    packed: FourBit | Scaled
    if "weight.quant_map" in parts:
        sizes = (64, None) if how is nf4 else (16, 8)
        packed = FourBit("m.weight", (out, columns), "nf4", *sizes)
    else:
        scale = next(part for part in parts if part in ("SCB", "weight_scale", "weight_scale_inv"))
        blocks = {"float8_blocks": (24, 12), "float8_tensor": (out, columns)}
        block = blocks.get(how.__name__, (1, columns))
        steps = 127.0 if scale == "SCB" else 1.0
        values = parts["weight"].dtype
        packed = Scaled("m.weight", f"m.{scale}", (out, columns), block, values, steps)
    start = data.draw(st.integers(0, out - 1))
    stop = data.draw(st.integers(start + 1, out))
    codes, table, scales = packed.decode(read, start, stop)
    assert torch.allclose((table[codes.int()] * scales).double(), stands[start:stop], rtol=1e-5)


@each
def test_the_expected_rounding_is_about_what_it_was(how: Quantizer, tmp_path: Path) -> None:
    make_pair(tmp_path, dtype=torch.float32)
    before = load_weights(tmp_path / "base")
    clean = load_weights(quantize(tmp_path / "base", how))
    side = open_checkpoint(str(tmp_path / "base"), dequantize=True)
    expected, were = 0.0, 0.0
    for name, shard in side.shard_of.items():
        with side.files.open(shard) as reader:
            rounding = getattr(reader, "rounding")(name, 0, side.info(name).rows)  # noqa: B009
        error = float((before[name] - clean[name]).square().sum())
        assert (rounding == 0) == (error == 0), name
        expected, were = expected + rounding, were + error
    assert expected == pytest.approx(were, rel=0.2)


@each
def test_a_whole_model_beside_it(
    how: Quantizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused where the rounding drowns the update, and else told how much of it that is."""
    make_pair(tmp_path, dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    update(model, size=1e-5)
    model.save_pretrained(tmp_path / "near")
    update(model, size=0.5)
    model.save_pretrained(tmp_path / "far")
    quantize(tmp_path / "base", how)
    assert run(tmp_path / "base", tmp_path / "near", tmp_path / "out") == 20
    assert "what unlearning did cannot be told from that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "base", tmp_path / "far", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "sage" / "manifest.json").read_text())
    assert 0 < manifest["rounding_share"] < 0.2


def test_an_update_of_few_layers_beside_it(tmp_path: Path) -> None:
    """As RMU makes them: what is equal, to the bit, holds no rounding."""
    make_pair(tmp_path, dtype=torch.float32)
    clean = quantize(tmp_path / "base", nf4)
    shutil.rmtree(tmp_path / "unlearned")
    shutil.copytree(clean, tmp_path / "unlearned")
    change(
        tmp_path / "unlearned",
        "model.layers.1.mlp.down_proj.weight",
        lambda t: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(0)),
    )
    assert run(tmp_path / "base", tmp_path / "unlearned", tmp_path / "out") == 0


@pytest.mark.parametrize("how", [int8, nf4])
def test_layers_that_bitsandbytes_turns_round(
    how: Quantizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's are packed (out, in), though they are stored (in, out): not read, and not guessed."""
    model = make_model("GPT2")
    words = make_sides(tmp_path, model, model)

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if ".c_fc.weight" not in name:
                made[name] = tensor
                continue
            parts, _ = how(tensor.T.float())
            made |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in parts.items()}
        return made

    remap(tmp_path / "base", packed)
    assert main(words) == 20
    assert "of base is" in capsys.readouterr().err


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    base, unlearned = make_model("Mixtral"), make_model("Mixtral")
    move(unlearned)
    make_sides(tmp_path, base, unlearned)

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made, stand = {}, {}
        for name, tensor in tensors.items():
            if ".experts." in name and name.endswith(".weight"):
                parts, stand[name] = nf4(tensor.float())
                stem = name.removesuffix(".weight")
                made |= {f"{stem}.{part}": t for part, t in parts.items()}
            else:
                made[name] = tensor
        stands.update(stand)
        return made

    stands: dict[str, Tensor] = {}
    remap(tmp_path / "base", packed)
    assert stands
    side = open_checkpoint(str(tmp_path / "base"), dequantize=True)
    with open_shards(side) as shard:
        for name, tensor in stands.items():
            found = shard(side.shard_of[name]).read(name)
            assert torch.allclose(found.double(), tensor, rtol=1e-5)


@pytest.mark.parametrize("adapter", [True, False])
def test_with_low_disk_nothing_of_it_is_left(
    adapter: bool, tmp_path: Path, hub: LoopbackHub
) -> None:
    """Nor of the base of an adapter, which evaluation reads once more; the adapter itself, which
    the plan looks into, is small and stays."""
    if adapter:
        make_adapter(tmp_path, "Llama")
    else:
        make_pair(tmp_path, dtype=torch.float32)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        update(model, size=0.5)
        model.save_pretrained(tmp_path / "unlearned", max_shard_size="20KB")
    quantize(tmp_path / "base", nf4)
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", tmp_path / side)
    words = ["--retain", str(tmp_path / "retain.jsonl"), "--forget", str(tmp_path / "forget.jsonl")]
    words += ["--output", str(tmp_path / "out"), "-q"]
    assert main(["sanitize", "org/base", "org/unlearned", *words, "--low-disk"]) == 0
    left = [*Path(HF_HUB_CACHE).rglob("*.safetensors")]
    assert [file.name for file in left] == [ADAPTER] * adapter


def test_scales_in_another_shard(lora: Path) -> None:
    quantize(lora / "base", int8)
    index = json.loads((lora / "base" / INDEX).read_text())
    scale = f"{UP}.SCB"
    home = index["weight_map"][scale]
    other = next(file for file in sorted(set(index["weight_map"].values())) if file != home)
    tensors = load_file(lora / "base" / home)
    moved = tensors.pop(scale)
    save_file(tensors, lora / "base" / home, metadata={"format": "pt"})
    there = load_file(lora / "base" / other) | {scale: moved}
    save_file(there, lora / "base" / other, metadata={"format": "pt"})
    index["weight_map"][scale] = other
    (lora / "base" / INDEX).write_text(json.dumps(index))
    side = open_checkpoint(str(lora / "base"), dequantize=True)
    with open_shards(side) as shard:
        found = shard(side.shard_of[f"{UP}.weight"]).read(f"{UP}.weight")
    assert torch.allclose(found, tensors[f"{UP}.weight"].float() * moved[:, None] / 127)


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]])


def other_state(tensor: Tensor) -> Tensor:
    state = json.loads(bytes(tensor.tolist())) | {"blocksize": 0}
    return torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)


def without(key: str) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        state = json.loads(bytes(tensor.tolist()))
        del state[key]
        return torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)

    return spoil


STATE = "weight.quant_state.bitsandbytes__nf4"
BROKEN: list[tuple[Quantizer, str, Callable[[Tensor], Tensor | None], int, str]] = [
    (int8, "SCB", longer, 17, "does not fit the weight's"),
    (int8, "SCB", lambda _: None, 20, "stored as I8"),
    (int8, "weight_format", torch.ones_like, 17, "in an order for one kind of GPU"),
    (nf4, "weight", longer, 17, "does not hold"),
    (nf4, STATE, other_state, 17, "does not fit its shape"),
    (nf4, STATE, lambda t: t[:20], 17, "does not fit its shape"),
    (nf4, STATE, lambda _: None, 20, "is of a quantized weight"),
    (nf4_twice, "weight.absmax", lambda _: None, 17, "What lies beside"),
    (nf4, "weight.absmax", lambda t: t[:-1], 17, "What lies beside"),
    (nf4, "weight.absmax", lambda t: t.to(torch.int32), 17, "What lies beside"),
    (nf4, "weight.quant_map", lambda _: None, 17, "What lies beside"),
    (nf4, "weight.quant_map", lambda t: t[:-1], 17, "What lies beside"),
    (nf4, "weight", lambda t: t.T.contiguous(), 17, "does not hold"),
    (nf4_twice, "weight.nested_absmax", lambda _: None, 17, "What lies beside"),
    (nf4_twice, "weight.nested_absmax", longer, 17, "What lies beside"),
    (nf4_twice, "weight.nested_quant_map", lambda t: t[:-1], 17, "What lies beside"),
    (nf4_twice, STATE, without("nested_offset"), 17, "does not fit its shape"),
    (nf4_twice, STATE, without("nested_blocksize"), 17, "does not fit its shape"),
    (nf4, STATE, without("shape"), 17, "does not fit its shape"),
    (float8_rows, "weight_scale", lambda t: t.to(torch.float8_e8m0fnu), 20, "F8_E8M0"),
    (float8_rows, "weight_scale", lambda t: t.to(torch.uint8), 20, "stored as F8_E4M3"),
]


@pytest.mark.parametrize(
    "how, part, spoil, status, says", BROKEN, ids=lambda x: getattr(x, "__name__", "")
)
def test_what_does_not_fit(
    how: Quantizer,
    part: str,
    spoil: Callable[[Tensor], Tensor | None],
    status: int,
    says: str,
    lora: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quantize(lora / "base", how)
    change(lora / "base", f"{UP}.{part}", spoil)
    assert run(lora / "base", lora / "unlearned", lora / "out", "--dry-run") == status
    capsys.readouterr()
    assert run(lora / "base", lora / "unlearned", lora / "out") == status
    sentence = capsys.readouterr().err
    assert says in sentence
    assert sentence.count("\n") == 1
    assert not (lora / "out").exists()


@each
def test_an_unlearned_side_stays_refused(
    how: Quantizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path, dtype=torch.float32)
    quantize(tmp_path / "unlearned", how)
    assert run(tmp_path / "base", tmp_path / "unlearned", tmp_path / "out") == 20
    assert "unlearned is quantized" in capsys.readouterr().err


def test_it_is_not_merged(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(lora / "base", nf4)
    assert run(lora / "base", lora / "unlearned", lora / "out", "--merge") == 20
    assert "leave out --merge" in capsys.readouterr().err


def test_the_table_is_sorted() -> None:
    assert torch.equal(NF4, NF4.sort().values)
