"""Small things found out before, kept on this disk: dearer to find out than to look up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
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
    _put(kind, key, found, os.replace)


def agree(kind: str, key: str, found: Any) -> Any:
    """Keep `found`, JSON, unless another run was first; what is kept then."""
    _put(kind, key, found, _unless_there)
    try:
        return recall(kind, key)
    except LookupError:  # a disk that cannot be written
        return found


def _unless_there(new: Path, path: Path) -> None:
    """Give `new` the name of `path`. Raises OSError if that is there, or cannot be."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a file system that knows no links
        with path.open("xb") as file:
            file.write(new.read_bytes())


def _put(kind: str, key: str, found: Any, move: Callable[[Path, Path], None]) -> None:
    path = shelf(kind) / f"{key}.json"
    new = path.with_suffix(f".{os.getpid()}")  # as another run may be at the same
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"found": found}), encoding="utf-8")
        with suppress(OSError):
            move(new, path)
        new.unlink(missing_ok=True)
