"""SHA256SUMS: the hash of every file of a release, signed off last, as `sha256sum -c` reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.files import LocalFiles
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.record.manifest import MANIFEST, REPORT
from sage_hub.runtime.disk import write_whole

SUMS = "SHA256SUMS"
SIGNATURE = f"{SUMS}.*"
# What a person may edit, holds times, or shows figures: the manifest, which is the same for the
# same inputs, cannot state their hashes. The sums do.
RECORD = ("README.md", REPORT, MANIFEST, "sage/*.png", SUMS, SIGNATURE)
LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # in a name; a backslash before its line says so


def is_of_record(name: str) -> bool:
    """Whether the file `name` of a release is one that its manifest does not cover."""
    return any(fnmatch(name, pattern) for pattern in RECORD)


def signs(name: str) -> bool:
    """Whether the file `name` is the sums, or a signature of them, which they cannot cover."""
    return name == SUMS or fnmatch(name, SIGNATURE)


def signatures_in(folder: Path) -> list[Path]:
    """The signatures of the sums in `folder`."""
    return sorted(folder.glob(SIGNATURE))


def write_sums(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the sums of the release in `folder`, where no signature of others stays.

    What the manifest covers may not be there: it was sent, or is copied by the Hub.
    """
    for signature in signatures_in(folder):
        signature.unlink()
    record = [name for name in LocalFiles(folder).sizes if is_of_record(name) and name != SUMS]
    sums = manifest["files"] | {name: file_sha256(folder / name) for name in record}
    text = "".join(_line(name, sha256) for name, sha256 in sorted(sums.items()))
    write_whole(folder / SUMS, text)


def read_sums(text: str) -> dict[str, str]:
    """File -> SHA-256. Raises ValueError if that is not what `text` states."""
    found = {}
    for line in text.removesuffix("\n").split("\n"):
        parts = LINE.fullmatch(line)
        if parts is None:
            raise ValueError(f"no sum: {line!r}")
        escaped, sha256, name = parts.groups()
        found[re.sub(r"\\(.)", _unescaped, name) if escaped else name] = sha256
    return found


def is_edited(folder: Path, name: str) -> bool:
    """Whether the file `name` is not what the sums in `folder` state of it, if they do."""
    try:
        stated = read_sums((folder / SUMS).read_text(encoding="utf-8")).get(name)
        return stated is not None and stated != file_sha256(folder / name)
    except (OSError, ValueError):
        return False


def _line(name: str, sha256: str) -> str:
    escaped = "".join(ESCAPES.get(character, character) for character in name)
    return f"{'' if escaped == name else chr(92)}{sha256}  {escaped}\n"


def _unescaped(part: re.Match[str]) -> str:
    return {"n": "\n", "r": "\r"}.get(part[1], part[1])
