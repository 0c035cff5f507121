"""A release on its way: shards are sent while others are made, then all else, then one commit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationCopy

from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.method.sage import Gains
from sage_hub.publish.folder import Work
from sage_hub.publish.upload import Upload
from sage_hub.publish.verify import manifest_of, verify, verify_files
from sage_hub.record.manifest import MANIFEST, REPORT, as_written, leave_record, read_record
from sage_hub.record.release import Release, Terms, stop_at_gates
from sage_hub.record.sums import SUMS, is_edited, is_of_record, signatures_in
from sage_hub.repair.plan import Plan
from sage_hub.repair.update import Update
from sage_hub.repair.write import ShardRecord, write_shards
from sage_hub.runtime.places import scratch
from sage_hub.runtime.progress import Progress
from sage_hub.runtime.run import Run

CARD = "README.md"
EDITED = " (the card had been edited by hand; what it said is in the commit before)"
Record = tuple[dict[str, Any], dict[str, Any]]  # manifest and report
Ours = Callable[[Mapping[str, Any]], bool]  # whether a manifest is that of the very release


def make_shards(
    update: Update, gains: Gains, work: Work, upload: Upload | None, run: Run
) -> list[ShardRecord]:
    """All shards, those that an earlier run has finished and the others.

    With an `upload` each is sent as soon as it is finished, and goes from here then if `work`
    keeps none. One that is untouched comes along as it is; the Hub copies it by itself in the end.
    """
    plan, ranks = update.plan, run.ranks
    by_hub = plan.equal if plan.unlearned.commit is not None else ()
    kept = ranks.once(lambda: {shard: work.recall(shard) for shard in plan.unlearned.shards})
    if upload is not None and not work.keeps:
        kept |= _sent_earlier(plan, work, upload)
    done = {shard: ShardRecord.from_json(record) for shard, record in kept.items() if record}
    if done:
        run.progress.note(
            f"Going on after an earlier run: {len(done)} of {len(kept)} shards are done."
        )
    todo = ranks.mine([shard for shard in plan.unlearned.shards if shard not in done])
    with closing(write_shards(update, gains, work.release, todo, run.progress)) as written:
        for shard in written:
            name, file = shard.shard, work.release / shard.shard
            if name in plan.equal and (work.keeps or name not in by_hub):
                shutil.copyfile(plan.unlearned.files.path(name), file)
                plan.unlearned.files.close(name)
            size = file.stat().st_size if file.exists() else 0
            work.keep(name, {**asdict(shard), "bytes": size})
            done[name] = shard
            if upload is not None and name not in by_hub:
                if work.keeps:
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


def commit_release(upload: Upload, folder: Path, plan: Plan) -> str:
    """Send what was not sent yet, have the Hub copy untouched shards, and commit; the URL."""
    source = plan.unlearned
    for shard in plan.equal if source.commit else ():
        there = CommitOperationCopy(
            shard,
            shard,
            src_revision=source.commit,
            src_repo_id=source.name,
            src_repo_type="model",
        )
        upload.copy(there, partial(source.files.path, shard))
    upload.add_folder(folder)
    return upload.commit()


def finished(work: Work, ours: Ours, progress: Progress) -> Record | None:
    """The record of the release in the output folder if it is this very one and whole."""
    if not (work.output / MANIFEST).is_file():
        return None
    manifest, report = (read_record(work.output / name) for name in (MANIFEST, REPORT))
    if not report or not ours(manifest):
        return None
    if not verify(str(work.output), progress).whole:
        return None
    progress.note(f"{work.output} holds this very release already; it is not made again.")
    return manifest, report


def is_published(files: HubFiles, ours: Ours) -> bool:
    """Whether the repo holds this very release, whole."""
    if MANIFEST not in files.sizes or REPORT not in files.sizes:
        return False
    return ours(manifest_of(files)) and verify_files(files).whole


def published(upload: Upload, work: Work, terms: Terms, run: Run) -> Release | None:
    """The release on the Hub if it is this very one and whole, with the `terms` of this run.

    What they change of card and report goes there in a commit of its own, but for a release that
    does not meet a gate. Raises GateError for that.
    """
    files = upload.files
    if not upload.is_there or files is None:
        upload.check_tag()
        return None
    if work.output.exists():
        shutil.rmtree(work.output)
    with scratch() as folder:
        for name in filter(is_of_record, files.sizes):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files.path(name), folder / name)
        manifest, report = (read_record(folder / name) for name in (MANIFEST, REPORT))
        before, edited = _said(folder), is_edited(folder, CARD)
        with as_written(files.name):
            report = terms.conclude(folder, manifest, report)
        leave_record(folder, run.record)
        made = stop_at_gates(Release(upload.url, manifest, report))
        if _said(folder) == before:
            run.progress.note(f"{made.location} is this very release already; nothing was sent.")
            return replace(made, location=upload.take())
        upload.check_tag()
        sums = file_sha256(folder / SUMS)
        url = upload.amend(
            folder, lambda now: SUMS in now.sizes and now.sha256(SUMS) == sums, manifest["files"]
        )
    run.progress.note(
        f"{made.location} is this very release already; its card and report are updated, its "
        f"weights stay as they are{EDITED if edited else ''}."
    )
    return replace(made, location=url)


def _said(folder: Path) -> dict[str, bytes]:
    """Card, report and signatures, which are all that `terms` can change."""
    paths = [folder / CARD, folder / REPORT, *signatures_in(folder)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}
