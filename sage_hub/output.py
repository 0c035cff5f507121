"""The output folder: it appears when it is whole, and never over something that isn't ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sage_hub.errors import TargetError
from sage_hub.hub import MANIFEST
from sage_hub.plan import Plan


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
    ours = (output / MANIFEST).is_file()
    if output.is_dir() and any(output.iterdir()) and not ours and not force:
        raise TargetError(
            f"{output} exists and was not made by sage-hub (it has no {MANIFEST}); choose "
            "another output, or replace it with --force."
        )


@contextmanager
def staged(output: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block ends well, and goes otherwise."""
    check_output(output, force=force)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f".{output.name}.{os.getpid()}.partial")
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    work.mkdir()
    try:
        yield work
        if output.exists():
            output.rename(old)
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(old, ignore_errors=True)


def carry_files(plan: Plan, folder: Path) -> None:
    """Copy everything of the unlearned side that comes along verbatim."""
    for name in plan.carried:
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.unlearned.files.path(name), destination)
