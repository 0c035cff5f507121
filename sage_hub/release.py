"""The one story: open, plan, calibrate, sanitize, evaluate, write the card, publish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sage_hub import card, shards
from sage_hub.adapter import open_unlearned
from sage_hub.checkpoint import HubFiles, Location, read_json
from sage_hub.collect import statistics_for
from sage_hub.errors import GateError, SageHubError
from sage_hub.evaluation import Candidate, Evaluation, evaluate
from sage_hub.gain import choose_gain
from sage_hub.gates import Outcome, facts_of
from sage_hub.hub import MANIFEST
from sage_hub.jobs import (
    Job,
    check_weights,
    choose_target,
    describe_sources,
    nothing_to_do,
    survey,
    workspace,
)
from sage_hub.output import Work, carry_files, leave_record, working_on
from sage_hub.plan import Plan
from sage_hub.progress import SILENT, Progress
from sage_hub.publish import Source, Upload
from sage_hub.ranks import ALONE, Ranks
from sage_hub.record import (
    REPORT,
    make_manifest,
    make_report,
    read_record,
    with_results,
    write_json,
)
from sage_hub.sage import Gains
from sage_hub.settings import Settings
from sage_hub.statistics import Statistics
from sage_hub.target import Publication
from sage_hub.verify import manifest_of, verify, verify_files
from sage_hub.weights import part_of_the_way


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
    stats_cache: str | Path | None = None,
    ranks: Ranks = ALONE,
    publication: Publication = Publication(),  # noqa: B008 - frozen
    force: bool = False,
    progress: Progress = SILENT,
) -> Release:
    """Sanitize the update from `base` to `unlearned` and publish the result to `to`.

    Each of the three is a Hub repo (`org/name`, a source also `org/name@revision`) or a local
    folder; `to` defaults to the unlearned one's name with `-sage`. Nothing is published unless
    everything went well. Raises the errors of `sage_hub.errors`.
    """
    target = choose_target(to, unlearned)
    job = survey(
        base,
        unlearned,
        target,
        settings=settings,
        statistics=statistics,
        stats_cache=stats_cache,
        ranks=ranks,
        publication=publication,
        force=force,
    )
    return run(check_weights(job, progress), progress)


def sanitize(
    base: str,
    unlearned: str,
    output: str | Path,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    stats_cache: str | Path | None = None,
    ranks: Ranks = ALONE,
    force: bool = False,
    progress: Progress = SILENT,
) -> Release:
    """The same as `push`, into the folder `output`: nothing leaves the machine."""
    target = Location(folder=Path(output))
    job = survey(
        base,
        unlearned,
        target,
        settings=settings,
        statistics=statistics,
        stats_cache=stats_cache,
        ranks=ranks,
        force=force,
    )
    return run(check_weights(job, progress), progress)


def run(job: Job, progress: Progress = SILENT) -> Release:
    """Do the job: write the release, and publish it if its target is on the Hub.

    A release that an earlier run has finished is not made again, and one that it has published is
    not published again. What an earlier run of the same inputs has begun is finished.
    """
    output, ranks = job.target.folder or workspace(job.target), job.ranks
    fingerprint = ranks.once(lambda: job.fingerprint)
    with working_on(output, fingerprint, force=job.force, ranks=ranks, progress=progress) as work:
        if job.target.folder is None:
            return _run_to_hub(job, fingerprint, work, progress)
        release = ranks.once(
            lambda: finished_release(job, fingerprint, work, progress)
        ) or write_release(job, fingerprint, work, progress)
    stop_at_gates(release)
    return release


def _run_to_hub(job: Job, fingerprint: str, work: Work, progress: Progress) -> Release:
    """Write the release while its shards are sent, and make it visible.

    With several ranks the first one sends: its own shards in the meantime, the others' in the end.
    """
    ranks = job.ranks
    with _upload(job, fingerprint) if ranks.first else nullcontext() as upload:
        if done := ranks.once(lambda: upload and _published(job, upload, work, progress)):
            stop_at_gates(done)
            return done
        release = None
        if job.keeps_output:
            release = ranks.once(lambda: finished_release(job, fingerprint, work, progress))
        release = release or write_release(job, fingerprint, work, progress, upload)
        stop_at_gates(release)
        folder = work.output if job.keeps_output else work.release
        url = ranks.once(lambda: upload and _publish(job, upload, folder))
        return replace(release, location=url or "")


def _upload(job: Job, fingerprint: str) -> Upload:
    def ours(files: HubFiles) -> bool:
        if MANIFEST not in files.sizes or REPORT not in files.sizes:
            return False
        manifest, report = manifest_of(files), read_json(files, REPORT)
        return (
            manifest.get("fingerprint") == fingerprint
            and with_results(report, job.results) == report
            and verify_files(files).whole
        )

    return Upload(job.target.repo, job.publication, ours, force=job.force)


def _published(job: Job, upload: Upload, work: Work, progress: Progress) -> Release | None:
    """The release as it is on the Hub, if it is this very one and whole, else None."""
    url = upload.published()
    if url is None or upload.files is None:
        upload.check_tag()
        return None
    progress.note(f"{url} is this very release already; nothing was sent.")
    if work.output.exists():
        shutil.rmtree(work.output)
    if job.record is not None:
        for name in upload.files.sizes:
            if name == "README.md" or name.startswith("sage/"):
                (job.record / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(upload.files.path(name), job.record / name)
    manifest, report = (read_json(upload.files, name) for name in (MANIFEST, REPORT))
    report["gates"] = _outcomes(job, manifest, report)
    return Release(url, manifest, report, job.warnings)


def _publish(job: Job, upload: Upload, folder: Path) -> str:
    """Send what was not sent yet, have the Hub copy untouched shards, and commit.

    The folder goes when it is published.
    """
    try:
        source = job.plan.unlearned
        for shard in job.plan.equal if source.commit else ():
            upload.copy(
                shard,
                Source(source.name, source.commit or "", shard),
                partial(source.files.path, shard),
            )
        upload.add_folder(folder)
        url = upload.commit()
    except SageHubError as error:
        if not job.keeps_output:
            raise
        raise type(error)(f"{error} The finished release is kept in {folder}.") from None
    shutil.rmtree(folder)
    return url


def finished_release(
    job: Job, fingerprint: str, work: Work, progress: Progress = SILENT
) -> Release | None:
    """The release in the output folder if it is this very one and whole, else None."""
    if not (work.output / MANIFEST).is_file():
        return None
    manifest, report = (read_record(work.output / name) for name in (MANIFEST, REPORT))
    if manifest.get("fingerprint") != fingerprint or not report:
        return None
    if not verify(str(work.output), progress).whole:
        return None
    progress.note(f"{work.output} holds this very release already; it is not made again.")
    return conclude(job, work.output, manifest, report)


def write_release(
    job: Job,
    fingerprint: str,
    work: Work,
    progress: Progress = SILENT,
    upload: Upload | None = None,
) -> Release:
    """Write the whole release into the output folder, which appears only when it is complete.

    With an `upload` each shard is sent as soon as it is finished. If the job keeps none, it goes
    then, and the folder gets no name.
    """
    clock, ranks = _Clock(), job.ranks
    how = shards.Filter(*job.settings.sharpness, job.settings.rank)
    folder = work.release
    with statistics_for(job, work.statistics, progress) as statistics:
        clock.lap("calibrate")
        plan = job.plan.observed(statistics.site_of)
        if job.settings.low_disk:
            plan = plan.passing(work.downloads)
        chosen = choose_gain(plan, statistics, how, job, work.folder, progress)
        finished = _write_shards(job, plan, statistics, how, chosen.gains, work, progress, upload)
        records = [tensor for shard in finished for tensor in shard.tensors]
        if all(record.action == "identical" for record in records):
            raise nothing_to_do(plan)
        clock.lap("sanitize")
        hashes = {shard.shard: shard.sha256 for shard in finished}
        hashes |= ranks.once(
            lambda: (
                shards.write_index(plan, folder) | carry_files(plan, folder, job.settings.out_dtype)
            )
        )
        manifest = make_manifest(
            plan,
            fingerprint,
            describe_sources(job),
            job.settings,
            chosen,
            statistics,
            records,
            hashes,
        )
        if job.statistics is not None:
            manifest["statistics"]["file"] = job.statistics.name
        calibrated = {about["fingerprint"] for about in statistics.origin.data.values()}
    alpha = shards.norm_matched_alpha(records)
    evaluation = _evaluate(job, plan, folder, alpha, calibrated, work.folder, progress)
    clock.lap("evaluate")
    report = make_report(
        evaluation,
        alpha=alpha,
        seed=job.settings.seed,
        device=job.settings.device,
        seconds=clock.laps,
        card=card.describe(plan, job.target.name, job.warnings),
    )

    def finish() -> Release:
        write_json(folder / MANIFEST, manifest)
        release = conclude(job, folder, manifest, report)
        if upload is not None:
            upload.settle()  # what is sent must not move
        if not job.keeps_output:
            return release
        if work.output.exists():  # only what meets the gates takes the place of a release
            stop_at_gates(replace(release, location=str(folder)))
        work.finish(force=job.force)
        return replace(release, location=str(job.target.folder or work.output))

    return ranks.once(finish)


def _evaluate(
    job: Job,
    plan: Plan,
    folder: Path,
    alpha: float,
    calibrated: Collection[str],
    scratch: Path,
    progress: Progress,
) -> Evaluation:
    """Evaluate base, unlearned, the control W_b + αΔ and what was written into `folder`."""
    if not job.keeps_output:
        return Evaluation.not_at_all(
            "with --low-disk and no --forget or --heldout no whole model is kept that could be run"
        )
    models = {
        "base": Candidate(plan.base),
        "unlearned": Candidate(plan.unlearned),
        "control": Candidate(plan.unlearned, plan.base, part_of_the_way(alpha)),
        "sanitized": Candidate(open_unlearned(str(folder), plan.base)),
    }
    if job.reference is not None:
        models["reference"] = Candidate(job.reference)
    return evaluate(
        models,
        job.proxies,
        job.settings,
        scratch,
        tokens_of=plan.base,
        calibrated=calibrated,
        compared=[("sanitized", other) for other in ("unlearned", "control", "base")],
        ranks=job.ranks,
        progress=progress,
    )


def conclude(
    job: Job, folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any]
) -> Release:
    """Add results made elsewhere and the gates' outcomes to the report in `folder`; the card."""
    full = with_results(report, job.results)
    full["gates"] = _outcomes(job, manifest, full)
    if full != read_record(folder / REPORT) or job.settings.card_template is not None:
        card.write_card(folder, manifest, full, job.settings.card_template)
        # Last, as it says that all the rest is there.
        write_json(folder / REPORT, full)
    leave_record(folder, job.record)
    return Release(str(job.target.folder or folder), manifest, full, job.warnings)


