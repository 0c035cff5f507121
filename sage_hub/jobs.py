"""Everything a run needs, and everything that would stop it, found out before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from sage_hub import card, harness
from sage_hub.adapter import Adapter, Merged, open_unlearned
from sage_hub.architecture import empty_model
from sage_hub.blocks import cut
from sage_hub.budget import GB, Budget, plan_memory, statistics_bytes
from sage_hub.checkpoint import (
    Checkpoint,
    HubFiles,
    Location,
    digest,
    open_checkpoint,
    open_files,
    parse_location,
)
from sage_hub.comparison import Result
from sage_hub.encoding import row_limit
from sage_hub.environment import machine_memory
from sage_hub.errors import (
    NothingToDoError,
    OutOfMemoryError,
    SageHubError,
    StatisticsError,
    UsageError,
)
from sage_hub.estimate import Estimate, estimate, probe
from sage_hub.evaluation import expected_names
from sage_hub.gates import ALWAYS_KNOWN, Gate, check_names, parse
from sage_hub.output import check_disk, check_output
from sage_hub.plan import Plan, make_plan
from sage_hub.progress import SILENT, Progress, in_bytes
from sage_hub.proxies import Proxy, check_disjoint, read_proxy
from sage_hub.ranks import ALONE, Ranks
from sage_hub.record import describe_source
from sage_hub.results import read_results
from sage_hub.settings import Settings
from sage_hub.sites import find_sites
from sage_hub.statistics import Ready, check_belongs, find_ready, open_statistics
from sage_hub.tables import MODELS
from sage_hub.target import Publication, check_target
from sage_hub.versions import versions
from sage_hub.weights import loaded_whole


@dataclass(frozen=True)
class Job:
    """Everything that a run needs: nothing was computed or written yet."""

    plan: Plan
    settings: Settings
    proxies: Mapping[str, Proxy]  # those of retain, forget, heldout that there are
    fingerprints: Mapping[str, str]  # "tokenizer"; "base" and "unlearned" once weights are checked
    statistics: Ready | None  # instead of calibrating
    memory: Budget | None  # what calibration and evaluation take, at most
    target: Location
    gates: tuple[Gate, ...] = ()
    results: tuple[Result, ...] = ()  # made elsewhere, for the same record
    reference: Checkpoint | None = None  # a model that never saw the forget set
    stats_cache: Path | None = None  # where statistics are looked for and kept
    record: Path | None = None  # where card and record are left too
    ranks: Ranks = ALONE  # the processes that do it together
    publication: Publication = field(default_factory=Publication)  # if the target is on the Hub
    force: bool = False
    warnings: tuple[str, ...] = ()
    problems: tuple[SageHubError, ...] = ()  # each would stop the run

    @property
    def keeps_output(self) -> bool:
        """Whether all finished shards stay until the end: the result, or what is evaluated."""
        evaluates = self.proxies.keys() - {"retain"}
        return self.target.folder is not None or not self.settings.low_disk or bool(evaluates)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over all that the release is made from: the same for the same release."""
        unlearned = self.plan.unlearned.files
        beside = [*self.plan.carried, *(["README.md"] if "README.md" in unlearned.sizes else [])]
        return digest(
            {
                "sources": describe_sources(self),
                "tokenizer": self.fingerprints["tokenizer"],
                "beside the weights": {name: unlearned.sha256(name) for name in beside},
                "proxies": {which: proxy.row_hashes for which, proxy in self.proxies.items()},
                "reference": self.reference.fingerprint() if self.reference else None,
                "statistics": self.statistics.sha256() if self.statistics else None,
                "settings": self.settings.describe(),
                "versions": versions(),
            }
        )


def survey(
    base: str,
    unlearned: str,
    target: Location,
    *,
    settings: Settings,
    statistics: str | Path | None = None,
    stats_cache: str | Path | None = None,
    ranks: Ranks = ALONE,
    publication: Publication = Publication(),  # noqa: B008 - frozen
    force: bool = False,
) -> Job:
    """Plan the run from configs and headers, reading no weights, and find all its problems.

    What leaves nothing to plan is raised: a side that cannot be opened, or another architecture.
    """
    ready = None if statistics is None else find_ready(statistics)
    settings = settings.resolve_device()
    publication = _titled(publication, unlearned)
    base_side = open_checkpoint(base)
    sides = {
        "base": base_side,
        "unlearned": open_unlearned(unlearned, base_side, merge=settings.merge),
    }
    plan = make_plan(**sides, parameters=settings.parameters).stored_as(settings.stored_dtype)
    plan = plan.without(settings.files)
    sources = [parse_location(side).folder for side in (base, unlearned)]
    memory, least, room = expect_calibration(plan.base, settings)
    if ready is not None:
        memory = replace(memory, moments=0, sketched=frozenset())
    reference = open_checkpoint(settings.reference) if settings.reference else None
    data = _Data(settings, calibrates=ready is None)

    checks: list[Callable[[], object]] = [
        lambda: _check_target(target, sources, publication, force=force),
        lambda: _check_ranks(settings, ranks),
        lambda: check_disk(
            plan,
            target.folder or workspace(target),
            statistics=room if ready is None else ready.missing_bytes,
            low_disk=settings.low_disk,
            keep=target.folder is not None or bool(settings.sets.keys() - {"retain"}),
        ),
        lambda: data.read_results(sides),
        data.read_sets,
        data.read_gates,
        lambda: card.find_template(settings.card_template),
        lambda: harness.check_available(settings.lm_eval),
    ]
    if ready is None:
        checks.append(lambda: _check_memory(least))
    if plan.base.commit and plan.unlearned.commit:  # the Hub knows the hashes
        checks.append(lambda: _fingerprints(plan, SILENT))
    problems = [*plan.problems, *_failures(checks)]
    fingerprints = {"tokenizer": plan.base.tokenizer_fingerprint()}
    job = Job(
        plan,
        settings,
        data.proxies,
        fingerprints,
        ready,
        memory,
        target,
        tuple(data.gates),
        tuple(data.results),
        reference,
        None if stats_cache is None else Path(stats_cache),
        ranks=ranks,
        publication=publication,
        force=force,
    )
    return replace(job, problems=tuple(problems), warnings=tuple(_warnings(job)))


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


