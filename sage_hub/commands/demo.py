"""`sage-hub demo`: make a small unlearning problem, then run on it what `push` runs."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from sage_hub.checkpoint.location import Location
from sage_hub.checkpoint.pair import open_pair
from sage_hub.commands import demo_models
from sage_hub.commands.job import Job
from sage_hub.commands.push import release
from sage_hub.commands.survey import check_weights, survey
from sage_hub.errors import TargetError
from sage_hub.record.release import Release
from sage_hub.runtime.progress import Progress
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings, as_words

METHODS = {"npo": "NPO (negative preference optimization)", "ga": "gradient ascent"}


def run(
    folder: Path,
    *,
    model: Literal["people", "smollm2"],
    method: Literal["npo", "ga"],
    seed: int,
    given: Mapping[str, Any],
    force: bool,
    show: Callable[[Job], object],
    progress: Progress,
) -> tuple[Release, list[str]]:
    """Train, unlearn and sanitize in `folder`; return the release and what to type next.

    That is the command that shows it, then those that repeat it.

    The plan is shown by `show`. Raises TargetError if the folder holds something and `force` is
    not set.
    """
    Settings(**given)  # refused before the training, not after it
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not force:
            raise TargetError(
                f"{folder} is not empty; choose another --output, or replace it with --force."
            )
        for name in ("base", "unlearned", "release"):
            shutil.rmtree(folder / name, ignore_errors=True)
    progress.note(f"Training a small model, then unlearning by {METHODS[method]}, in {folder} …")
    files = _build(folder, model=model, method=method, seed=seed, quiet=progress.quiet)
    sets = {
        "retain": str(files.retain),
        "forget": str(files.forget),
        "heldout": str(files.heldout),
    }
    settings = Settings(**{**sets, **given})
    target = Location(folder=folder / "release")
    pair = open_pair(str(files.base), str(files.unlearned))
    job = survey(pair, target, settings, run=Run(progress))
    show(job)
    return release(check_weights(job)), _commands(files, target, given)


def _build(folder: Path, **options: Any) -> demo_models.DemoFiles:
    """Build, and leave nothing behind if that is interrupted, so that the same command works."""
    try:
        return demo_models.build(folder, **options)
    except BaseException:
        for name in ("base", "unlearned"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("retain.jsonl", "forget.jsonl", "heldout.jsonl"):
            (folder / name).unlink(missing_ok=True)
        raise


def _commands(
    files: demo_models.DemoFiles, target: Location, given: Mapping[str, Any]
) -> list[str]:
    def path(where: Path) -> str:
        text = str(where)
        return text if text.startswith(("/", ".")) else f"./{text}"

    sets = {name: path(getattr(files, name)) for name in ("retain", "forget", "heldout")}
    words, settings = as_words(sets), as_words(given)
    both = [path(files.base), path(files.unlearned)]
    assert target.folder is not None
    return [
        shlex.join(["sage-hub", "review", path(target.folder)]),
        shlex.join(["sage-hub", "push", *both, "--to", path(target.folder), *words, *settings]),
        shlex.join(["sage-hub", "audit", *both, *words[:4]]),
    ]
