"""The memory of this machine, or of its container."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

GB = 1e9
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's if less."""
    sizes = []
    with suppress(AttributeError, ValueError, OSError):  # no sysconf, as on Windows
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(path.read_text()))
    return min(sizes, default=None)
