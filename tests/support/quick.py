"""Pictures in a hurry: composed, and one pixel of each written. `unhurried` has them drawn."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
_save = Figure.savefig


def hurry(patch: Callable[[Any, str, Any], None]) -> None:
    patch(Figure, "savefig", _save_a_pixel)


def take_time(patch: Callable[[Any, str, Any], None]) -> None:
    patch(Figure, "savefig", _save)


def _save_a_pixel(_: Figure, file: Any, **options: Any) -> None:
    if hasattr(file, "write"):
        file.write(PIXEL)
    else:
        file.write_bytes(PIXEL)
