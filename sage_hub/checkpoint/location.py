"""How a person names where something lies: a folder, or a Hub repo at a revision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sage_hub.errors import UsageError

_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Location:
    """Where the user says something lies: a local folder, or a Hub repo at a revision."""

    folder: Path | None
    repo: str = ""
    revision: str | None = None

    @property
    def name(self) -> str:
        """A name fit to publish: the repo id, or the folder's own name without its path."""
        return self.repo if self.folder is None else self.folder.resolve().name


def parse_location(text: str) -> Location:
    """Read `org/name`, `org/name@revision` or a folder.

    As everywhere in the ecosystem a folder is a path that exists or starts with `./`, `../`, `/`
    or `~`. Raises UsageError for anything else.
    """
    path = Path(text).expanduser()
    if path.is_dir() or text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        return Location(folder=path)
    repo, _, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or (not revision and "@" in text):
        raise UsageError(
            f"{text!r} is neither a folder nor a Hub repo; write org/name, org/name@revision, "
            "or a path that starts with ./ or /."
        )
    return Location(folder=None, repo=repo, revision=revision or None)
