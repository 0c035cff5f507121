"""`sage-hub stats`: calibrate for its own sake, into files or a repo of the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sage_hub.calibration.calibrate import calibrate, on_day_begun
from sage_hub.calibration.statistics import REPO_FILE, Origin, is_whole, open_statistics
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.commands.here import settle
from sage_hub.commands.inputs import general_texts, read_proxies
from sage_hub.errors import TargetError, UsageError
from sage_hub.publish.target import Publication, check_target
from sage_hub.publish.upload import Upload
from sage_hub.record.card import statistics_card
from sage_hub.rows.encoding import check_rows
from sage_hub.rows.proxies import Proxy
from sage_hub.rows.sources import DATASET_SCHEME
from sage_hub.runtime.places import scratch
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


def collect_statistics(
    model: str,
    output: str | Path | None = None,
    *,
    to: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    retain: Sequence[str] = (),
    publication: Publication = Publication(),  # noqa: B008 - frozen
    force: bool = False,
    run: Run = Run(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Calibrate `model` on the proxies of `settings`: into the file `output`, or the repo `to`.

    The retain proxy defaults to the general-purpose one; a forget proxy is taken in if there is
    one. With proxies in `retain`, which stand for that of the settings, `output` is a folder: for
    each it gets a file, named after it, all from one pass over the weights. Returns what the
    statistics belong to; for a folder a list of that under `statistics`.
    """
    if (output is None) == (to is None):
        raise UsageError("Statistics go into a file (--output) or a repo of the Hub (--to).")
    if to is None:
        publication.check_unused()
    if retain and output is None:
        raise UsageError(
            "A repo of the Hub holds the statistics of one retain proxy; use --output."
        )
    if output is not None and not retain:
        _check_file(Path(output))
    once = run.ranks.once
    checkpoint = open_checkpoint(model, pickled=settings.pickled_weights, dequantize=True)
    checkpoint = checkpoint.reading_with(settings.tokenizer)
    checkpoint.tokenizer_fingerprint()  # so that a change of it is noticed
    given, settings = settings.date, settle(settings, checkpoint, run.ranks)
    if to is not None:
        check_target(to, publication, force=force, mark=REPO_FILE)
    with scratch() as folder:
        # All ranks read what the first one writes.
        file = once(lambda: folder / REPO_FILE) if output is None else Path(output)
        if retain:
            files = _files(retain, file, settings)
        else:
            files = {file: read_proxies(settings.to_calibrate(), general_texts())}
        for proxies in files.values():
            check_rows(proxies, checkpoint, settings)
        weights = once(lambda: checkpoint.fingerprint(run.progress))
        if given is None and settings.date is not None:
            settings = on_day_begun(checkpoint, files, settings, weights, run)
        calibrate(checkpoint, files, settings, weights=weights, run=run)
        if retain:
            return {"statistics": [_describe(_origin(made), made) for made in files]}
        origin = _origin(file)
        result = _describe(origin, None if output is None else file)
        if to is None:
            return result
        return result | once(lambda: _publish_statistics(to, file, origin, publication, force))


def _check_file(path: Path) -> None:
    """Raise TargetError if `path` is there and holds no statistics."""
    if path.is_dir():
        raise TargetError(f"--output {path} is a folder; give the file to write.")
    if path.exists() and not is_whole(path):
        raise TargetError(
            f"{path} exists and holds no statistics of this version; choose another --output."
        )


def _files(retain: Sequence[str], folder: Path, settings: Settings) -> dict[Path, dict[str, Proxy]]:
    """The file of each of the `retain` proxies, and all that goes into it.

    Raises UsageError if two would have the same name, or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; several --retain need a folder.")
    files: dict[Path, dict[str, Proxy]] = {}
    for source in retain:
        own = replace(settings.to_calibrate(), retain=source)
        proxies = read_proxies(own)
        name = proxies["retain"].name
        stem = name if "://" in name else Path(name).stem
        stem = re.sub(r"\W+", "-", stem.removeprefix(DATASET_SCHEME)).strip("-")
        path = folder / f"{stem}.safetensors"
        if path in files:
            raise UsageError(f"Two of the retain proxies would be written to {path}; rename one.")
        files[path] = proxies
    return files


def _origin(file: Path) -> Origin:
    with open_statistics(file) as made:
        return made.origin


def _describe(origin: Origin, file: Path | None) -> dict[str, Any]:
    return {
        "file": None if file is None else str(file),
        "model": origin.model,
        "commit": origin.commit,
        "data": origin.published_data,
    }


def _publish_statistics(
    to: str, file: Path, origin: Origin, how: Publication, force: bool
) -> dict[str, str]:
    how = replace(how, message=how.message or f"Statistics of {origin.model}")
    sha256 = file_sha256(file)

    def ours(files: HubFiles) -> bool:
        return REPO_FILE in files.sizes and files.sha256(REPO_FILE) == sha256

    with Upload(to, how, ours, force=force, mark=REPO_FILE) as upload:
        if upload.is_there:
            return {"location": upload.take()}
        readme = file.with_name("README.md")
        readme.write_text(statistics_card(origin), encoding="utf-8")
        upload.send({REPO_FILE: file, "README.md": readme})
        return {"location": upload.commit()}
