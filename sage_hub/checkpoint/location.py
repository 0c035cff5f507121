"""How a person names where something lies: a folder, or a Hub repo at a revision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sage_hub.errors import UsageError

_REPO = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(/(?P<below>[\w.-]+(/[\w.-]+)*))?/?")


@dataclass(frozen=True)
class Location:
    """Where the user says something lies: a local folder, or a Hub repo at a revision.

    Of a repo it may be a folder, `below` the top.
    """

    folder: Path | None
    repo: str = ""
    revision: str | None = None
    below: str = ""

    @property
    def name(self) -> str:
        """A name fit to publish: the repo id, with what is below, or the folder's own name."""
        if self.folder is None:
            return f"{self.repo}/{self.below}".rstrip("/")
        return self.folder.resolve().name


def parse_location(text: str) -> Location:
    """Read `org/name`, `org/name/folder/below`, either with `@revision`, or a folder.

    As everywhere in the ecosystem a folder is a path that exists or starts with `./`, `../`, `/`
    or `~`. Raises UsageError for anything else.
    """
    path = Path(text).expanduser()
    if path.is_dir() or text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        return Location(folder=path)
    place, _, revision = text.partition("@")
    found = _REPO.fullmatch(place)
    if not found or {".", ".."} & set(place.split("/")) or (not revision and "@" in text):
        raise UsageError(
            f"{text!r} is neither a folder nor a Hub repo; write org/name, org/name@revision, "
            "or a path that starts with ./ or /."
        )
    return Location(None, found["repo"], revision or None, found["below"] or "")
