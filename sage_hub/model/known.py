"""What a run on shapes shows of a model, kept on disk: it depends on its class and config alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel

from sage_hub.checkpoint.files import digest
from sage_hub.runtime.versions import versions

T = TypeVar("T")

FORMAT = 1  # of what is kept; another one is found out anew


def shelf() -> Path:
    """The folder of what is known."""
    return Path(HF_HOME) / "sage-hub" / "shapes"


def known(
    model: PreTrainedModel, what: str, find: Callable[[], Any], read: Callable[[Any], T]
) -> T:
    """What `read` makes of what `find` gives, JSON, found out once for this class and config.

    A disk that cannot be read or written, or holds something else, is no hindrance.
    """
    kind = type(model)
    key = digest(
        {
            "what": [what, FORMAT],
            "class": [kind.__module__, kind.__qualname__],
            "config": model.config.to_json_string(),
            "versions": versions(),
        }
    )
    path = shelf() / f"{key}.json"
    try:
        return read(json.loads(path.read_text(encoding="utf-8"))["found"])
    except (OSError, ValueError, KeyError, TypeError):
        found = find()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")  # as another run may be at the same
        new.write_text(json.dumps({"found": found}), encoding="utf-8")
        new.replace(path)
    except OSError:
        pass
    return read(found)
