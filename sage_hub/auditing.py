"""The audit: how much an update disturbs retained inputs, without writing anything."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sage_hub import shards
from sage_hub.adapter import open_unlearned
from sage_hub.bias import summarize
from sage_hub.checkpoint import Location, open_checkpoint
from sage_hub.collect import statistics_for
from sage_hub.jobs import Job, check_given_statistics, read_proxies
from sage_hub.plan import make_plan
from sage_hub.progress import SILENT, Progress
from sage_hub.settings import Settings
from sage_hub.statistics import find_ready


def audit(
    base: str,
    unlearned: str,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    stats_cache: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Activation bias of the update, per module and for the model; writes no weights.

    The result is that of `sage_hub.bias.summarize`, with the sources' names and the settings.
    """
    ready = None if statistics is None else find_ready(statistics)
    settings = settings.resolve_device()
    base_side = open_checkpoint(base)
    plan = make_plan(base_side, open_unlearned(unlearned, base_side), settings.parameters)
    if plan.problems:
        raise plan.problems[0]
    proxies = read_proxies(settings.to_calibrate(), calibrates=ready is None)
    fingerprints = {
        "base": plan.base.fingerprint(progress),
        "tokenizer": plan.base.tokenizer_fingerprint(),
    }
    cache = None if stats_cache is None else Path(stats_cache)
    job = Job(
        plan,
        settings,
        proxies,
        fingerprints,
        ready,
        None,
        Location(folder=None),
        stats_cache=cache,
    )
    check_given_statistics(job, progress)
    how = shards.Filter(*settings.sharpness, settings.rank)
    with (
        tempfile.TemporaryDirectory(prefix="sage-hub-") as scratch,
        statistics_for(
            job, Path(scratch) / "statistics.safetensors", progress, forget=True
        ) as opened,
    ):
        observed = plan.observed(opened.site_of)
        measured = shards.measure(observed, opened, how, device=settings.device, progress=progress)
        model = summarize(measured)
        names = {"base": plan.base.name, "unlearned": plan.unlearned.name}
        return {**names, "settings": settings.describe(), **model}
