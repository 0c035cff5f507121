"""The settings of a run as this machine and this day make them, the same for every command."""

from __future__ import annotations

from dataclasses import replace

import torch

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import UsageError
from sage_hub.model.compute import compute_type, name_of
from sage_hub.rows.encoding import dated
from sage_hub.runtime.ranks import Ranks
from sage_hub.settings import Settings


def on_device(settings: Settings) -> Settings:
    """`settings` with the device "auto" replaced. Raises UsageError for one that is not here."""
    if settings.device == "auto":
        return replace(settings, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        # "meta" is a device to torch, but nothing can be computed on it.
        torch.ones(1, device=settings.device).item()
    except Exception:
        raise UsageError(
            f"The device {settings.device!r} is not available here; use --device cpu."
        ) from None
    return settings


def settle(settings: Settings, base: Checkpoint, ranks: Ranks) -> Settings:
    """`settings` with a device, a compute type and, where prompts have one, a date.

    What is given stays. `base` is the model that all others are compared with, and is read with
    its tokenizer. Raises UsageError for a device that is not here.
    """
    settings = on_device(settings)
    stored = base.architecture.dtype
    chosen = ranks.once(lambda: compute_type(settings.compute_dtype, stored, settings.device))
    day = ranks.once(lambda: dated(base, settings).date)  # at midnight, too
    return replace(settings, compute_dtype=name_of(chosen), date=day)
