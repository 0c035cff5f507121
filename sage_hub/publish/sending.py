"""A release on its way: shards are sent while others are made, then all else, then one commit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.files import read_json
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.method.sage import Gains
from sage_hub.publish.folder import Work
from sage_hub.publish.upload import Source, Upload
from sage_hub.publish.verify import manifest_of, verify, verify_files
from sage_hub.record.manifest import MANIFEST, REPORT, read_record, with_results
from sage_hub.record.release import Terms
from sage_hub.repair.plan import Plan
from sage_hub.repair.update import Update
from sage_hub.repair.write import ShardRecord, write_shards
from sage_hub.runtime.progress import Progress
from sage_hub.runtime.run import Run

Record = tuple[dict[str, Any], dict[str, Any]]  # manifest and report


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
        upload.copy(
            shard,
            Source(source.name, source.commit or "", shard),
            partial(source.files.path, shard),
        )
    upload.add_folder(folder)
    return upload.commit()


def finished(work: Work, progress: Progress) -> Record | None:
    """The record of the release in the output folder if it is this very one and whole."""
    if not (work.output / MANIFEST).is_file():
        return None
    manifest, report = (read_record(work.output / name) for name in (MANIFEST, REPORT))
    if manifest.get("fingerprint") != work.fingerprint or not report:
        return None
    if not verify(str(work.output), progress).whole:
        return None
    progress.note(f"{work.output} holds this very release already; it is not made again.")
    return manifest, report


def is_published(files: HubFiles, fingerprint: str, terms: Terms) -> bool:
    """Whether the repo holds the release of this fingerprint, whole and with the same results."""
    if MANIFEST not in files.sizes or REPORT not in files.sizes:
        return False
    manifest, report = manifest_of(files), read_json(files, REPORT)
    return (
        manifest.get("fingerprint") == fingerprint
        and with_results(report, terms.results) == report
        and verify_files(files).whole
    )


def published(upload: Upload, work: Work, run: Run) -> tuple[str, Mapping[str, Any], Any] | None:
    """URL, manifest and report of the release on the Hub, if it is this very one and whole."""
    url = upload.published()
    if url is None or upload.files is None:
        upload.check_tag()
        return None
    run.progress.note(f"{url} is this very release already; nothing was sent.")
    if work.output.exists():
        shutil.rmtree(work.output)
    if run.record is not None:
        for name in upload.files.sizes:
            if name == "README.md" or name.startswith("sage/"):
                (run.record / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(upload.files.path(name), run.record / name)
    return url, read_json(upload.files, MANIFEST), read_json(upload.files, REPORT)
