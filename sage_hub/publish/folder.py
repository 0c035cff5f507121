"""The output folder: it appears when it is whole, and a run that was stopped goes on.

Beside an output `NAME` lies its work folder `.NAME.partial`, while a run is on or after one was
stopped:

    lock                      held by the run; the system releases it when the run dies
    fingerprint               of all that the parts are made from
    day                       the date of its prompts, where they have one
    statistics.safetensors    a finished part
    downloads/                shards of the sources, with --low-disk
    shards/SHARD.json         what was done with a shard that is finished
    release/                  what will be the output
    release.answers.jsonl     what models made of each row, which will lie beside the output
    old/                      the output before, while it is being replaced
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from sage_hub.calibration.journal import journal_of
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.errors import DiskSpaceError, SageHubError, TargetError, note_kept
from sage_hub.evaluation.answers import beside, check_ours
from sage_hub.record.manifest import MANIFEST
from sage_hub.repair.plan import Plan
from sage_hub.repair.write import ShardRecord
from sage_hub.runtime.disk import sync, write_whole
from sage_hub.runtime.places import alone_in
from sage_hub.runtime.progress import Progress
from sage_hub.runtime.run import Run

LOCK, DAY, FINGERPRINT = "lock", "day", "fingerprint"


@dataclass(frozen=True)
class Work:
    """The work folder of a run: its finished parts outlive the run, for the next one."""

    output: Path
    fingerprint: str  # of all that the release is made from
    keeps: bool = True  # all finished shards, until the end
    day: str | None = None  # the date of its prompts, where they have one

    @property
    def folder(self) -> Path:
        return work_folder(self.output)

    @property
    def release(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "release"

    @property
    def statistics(self) -> Path:
        """The statistics of the base model, if this run makes them."""
        return self.folder / "statistics.safetensors"

    @property
    def rows(self) -> Path:
        """The rows that the base model has written, if it had to."""
        return self.folder / "rows.json"

    @property
    def downloads(self) -> Path:
        """Where shards of the sources are kept while they are read, with low disk."""
        return self.folder / "downloads"

    def keep(self, shard: str, record: dict[str, Any]) -> None:
        """Note that `shard` is finished."""
        path = self._note(shard)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(record))

    def recall(self, shard: str) -> dict[str, Any] | None:
        """What was kept of `shard` by this run or an earlier one; None if it is not finished."""
        record, written = self.note(shard), self.release / shard
        if record is None or not written.is_file():
            return None
        return record if file_sha256(written) == record["sha256"] else None

    def note(self, shard: str) -> dict[str, Any] | None:
        """What was kept of `shard`, be its file here or not; None if that is damaged."""
        try:
            record: dict[str, Any] = json.loads(self._note(shard).read_text(encoding="utf-8"))
            ShardRecord.from_json(record)
            return record if isinstance(record["bytes"], int) else None
        except (OSError, LookupError, TypeError, ValueError, RecursionError):
            return None

    def finish(self, *, force: bool) -> None:
        """Give the release its name, in place of what was there before."""
        try:
            check_output(self.output, force=force)
        except TargetError as error:  # it came meanwhile; what was made is not lost for it
            error.final = False
            raise
        sync(self.release)  # a name that is on the disk sooner than its files would lie
        if self.output.exists():
            self.output.rename(self._old)
        answers = beside(self.release)  # first, as the same command makes them with the release
        if answers.exists():
            answers.replace(beside(self.output))
        else:  # those of the release before are of no use
            beside(self.output).unlink(missing_ok=True)
        self.release.rename(self.output)

    @property
    def has_parts(self) -> bool:
        """Whether anything is finished that a next run would not have to do again."""
        begun = self.rows, self.statistics, journal_of(self.statistics)
        return any(map(Path.exists, begun)) or any(self._note("").parent.glob("*.json"))

    def open(self, progress: Progress) -> None:
        """Take over what an earlier run of this fingerprint left, and nothing else."""
        self._put_back()
        path = self.folder / FINGERPRINT
        earlier = _read(path)
        if earlier != self.fingerprint:
            if self.has_parts:
                progress.note(
                    f"{self.output} was begun by a run with other inputs, settings or versions; "
                    "this one starts anew."
                )
            self.clear()
        self.release.mkdir(exist_ok=True)
        write_whole(self.folder / DAY, self.day or "")
        write_whole(path, self.fingerprint)

    def clear(self) -> None:
        """Remove everything but the lock."""
        # The mark goes first, so that half of the parts is never taken for all of them.
        (self.folder / FINGERPRINT).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith(LOCK):
                path.unlink()

    def remove(self) -> None:
        """Remove the folder, unless the next run is in it already."""
        self._put_back()
        self.clear()
        (self.folder / LOCK).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    @property
    def _old(self) -> Path:
        return self.folder / "old"

    def _put_back(self) -> None:
        """The output before, if a run was stopped between the two renames that replace it."""
        if self._old.exists() and not self.output.exists():
            self._old.rename(self.output)

    def _note(self, shard: str) -> Path:
        return self.folder / "shards" / f"{shard}.json"


def work_folder(output: Path) -> Path:
    """Where `output` is made: beside it, on the same disk, so that a rename is enough."""
    output = output.resolve()
    return output.with_name(f".{output.name}.partial")


def begun(output: Path) -> tuple[str | None, str | None]:
    """The day on which a run began `output`, if that matters, and its fingerprint."""
    folder = work_folder(output)
    return _read(folder / DAY), _read(folder / FINGERPRINT)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


@contextmanager
def working_on(work: Work, *, force: bool, run: Run) -> Iterator[None]:
    """Within it the work folder is this run's alone; its first rank takes care of it.

    What is finished stays there if the block fails in a way that the same command may survive
    later, and goes otherwise. Raises TargetError if another run has the folder.
    """
    ranks, note = run.ranks, run.progress.note
    lock = ranks.at_first(lambda: _locked(work, force=force))
    if lock is None:
        ranks.once(lambda: None)  # until the first has opened it
        yield
        return
    with lock:
        try:
            ranks.once(lambda: work.open(run.progress))
            yield
        except BaseException as error:
            if work.has_parts and not (isinstance(error, SageHubError) and error.final):
                note(f"What is finished is kept in {work.folder}; the same command goes on there.")
                note_kept(error, "finished parts", work.folder)
            else:
                work.remove()
            raise
        work.remove()


def _locked(work: Work, *, force: bool) -> AbstractContextManager[object]:
    """The lock of the work folder, taken. Raises TargetError if another run has it."""
    check_output(work.output, force=force)
    work.folder.mkdir(parents=True, exist_ok=True)
    return alone_in(
        work.folder,
        LOCK,
        f"Another run is writing {work.output} at this moment; wait for it, or choose another "
        "output.",
    )


def check_output(output: Path, sources: Sequence[Path | None] = (), *, force: bool) -> None:
    """Raise TargetError if `output` is a source, a file, or a folder that is not a release."""
    for source in sources:
        # Replacing a folder would delete a source below it.
        if source is not None and source.resolve().is_relative_to(output.resolve()):
            raise TargetError(
                f"{output} is one of the two sources, or holds one; choose another output."
            )
    if output.exists() and not output.is_dir():
        raise TargetError(f"{output} is a file; choose another output.")
    if output.is_mount():
        raise TargetError(
            f"{output} is where a disk is mounted, which nothing can take the place of; choose a "
            "folder in it."
        )
    check_ours(beside(output), "Answers are to lie beside the output, and")
    ours = (output / MANIFEST).is_file()
    if output.is_dir() and any(output.iterdir()) and not ours and not force:
        raise TargetError(
            f"{output} exists and was not made by sage-hub (it has no {MANIFEST}); choose "
            "another output, or replace it with --force."
        )


def check_disk(
    plan: Plan,
    output: Path,
    *,
    statistics: int = 0,
    calibration: int = 0,
    low_disk: bool = False,
    keep: bool = True,
) -> None:
    """Raise DiskSpaceError if output, downloads and `statistics` bytes don't fit where they go.

    At the end of the `calibration` its journal, with the hidden states that wait, lies beside the
    statistics that are written from it; it goes before the output comes. What an earlier run has
    left there is used again, or removed first. With `low_disk` a download goes where the output
    goes, and of an output that is not kept there are two shards at a time.
    """
    left = sum(path.stat().st_size for path in work_folder(output).rglob("*") if path.is_file())
    # With low disk one shard is sent while the next is made.
    written = plan.output_bytes if keep or not low_disk else 2 * plan.largest_output
    passing = plan.passing_bytes if low_disk else 0
    needs = {output: max(0, statistics + passing + max(calibration, written) - left)}
    if plan.download_bytes and not low_disk:
        needs[Path(HF_HUB_CACHE)] = plan.download_bytes
    per_device: dict[int, tuple[Path, int]] = {}
    for path, size in needs.items():
        while not path.exists():
            path = path.resolve().parent
        device = os.stat(path).st_dev
        first, total = per_device.get(device, (path, 0))
        per_device[device] = (first, total + size)
    for path, size in per_device.values():
        free = shutil.disk_usage(path).free
        if size > free:
            raise DiskSpaceError(
                f"The run needs {size / 1e9:.1f} GB at {path}, where {free / 1e9:.1f} GB are free; "
                "free some, set --output, HF_HOME or TMPDIR to a larger disk, or see --low-disk."
            )
