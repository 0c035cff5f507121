"""The one story: open, plan, calibrate, sanitize, evaluate, write the card, publish."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from sage_hub import card, shards
from sage_hub.adapter import open_unlearned
from sage_hub.bias import summarize
from sage_hub.calibrate import calibrate
from sage_hub.checkpoint import Location, digest, open_checkpoint, parse_location
from sage_hub.errors import NothingToDoError, SageHubError, StatisticsError, UsageError
from sage_hub.evaluation import Evaluation, evaluate_release
from sage_hub.hub import MANIFEST, Source, Upload, check_target
from sage_hub.output import Work, carry_files, check_disk, check_output, working_on
from sage_hub.plan import Plan, make_plan
from sage_hub.progress import SILENT, Progress
from sage_hub.proxies import Proxy, check_disjoint, read_proxy
from sage_hub.record import (
    describe_source,
    make_manifest,
    make_report,
    read_record,
    versions,
    write_json,
)
from sage_hub.settings import SETS, Settings
from sage_hub.statistics import Statistics, check_belongs, open_statistics
from sage_hub.tensorfile import file_sha256
from sage_hub.verify import verify

REPORT = "sage/report.json"


@dataclass(frozen=True)
class Job:
    """Everything that a run needs: nothing was computed or written yet."""

    plan: Plan
    settings: Settings
    proxies: Mapping[str, Proxy]  # those of retain, forget, heldout that there are
    fingerprints: Mapping[str, str]  # "tokenizer"; "base" and "unlearned" once weights are checked
    statistics: Path | None  # a ready file, instead of calibrating
    target: Location
    private: bool = False
    create_pr: bool = False
    force: bool = False
    warnings: tuple[str, ...] = ()
    problems: tuple[SageHubError, ...] = ()  # each would stop the run

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over all that the release is made from: the same for the same release."""
        unlearned = self.plan.unlearned.files
        beside = [*self.plan.carried, *(["README.md"] if "README.md" in unlearned.sizes else [])]
        return digest(
            {
                "sources": _sources(self),
                "tokenizer": self.fingerprints["tokenizer"],
                "beside the weights": {name: unlearned.sha256(name) for name in beside},
                "proxies": {which: proxy.row_hashes for which, proxy in self.proxies.items()},
                "statistics": file_sha256(self.statistics) if self.statistics else None,
                "settings": self.settings.describe(),
                "versions": versions(),
            }
        )


