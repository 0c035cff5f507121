"""`sage-hub review`: a page about a release, with its record and what models say of each row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.files import open_files, read_json
from sage_hub.checkpoint.location import Location, parse_location
from sage_hub.commands.job import output_of
from sage_hub.errors import NotFoundError, ResultsError
from sage_hub.evaluation.answers import (
    PAGE,
    Answers,
    beside,
    check_place,
    read_answers,
    write_for_owner,
)
from sage_hub.publish.verify import manifest_of
from sage_hub.record.content import answers_command, release_content
from sage_hub.record.manifest import REPORT, REPORT_VERSION, as_written
from sage_hub.record.page import page_of


@dataclass(frozen=True)
class Review:
    """A page that was written, the answers in it, and what it lacks, in sentences."""

    page: Path
    answers: Path | None
    lacks: tuple[str, ...]


def review(
    release: str, *, answers: str | Path | None = None, output: str | Path | None = None
) -> Review:
    """Write the page about `release`, a folder or a Hub repo, and say where it is.

    `answers` is a file of them; by default the one beside the folder where the release was made.
    The page holds them, so `output` may not lie in the release; by default it is beside it, and
    for a repo in the current folder. Raises ResultsError for answers of another release.
    """
    location = parse_location(release)
    files = open_files(release)
    manifest = manifest_of(files)
    report = read_json(files, REPORT) if REPORT in files.sizes else {}
    if report.get("format_version") != REPORT_VERSION:
        raise NotFoundError(f"{files.name} has no {REPORT} of this version of sage-hub.")
    page = Path(output) if output else _page_of(location)
    check_place(page, "--output" if output else "The page", [location.folder])
    kept = Path(answers) if answers else beside(output_of(location))
    found, lacks = _answers(kept, manifest, asked=answers is not None)
    if found is None:
        with as_written(files.name):
            again = answers_command(manifest, _typed(location, release), str(kept))
        lacks += [
            "To have them: sage-hub eval with base, unlearned and release, in this order, where "
            "local models and sets lie. This is the command, with the settings of the release:",
            again,
        ]
    with as_written(files.name):
        text = page_of(release_content(manifest, report, found, lacks))
    write_for_owner(page, text)
    return Review(page, None if found is None else kept, tuple(lacks))


def _page_of(location: Location) -> Path:
    if location.folder is not None:
        return beside(location.folder, PAGE)
    return Path(f"{location.name.replace('/', '--')}{PAGE}")


def _typed(location: Location, release: str) -> str:
    """The release as a command takes it wherever it is run."""
    return release if location.folder is None else str(location.folder.resolve())


def _answers(
    path: Path, manifest: dict[str, Any], *, asked: bool
) -> tuple[Answers | None, list[str]]:
    """The answers in `path` if they are of this release, and what is to be said of them."""
    if not asked and not path.is_file():
        return None, [f"There are no answers to read: {path} is not there."]
    found = read_answers(path)
    if found.release is None:
        return found, [
            f"The answers are of {', '.join(found.models)}, as `sage-hub eval` asked them; nothing "
            "proves that the last one is this very release."
        ]
    if found.release != manifest.get("fingerprint"):
        if asked:
            raise ResultsError(f"{path} holds the answers of another release.")
        return None, [f"There are no answers to read: those in {path} are of another release."]
    return found, []
