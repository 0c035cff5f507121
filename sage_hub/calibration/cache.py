"""The cache of statistics: files named by all that they are made from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from sage_hub.calibration.statistics import VERSION, stored_energy
from sage_hub.checkpoint.files import digest
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.disk import sync
from sage_hub.runtime.versions import versions
from sage_hub.settings import OF_PROMPTS, Settings


def statistics_key(
    checkpoint: Checkpoint, proxies: Mapping[str, Proxy], settings: Settings, weights: str
) -> str:
    """A SHA-256 over all that statistics are made from, and what they say they are of."""
    own = ("rank", "max_tokens", "max_length", "batch_size", "seed", "chat_template")
    described = settings.describe()
    kept = {
        name: described[name] for name in (*own, "moments", "memory", "device", "compute_dtype")
    }
    kept |= {name: value for name in OF_PROMPTS if (value := getattr(settings, name))}
    return digest(
        {
            "model": [checkpoint.name, checkpoint.commit],
            "weights": weights,
            "tokenizer": checkpoint.tokenizer_fingerprint(),
            # In their order, as which of them fit into `max_tokens` depends on it.
            "proxies": {w: [proxy.describe(), proxy.row_hashes] for w, proxy in proxies.items()},
            "settings": {"energy": stored_energy(settings), **kept},
            "format": VERSION,
            "versions": versions(),
        }
    )


def link(there: Path, here: Path) -> None:
    """Put the file `there` in the place of what is `here`, or a copy of it."""
    here.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own at first, as another run may be at the same.
    new = here.with_name(f"{here.stem}.{os.getpid()}.safetensors")
    try:
        try:
            new.hardlink_to(there)
        except OSError:  # another disk
            shutil.copyfile(there, new)
            sync(new)
        new.replace(here)
    finally:
        new.unlink(missing_ok=True)
