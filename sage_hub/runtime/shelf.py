"""Small things found out before, kept on this disk: dearer to find out than to look up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME


def shelf(kind: str) -> Path:
    """The folder of what is known of a kind."""
    return Path(HF_HOME) / "sage-hub" / kind


def recall(kind: str, key: str) -> Any:
    """What was kept under `key`, JSON. Raises LookupError if nothing is there that can be read."""
    try:
        return json.loads((shelf(kind) / f"{key}.json").read_text(encoding="utf-8"))["found"]
    except (OSError, ValueError, KeyError, TypeError):
        raise LookupError(f"nothing is kept of {kind} under {key}") from None


def keep(kind: str, key: str, found: Any) -> None:
    """Keep `found`, JSON. A disk that cannot be written is no hindrance."""
    path = shelf(kind) / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")  # as another run may be at the same
        new.write_text(json.dumps({"found": found}), encoding="utf-8")
        new.replace(path)
    except OSError:
        pass
