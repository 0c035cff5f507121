"""The record of a release: manifest (what was done, to what) and report (with what result)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sage_hub.calibration.statistics import Statistics
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import CorruptCheckpointError, TargetError, first_line
from sage_hub.evaluation.comparison import Difference, Result
from sage_hub.evaluation.evaluate import Evaluation
from sage_hub.evaluation.relearning import RECIPE
from sage_hub.method.sage import relative
from sage_hub.repair.bias import profile_of
from sage_hub.repair.control import Control
from sage_hub.repair.gain import Chosen
from sage_hub.repair.plan import Plan
from sage_hub.repair.write import TensorRecord
from sage_hub.runtime.disk import write_whole
from sage_hub.runtime.versions import hardware, versions
from sage_hub.settings import Settings

MANIFEST_VERSION = 1
MANIFEST = "sage/manifest.json"
REPORT = "sage/report.json"
REPORT_VERSION = 2
METHOD = (
    "SAGE (arXiv 2606.18309) was available to this tool's authors as an abstract only; the "
    "formulation follows it and is theirs in detail."
)


def describe_source(checkpoint: Checkpoint, fingerprint: str) -> dict[str, Any]:
    """A source for the record; `commit` is None for a local folder."""
    how = checkpoint.files.reading
    source = {"name": checkpoint.name, "commit": checkpoint.commit, "fingerprint": fingerprint}
    return source | ({"weights": how} if how else {})


def model_bias(records: Sequence[TensorRecord]) -> dict[str, float | None]:
    """Retention activation bias over all filtered weights, relative to the base's outputs.

    `Σ tr(D C Dᵀ) / Σ tr(W_b C W_bᵀ)`, before (the source's update) and after (what is stored).
    `kept` is after / before.
    """
    whole = math.fsum(record.retain_base for record in records)
    before = math.fsum(record.retain_before for record in records)
    after = math.fsum(record.retain_after for record in records)
    return {
        "before": relative(before, whole),
        "after": relative(after, whole),
        "kept": relative(after, before),
    }


def make_manifest(
    plan: Plan,
    fingerprint: str,
    sources: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    chosen: Chosen,
    statistics: Statistics,
    records: Sequence[TensorRecord],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """What was done. The same inputs give the same manifest: it holds no time and no host."""
    tensors = []
    for record in records:
        entry = asdict(record)
        del entry["profile"]
        for inner in ("retain_before", "retain_after", "retain_base", "update_norm", "kept_norm"):
            del entry[inner]
        del entry["rounding_norm"]
        tensors.append({key: value for key, value in entry.items() if value not in (None, "")})
    counts = {
        action: sum(record.action == action for record in records)
        for action in ("filtered", "identical", "copied")
    }
    return {
        "format_version": MANIFEST_VERSION,
        "fingerprint": fingerprint,
        "method": METHOD,
        "sources": dict(sources),
        "settings": settings.describe(),
        "gain": chosen.gains.model,
        "gain_shares": dict(chosen.gains.shares),
        "gain_search": chosen.search,
        "statistics": {
            "fingerprint": statistics.fingerprint,
            "model": statistics.origin.model,
            "commit": statistics.origin.commit,
            "data": statistics.origin.published_data,
            "settings": statistics.origin.settings,
            "sites": len(statistics.sites),
            "sketched": len(statistics.sketched),
            "most_missed_by_a_sketch": max(statistics.sketched.values(), default=None),
        },
        "bias": model_bias(records),
        "profile": profile_of(
            [record.profile for record in records if record.profile],
            math.fsum(record.retain_before for record in records),
        ),
        "counts": counts,
        "tensors": tensors,
        "files": dict(sorted(hashes.items())),
        "left_behind": plan.left_behind,
        "versions": versions(),
    }


def make_report(
    evaluation: Evaluation,
    settings: Settings,
    seconds: Mapping[str, float],
    *,
    control: Control | None,
    card: Mapping[str, Any],
) -> dict[str, Any]:
    """The figures of all models, how they compare, and what was not run and why."""
    return {
        "format_version": REPORT_VERSION,
        "data": evaluation.data,
        "results": [_plain(result) for result in evaluation.results],
        "differences": [_plain(difference) for difference in evaluation.differences],
        "retain_recovered": evaluation.retain_recovered,
        "control_alpha": control.alpha if control else None,
        "control_by": control.by if control else None,
        "relearning": RECIPE.describe(),
        "not_run": evaluation.not_run,
        "gates": [],
        "seed": settings.seed,
        "hardware": hardware(settings.device),
        "card": dict(card),
        "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()},
    }


def with_results(report: Mapping[str, Any], imported: Sequence[Result]) -> dict[str, Any]:
    """The report with results that were made elsewhere, in place of any that it had."""
    measured = [result for result in report["results"] if not result["imported"]]
    added = [_plain(replace(result, imported=True)) for result in imported]
    return {**report, "results": measured + added}


def _plain(part: Result | Difference) -> dict[str, Any]:
    """As JSON will give it back."""
    found = asdict(part)
    if found["interval"] is not None:
        found["interval"] = list(found["interval"])
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as readable JSON. Raises ValueError for NaN or Inf, which JSON has not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_json(content))


def as_json(content: Mapping[str, Any]) -> str:
    """`content` as `write_json` writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_record(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty if the file is not there, or is no such thing any more."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def as_written(name: str) -> Iterator[None]:
    """Within it a record that was read is taken for what sage-hub writes, wherever it is from.

    What fails then is the record's fault: raises CorruptCheckpointError, about that of `name`.
    """
    try:
        yield
    except (
        *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError),
    ) as error:
        raise CorruptCheckpointError(
            f"The record of {name} is not as sage-hub writes it ({first_line(error)}); it was "
            "changed, or is of another version."
        ) from None


def check_record(folder: Path, output: Path | None) -> None:
    """Raise TargetError if a copy of the record would replace a README.md of another kind, or lie
    in the output, which appears only in the end."""
    if output is not None and folder.resolve().is_relative_to(output.resolve()):
        raise TargetError(f"--record {folder} lies in the output; the record is there anyhow.")
    if (folder / "README.md").exists() and not (folder / MANIFEST).exists():
        raise TargetError(
            f"--record {folder} has a README.md that is none of a release; choose another folder."
        )


def leave_record(release: Path, folder: Path | None) -> None:
    """Copy the card and `sage/` of a release into `folder`, if there is to be such a copy."""
    if folder is None or folder.resolve() == release.resolve():
        return
    shutil.copytree(release / "sage", folder / "sage", dirs_exist_ok=True)
    for gone in folder.glob("SHA256SUMS.*"):  # signatures of other sums
        gone.unlink()
    for path in (release / "README.md", *release.glob("SHA256SUMS*")):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
