"""Statistics for their own sake: calibrate a model once, into a file or a repo of the Hub."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sage_hub.calibrate import calibrate
from sage_hub.card import statistics_card
from sage_hub.checkpoint import HubFiles, open_checkpoint
from sage_hub.errors import UsageError
from sage_hub.jobs import read_proxies
from sage_hub.progress import SILENT, Progress
from sage_hub.publish import Upload
from sage_hub.ranks import ALONE, Ranks
from sage_hub.settings import Settings
from sage_hub.statistics import REPO_FILE, Origin, open_statistics
from sage_hub.target import Publication, check_target
from sage_hub.tensorfile import file_sha256


def collect_statistics(
    model: str,
    output: str | Path | None = None,
    *,
    to: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    stats_cache: str | Path | None = None,
    ranks: Ranks = ALONE,
    publication: Publication = Publication(),  # noqa: B008 - frozen
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Calibrate `model` on the proxies of `settings`: into the file `output`, or the repo `to`.

    Returns what the statistics belong to. The retain proxy defaults to the general-purpose one; a
    forget proxy is taken in if there is one.
    """
    if (output is None) == (to is None):
        raise UsageError("Statistics go into a file (--output) or a repo of the Hub (--to).")
    if to is None:
        publication.check_unused()
    settings = settings.resolve_device()
    checkpoint = open_checkpoint(model)
    proxies = read_proxies(settings.to_calibrate(), calibrates=True)
    if to is not None:
        check_target(to, publication, force=force, mark=REPO_FILE)
    with tempfile.TemporaryDirectory(prefix="sage-hub-") as scratch:
        # All ranks read what the first one writes.
        file = ranks.once(lambda: Path(scratch, REPO_FILE)) if output is None else Path(output)
        calibrate(
            checkpoint,
            proxies,
            settings,
            file,
            weights=ranks.once(lambda: checkpoint.fingerprint(progress)),
            cache=None if stats_cache is None else Path(stats_cache),
            ranks=ranks,
            progress=progress,
        )
        with open_statistics(file) as made:
            origin = made.origin
        result = {
            "file": None if output is None else str(output),
            "model": origin.model,
            "commit": origin.commit,
            "data": origin.published_data,
        }
        if to is None:
            return result
        return result | ranks.once(
            lambda: _publish_statistics(to, file, origin, publication, force)
        )


def _publish_statistics(
    to: str, file: Path, origin: Origin, how: Publication, force: bool
) -> dict[str, str]:
    how = replace(how, message=how.message or f"Statistics of {origin.model}")
    sha256 = file_sha256(file)

    def ours(files: HubFiles) -> bool:
        return REPO_FILE in files.sizes and files.sha256(REPO_FILE) == sha256

    with Upload(to, how, ours, force=force, mark=REPO_FILE) as upload:
        if url := upload.published():
            return {"location": url}
        readme = file.with_name("README.md")
        readme.write_text(statistics_card(origin), encoding="utf-8")
        upload.send({REPO_FILE: file, "README.md": readme})
        return {"location": upload.commit()}
