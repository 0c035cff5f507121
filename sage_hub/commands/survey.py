"""The survey before a run: all that would stop it is found out here, before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from sage_hub.calibration.budget import Budget, expect_calibration
from sage_hub.calibration.statistics import check_belongs, find_ready, open_statistics
from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.checkpoint.location import Location, parse_location
from sage_hub.checkpoint.merged import Merged, check_effect
from sage_hub.checkpoint.notes import notes_on
from sage_hub.checkpoint.pair import Pair
from sage_hub.commands.here import settle
from sage_hub.commands.inputs import Inputs, Supply
from sage_hub.commands.job import Job
from sage_hub.commands.rows import check_save, warn_of_rows
from sage_hub.errors import (
    OutOfMemoryError,
    SageHubError,
    StatisticsError,
    UsageError,
    about,
)
from sage_hub.evaluation import harness
from sage_hub.evaluation.depth import check_depth
from sage_hub.publish.announce import check_announcement
from sage_hub.publish.folder import check_disk, check_output
from sage_hub.publish.target import Publication, check_target, target_warnings
from sage_hub.record import card
from sage_hub.record.manifest import check_record
from sage_hub.record.metadata import metadata_warnings
from sage_hub.record.signing import check_signer
from sage_hub.repair.beside import bring, check_cases, path_warnings
from sage_hub.repair.effect import check_filters, no_update
from sage_hub.repair.matching import make_plan
from sage_hub.repair.plan import Plan
from sage_hub.repair.readable import unreadable
from sage_hub.rows.proxies import Hashes, Proxy, check_disjoint
from sage_hub.rows.sources import at_commit
from sage_hub.runtime.machine import GB, machine_memory
from sage_hub.runtime.progress import SILENT, Progress, in_bytes
from sage_hub.runtime.run import Run
from sage_hub.settings import OF_PROMPTS, Settings


def survey(
    pair: Pair,
    target: Location,
    settings: Settings,
    *,
    statistics: str | Path | None = None,
    publication: Publication = Publication(),  # noqa: B008 - frozen
    force: bool = False,
    run: Run = Run(),  # noqa: B008 - frozen
) -> Job:
    """Plan the run from configs and headers, reading no weights, and find all its problems.

    Each problem would stop `check_weights`. Only what leaves nothing to plan is raised: a reference
    or statistics that cannot be opened, or another architecture.
    """
    ready = None if statistics is None else find_ready(statistics)
    reference = None
    if settings.reference:
        with about("reference", "--reference"):
            reference = open_checkpoint(settings.reference, pickled=settings.pickled_weights)
    others = [pair.unlearned, *([reference] if reference else [])]
    pair = replace(pair, base=pair.base.reading_with(settings.tokenizer, others))
    settings = _pinned(settings, pair.base, reference)
    given, settings = settings.date, settle(settings, pair.base, run.ranks)
    title = f"Sanitize {pair.unlearned.name} with sage-hub"
    publication = replace(publication, message=publication.message or title)
    plan = bring(make_plan(pair).stored_as(settings.stored_dtype), settings.carry)
    plan = plan.without(settings.files)
    memory, least, kept = expect_calibration(plan.base, settings)
    if ready is not None:
        memory = replace(memory, moments=0, sketched=frozenset())
    supply = Supply.of(plan.base, settings, calibrates=ready is None)
    data = Inputs(settings, ready is None, supply)
    job = Job(
        plan,
        settings,
        data.proxies,
        {"tokenizer": plan.base.tokenizer_fingerprint()},
        ready,
        target,
        memory,
        reference=reference,
        of_today=given is None and settings.date is not None,
        publication=publication,
        force=force,
        run=run,
        supply=supply,
    )
    problems = (
        *plan.problems,
        *_failures(_checks(job, pair, data, least, kept)),
        *unreadable(plan),
    )
    job = replace(
        job,
        settings=_with_commits(settings, data.proxies),
        shown=data.shown,
        gates=tuple(data.gates),
        results=tuple(data.results),
        problems=problems,
    )
    return replace(job, warnings=tuple(_warnings(job)))


def _checks(
    job: Job, pair: Pair, data: Inputs, least: Budget, kept: int
) -> Iterator[Callable[[], object]]:
    """Each thing that can be refused beforehand, in the order in which it is told.

    `least` is the memory that calibration takes at least, `kept` the bytes of its statistics.
    """
    plan, settings, ready = job.plan, job.settings, job.statistics
    yield lambda: check_filters(plan, settings)
    yield lambda: check_cases(plan.unlearned)
    yield lambda: _check_target(job, pair)
    yield lambda: _check_ranks(job)
    yield lambda: check_save(job)
    yield lambda: check_signer(job.run.sign)
    yield lambda: check_disk(
        plan,
        job.output,
        statistics=kept if ready is None else ready.missing_bytes,
        calibration=int(kept + job.memory.spilled) if ready is None and job.memory else 0,
        low_disk=settings.low_disk,
        keep=job.keeps_output or bool(settings.sets.keys() - {"retain"}),
    )
    yield lambda: check_effect(plan.unlearned)
    yield lambda: data.read_results(pair.sides)
    yield from (partial(data.read_set, which) for which in settings.sets)
    yield data.compare_sets
    yield lambda: data.check_rows(plan, job.reference)
    yield lambda: check_depth(data.proxies, settings, plan.base, *filter(None, [job.reference]))
    yield data.read_gates
    yield about("card_template", "--card-template")(
        lambda: card.find_template(settings.card_template)
    )
    yield about("lm_eval", "--lm-eval")(lambda: harness.check_available(settings.lm_eval))
    if ready is None:
        yield lambda: _check_memory(least)
    if plan.base.commit and plan.unlearned.commit:  # the Hub knows the hashes
        yield lambda: _fingerprints(plan, SILENT)


def check_weights(job: Job) -> Job:
    """Raise the first problem of `job`, if any; then the checks that take the weights' hashes.

    For a Hub repo these are known, and the files of a folder are read once.
    """
    if job.problems:
        first, more = job.problems[0], len(job.problems) - 1
        if not more:
            raise first
        others = "is another problem" if more == 1 else f"are {more} more problems"
        raise type(first)(f"{first} There {others}; --dry-run lists all.")
    found, equal = job.run.ranks.once(
        lambda: (_fingerprints(job.plan, job.run.progress), job.plan.knowing_hashes().equal)
    )
    job = replace(
        job, plan=replace(job.plan, equal=equal), fingerprints={**job.fingerprints, **found}
    )
    return with_given_statistics(job)


def choose_target(to: str | None, pair: Pair) -> Location:
    """Where `to` says, or `<unlearned>-sage` beside the unlearned one."""
    if to == "":
        raise UsageError("--to is empty; leave it away or give it a value.")
    if to is not None:
        return parse_location(to)
    source = pair.unlearned.files.location
    if source.folder is None:
        return Location(
            None, "-".join(filter(None, [source.repo, *source.below.split("/"), "sage"]))
        )
    folder = Path(os.path.realpath(source.folder))  # resolve() raises on a loop of links
    return Location(folder=folder.with_name(f"{folder.name}-sage"))


def _check_memory(least: Budget) -> None:
    """Raise OutOfMemoryError if even a single token is too much to calibrate on, here."""
    least.check()
    available = machine_memory()
    if available is not None and least.total > available:
        raise OutOfMemoryError(
            f"Calibration takes {in_bytes(least.total)} of memory at least, and this machine has "
            f"{in_bytes(available)}; use a larger one, or --stats made on one."
        )


def _fingerprints(plan: Plan, progress: Progress) -> dict[str, str]:
    """The fingerprints of both sides. Raises NothingToDoError if they are the same."""
    sides = {"base": plan.base, "unlearned": plan.unlearned}
    found = {name: side.fingerprint(progress) for name, side in sides.items()}
    if found["base"] == found["unlearned"]:
        raise no_update(plan)
    return found


def _check_target(job: Job, pair: Pair) -> None:
    target, publication = job.target, job.publication
    if job.run.record is not None:
        check_record(job.run.record, target.folder)
    if target.folder is not None:
        publication.check_unused()
        sources = [side.files.location.folder for side in pair.sides.values()]
        check_output(target.folder, sources, force=job.force)
        return
    if target.revision or target.below:
        raise UsageError("A target takes no @revision and no folder; publish to org/name.")
    check_target(target.repo, publication, force=job.force)
    if publication.announce:
        check_announcement(pair.unlearned.files, target.repo, publication)


def _check_ranks(job: Job) -> None:
    if job.settings.low_disk and job.run.ranks.count > 1:
        raise UsageError("--low-disk is for one process; run without torchrun.")


def _pinned(settings: Settings, base: Checkpoint, reference: Checkpoint | None) -> Settings:
    """The settings with the commits of the tokenizer and the reference that are on the Hub."""
    named = {"tokenizer": base.tokenizer if settings.tokenizer else None, "reference": reference}
    found = {n: f"{m.name}@{m.commit}" for n, m in named.items() if m is not None and m.commit}
    return replace(settings, **found)  # type: ignore[arg-type]


def _with_commits(settings: Settings, proxies: Mapping[str, Proxy]) -> Settings:
    """The settings with the commits at which their datasets were read, for the record."""
    found = {
        which: at_commit(source, proxies[which].revision)
        for which, source in settings.sets.items()
        if which in proxies
    }
    others = {which: found.get(which, source) for which, source in settings.bystanders.items()}
    own = {which: source for which, source in found.items() if which not in others}
    return replace(settings, bystanders=others, **own)  # type: ignore[arg-type]


def _failures(checks: Iterable[Callable[[], object]]) -> Iterator[SageHubError]:
    for check in checks:
        try:
            check()
        except SageHubError as error:
            yield error


def with_given_statistics(job: Job) -> Job:
    """The job with the date of its ready statistics, if it has some and nobody gave a date.

    Raises StatisticsError or OverlapError if they don't belong to it. That they were made of other
    rows or prompts than the job's is no error, and is said.
    """
    if job.statistics is None:
        return job
    with open_statistics(job.statistics.path()) as statistics:
        check_belongs(
            statistics,
            name=job.plan.base.name,
            weights=job.fingerprints["base"],
            tokenizer=job.fingerprints["tokenizer"],
            energy=job.settings.sharpness[1],
            rank=job.settings.rank,
        )
        if job.settings.gain_rule == "match" and not statistics.has("forget"):
            raise StatisticsError(
                "The gain is measured on the forget proxy, which the statistics don't have; make "
                "them anew with `sage-hub stats --forget`, or give the --gain."
            )
        data = statistics.origin.data
        seen = data["retain"]
        made_with = statistics.origin.settings
    job = replace(job.on_day(made_with.get("date")), of_today=False)
    for name in ("compute_dtype", "chat_template", *OF_PROMPTS):
        theirs, ours = made_with.get(name), getattr(job.settings, name)
        if theirs != ours:
            job.run.progress.note(
                f"The statistics were made with {name} {_said(theirs)}; this run has {_said(ours)}."
            )
    for which in data.keys() & job.proxies.keys():
        if data[which]["fingerprint"] != job.proxies[which].fingerprint:
            job.run.progress.note(
                f"The statistics were made on other {which} rows ({data[which]['name']}) than "
                f"those of {job.proxies[which].name}, which are only evaluated."
            )
    others = {which: proxy.hashes for which, proxy in job.proxies.items() if which != "retain"}
    check_disjoint({"retain": Hashes(seen["name"], seen["row_hashes"]), **others})
    return job


def _said(value: object) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _warnings(job: Job) -> Iterator[str]:
    yield from warn_of_rows(job)
    available = machine_memory()
    if available is not None and job.settings.memory * GB > available:
        yield (
            f"--memory allows {job.settings.memory:g} GB, and this machine has "
            f"{in_bytes(available)}; give less, or the system may end the run."
        )
    if job.target.folder is None and not job.publication.private:
        for side in (job.plan.base, job.plan.unlearned):
            if side.files.private:
                yield (
                    f"{side.name} is private; if {job.target.repo} has to be created it is as "
                    "private as its owner's new repos are. --private makes sure of it."
                )
    yield from notes_on(Pair(job.plan.base, job.plan.unlearned))
    if job.target.folder is None and not job.problems:
        yield from target_warnings(job.target.repo, job.publication)
    yield from metadata_warnings(job.plan)
    unlearned = job.plan.unlearned
    yield from path_warnings(job.plan)
    used = job.plan.base.tokenizer
    if used is not None:
        yield f"Rows are put into tokens by the tokenizer of {used.name}."
    if not unlearned.has_tokenizer and not isinstance(unlearned, (Adapter, Merged)):
        yield (
            "The unlearned side has no tokenizer, and neither will the release have one; put "
            "tokenizer files beside its weights first if it should."
        )
    if unlearned.has_tokenizer and (
        unlearned.tokenizer_fingerprint() != job.fingerprints["tokenizer"]
    ):
        yield (
            "The unlearned side has other tokenizer files than those used for calibration and "
            f"evaluation ({(used or job.plan.base.files).name}'s); its own are in the release."
        )
