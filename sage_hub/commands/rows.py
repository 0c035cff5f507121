"""The rows that the base writes where none are given: which, when, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sage_hub.calibration.statistics import open_statistics
from sage_hub.commands.inputs import general_texts
from sage_hub.commands.job import Job
from sage_hub.errors import TargetError, UsageError
from sage_hub.evaluation.scoring import score
from sage_hub.evaluation.written import NAME, far_more_lost, write_rows
from sage_hub.model.blocks import open_blocks
from sage_hub.model.compute import type_of
from sage_hub.model.weights import open_weights
from sage_hub.publish.folder import Work
from sage_hub.rows.encoding import encoder_of
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy, Row
from sage_hub.runtime.disk import write_whole
from sage_hub.runtime.run import Run
from sage_hub.settings import GUARD

RETAIN_ROWS, GUARD_ROWS = 200, 100  # docs/results.md
SPARE = 1.25  # that many times as many are written, as some are left out
FEWEST = 20  # of a set, or general texts stand in
FAR = 3.0  # times the median deviation: what is lost far more than the rest (docs/results.md)

Records = Sequence[Mapping[str, str]]


def check_save(job: Job) -> None:
    """Raise UsageError or TargetError where --save-retain has nothing to save, or no place."""
    path = job.run.save_retain
    if path is None:
        return
    if "retain" not in job.supply.written:
        raise UsageError("--save-retain is for rows that the base writes, and here it writes none.")
    if path.exists() or not path.parent.is_dir():
        wrong = "is there already" if path.exists() else "is in no folder that is there"
        raise TargetError(f"--save-retain {path} {wrong}; choose another file.")


def warn_of_rows(job: Job) -> Iterator[str]:
    """What a person should know of the rows that nobody gave."""
    supply, settings = job.supply, job.settings
    if "retain" in supply.written:
        yield (
            f"The base writes the retain proxy itself, {RETAIN_ROWS} questions and answers. A few "
            "hundred rows of your own domain, given with --retain, protect it better."
        )
    elif "retain" in supply.general:
        yield (
            "The retain proxy is the general-purpose one that comes with sage-hub, because the "
            f"base cannot write one: {supply.why}. A few hundred rows of your own domain, given "
            "with --retain, protect what you care for better."
        )
    if settings.gain_rule == "keep":
        yield (
            "Without --forget it is not measured how much is forgotten: the gain is the largest "
            f"that keeps {100 * settings.keep:g} % of what the unlearned model has lost on other "
            f"rows, which {'the base writes' if GUARD in supply.written else 'are general texts'}."
        )
    elif settings.gain == "auto" and settings.forget is None:
        yield (
            "With --low-disk and without --forget no gain can be chosen: what is left of the "
            "update is not turned up, so the release will forget less than its source, and nothing "
            "here shows how much."
        )


def with_written(job: Job, work: Work) -> Job:
    """`job` with the rows that its base writes, or has written in an earlier run of it.

    General texts stand in for those of a base that writes too few.
    """
    wanted, ranks = job.supply.written, job.run.ranks
    if not wanted:
        return job
    sets = ranks.once(lambda: _kept(work.rows) or _write(job, work))
    if any(len(sets[which]) < FEWEST for which in wanted):
        job.run.progress.note(
            "These are too few to calibrate on and to find a gain by, so general texts stand in; "
            "rows of your own, given with --retain, protect what you care for better."
        )
        return replace(job, proxies={**general_texts(wanted), **job.proxies})
    if (path := job.run.save_retain) is not None:
        ranks.once(lambda: _save(path, sets["retain"]))
    proxies = {which: Proxy(NAME, parse_rows(sets[which], NAME)) for which in wanted}
    return replace(job, proxies={**proxies, **job.proxies})


def _write(job: Job, work: Work) -> dict[str, Records]:
    """The rows of each set that is wanted, and a file of them for the next run."""
    settings, run, plan = job.settings, job.run, job.plan
    counts = {"retain": RETAIN_ROWS, GUARD: GUARD_ROWS}
    many = round(SPARE * sum(counts.values()))
    with (
        open_weights(plan.base) as weights,
        open_blocks(plan.base, weights, settings.device, type_of(settings.compute_dtype)) as model,
        model.whole(weights) as whole,
    ):
        rows = write_rows(whole, plan.base, many, settings, Run(run.progress))
    fresh = _not_given(job, rows)
    left = _without_forgotten(job, fresh, work.folder) if fresh else fresh
    # The same guard rows, whatever is wanted beside them.
    sets = {GUARD: left[:GUARD_ROWS], "retain": left[GUARD_ROWS:][:RETAIN_ROWS]}
    run.progress.note(
        f"The base wrote {len(rows)} rows. {len(rows) - len(left)} of them are left out, as the "
        "unlearned model has lost far more of them than of the others, or as they were given."
    )
    write_whole(work.rows, json.dumps(sets))
    return sets


def _not_given(job: Job, rows: Records) -> Records:
    """Those that are in no set of `job`, be it with another answer, nor were calibrated on."""
    tellings = [one for p in job.proxies.values() for row in p.rows for one in row.tellings]
    hashes, asked = {one.hash for one in tellings}, {_folded(one) for one in tellings}
    if job.statistics is not None:
        with open_statistics(job.statistics.path()) as statistics:
            for about in statistics.origin.data.values():
                hashes.update(about["row_hashes"])
    parsed = parse_rows(rows, NAME) if rows else ()
    return [
        row
        for row, one in zip(rows, parsed, strict=True)
        if one.hash not in hashes and _folded(one) not in asked
    ]


def _folded(row: Row) -> str:
    """What a row asks, whatever the case and the white space."""
    return " ".join(row.prompt.casefold().split())


def _without_forgotten(job: Job, rows: Records, scratch: Path) -> Records:
    """Those that the unlearned model has not lost far more of than of the others, in nats."""
    plan, settings = job.plan, job.settings
    encoder, losses = encoder_of(plan.base, settings), []
    encoded = [encoder.row(row, NAME) for row in parse_rows(rows, NAME)]
    for name, side in (("the base", plan.base), ("the unlearned model", plan.unlearned)):
        dtype = type_of(settings.compute_dtype)
        with (
            open_weights(side) as weights,
            open_blocks(side, weights, settings.device, dtype) as model,
        ):
            what = f"Reading them with {name}"
            found = score(model, weights, encoded, settings, scratch, what=what)
            losses.append([one.loss for one in found])
    lost = [after - before for before, after in zip(*losses, strict=True)]
    far = far_more_lost(lost, FAR)
    return [row for row, forgotten in zip(rows, far, strict=True) if not forgotten]


def _kept(path: Path) -> dict[str, Records] | None:
    try:
        found: dict[str, Records] = json.loads(path.read_text(encoding="utf-8"))
        return found if all(isinstance(found[which], list) for which in (GUARD, "retain")) else None
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return None


def _save(path: Path, rows: Records) -> None:
    try:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise TargetError(f"--save-retain {path} cannot be written: {error.strerror}.") from None
