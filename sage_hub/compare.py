"""Evaluation for its own sake: any models on the same rows, and how they differ from the first."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage_hub import harness
from sage_hub.adapter import open_unlearned
from sage_hub.checkpoint import Checkpoint, open_checkpoint
from sage_hub.errors import UsageError
from sage_hub.evaluation import Candidate, evaluate
from sage_hub.jobs import read_proxies
from sage_hub.progress import SILENT, Progress
from sage_hub.ranks import ALONE, Ranks
from sage_hub.record import make_report
from sage_hub.settings import Settings


def evaluate_models(
    models: Sequence[str],
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    ranks: Ranks = ALONE,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Evaluate `models`, repos of the Hub or folders, on the sets of `settings`, in turn.

    The first is what the others are compared with, and the base of those that are adapters; all
    see rows as tokens of its tokenizer. The result is a report as in a release (docs/formats.md),
    with `models` that maps each name to its commit. Raises UsageError without any set.
    """
    settings = settings.resolve_device()
    if len(set(models)) < len(models):
        raise UsageError("A model is given twice; name each of them once.")
    if "reference" in models:
        raise UsageError("A model cannot be called 'reference' here; write ./reference.")
    if not settings.sets:
        raise UsageError("Nothing to evaluate on; give --forget, --retain, --heldout or others.")
    harness.check_available(settings.lm_eval)
    proxies = read_proxies(settings, calibrates=False)
    first = open_checkpoint(models[0])
    sides: dict[str, Checkpoint] = {models[0]: first}
    sides |= {name: open_unlearned(name, first) for name in models[1:]}
    candidates = {name: Candidate(side) for name, side in sides.items()}
    if settings.reference:
        candidates["reference"] = Candidate(open_checkpoint(settings.reference))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sage-hub-") as scratch:
        found = evaluate(
            candidates,
            proxies,
            settings,
            Path(scratch),
            tokens_of=first,
            compared=[(name, models[0]) for name in sides if name != models[0]],
            robust=list(sides),
            origin=models[0],
            ranks=ranks,
            progress=progress,
        )
    report = make_report(
        found,
        alpha=None,
        seed=settings.seed,
        device=settings.device,
        seconds={"evaluate": time.perf_counter() - start},
        card={},
    )
    return {"models": {name: side.commit for name, side in sides.items()}, **report}
