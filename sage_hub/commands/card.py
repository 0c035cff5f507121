"""`sage-hub card`: write the card of a release again, from its record."""

from __future__ import annotations

from pathlib import Path

from sage_hub.errors import NotFoundError
from sage_hub.publish.verify import stated_hashes
from sage_hub.record.manifest import MANIFEST, REPORT, REPORT_VERSION, as_written, read_record
from sage_hub.record.release import write_record
from sage_hub.record.signing import check_signer


def rewrite(folder: Path, template: str | None = None, sign: str | None = None) -> Path:
    """Write the card in the release `folder` again, from its record, and its sums; the card's path.

    The command `sign` signs these. Raises NotFoundError if there is no record of this version,
    CorruptCheckpointError if it was changed.
    """
    manifest, report = (read_record(folder / name) for name in (MANIFEST, REPORT))
    if not manifest or report.get("format_version") != REPORT_VERSION:
        raise NotFoundError(
            f"{folder} holds no record of this version of sage-hub ({MANIFEST}, "
            f"{REPORT}); give the folder of a release."
        )
    check_signer(sign)
    stated_hashes(manifest, str(folder))
    with as_written(str(folder)):
        write_record(folder, manifest, report, template, sign)
    return folder / "README.md"
