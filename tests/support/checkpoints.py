"""Read and change the weights of a checkpoint on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def change(side: Path, tensor: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace one tensor of a checkpoint, or drop it where `how` returns None."""
    index = json.loads((side / INDEX).read_text())
    file = side / index["weight_map"][tensor]
    tensors = load_file(file)
    new = how(tensors.pop(tensor))
    if new is None:
        del index["weight_map"][tensor]
        (side / INDEX).write_text(json.dumps(index))
    else:
        tensors[tensor] = new
    save_file(tensors, file, metadata={"format": "pt"})


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
