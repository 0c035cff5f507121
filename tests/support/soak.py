"""What is tried a few times always, and often once a week."""

from __future__ import annotations

from typing import Any

import pytest


def seeds(few: int, many: int) -> list[Any]:
    """The seeds below `many`; those from `few` on are for the soak."""
    return [*range(few), *(pytest.param(n, marks=pytest.mark.soak) for n in range(few, many))]


def soak(*values: Any) -> Any:
    """A case for the soak alone."""
    return pytest.param(*values, marks=pytest.mark.soak)
