"""The versions of all that the result depends on, and the hardware that it was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARIES = (
    *("sage-hub", "torch", "transformers", "tokenizers", "jinja2", "safetensors"),
    *("huggingface_hub", "numpy"),
)


def versions() -> dict[str, str]:
    """Versions of Python and of every library that the result depends on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed as a package"
    return found


def hardware(device: str) -> dict[str, Any]:
    """What computed: kind of machine, cores, and the GPU if it was one. No host, no user."""
    import torch

    found: dict[str, Any] = {
        "device": device,
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
