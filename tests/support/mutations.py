"""What trainers, wrappers and savers do to the names and tensors of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def remap(side: Path, how: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Rewrite every shard of a checkpoint, and its index: `how` is given the tensors of each."""
    placed = {}
    for file in sorted(side.glob("*.safetensors")):
        tensors = {name: tensor.contiguous() for name, tensor in how(load_file(file)).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, file.name)
    if (side / INDEX).exists():
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (side / INDEX).write_text(json.dumps(index))


def rename(side: Path, how: Callable[[str], str | None]) -> None:
    """Give every tensor the name that `how` makes of its own; drop it where that is None."""

    def one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {new: t for name, t in tensors.items() if (new := how(name)) is not None}

    remap(side, one)


def edit_config(side: Path, **changes: object) -> None:
    file = side / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def add(side: Path, tensors: dict[str, Tensor]) -> None:
    """Put more tensors into the last shard."""
    files = sorted(side.glob("*.safetensors"))
    last = set(load_file(files[-1]))
    remap(side, lambda own: {**own, **tensors} if set(own) == last else own)
