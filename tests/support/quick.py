"""What nearly every run repeats, and takes half of its time, done once.

Whether a model can be run block by block is proved on shapes each time that one is opened: here
once for each configuration. Pictures are composed, and one pixel of each is written. The fixture
`unhurried` has all of it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from sage_hub.model import blocks

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
_prove, _save = blocks._proved, Figure.savefig
_shown: dict[tuple[type, str], Any] = {}


def hurry(patch: Callable[[Any, str, Any], None]) -> None:
    patch(blocks, "_proved", _proved_once)
    patch(Figure, "savefig", _save_a_pixel)


def take_time(patch: Callable[[Any, str, Any], None]) -> None:
    patch(blocks, "_proved", _prove)
    patch(Figure, "savefig", _save)


def _proved_once(found: blocks.BlockModel) -> blocks.BlockModel | None:
    key = type(found.model), found.model.config.to_json_string()
    if key not in _shown:
        proved = _prove(found)
        _shown[key] = proved and {"_returns": proved._returns, "_behind": proved._behind}
    return _shown[key] and replace(found, **_shown[key])


def _save_a_pixel(_: Figure, file: Any, **options: Any) -> None:
    if hasattr(file, "write"):
        file.write(PIXEL)
    else:
        file.write_bytes(PIXEL)
