"""Quantized checkpoints are told before anything is made of their numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from support.adapters import ADAPTER, make_adapter
from support.architectures import make_model, make_sides
from support.checkpoints import INDEX
from support.mutations import edit_config

from sage_hub.cli.main import main

UP = "model.layers.0.mlp.up_proj"


def retype(file: Path, tensor: str, dtype: str, itemsize: int, name: str = "") -> None:
    """Say of a tensor that its bytes are numbers of another type, and call it `name`."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + length])
    field = fields.pop(tensor)
    start, stop = field["data_offsets"]
    rows = field["shape"][0]
    field |= {"dtype": dtype, "shape": [rows, (stop - start) // rows // itemsize]}
    header = json.dumps({**fields, name or tensor: field}).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def pack(side: Path, dtype: str, itemsize: int, name: str = f"{UP}.weight") -> None:
    index = json.loads((side / INDEX).read_text())
    shard = index["weight_map"].pop(f"{UP}.weight")
    retype(side / shard, f"{UP}.weight", dtype, itemsize, name)
    index["weight_map"][name] = shard
    (side / INDEX).write_text(json.dumps(index))


def refused(
    words: list[str], capsys: pytest.CaptureFixture[str], says: str, status: int = 20
) -> None:
    capsys.readouterr()
    assert main([*words, "--quiet"]) == status
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert says in sentence


MLX = {"group_size": 64, "bits": 4}
STATED: list[dict[str, Any]] = [
    {"quantization": MLX},
    {"quantization_config": {"quant_method": "awq"}},
    {"compression_config": {"format": "pack-quantized"}},
    {"text_config": {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}},
    {"quantization_config": "of an odd kind"},
]


@pytest.mark.parametrize("side", ["base", "unlearned"])
@pytest.mark.parametrize("stated", STATED, ids=json.dumps)
def test_a_config_that_says_so(
    stated: dict[str, Any], side: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(pair / side, **stated)
    both = [str(pair / "base"), str(pair / "unlearned")]
    refused(["sanitize", *both, "--output", "out", "--dry-run"], capsys, f"{side} is quantized")
    refused(["audit", *both], capsys, f"{side} is quantized")


def test_a_config_within_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("Llava")
    words = make_sides(tmp_path, model, model)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    refused(words, capsys, "base is quantized (bitsandbytes)")


@pytest.mark.parametrize("side", ["base", "unlearned"])
@pytest.mark.parametrize(
    "dtype, itemsize",
    [("U32", 4), ("I32", 4), ("U8", 1), ("I8", 1), ("U16", 2), ("F8_E4M3", 1), ("U64", 8)],
)
def test_a_type_that_weights_are_not_of(
    dtype: str, itemsize: int, side: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(pair / side, dtype, itemsize)
    both = [str(pair / "base"), str(pair / "unlearned")]
    refused(["sanitize", *both, "--output", "out"], capsys, f"of {side} is stored as {dtype}")
    one = ["stats", str(pair / side), "--output", "st"]
    refused(one, capsys, f"of {side} is stored as {dtype}")


@pytest.mark.parametrize("name", ["qweight", "weight_packed", "weight_scale", "weight.absmax"])
def test_a_name_that_weights_have_not(
    name: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(pair / "unlearned", "I32", 4, f"{UP}.{name}")
    both = [str(pair / "base"), str(pair / "unlearned")]
    refused(["sanitize", *both, "--output", "out"], capsys, f"{UP}.{name}")


def test_an_adapter_of_packed_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(tmp_path, "Llama")
    tensor = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    retype(tmp_path / "unlearned" / ADAPTER, tensor, "U32", 4)
    both = [str(tmp_path / "base"), str(tmp_path / "unlearned")]
    refused(["sanitize", *both, "--output", "out"], capsys, "stored as U32")
