"""Processes of their own, for runs that are killed or that need each other."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence

# Forked from a server that has imported everything, so that a run takes a second, not ten.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "matplotlib.figure",
        "scipy.stats",
        "torch",
        "sage_hub.cli.main",
        "sage_hub.commands.push",
        "transformers.models.llama.modeling_llama",
    ]
)


def run_hurried(words: Sequence[str]) -> None:
    """Run the command, and end with its status."""
    from sage_hub.cli.main import main
    from support.quick import hurry

    hurry(setattr)
    sys.exit(main(words))
