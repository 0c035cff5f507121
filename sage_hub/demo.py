"""`sage-hub demo`: make a small unlearning problem, then run on it what `push` runs."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sage_hub import demo_models, display, jobs, release
from sage_hub.checkpoint import Location
from sage_hub.errors import TargetError
from sage_hub.progress import Progress
from sage_hub.release import Release
from sage_hub.settings import Settings


def run(
    folder: Path,
    *,
    model: Literal["people", "smollm2"],
    method: Literal["npo", "ga"],
    seed: int,
    given: Mapping[str, Any],
    force: bool,
    progress: Progress,
) -> tuple[Release, list[str]]:
    """Train, unlearn and sanitize in `folder`; return the release and the commands to repeat it.

    Raises TargetError if the folder holds something and `force` is not set.
    """
    Settings(**given)  # refused before the training, not after it
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not force:
            raise TargetError(
                f"{folder} is not empty; choose another --output, or replace it with --force."
            )
        for name in ("base", "unlearned", "release"):
            shutil.rmtree(folder / name, ignore_errors=True)
    progress.note(f"Training a small model and unlearning with {method.upper()} in {folder} …")
    files = _build(folder, model=model, method=method, seed=seed, quiet=progress.quiet)
    sets = {
        "retain": str(files.retain),
        "forget": str(files.forget),
        "heldout": str(files.heldout),
    }
    settings = Settings(**{**sets, **given})
    target = Location(folder=folder / "release")
    job = jobs.survey(str(files.base), str(files.unlearned), target, settings=settings)
    progress.note(display.plan_text(job))
    done = release.run(jobs.check_weights(job, progress), progress)
    return done, _commands(files, target, given)


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

    data = [f"--{name}" for name in ("retain", "forget", "heldout")]
    words = [
        word
        for pair in zip(data, map(path, (files.retain, files.forget, files.heldout)), strict=True)
        for word in pair
    ]
    settings = [
        word
        for name, value in given.items()
        for word in (
            [f"--{name.replace('_', '-')}", str(value)]
            if name != "chat_template"
            else ["--no-chat-template"]
        )
    ]
    both = [path(files.base), path(files.unlearned)]
    assert target.folder is not None
    return [
        shlex.join(["sage-hub", "push", *both, "--to", path(target.folder), *words, *settings]),
        shlex.join(["sage-hub", "audit", *both, *words[:4]]),
    ]
