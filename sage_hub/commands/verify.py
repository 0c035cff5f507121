"""`sage-hub verify`: whether a release is what its record says, and comes out so again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sage_hub.commands.here import on_device
from sage_hub.commands.push import sanitize
from sage_hub.errors import NotFoundError, UsageError, VerificationError
from sage_hub.evaluation.written import NAME
from sage_hub.publish.verify import Verification, read_manifest, verify
from sage_hub.record import card
from sage_hub.record.manifest import as_written
from sage_hub.runtime.places import scratch
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

WRITTEN = "the base wrote the rows itself, and may write others on another kind of machine"


def check(
    release: str,
    *,
    rebuild: bool = False,
    run: Run = Run(),  # noqa: B008 - frozen
) -> Verification:
    """Compare the files of `release` with its record; with `rebuild` those made again, too."""
    found = verify(release, run.progress)
    if rebuild:
        found = replace(found, differences=(*found.differences, *_rebuild(release, run)))
    return found


def raise_differences(found: Verification) -> None:
    """Raise VerificationError if there are any."""
    if found.differences:
        raise VerificationError(
            f"{found.name} is not what its record says: {len(found.differences)} "
            f"difference{'s' if len(found.differences) > 1 else ''}."
        )


def _rebuild(release: str, run: Run) -> list[str]:
    """Make `release` again from what its manifest states, and compare the hashes of all files.

    Sources on the Hub are taken at the recorded commits, local ones and proxies by their names
    from the current folder. Returns each difference in one sentence.
    """
    manifest = read_manifest(release)
    with as_written(release):
        base, unlearned = (
            card.recorded_source(manifest["sources"][side]) for side in ("base", "unlearned")
        )
        settings = Settings.from_record(manifest["settings"]).without_evaluation()
        given, local = manifest["statistics"].get("file"), card.local_inputs(manifest)
        needed = {base, unlearned, *settings.sets.values(), given}
        written = any(about["name"] == NAME for about in manifest["statistics"]["data"].values())
        theirs = dict(manifest["versions"])
    device = settings.device
    try:
        on_device(settings)
    except UsageError:  # made on a GPU, and there is none
        settings = on_device(replace(settings, device="auto"))
    for name in local:
        if name in needed and not Path(name).exists():
            raise NotFoundError(
                f"{release} was made from {name}, and the record does not say in which folder; run "
                "this where it is."
            )
    if written:
        run.progress.note(f"{WRITTEN[0].upper()}{WRITTEN[1:]}.")
    with scratch() as folder:
        made = sanitize(
            base,
            unlearned,
            folder / "rebuilt",
            settings=settings,
            statistics=given,
            run=run,
        )
    found = made.manifest["files"]
    differences = [
        f"{name} comes out as {found.get(name, 'nothing')}, not {sha256}"
        for name, sha256 in manifest["files"].items()
        if found.get(name) != sha256
    ]
    ours = made.manifest["versions"]
    changed = {lib: v for lib, v in theirs.items() if ours.get(lib) != v}
    if differences and settings.device != device:
        differences.append(f"it was made on {device}, and here on {settings.device}")
    if differences and written:
        differences.append(WRITTEN)
    if differences:
        differences += _moved(manifest, made.manifest)
    if differences and changed:
        differences += [f"{lib} was {v} and is {ours.get(lib)}" for lib, v in changed.items()]
    return differences


def _moved(manifest: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[str]:
    """What a release was made from and has changed under its name, each in one sentence."""
    for side, source in manifest["sources"].items():
        if made["sources"][side]["fingerprint"] != source["fingerprint"]:
            yield f"the {side} model, {source['name']}, has other weights or another config now"
    before, now = (about.get("prompts") or {} for about in (manifest, made))
    if before.get("tokenizer_fingerprint") != now.get("tokenizer_fingerprint"):
        template = before.get("chat_template") != now.get("chat_template")
        yield f"the tokenizer has other files now{', and another chat template' * template}"
    if before.get("date") != now.get("date"):
        yield f"prompts had the date {before.get('date')}, and have {now.get('date')} now"
    rows = made["statistics"]["data"]
    for which, about in manifest["statistics"]["data"].items():
        if rows.get(which, {}).get("fingerprint") != about["fingerprint"]:
            yield f"the {which} rows of {about['name']} are others now"
