"""Whether a release is what its manifest says, file by file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from sage_hub.checkpoint.files import Files, open_files, read_json
from sage_hub.errors import CorruptCheckpointError, NotFoundError
from sage_hub.record.manifest import MANIFEST
from sage_hub.runtime.progress import SILENT, Progress

# What a person may edit, holds times, or shows figures: the manifest, which is the same for the
# same inputs, cannot state their hashes.
NOT_COVERED = (
    *("README.md", "sage/report.json", MANIFEST, ".gitattributes"),
    *("sage/*.png", ".eval_results/*.yaml"),
)


@dataclass(frozen=True)
class Verification:
    """What was compared, and each difference in one sentence."""

    name: str
    commit: str | None
    fingerprint: str
    checked: tuple[str, ...]
    not_covered: tuple[str, ...]
    differences: tuple[str, ...]
    whole: bool  # all that is stated is there as stated; there may be more


def verify(release: str, progress: Progress = SILENT) -> Verification:
    """Compare every file of the release (a folder or a Hub repo) with its manifest.

    Large files of a repo are compared by the hash that the Hub has of them, not downloaded.
    Raises NotFoundError if it has no manifest.
    """
    return verify_files(open_files(release), progress)


def verify_files(files: Files, progress: Progress = SILENT) -> Verification:
    """The same of files that are open."""
    manifest = manifest_of(files)
    stated = _stated_hashes(manifest, files.name)
    present = [name for name in stated if name in files.sizes]
    found = {
        name: files.sha256(name)
        for name in progress.each(f"Hashing {files.name}", present, len(present), "file")
    }
    differences = []
    for name, sha256 in stated.items():
        if name not in found:
            differences.append(f"{name} is missing")
        elif found[name] != sha256:
            differences.append(
                f"{name} has the SHA-256 {found[name]}, and {sha256} in the manifest"
            )
    whole = not differences
    differences += [
        f"{name} is not in the manifest"
        for name in files.sizes
        if name not in stated and not _not_covered(name)
    ]
    return Verification(
        files.name,
        files.commit,
        str(manifest.get("fingerprint", "")),
        tuple(found),
        tuple(name for name in files.sizes if _not_covered(name)),
        tuple(differences),
        whole,
    )


def is_of_release(name: str, manifest: Mapping[str, Any]) -> bool:
    """Whether the file `name` was written with this manifest, and not added by somebody."""
    return name in manifest.get("files", ()) or (_not_covered(name) and name != ".gitattributes")


def _not_covered(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in NOT_COVERED)


def read_manifest(release: str) -> dict[str, Any]:
    """The manifest of `release`. Raises NotFoundError if it has none."""
    return manifest_of(open_files(release))


def manifest_of(files: Files) -> dict[str, Any]:
    """The manifest among `files`. Raises NotFoundError if there is none."""
    if MANIFEST not in files.sizes:
        raise NotFoundError(
            f"{files.name} has no {MANIFEST}; it was not made by sage-hub. Give a release that was."
        )
    return read_json(files, MANIFEST)


def _stated_hashes(manifest: Mapping[str, Any], name: str) -> dict[str, str]:
    stated = manifest.get("files")
    if not isinstance(stated, dict) or not stated:
        raise CorruptCheckpointError(
            f"{MANIFEST} of {name} lists no files; it was changed. Make the release again."
        )
    return {str(file): str(sha256) for file, sha256 in stated.items()}
