"""`sage-hub audit`: how much an update disturbs retained inputs, without writing anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sage_hub.calibration.statistics import find_ready
from sage_hub.checkpoint.pair import open_pair
from sage_hub.commands.here import settle
from sage_hub.commands.inputs import general_texts, read_proxies
from sage_hub.commands.job import Job
from sage_hub.commands.survey import with_given_statistics
from sage_hub.repair.bias import summarize
from sage_hub.repair.effect import check_changes, check_filters
from sage_hub.repair.matching import make_plan
from sage_hub.repair.update import Filter, Update
from sage_hub.rows.encoding import check_rows
from sage_hub.runtime.places import scratch
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


def audit(
    base: str,
    unlearned: str,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    run: Run = Run(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Activation bias of the update, per module and for the model; writes no weights.

    The result is that of `bias.summarize`, with the sources' names and the settings. Raises
    NothingToDoError for two sides between which there is none.
    """
    ready = None if statistics is None else find_ready(statistics)
    pair = open_pair(base, unlearned, pickled=settings.pickled_weights)
    first = pair.base.reading_with(settings.tokenizer, [pair.unlearned])
    plan = make_plan(replace(pair, base=first))
    given, settings = settings.date, settle(settings, first, run.ranks)
    of_today = given is None and settings.date is not None
    if plan.problems:
        raise plan.problems[0]
    check_filters(plan, settings)
    check_changes(plan)
    proxies = read_proxies(settings.to_calibrate(), general_texts() if ready is None else {})
    check_rows(proxies, plan.base, settings)
    fingerprints = {
        "base": plan.base.fingerprint(run.progress),
        "tokenizer": plan.base.tokenizer_fingerprint(),
    }
    job = Job(plan, settings, proxies, fingerprints, ready, of_today=of_today, run=run)
    job = with_given_statistics(job)
    how = Filter(*settings.sharpness, settings.rank)
    with (
        scratch() as folder,
        job.calibrated(folder / "statistics.safetensors", forget=True) as opened,
    ):
        update = Update(plan.observed(opened.site_of), opened, how, settings.device)
        names = {"base": plan.base.name, "unlearned": plan.unlearned.name}
        audit = summarize(update.measure(run), opened.outputs)
        return {**names, "settings": job.settings.describe(), **audit}
