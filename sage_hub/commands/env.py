"""What a bug report needs to know of the machine: nothing that is secret, or says whose it is."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sage_hub.record.tables import Table
from sage_hub.runtime.machine import machine_memory
from sage_hub.runtime.progress import in_bytes
from sage_hub.runtime.versions import versions

BESIDE = ("tokenizers", "datasets", "hf-xet", "peft", "accelerate")  # libraries that matter too
VARIABLES = (  # whose values may name a host or a folder, so that only their being set is told
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "HF_OIDC_RESOURCE",
    "SAGE_HUB_WRITE_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "WORLD_SIZE",
    "GITHUB_ACTIONS",
)


def describe() -> dict[str, Any]:
    """Versions, platform, processors, memory and disk in bytes, and which variables are set."""
    import torch
    from huggingface_hub import constants

    cuda = torch.cuda
    return {
        "versions": versions() | _also_installed(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"cores": _cores(), "threads": torch.get_num_threads()},
        "gpu": [
            {"name": found.name, "memory": found.total_memory}
            for found in (cuda.get_device_properties(i) for i in range(cuda.device_count()))
        ],
        "cuda": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
        "memory": machine_memory(),
        "disk_free": {
            "current folder": _free(Path.cwd()),
            "Hugging Face cache": _free(Path(constants.HF_HUB_CACHE)),
        },
        "set": [name for name in VARIABLES if os.environ.get(name)],
        "token": _token(Path(constants.HF_TOKEN_PATH)),
    }


def table(found: dict[str, Any]) -> Table:
    """What `describe` found, a line each, to be pasted into an issue."""
    gpus = [f"{gpu['name']}, {in_bytes(gpu['memory'])}" for gpu in found["gpu"]]
    if found["mps"]:
        gpus.append("Apple MPS")
    lines = {
        **found["versions"],
        "platform": found["platform"],
        "cpu": f"{found['cpu']['cores']} cores, {found['cpu']['threads']} threads",
        "gpu": "; ".join(gpus) or "none",
        "cuda": found["cuda"] or "not in this build of torch",
        "memory": _amount(found["memory"]),
        **{f"free, {where}": _amount(size) for where, size in found["disk_free"].items()},
        "set": ", ".join(found["set"]) or "none of the variables that matter",
        "token": found["token"] or "none",
    }
    return Table((), list(lines.items()))


def _also_installed() -> dict[str, str]:
    found = {}
    for library in BESIDE:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _free(path: Path) -> int | None:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _token(stored: Path) -> str | None:
    """Where huggingface_hub will find a token. It is not read, and no request is made."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return "by OIDC"
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "in the environment"
    return "stored by `hf auth login`" if stored.is_file() else None


def _amount(size: int | None) -> str:
    return "unknown" if size is None else in_bytes(size)
