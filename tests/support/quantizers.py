"""What quantization tools make of a checkpoint, written anew from their formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.mutations import edit_config, remap

Parts = dict[str, Tensor]  # what follows the module's name -> the tensor
# The values of bitsandbytes' 4-bit type, as its files hold them (QLoRA, appendix E).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def int8(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax(1)
    codes = (weight / scale[:, None] * 127).round().to(torch.int8)
    parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.double() * scale.double()[:, None] / 127


def _nearest(numbers: Tensor, table: Tensor) -> Tensor:
    return (numbers[..., None] - table).abs().argmin(-1)


def _four_bit(weight: Tensor, size: int, nested: int | None) -> tuple[Parts, Tensor]:
    flat = weight.flatten().double()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
    scales = blocks.abs().amax(1).clamp(min=1e-9)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [*weight.shape]}
    parts: Parts = {"weight.quant_map": NF4.clone()}
    if nested is None:
        parts["weight.absmax"] = scales.float()
    else:
        offset = float(scales.mean())
        table = torch.linspace(-1, 1, 256)
        rest = scales - offset
        outer = torch.nn.functional.pad(rest, (0, -len(rest) % nested)).reshape(-1, nested)
        outer = outer.abs().amax(1).clamp(min=1e-9).float()
        own = outer.repeat_interleave(nested)[: len(rest)]
        codes = _nearest(rest / own, table)
        parts |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_quant_map": table}
        parts["weight.nested_absmax"] = outer
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        scales = (table[codes] * own).double() + offset
    codes = _nearest(blocks / scales[:, None], NF4.double())
    stands = (NF4.double()[codes] * scales[:, None]).flatten()[: len(flat)].reshape(weight.shape)
    codes = codes.flatten()[: len(flat)]
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).reshape(-1, 2)
    parts["weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8)
    said = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = said
    return parts, stands


def nf4(weight: Tensor) -> tuple[Parts, Tensor]:
    return _four_bit(weight, 64, None)


def nf4_twice(weight: Tensor) -> tuple[Parts, Tensor]:
    return _four_bit(weight, 16, 8)


def _float8(
    weight: Tensor, block: tuple[int, int], name: str, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Parts, Tensor]:
    (out, columns), (rows, across) = weight.shape, block
    scales = torch.zeros(-(-out // rows), -(-columns // across))
    for i in range(len(scales)):
        for j in range(len(scales[0])):
            part = weight[i * rows : (i + 1) * rows, j * across : (j + 1) * across]
            scales[i, j] = part.abs().max() / torch.finfo(dtype).max
    wide = scales.repeat_interleave(rows, 0)[:out].repeat_interleave(across, 1)[:, :columns]
    codes = (weight / wide).to(dtype)
    return {"weight": codes, name: scales}, codes.double() * wide.double()


def float8_blocks(weight: Tensor) -> tuple[Parts, Tensor]:
    return _float8(weight, (24, 12), "weight_scale_inv")


def float8_rows(weight: Tensor) -> tuple[Parts, Tensor]:
    return _float8(weight, (1, weight.shape[1]), "weight_scale")


def float8_tensor(weight: Tensor) -> tuple[Parts, Tensor]:
    parts, stands = _float8(weight, (*weight.shape,), "weight_scale", torch.float8_e5m2)
    scale = parts["weight_scale"].reshape(())
    return parts | {"weight_scale": scale, "input_scale": torch.tensor(1.0)}, stands


CONFIGS: Mapping[str, dict[str, object]] = {
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_twice": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "float8_blocks": {"quant_method": "fp8", "weight_block_size": [24, 12]},
    "float8_rows": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "float8_tensor": {"quant_method": "fp8"},
}
QUANTIZERS: tuple[Callable[[Tensor], tuple[Parts, Tensor]], ...] = (
    *(int8, nf4, nf4_twice, float8_blocks, float8_rows, float8_tensor),
)


def quantize(side: Path, how: Callable[[Tensor], tuple[Parts, Tensor]]) -> Path:
    """Quantize the layers of a checkpoint in place; the folder of what that stands for, float32."""
    clean = side.with_name(f"{side.name}-{how.__name__}-stands-for")
    shutil.copytree(side, clean)
    stand = {}

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if not name.endswith("_proj.weight"):
                made[name] = tensor
                continue
            parts, stand[name] = how(tensor.float())
            made |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in parts.items()}
        return made

    remap(side, packed)
    for file in clean.glob("*.safetensors"):
        tensors = {n: stand.get(n, t).float().contiguous() for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    edit_config(side, quantization_config=CONFIGS[how.__name__])
    return clean