def expect_calibration(base: Checkpoint, settings: Settings) -> tuple[Budget, Budget, int]:
    """What it takes to calibrate `base`: at most, if the proxies are as long as the settings
    allow, at least, if they are a single token, and the bytes on disk at most."""
    model = empty_model(base)
    sites, blocks = find_sites(model), cut(model)
    sets = 1 if settings.gain_rule == "number" else 2
    most, least = (
        plan_memory(
            blocks,
            sites,
            settings,
            tokens=tokens,
            longest=longest,
            held=base.weight_bytes if loaded_whole(base) else 0,
        )
        for tokens, longest in (
            (sets * settings.max_tokens, row_limit(base, settings.max_length)),
            (1, 1),
        )
    )
    kept = sets * statistics_bytes(sites, most.sketched, settings.rank)
    return most, least, int(kept + most.spilled)


def _check_memory(least: Budget) -> None:
    """Raise OutOfMemoryError if even a single token is too much to calibrate on, here."""
    least.check()
    available = machine_memory()
    if available is not None and least.total > available:
        raise OutOfMemoryError(
            f"Calibration takes {in_bytes(least.total)} of memory at least, and this machine has "
            f"{in_bytes(available)}; use a larger one, or --stats made on one."
        )


def forecast(base: str, settings: Settings) -> Estimate:
    """What it takes to calibrate `base` and to sanitize an update of it, and how long, here.

    `base` may be a config alone. The proxies are taken to be as long as the settings allow.
    """
    settings = settings.resolve_device()
    files = open_files(base)
    whole = any(name.endswith(".safetensors") for name in files.sizes)
    checkpoint = open_checkpoint(base) if whole else Checkpoint(files, {})
    model = empty_model(checkpoint)
    return estimate(
        model,
        settings,
        tokens=settings.max_tokens,
        longest=row_limit(checkpoint, settings.max_length),
        rates=probe(model.dtype, settings.device),
    )


def check_weights(job: Job, progress: Progress = SILENT) -> Job:
    """Raise the first problem of `job`, if any; then the checks that take the weights' hashes.

    For a Hub repo these are known, and the files of a folder are read once.
    """
    if job.problems:
        first, more = job.problems[0], len(job.problems) - 1
        if not more:
            raise first
        others = "is another problem" if more == 1 else f"are {more} more problems"
        raise type(first)(f"{first} There {others}; --dry-run lists all.")
    found, equal = job.ranks.once(
        lambda: (_fingerprints(job.plan, progress), job.plan.knowing_hashes().equal)
    )
    job = replace(
        job, plan=replace(job.plan, equal=equal), fingerprints={**job.fingerprints, **found}
    )
    check_given_statistics(job, progress)
    return job


def choose_target(to: str | None, unlearned: str) -> Location:
    """Where `to` says, or `<unlearned>-sage` beside the unlearned one."""
    if to == "":
        raise UsageError("--to is empty; leave it away or give it a value.")
    if to is not None:
        return parse_location(to)
    source = parse_location(unlearned)
    if source.folder is None:
        return Location(folder=None, repo=f"{source.repo}-sage")
    folder = Path(os.path.realpath(source.folder))  # resolve() raises on a loop of links
    return Location(folder=folder.with_name(f"{folder.name}-sage"))


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


def _titled(publication: Publication, unlearned: str) -> Publication:
    name = parse_location(unlearned).name
    return replace(publication, message=publication.message or f"Sanitize {name} with sage-hub")


def _check_target(
    target: Location, sources: Sequence[Path | None], publication: Publication, *, force: bool
) -> None:
    if target.folder is not None:
        publication.check_unused()
        check_output(target.folder, sources, force=force)
        return
    if target.revision:
        raise UsageError("A target takes no @revision; publish to org/name.")
    check_target(target.repo, publication, force=force)


def _check_ranks(settings: Settings, ranks: Ranks) -> None:
    if settings.low_disk and ranks.count > 1:
        raise UsageError("--low-disk is for one process; run without torchrun.")


def _failures(checks: Sequence[Callable[[], object]]) -> Iterator[SageHubError]:
    for check in checks:
        try:
            check()
        except SageHubError as error:
            yield error


def check_given_statistics(job: Job, progress: Progress) -> None:
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
            progress.note(
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


def describe_sources(job: Job) -> dict[str, dict[str, Any]]:
    """Both sources for the record."""
    return {
        "base": describe_source(job.plan.base, job.fingerprints["base"]),
        "unlearned": describe_source(job.plan.unlearned, job.fingerprints["unlearned"]),
    }


def workspace(target: Location) -> Path:
    """Where a release is made before it is published."""
    return Path(HF_HOME) / "sage-hub" / target.repo.replace("/", "--")
