"""How a run is carried out: who watches, who works at it, what is left beside the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sage_hub.runtime.progress import SILENT, Progress
from sage_hub.runtime.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Run:
    """None of it changes what comes out."""

    progress: Progress = SILENT
    ranks: Ranks = ALONE  # the processes that do it together
    stats_cache: Path | None = None  # where statistics are looked for and kept
    record: Path | None = None  # where card and record are left too
    sign: str | None = None  # the command that signs the sums of a release
    save_retain: Path | None = None  # where the rows that the base writes are left
    answers: Path | None = None  # where `eval` leaves what models made of each row
