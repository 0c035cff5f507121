"""The story of a release: open, survey, calibrate, turn up, sanitize, evaluate, card, publish."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.location import Location
from sage_hub.checkpoint.pair import open_pair, open_unlearned
from sage_hub.commands.job import Job
from sage_hub.commands.rows import with_written
from sage_hub.commands.survey import check_weights, choose_target, survey
from sage_hub.errors import SageHubError, note_kept
from sage_hub.evaluation.answers import beside, write_answers
from sage_hub.evaluation.evaluate import Evaluation, Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.model.weights import part_of_the_way
from sage_hub.publish.announce import announced
from sage_hub.publish.folder import Work, begun, working_on
from sage_hub.publish.opened import open_as_user
from sage_hub.publish.sending import commit_release, finished, is_published, make_shards, published
from sage_hub.publish.target import Publication
from sage_hub.publish.upload import Upload
from sage_hub.record.card import describe
from sage_hub.record.manifest import (
    MANIFEST,
    as_written,
    leave_record,
    make_manifest,
    make_report,
    write_json,
)
from sage_hub.record.release import Release, Terms, stop_at_gates
from sage_hub.repair.beside import carry_files, write_index
from sage_hub.repair.control import Control, choose_control
from sage_hub.repair.effect import check_breadth, check_changes, check_rounding, check_written
from sage_hub.repair.gain import Trial, choose_gain
from sage_hub.repair.keeping import choose_by_keeping
from sage_hub.repair.plan import Plan
from sage_hub.repair.update import Filter, Update
from sage_hub.repair.write import norm_matched_alpha, rounding_share
from sage_hub.rows.encoding import describe_prompts
from sage_hub.runtime.progress import Clock
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

COMPARED = [("sanitized", other) for other in ("unlearned", "control", "base")]


def push(
    base: str,
    unlearned: str,
    to: str | None = None,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    publication: Publication = Publication(),  # noqa: B008 - frozen
    force: bool = False,
    run: Run = Run(),  # noqa: B008 - frozen
) -> Release:
    """Sanitize the update from `base` to `unlearned` and publish the result to `to`.

    Each of the three is a Hub repo (`org/name`, a source also `org/name@revision`) or a local
    folder; `to` defaults to the unlearned one's name with `-sage`. Nothing is published unless
    everything went well. Raises the errors of `sage_hub.errors`.
    """
    pair = open_pair(base, unlearned, merge=settings.merge, pickled=settings.pickled_weights)
    how: dict[str, Any] = {"publication": publication, "force": force, "run": run}
    job = survey(pair, choose_target(to, pair), settings, statistics=statistics, **how)
    return release(check_weights(job))


def sanitize(
    base: str,
    unlearned: str,
    output: str | Path,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    statistics: str | Path | None = None,
    force: bool = False,
    run: Run = Run(),  # noqa: B008 - frozen
) -> Release:
    """The same as `push`, into the folder `output`: nothing leaves the machine."""
    pair = open_pair(base, unlearned, merge=settings.merge, pickled=settings.pickled_weights)
    to = Location(Path(output))
    job = survey(pair, to, settings, statistics=statistics, force=force, run=run)
    return release(check_weights(job))


def release(job: Job) -> Release:
    """Do the job: make the release, and publish it if its target is on the Hub.

    A release that an earlier run has finished is not made again, and one that it has published is
    not published again. What an earlier run of the same inputs has begun is finished.
    """
    job = _as_begun(job)
    fingerprint = job.run.ranks.once(lambda: job.fingerprint)
    work = Work(job.output.resolve(), fingerprint, job.keeps_output, job.settings.date)
    with working_on(work, force=job.force, run=job.run):
        if job.target.folder is None:
            return _announced(job, _to_hub(job, work))
        made = _finished(job, work) or _make(job, work)
    return stop_at_gates(made)


def _as_begun(job: Job) -> Job:
    """The job on the day of the run that has begun it, whose date its prompts have."""

    def begun_on() -> str | None:
        day, fingerprint = begun(job.output)
        return day if day and job.on_day(day).fingerprint == fingerprint else None

    found = job.on_day(job.run.ranks.once(begun_on)) if job.of_today else job
    if found is not job:
        job.run.progress.note(
            f"The prompts have the date {found.settings.date}, as those of the run that began this."
        )
    return found


def _to_hub(job: Job, work: Work) -> Release:
    """Make the release while its shards are sent, and let one commit show all of it.

    With several ranks the first one sends: its own shards in the meantime, the others' in the end.
    """
    ranks, terms = job.run.ranks, _terms(job)

    def ours(files: Any) -> bool:
        return is_published(files, job.has_made)

    to, how = job.target.repo, job.publication
    opened = ranks.at_first(lambda: Upload(to, how, ours, force=job.force))
    with opened or nullcontext() as upload:
        if done := ranks.once(lambda: upload and published(upload, work, terms, job.run)):
            return replace(done, warnings=job.warnings)
        made = (_finished(job, work) if work.keeps else None) or _make(job, work, upload)
        stop_at_gates(made)
        return replace(made, location=ranks.once(lambda: _commit(job, work, upload)))


def _announced(job: Job, done: Release) -> Release:
    """The release, announced if that was asked for."""
    if not job.publication.announce:
        return done
    source = job.plan.unlearned.files.location.repo
    return job.run.ranks.once(lambda: announced(done, source, job.target.repo, job.publication))


def _make(job: Job, work: Work, upload: Upload | None = None) -> Release:
    """Make the release in the work folder, and give it its name when it is complete."""
    settings, run, clock = job.settings, job.run, Clock()
    if not settings.low_disk:  # where each look at a shard is a download
        run.ranks.once(lambda: check_changes(job.plan))
        if settings.gain_rule == "keep":
            run.ranks.once(lambda: check_breadth(job.plan))
    looked_at = job.plan.passing(work.downloads) if settings.low_disk else job.plan
    rounded = run.ranks.once(lambda: check_rounding(looked_at))
    job = with_written(job, work)
    with job.calibrated(work.statistics) as statistics:
        clock.lap("calibrate")
        plan = job.plan.observed(statistics.site_of)
        plan = plan.passing(work.downloads) if settings.low_disk else plan
        how = Filter(*settings.sharpness, settings.rank)
        update = Update(plan, statistics, how, settings.device)
        trial = Trial(job.proxies, settings, job.reference, work.folder, run)
        choose = choose_by_keeping if settings.gain_rule == "keep" else choose_gain
        chosen = choose(update, trial)
        control = choose_control(update, chosen, trial)
        shards = make_shards(update, chosen.gains, work, upload, run)
        plan.check_unchanged()
        records = [tensor for shard in shards for tensor in shard.tensors]
        check_written(records, plan)
        share = rounding_share(records) if rounded is None else rounded
        if share is not None:
            run.progress.note(
                f"The two sides are stored in different types; rounding alone explains "
                f"{100 * share:.2g} % of the update's size (‖Δ‖²)."
            )
        clock.lap("sanitize")
        hashes = {shard.shard: shard.sha256 for shard in shards}
        hashes |= run.ranks.once(lambda: _write_beside(plan, work, settings))
        manifest = make_manifest(
            plan, work.fingerprint, job.sources, settings, chosen, statistics, records, hashes
        )
        manifest |= {} if share is None else {"rounding_share": share}
        if job.statistics is not None:
            manifest["statistics"]["file"] = job.statistics.name
        manifest["prompts"] = describe_prompts(plan.base, settings)
        seen = {about["fingerprint"] for about in statistics.origin.data.values()}
    control = control or Control(norm_matched_alpha(records), "size")
    study = Study(job.proxies, plan.base, seen, COMPARED, known=chosen.known)
    evaluation = _evaluate(job, plan, work, control, study)
    clock.lap("evaluate")
    about = describe(plan, job.target.name, job.warnings)
    report = make_report(evaluation, settings, clock.laps, control=control, card=about)
    if evaluation.seen:
        run.ranks.once(
            lambda: write_answers(beside(work.release), evaluation.seen, work.fingerprint)
        )
    return run.ranks.once(lambda: _finish(job, work, upload, manifest, report))


def _write_beside(plan: Plan, work: Work, settings: Settings) -> dict[str, str]:
    index = write_index(plan, work.release)
    return index | carry_files(plan, work.release, settings.out_dtype)


def _evaluate(job: Job, plan: Plan, work: Work, control: Control, study: Study) -> Evaluation:
    """Evaluate base, unlearned, the control W_b + αΔ if it is another, and what was written."""
    if not work.keeps:
        return Evaluation.not_at_all(
            "with --low-disk and no --forget or --heldout no whole model is kept that could be run"
        )
    models = {
        "base": Candidate(plan.base),
        "unlearned": Candidate(plan.unlearned),
        "control": Candidate(plan.unlearned, plan.base, part_of_the_way(control.alpha)),
        "sanitized": Candidate(open_unlearned(str(work.release), plan.base)),
    }
    if control.by == "source":
        del models["control"]
    if job.reference is not None:
        models["reference"] = Candidate(job.reference)
    return evaluate(models, study, job.settings, work.folder, job.run)


def _terms(job: Job) -> Terms:
    return Terms(job.gates, job.results, job.settings.card_template, job.run.sign)


def _conclude(job: Job, folder: Path, manifest: Any, report: Any) -> Release:
    full = _terms(job).conclude(folder, manifest, report)
    leave_record(folder, job.run.record)
    return Release(str(job.target.folder or folder), manifest, full, job.warnings)


def _finished(job: Job, work: Work) -> Release | None:
    """The release that an earlier run has finished, with the results and gates of this one."""

    def look() -> Release | None:
        found = finished(work, job.has_made, job.run.progress)
        with as_written(str(work.output)):
            return _conclude(job, work.output, *found) if found else None

    return job.run.ranks.once(look)


def _finish(job: Job, work: Work, upload: Upload | None, manifest: Any, report: Any) -> Release:
    if upload is not None:
        upload.settle()  # what is sent must not move, nor go while it is opened
    open_as_user(work.release, job.plan.base)
    write_json(work.release / MANIFEST, manifest)
    made = _conclude(job, work.release, manifest, report)
    if not work.keeps:
        return replace(made, sent=True)
    if work.output.exists():  # only what meets the gates takes the place of a release
        stop_at_gates(replace(made, location=str(work.release)))
    work.finish(force=job.force)
    return replace(made, location=str(job.target.folder or work.output))


def _commit(job: Job, work: Work, upload: Upload | None) -> str:
    """Publish the release, which goes from here then; the URL."""
    if upload is None:  # it is another rank's matter
        return ""
    folder = work.output if work.keeps else work.release
    try:
        url = commit_release(upload, folder, job.plan)
    except SageHubError as error:
        if not work.keeps:
            raise
        failure = type(error)(f"{error} The finished release is kept in {folder}.")
        note_kept(failure, "the release", folder)
        raise failure from None
    shutil.rmtree(folder)
    return url
