"""Whether a release is what its manifest and its sums say, file by file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sage_hub.checkpoint.files import Files, open_files, read_json
from sage_hub.errors import CorruptCheckpointError, NotFoundError
from sage_hub.record.manifest import MANIFEST
from sage_hub.record.sums import SUMS, is_of_record, read_sums, signs
from sage_hub.runtime.progress import SILENT, Progress

OF_THE_HUB = ".gitattributes"  # which it adds


@dataclass(frozen=True)
class Verification:
    """What was compared, and each difference in one sentence."""

    name: str
    commit: str | None
    fingerprint: str
    checked: tuple[str, ...]
    not_covered: tuple[str, ...]
    differences: tuple[str, ...]
    whole: bool  # all that the manifest states is there as stated; there may be more
    signed: bool  # there are sums, of card and report too


def verify(release: str, progress: Progress = SILENT) -> Verification:
    """Compare every file of the release (a folder or a Hub repo) with its manifest and its sums.

    Large files of a repo are compared by the hash that the Hub has of them, not downloaded.
    Raises NotFoundError if it has no manifest.
    """
    return verify_files(open_files(release), progress)


def verify_files(files: Files, progress: Progress = SILENT) -> Verification:
    """The same of files that are open."""
    manifest = manifest_of(files)
    stated = stated_hashes(manifest, files.name)
    sums, faults = _sums_of(files)
    present = [name for name in {**stated, **sums} if name in files.sizes]
    found = {
        name: files.sha256(name)
        for name in progress.each(f"Hashing {files.name}", present, len(present), "file")
    }
    broken = dict(_differences(stated, found, "the manifest"))
    known = {name for name in files.sizes if is_of_release(name, manifest)}
    strange = files.sizes.keys() - known - {OF_THE_HUB}
    uncovered = {name for name in known - sums.keys() if sums and not signs(name)}
    differences = {
        **{name: f"{name} is not in {SUMS}" for name in uncovered},
        **dict(_differences(sums, found, SUMS)),
        **{name: f"{name} is not in the manifest" for name in strange},
        **broken,
    }
    return Verification(
        files.name,
        files.commit,
        str(manifest.get("fingerprint", "")),
        tuple(found),
        tuple(name for name in files.sizes if name not in found and name not in strange),
        (*faults, *(differences[name] for name in sorted(differences))),
        whole=not broken,
        signed=SUMS in files.sizes,
    )


def _sums_of(files: Files) -> tuple[dict[str, str], list[str]]:
    """The sums, none where there are none; and a sentence if they are no such thing."""
    if SUMS not in files.sizes:
        return {}, []
    try:
        return read_sums(files.path(SUMS).read_text(encoding="utf-8")), []
    except ValueError:
        return {}, [f"{SUMS} is not what sha256sum reads"]


def _differences(
    stated: Mapping[str, str], found: Mapping[str, str], where: str
) -> Iterator[tuple[str, str]]:
    for name, sha256 in stated.items():
        if name not in found:
            yield name, f"{name} is missing"
        elif found[name] != sha256:
            yield name, f"{name} has the SHA-256 {found[name]}, and {sha256} in {where}"


def is_of_release(name: str, manifest: Mapping[str, Any]) -> bool:
    """Whether the file `name` was written with this manifest, and not added by somebody."""
    stated = manifest.get("files")
    return (isinstance(stated, dict) and name in stated) or is_of_record(name)


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


def stated_hashes(manifest: Mapping[str, Any], name: str) -> dict[str, str]:
    """File -> SHA-256, of the release `name`. Raises CorruptCheckpointError if there are none."""
    stated = manifest.get("files")
    if not isinstance(stated, dict) or not stated:
        raise CorruptCheckpointError(
            f"{MANIFEST} of {name} lists no files; it was changed. Make the release again."
        )
    return {str(file): str(sha256) for file, sha256 in stated.items()}
