"""The versions of all that the result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("sage-hub", "torch", "transformers", "safetensors", "huggingface_hub", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of every library that the result depends on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed as a package"
    return found