@dataclass(frozen=True)
class Release:
    """A finished release: where it is, and its record."""

    location: str  # the commit's or PR's URL, or the folder
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def push(
    base: str,
    unlearned: str,
    to: str | None = None,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Release:
    """Sanitize the update from `base` to `unlearned` and publish the result to `to`.

    Each of the three is a Hub repo (`org/name`, a source also `org/name@revision`) or a local
    folder; `to` defaults to the unlearned one's name with `-sage`. Nothing is published unless
    everything went well. Raises the errors of `sage_hub.errors`.
    """
    target = choose_target(to, unlearned)
    job = prepare(
        base,
        unlearned,
        target,
        settings=settings,
        statistics=statistics,
        private=private,
        create_pr=create_pr,
        force=force,
        progress=progress,
    )
    return run(job, progress)


def sanitize(
    base: str,
    unlearned: str,
    output: str | Path,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Release:
    """The same as `push`, into the folder `output`: nothing leaves the machine."""
    job = prepare(
        base,
        unlearned,
        Location(folder=Path(output)),
        settings=settings,
        statistics=statistics,
        force=force,
        progress=progress,
    )
    return run(job, progress)


def prepare(
    base: str,
    unlearned: str,
    target: Location,
    *,
    settings: Settings,
    statistics: str | Path | None = None,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Job:
    """Open both sides, plan the run, and raise whatever would stop it later."""
    job = survey(
        base,
        unlearned,
        target,
        settings=settings,
        statistics=statistics,
        private=private,
        create_pr=create_pr,
        force=force,
    )
    return check_weights(job, progress)


def survey(
    base: str,
    unlearned: str,
    target: Location,
    *,
    settings: Settings,
    statistics: str | Path | None = None,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
) -> Job:
    """Plan the run from configs and headers, reading no weights, and find all its problems.

    What leaves nothing to plan is raised: a side that cannot be opened, or another architecture.
    """
    statistics = None if statistics is None else Path(statistics)
    settings = settings.resolve_device()
    base_side = open_checkpoint(base)
    sides = {
        "base": base_side,
        "unlearned": open_unlearned(unlearned, base_side, merge=settings.merge),
    }
    plan = make_plan(**sides, parameters=settings.parameters).stored_as(settings.stored_dtype)
    sources = [parse_location(side).folder for side in (base, unlearned)]
    proxies: dict[str, Proxy] = {}

    def read_sets() -> None:
        proxies.update(read_proxies(settings, statistics=statistics))
        if settings.gain == "match" and statistics is None and "forget" not in proxies:
            raise UsageError("--gain match is measured on the forget proxy; give --forget.")

    checks: list[Callable[[], object]] = [
        lambda: _check_target(target, sources, force=force),
        lambda: check_disk(
            plan,
            target.folder or _workspace(target),
            low_disk=settings.low_disk,
            keep=target.folder is not None,
        ),
        lambda: _check_low_disk(settings, statistics),
        read_sets,
    ]
    if plan.base.commit and plan.unlearned.commit:  # the Hub knows the hashes
        checks.append(lambda: _fingerprints(plan, SILENT))
    problems = [*plan.problems, *_failures(checks)]
    fingerprints = {"tokenizer": plan.base.tokenizer_fingerprint()}
    job = Job(plan, settings, proxies, fingerprints, statistics, target, private, create_pr, force)
    return replace(job, problems=tuple(problems), warnings=tuple(_warnings(job)))


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
    fingerprints = {**job.fingerprints, **_fingerprints(job.plan, progress)}
    job = replace(job, plan=job.plan.knowing_hashes(), fingerprints=fingerprints)
    _check_given_statistics(job)
    return job


def _fingerprints(plan: Plan, progress: Progress) -> dict[str, str]:
    """The fingerprints of both sides. Raises NothingToDoError if they are the same."""
    sides = {"base": plan.base, "unlearned": plan.unlearned}
    found = {name: side.fingerprint(progress) for name, side in sides.items()}
    if found["base"] == found["unlearned"]:
        raise _nothing_to_do(plan)
    return found


def _nothing_to_do(plan: Plan) -> NothingToDoError:
    return NothingToDoError(
        f"{plan.base.name} and {plan.unlearned.name} hold the same weights; there is no update to "
        "sanitize. Check that both arguments are what you meant."
    )


def _check_target(target: Location, sources: Sequence[Path | None], *, force: bool) -> None:
    if target.folder is not None:
        check_output(target.folder, sources, force=force)
        return
    if target.revision:
        raise UsageError("A target takes no @revision; publish to org/name.")
    check_target(target.repo, force=force)


def _check_low_disk(settings: Settings, statistics: Path | None) -> None:
    if settings.low_disk and statistics is None:
        raise UsageError(
            "--low-disk keeps no whole model to calibrate on; make the statistics with `sage-hub "
            "stats` where there is room for the base, and give them with --stats."
        )


def _failures(checks: Sequence[Callable[[], object]]) -> Iterator[SageHubError]:
    for check in checks:
        try:
            check()
        except SageHubError as error:
            yield error


def run(job: Job, progress: Progress = SILENT) -> Release:
    """Do the job: write the release, and publish it if its target is on the Hub.

    A release that an earlier run has finished is not made again, and what an earlier run of the
    same inputs has begun is finished.
    """
    output = job.target.folder or _workspace(job.target)
    with working_on(output, job.fingerprint, force=job.force, progress=progress) as work:
        if job.target.folder is None and job.settings.low_disk:
            upload = _upload(job)
            release = write_release(job, work, progress, upload)
            return replace(release, location=_publish(job, upload, work.release, progress))
        release = finished_release(job, work, progress) or write_release(job, work, progress)
        if job.target.folder is not None:
            return release
        try:
            url = _publish(job, _upload(job), work.output, progress)
        except SageHubError as error:
            raise type(error)(f"{error} The finished release is kept in {output}.") from None
        shutil.rmtree(work.output)
        return replace(release, location=url)


def _upload(job: Job) -> Upload:
    return Upload(job.target.repo, private=job.private, create_pr=job.create_pr, force=job.force)


def _publish(job: Job, upload: Upload, folder: Path, progress: Progress) -> str:
    """Send what was not sent yet, have the Hub copy untouched shards, and commit."""
    source = job.plan.unlearned
    for shard in job.plan.equal if source.commit else ():
        upload.copy(
            shard,
            Source(source.name, source.commit or "", shard),
            partial(source.files.path, shard),
        )
    upload.add_folder(folder, progress)
    return upload.commit(f"Sanitize {source.name} with sage-hub")


def finished_release(job: Job, work: Work, progress: Progress = SILENT) -> Release | None:
    """The release in the output folder if it is this very one and whole, else None."""
    if not (work.output / MANIFEST).is_file():
        return None
    manifest, report = (read_record(work.output / name) for name in (MANIFEST, REPORT))
    if manifest.get("fingerprint") != job.fingerprint or not report:
        return None
    if verify(str(work.output), progress).differences:
        return None
    progress.note(f"{work.output} holds this very release already; it is not made again.")
    return Release(str(job.target.folder or work.output), manifest, report, job.warnings)


def write_release(
    job: Job, work: Work, progress: Progress = SILENT, upload: Upload | None = None
) -> Release:
    """Write the whole release into the output folder, which appears only when it is complete.

    With an `upload` each shard is sent as soon as it is finished and is not kept, and the folder
    gets no name.
    """
    clock = _Clock()
    how = shards.Filter(job.settings.strength, job.settings.energy, job.settings.rank)
    folder = work.release
    with _statistics_for(job, work.statistics, progress) as statistics:
        clock.lap("calibrate")
        plan = job.plan.observed(statistics.site_of)
        if job.settings.low_disk:
            plan = plan.passing(work.downloads)
        gain = _choose_gain(plan, statistics, how, job.settings, progress)
        finished = _write_shards(job, plan, statistics, how, gain, work, progress, upload)
        records = [tensor for shard in finished for tensor in shard.tensors]
        if all(record.action == "identical" for record in records):
            raise _nothing_to_do(plan)
        clock.lap("sanitize")
        hashes = {shard.shard: shard.sha256 for shard in finished}
        hashes |= shards.write_index(plan, folder) | carry_files(
            plan, folder, job.settings.out_dtype
        )
        manifest = make_manifest(
            plan, job.fingerprint, _sources(job), job.settings, gain, statistics, records, hashes
        )
        if job.statistics is not None:
            manifest["statistics"]["file"] = job.statistics.name
        calibrated = {about["fingerprint"] for about in statistics.origin.data.values()}
    alpha = shards.norm_matched_alpha(records)
    if job.settings.low_disk:
        evaluation = Evaluation.not_at_all("--low-disk keeps no whole model that could be run")
    else:
        sanitized = open_unlearned(str(folder), plan.base)
        evaluation = evaluate_release(
            plan, sanitized, alpha, job.proxies, job.settings, calibrated, progress
        )
    clock.lap("evaluate")
    report = make_report(evaluation, alpha=alpha, seed=job.settings.seed, seconds=clock.laps)
    write_json(folder / MANIFEST, manifest)
    write_json(folder / REPORT, report)
    card.write_card(folder, plan, manifest, report, name=job.target.name, warnings=job.warnings)
    if upload is None:
        work.finish(force=job.force)
    return Release(str(job.target.folder or work.output), manifest, report, job.warnings)


def _write_shards(
    job: Job,
    plan: Plan,
    statistics: Statistics,
    how: shards.Filter,
    gain: float,
    work: Work,
    progress: Progress,
    upload: Upload | None,
) -> list[shards.ShardRecord]:
    """All shards, those that an earlier run has finished and the others.

    One that is untouched comes along as it is; to a repo the Hub copies it in the end.
    """
    by_hub = plan.unlearned.commit is not None and upload is not None
    kept = {shard: work.recall(shard) for shard in plan.unlearned.shards}
    done = {s: shards.ShardRecord.from_json(record) for s, record in kept.items() if record}
    if done:
        progress.note(f"Going on after an earlier run: {len(done)} of {len(kept)} shards are done.")
    written = shards.write_shards(
        plan,
        statistics,
        how,
        gain,
        work.release,
        done=done,
        device=job.settings.device,
        progress=progress,
    )
    with closing(written):
        for shard in written:
            name, file = shard.shard, work.release / shard.shard
            if name in plan.equal and not by_hub:
                shutil.copyfile(plan.unlearned.files.path(name), file)
                plan.unlearned.files.close(name)
            work.keep(name, asdict(shard))
            done[name] = shard
            if upload is not None and file.exists():
                upload.add(name, file)
                file.unlink()
    return [done[shard] for shard in plan.unlearned.shards]


def collect_statistics(
    model: str,
    output: str | Path,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Calibrate `model` on the proxies of `settings` and write the statistics file `output`.

    Returns what the file belongs to. The retain proxy defaults to the general-purpose one; a
    forget proxy is taken in if there is one.
    """
    settings = settings.resolve_device()
    checkpoint = open_checkpoint(model)
    proxies = read_proxies(replace(settings, heldout=None), statistics=None)
    origin = calibrate(
        checkpoint,
        proxies,
        settings,
        Path(output),
        weights=checkpoint.fingerprint(progress),
        progress=progress,
    )
    return {
        "file": str(output),
        "model": origin.model,
        "commit": origin.commit,
        "data": origin.published_data,
    }


def audit(
    base: str,
    unlearned: str,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Activation bias of the update, per module and for the model; writes no weights.

    The result is that of `sage_hub.bias.summarize`.
    """
    statistics = None if statistics is None else Path(statistics)
    settings = settings.resolve_device()
    base_side = open_checkpoint(base)
    plan = make_plan(base_side, open_unlearned(unlearned, base_side), settings.parameters)
    proxies = read_proxies(replace(settings, heldout=None), statistics=statistics)
    fingerprints = {
        "base": plan.base.fingerprint(progress),
        "tokenizer": plan.base.tokenizer_fingerprint(),
    }
    job = Job(plan, settings, proxies, fingerprints, statistics, Location(folder=None))
    _check_given_statistics(job)
    how = shards.Filter(settings.strength, settings.energy, settings.rank)
    with (
        tempfile.TemporaryDirectory(prefix="sage-hub-") as scratch,
        _statistics_for(
            job, Path(scratch) / "statistics.safetensors", progress, forget=True
        ) as opened,
    ):
        observed = plan.observed(opened.site_of)
        measured = shards.measure(observed, opened, how, device=settings.device, progress=progress)
        return summarize(measured)


def choose_target(to: str | None, unlearned: str) -> Location:
    """Where `to` says, or `<unlearned>-sage` beside the unlearned one."""
    if to:
        return parse_location(to)
    source = parse_location(unlearned)
    if source.folder is None:
        return Location(folder=None, repo=f"{source.repo}-sage")
    folder = Path(os.path.realpath(source.folder))  # resolve() raises on a loop of links
    return Location(folder=folder.with_name(f"{folder.name}-sage"))


def read_proxies(settings: Settings, *, statistics: Path | None) -> dict[str, Proxy]:
    """The sets that are given, read and checked to be disjoint.

    Without a retain proxy the general-purpose one stands in, unless ready statistics were given.
    """
    sources = {which: getattr(settings, which) for which in SETS}
    proxies = {
        which: read_proxy(source)
        for which, source in sources.items()
        if source is not None or (which == "retain" and statistics is None)
    }
    check_disjoint({which: (proxy.name, proxy.row_hashes) for which, proxy in proxies.items()})
    return proxies


@contextmanager
def _statistics_for(
    job: Job, path: Path, progress: Progress, *, forget: bool = False
) -> Iterator[Statistics]:
    """The given statistics, or new ones of the base model in the file `path`, if not there yet.

    The forget proxy is taken in if asked for, or if the gain is measured on it.
    """
    if job.statistics is None and not path.exists():
        sets = ("retain", "forget") if forget or job.settings.gain == "match" else ("retain",)
        seen = {which: job.proxies[which] for which in sets if which in job.proxies}
        calibrate(
            job.plan.base,
            seen,
            job.settings,
            path,
            weights=job.fingerprints["base"],
            progress=progress,
        )
    with open_statistics(job.statistics or path) as opened:
        yield opened


def _check_given_statistics(job: Job) -> None:
    if job.statistics is None:
        return
    with open_statistics(job.statistics) as statistics:
        check_belongs(
            statistics,
            name=job.plan.base.name,
            weights=job.fingerprints["base"],
            tokenizer=job.fingerprints["tokenizer"],
            energy=job.settings.energy,
            rank=job.settings.rank,
        )
        if job.settings.gain == "match" and not statistics.has("forget"):
            raise StatisticsError(
                "--gain match is measured on the forget proxy, which the statistics don't have; "
                "make them anew with `sage-hub stats --forget`."
            )
        seen = statistics.origin.data["retain"]
    others = {
        which: (proxy.name, proxy.row_hashes)
        for which, proxy in job.proxies.items()
        if which != "retain"
    }
    check_disjoint({"retain": (seen["name"], seen["row_hashes"]), **others})


def _choose_gain(
    plan: Plan,
    statistics: Statistics,
    how: shards.Filter,
    settings: Settings,
    progress: Progress,
) -> float:
    if settings.gain != "match":
        return float(settings.gain)
    measured = shards.measure(plan, statistics, how, device=settings.device, progress=progress)
    return shards.gain_that_matches(measured)


def _warnings(job: Job) -> Iterator[str]:
    retain = job.proxies.get("retain")
    if retain is not None and retain.builtin:
        yield (
            "The retain proxy is the general-purpose one that comes with sage-hub. A few hundred "
            "rows of your own domain, given with --retain, protect what you care for better."
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
    if unlearned.has_tokenizer and (
        unlearned.tokenizer_fingerprint() != job.fingerprints["tokenizer"]
    ):
        yield (
            "The tokenizer files of the two sides differ; the base's are used for calibration and "
            "evaluation, the unlearned side's are in the release."
        )


def _sources(job: Job) -> dict[str, dict[str, Any]]:
    return {
        "base": describe_source(job.plan.base, job.fingerprints["base"]),
        "unlearned": describe_source(job.plan.unlearned, job.fingerprints["unlearned"]),
    }


def _workspace(target: Location) -> Path:
    """Where a release is made before it is published."""
    return Path(HF_HOME) / "sage-hub" / target.repo.replace("/", "--")


class _Clock:
    """Seconds per stage, for the report."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now