def _outcomes(
    job: Job, manifest: Mapping[str, Any], report: Mapping[str, Any]
) -> list[dict[str, Any]]:
    facts = facts_of(manifest, report)
    return [asdict(gate.check(facts)) for gate in job.gates]


def stop_at_gates(release: Release) -> None:
    """Raise GateError, which has the release, if it does not meet a gate."""
    failed = [Outcome(**gate) for gate in release.report["gates"] if not gate["passed"]]
    if failed:
        many = "s are" if len(failed) > 1 else " is"
        public = release.location.startswith("http")
        state = "this release is published already" if public else "nothing was published"
        raise GateError(
            f"{len(failed)} gate{many} not met, and {state}: "
            f"{'; '.join(outcome.sentence() for outcome in failed)}. The release and its record "
            f"are in {release.location}.",
            release,
        )


def _write_shards(
    job: Job,
    plan: Plan,
    statistics: Statistics,
    how: shards.Filter,
    gains: Gains,
    work: Work,
    progress: Progress,
    upload: Upload | None,
) -> list[shards.ShardRecord]:
    """All shards, those that an earlier run has finished and the others.

    One that is untouched comes along as it is; the Hub copies it by itself in the end.
    """
    ranks = job.ranks
    by_hub = plan.equal if plan.unlearned.commit is not None else ()
    kept = ranks.once(lambda: {shard: work.recall(shard) for shard in plan.unlearned.shards})
    if upload is not None and not job.keeps_output:
        kept |= _sent_earlier(plan, work, upload)
    done = {s: shards.ShardRecord.from_json(record) for s, record in kept.items() if record}
    if done:
        progress.note(f"Going on after an earlier run: {len(done)} of {len(kept)} shards are done.")
    todo = [shard for shard in plan.unlearned.shards if shard not in done]
    written = shards.write_shards(
        plan,
        statistics,
        how,
        gains,
        work.release,
        ranks.mine(todo),
        device=job.settings.device,
        progress=progress,
    )
    with closing(written):
        for shard in written:
            name, file = shard.shard, work.release / shard.shard
            if name in plan.equal and (job.keeps_output or name not in by_hub):
                shutil.copyfile(plan.unlearned.files.path(name), file)
                plan.unlearned.files.close(name)
            size = file.stat().st_size if file.exists() else 0
            work.keep(name, {**asdict(shard), "bytes": size})
            done[name] = shard
            if upload is not None and name not in by_hub:
                if job.keeps_output:
                    upload.send({name: file})
                    continue
                upload.wait()  # so that there are two at a time
                upload.send({name: file}, then=file.unlink)
    for others in ranks.all(done):
        done |= others
    return [done[shard] for shard in plan.unlearned.shards]


def _sent_earlier(plan: Plan, work: Work, upload: Upload) -> dict[str, Any]:
    """The records of shards that an earlier run has made and sent, and that are not here."""
    notes = {
        shard: note
        for shard in plan.unlearned.shards
        if shard not in plan.equal
        and not (work.release / shard).is_file()
        and (note := work.note(shard)) is not None
    }
    sent = upload.adopt({s: (note["sha256"], note["bytes"]) for s, note in notes.items()})
    return {shard: note for shard, note in notes.items() if shard in sent}


class _Clock:
    """Seconds per stage, for the report."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now
