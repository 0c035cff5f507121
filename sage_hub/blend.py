"""The model W_b + αΔ in memory: the unlearned one at α = 1, and the control that any α makes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sage_hub.adapter import Adapter, Merged
from sage_hub.architecture import load_model, read_architecture
from sage_hub.checkpoint import Checkpoint
from sage_hub.errors import ArchitectureError


def load_blend(
    base: Checkpoint, unlearned: Checkpoint, alpha: float, device: str
) -> PreTrainedModel:
    """Load W_b + α (W_u − W_b), rounded to the model's dtype as a checkpoint of it would be.

    Raises ArchitectureError for a base tensor that is no parameter of the model as it stands.
    """
    if isinstance(unlearned, Merged):
        unlearned = unlearned.adapter
    if isinstance(unlearned, Adapter):
        model = load_model(base, device)
        unlearned.add_to(model, alpha)
        return model
    model = load_model(unlearned, device)
    if alpha != 1:
        _towards(base, model, alpha)
    return model


@torch.no_grad()
def _towards(base: Checkpoint, model: PreTrainedModel, alpha: float) -> None:
    """Turn the unlearned `model` into W_b + αΔ in place, a base tensor at a time."""
    architecture = read_architecture(base)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Tied parameters are one tensor under two names; it must be blended once.
    done: set[tuple[int, int]] = set()
    for shard, header in base.headers.items():
        with base.open_shard(shard) as reader:
            for name, info in header.tensors.items():
                place = architecture.place(name, info.shape)
                parameter = parameters.get(place.parameter) if place else None
                if place is None or parameter is None:
                    if architecture.may_be_absent(place.parameter if place else name):
                        continue
                    raise ArchitectureError(f"{name!r} is no part of a parameter of the model")
                if (id(parameter), place.start) in done:
                    continue
                done.add((id(parameter), place.start))
                rows = parameter.view(-1, info.columns)[place.start : place.stop]
                b = reader.read_rows(name, 0, info.rows).to(rows.device)
                wide = torch.promote_types(rows.dtype, torch.float32)
                b, u = b.to(wide), rows.to(wide)
                rows.copy_(b + alpha * (u - b))
