"""The survey before a run: all that would stop it is found out here, before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sage_hub.calibration.budget import Budget, expect_calibration
from sage_hub.calibration.statistics import check_belongs, find_ready, open_statistics
from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.checkpoint.location import Location, parse_location
from sage_hub.checkpoint.merged import Merged
from sage_hub.checkpoint.pair import Pair
from sage_hub.commands.job import Job
from sage_hub.errors import (
    NothingToDoError,
    OutOfMemoryError,
    SageHubError,
    StatisticsError,
    UsageError,
)
from sage_hub.evaluation import harness
from sage_hub.evaluation.comparison import Result
from sage_hub.evaluation.evaluate import expected_names
from sage_hub.evaluation.imported import read_results
from sage_hub.publish.folder import check_disk, check_output
from sage_hub.publish.target import Publication, check_target
from sage_hub.record import card
from sage_hub.record.gates import ALWAYS_KNOWN, Gate, check_names, parse
from sage_hub.record.manifest import check_record
from sage_hub.record.tables import MODELS
from sage_hub.repair.matching import make_plan
from sage_hub.repair.plan import Plan
from sage_hub.rows.proxies import Proxy, check_disjoint
from sage_hub.rows.sources import read_proxy
from sage_hub.runtime.machine import GB, machine_memory
from sage_hub.runtime.progress import SILENT, Progress, in_bytes
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


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
    settings = settings.resolve_device()
    title = f"Sanitize {pair.unlearned.name} with sage-hub"
    publication = replace(publication, message=publication.message or title)
    plan = make_plan(pair).stored_as(settings.stored_dtype).without(settings.files)
    memory, least, room = expect_calibration(plan.base, settings)
    if ready is not None:
        memory = replace(memory, moments=0, sketched=frozenset())
    reference = open_checkpoint(settings.reference) if settings.reference else None
    data = _Data(settings, calibrates=ready is None)
    job = Job(
        plan,
        settings,
        data.proxies,
        {"tokenizer": plan.base.tokenizer_fingerprint()},
        ready,
        target,
        memory,
        reference=reference,
        publication=publication,
        force=force,
        run=run,
    )
    checks: list[Callable[[], object]] = [
        lambda: _check_target(job, pair),
        lambda: _check_ranks(job),
        lambda: check_disk(
            plan,
            job.output,
            statistics=room if ready is None else ready.missing_bytes,
            low_disk=settings.low_disk,
            keep=target.folder is not None or bool(settings.sets.keys() - {"retain"}),
        ),
        lambda: data.read_results(pair.sides),
        data.read_sets,
        data.read_gates,
        lambda: card.find_template(settings.card_template),
        lambda: harness.check_available(settings.lm_eval),
    ]
    if ready is None:
        checks.append(lambda: _check_memory(least))
    if plan.base.commit and plan.unlearned.commit:  # the Hub knows the hashes
        checks.append(lambda: _fingerprints(plan, SILENT))
    problems = (*plan.problems, *_failures(checks))
    job = replace(job, gates=tuple(data.gates), results=tuple(data.results), problems=problems)
    return replace(job, warnings=tuple(_warnings(job)))


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
    check_given_statistics(job)
    return job


def choose_target(to: str | None, pair: Pair) -> Location:
    """Where `to` says, or `<unlearned>-sage` beside the unlearned one."""
    if to == "":
        raise UsageError("--to is empty; leave it away or give it a value.")
    if to is not None:
        return parse_location(to)
    source = pair.unlearned.files.location
    if source.folder is None:
        return Location(folder=None, repo=f"{source.repo}-sage")
    folder = Path(os.path.realpath(source.folder))  # resolve() raises on a loop of links
    return Location(folder=folder.with_name(f"{folder.name}-sage"))


@dataclass
class _Data:
    """The files that the settings name, as far as they could be read."""

    settings: Settings
    calibrates: bool
    proxies: dict[str, Proxy] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    def read_results(self, sides: Mapping[str, Checkpoint]) -> None:
        """Results made elsewhere; what they say of a side must be of it."""
        for model, path in self.settings.results.items():
            name, commit = (s.name, s.commit) if (s := sides.get(model)) else ("", None)
            self.results += read_results(model, path, name=name, commit=commit)

    def read_sets(self) -> None:
        """The sets, and whether there are those that the gain is found by."""
        settings = self.settings
        self.proxies |= read_proxies(settings, calibrates=self.calibrates)
        if settings.gain == "match" and self.calibrates and "forget" not in self.proxies:
            raise UsageError("--gain match is measured on the forget proxy; give --forget.")
        if settings.gain_rule == "search" and "retain" not in self.proxies:
            raise UsageError(
                "The gain is searched for on the forget rows, and held back by retain rows, which "
                "statistics don't hold: give --retain beside --stats, or --gain match."
            )
        if settings.target is not None and settings.gain_rule != "search":
            raise UsageError(
                "--target is reached by evaluating the forget set; give --forget, no --low-disk."
            )

    def read_gates(self) -> None:
        """The gates, after all that they can be about; nothing if the sets could not be read."""
        settings = self.settings
        self.gates += map(parse, settings.gates)
        if not self.proxies.keys() >= settings.sets.keys():
            return
        models = [*MODELS, *(["reference"] if settings.reference else [])]
        known = {*expected_names(self.proxies, settings, models), *ALWAYS_KNOWN}
        for result in self.results:
            known |= {f"{result.model}.{result.set}.{result.metric}"}
            known |= {f"{result.set}.{result.metric}"} if result.model == "sanitized" else set()
        tasks = [task.strip() for task in (settings.lm_eval or "").split(",")]
        check_names(self.gates, known, tasks)


def _check_memory(least: Budget) -> None:
    """Raise OutOfMemoryError if even a single token is too much to calibrate on, here."""
    least.check()
    available = machine_memory()
    if available is not None and least.total > available:
        raise OutOfMemoryError(
            f"Calibration takes {in_bytes(least.total)} of memory at least, and this machine has "
            f"{in_bytes(available)}; use a larger one, or --stats made on one."
        )


def read_proxies(settings: Settings, *, calibrates: bool) -> dict[str, Proxy]:
    """The sets that are given, read and checked to be disjoint.

    Without a retain proxy the general-purpose one stands in, if it is to calibrate on.
    """
    sources: dict[str, str | None] = {"retain": None} if calibrates else {}
    proxies = {which: read_proxy(source) for which, source in (sources | settings.sets).items()}
    check_disjoint({which: (proxy.name, proxy.row_hashes) for which, proxy in proxies.items()})
    return proxies


def _fingerprints(plan: Plan, progress: Progress) -> dict[str, str]:
    """The fingerprints of both sides. Raises NothingToDoError if they are the same."""
    sides = {"base": plan.base, "unlearned": plan.unlearned}
    found = {name: side.fingerprint(progress) for name, side in sides.items()}
    if found["base"] == found["unlearned"]:
        raise nothing_to_do(plan)
    return found


def nothing_to_do(plan: Plan) -> NothingToDoError:
    """The error that says so."""
    return NothingToDoError(
        f"{plan.base.name} and {plan.unlearned.name} hold the same weights; there is no update to "
        "sanitize. Check that both arguments are what you meant."
    )


def _check_target(job: Job, pair: Pair) -> None:
    target, publication = job.target, job.publication
    if job.run.record is not None:
        check_record(job.run.record, target.folder)
    if target.folder is not None:
        publication.check_unused()
        sources = [side.files.location.folder for side in pair.sides.values()]
        check_output(target.folder, sources, force=job.force)
        return
    if target.revision:
        raise UsageError("A target takes no @revision; publish to org/name.")
    check_target(target.repo, publication, force=job.force)


def _check_ranks(job: Job) -> None:
    if job.settings.low_disk and job.run.ranks.count > 1:
        raise UsageError("--low-disk is for one process; run without torchrun.")


def _failures(checks: Sequence[Callable[[], object]]) -> Iterator[SageHubError]:
    for check in checks:
        try:
            check()
        except SageHubError as error:
            yield error


def check_given_statistics(job: Job) -> None:
    """Raise StatisticsError or OverlapError if ready statistics don't belong to `job`.

    That they are of other rows than the job's proxies is no error, and is said.
    """
    if job.statistics is None:
        return
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
    for which in data.keys() & job.proxies.keys():
        if data[which]["fingerprint"] != job.proxies[which].fingerprint:
            job.run.progress.note(
                f"The statistics were made on other {which} rows ({data[which]['name']}) than "
                f"those of {job.proxies[which].name}, which are only evaluated."
            )
    others = {
        which: (proxy.name, proxy.row_hashes)
        for which, proxy in job.proxies.items()
        if which != "retain"
    }
    check_disjoint({"retain": (seen["name"], seen["row_hashes"]), **others})


def _warnings(job: Job) -> Iterator[str]:
    retain = job.proxies.get("retain")
    if retain is not None and retain.builtin:
        yield (
            "The retain proxy is the general-purpose one that comes with sage-hub. A few hundred "
            "rows of your own domain, given with --retain, protect what you care for better."
        )
    if job.settings.gain == "auto" and job.settings.forget is None:
        yield (
            "Without --forget no gain can be chosen: what is left of the update is not turned up, "
            "so the release will forget less than its source, and nothing here shows how much."
        )
    available = machine_memory()
    if available is not None and job.settings.memory * GB > available:
        yield (
            f"--memory allows {job.settings.memory:g} GB, and this machine has "
            f"{in_bytes(available)}; give less, or the system may end the run."
        )
    if job.target.folder is None and not job.publication.private:
        for side in (job.plan.base, job.plan.unlearned):
            if isinstance(side.files, HubFiles) and side.files.private:
                yield (
                    f"{side.name} is private; if {job.target.repo} has to be created it is as "
                    "private as its owner's new repos are. --private makes sure of it."
                )
    yield from card.licence_warnings(job.plan)
    unlearned = job.plan.unlearned
    for key in ("_name_or_path", "base_model_name_or_path"):
        if str(unlearned.config.get(key, "")).startswith(("/", "~")):
            yield (
                f"{unlearned.config_file} of the unlearned model names a folder of the machine it "
                f"was made on ({key}) and comes along verbatim; change that line first if it is "
                "private."
            )
    if not unlearned.has_tokenizer and not isinstance(unlearned, (Adapter, Merged)):
        yield (
            "The unlearned side has no tokenizer, and neither will the release have one; put the "
            "base's tokenizer files beside its weights first if it should."
        )
    if unlearned.has_tokenizer and (
        unlearned.tokenizer_fingerprint() != job.fingerprints["tokenizer"]
    ):
        yield (
            "The tokenizer files of the two sides differ; the base's are used for calibration and "
            "evaluation, the unlearned side's are in the release."
        )
