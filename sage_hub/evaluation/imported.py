"""Results that were made elsewhere, by open-unlearning or lm-eval, for the same record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sage_hub.errors import NotFoundError, ResultsError
from sage_hub.evaluation.comparison import Result
from sage_hub.evaluation.metrics import Direction

# Of open-unlearning's metrics, by the beginning of their names; the first that fits.
_DIRECTIONS: Mapping[str, Direction] = {
    "forget_quality": "higher",
    "forget_truth_ratio": "higher",
    "forget_": "lower",
    "retain_": "higher",
    "ra_": "higher",
    "wf_": "higher",
    "model_utility": "higher",
    "privleak": "near zero",
    "extraction_strength": "lower",
    "exact_memorization": "lower",
}


def read_results(
    model: str, path: str, *, name: str = "", commit: str | None = None
) -> list[Result]:
    """What the file or folder `path` says of `model` ("base", "unlearned", …).

    Of a folder the newest `results_*.json`, `*_EVAL.json` or `*_SUMMARY.json` below it. `name`
    and `commit` are those of the checkpoint, where they are known. Raises NotFoundError, and
    ResultsError for a file of neither tool or one that is of another checkpoint.
    """
    file = _find(Path(path).expanduser())
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content:
        raise ResultsError(f"{file.name} is not a JSON object.")
    if isinstance(content.get("results"), dict):
        _check_belongs(content, file.name, name, commit)
        found = list(from_lm_eval(model, content, file.name))
    else:
        found = list(_from_open_unlearning(model, content, file))
    if not found:
        raise ResultsError(
            f"{file.name} holds no results of open-unlearning (*_EVAL.json, *_SUMMARY.json) or "
            "lm-eval (results_*.json)."
        )
    return found


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    patterns = ("results_*.json", "*_EVAL.json", "*_SUMMARY.json")
    files = [file for pattern in patterns for file in path.rglob(pattern)]
    if files:
        return max(files, key=lambda file: (file.stat().st_mtime, -len(file.name)))
    what = f"holds none of {', '.join(patterns)}" if path.is_dir() else "does not exist"
    raise NotFoundError(f"The results {path} cannot be read: that {what}.")


def from_lm_eval(model: str, content: Mapping[str, Any], source: str) -> Iterator[Result]:
    """The results of lm-eval: a set per task; its interval is 1.96 standard errors each way."""
    better, counts = _part(content, "higher_is_better"), _part(content, "n-samples")
    for task, figures in content["results"].items():
        for key, value in figures.items() if isinstance(figures, dict) else ():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = figures.get(f"{metric}_stderr,{how}")
            known, count = _part(better, task).get(metric), _part(counts, task).get("effective")
            ends = (value - 1.96 * error, value + 1.96 * error) if _is_number(error) else None
            yield Result(
                model,
                task,
                metric if how == "none" else f"{metric}_{how.replace('-', '_')}",
                None,
                float(value),
                ends if ends and all(map(_is_number, ends)) else None,
                "not stated" if known is None else ("higher" if known else "lower"),
                count if isinstance(count, int) else 0,
                source,
            )


def _from_open_unlearning(model: str, content: Mapping[str, Any], file: Path) -> Iterator[Result]:
    benchmark = file.stem.removesuffix("_EVAL").removesuffix("_SUMMARY").lower()
    for metric, about in content.items():
        value: Any = about.get("agg_value") if isinstance(about, dict) else about
        if not _is_number(value):
            continue
        rows = about.get("value_by_index") if isinstance(about, dict) else None
        way = next((way for start, way in _DIRECTIONS.items() if metric.startswith(start)), None)
        yield Result(
            model,
            f"open_unlearning_{benchmark}",
            metric,
            None,
            float(value),
            None,
            way or "not stated",
            len(rows) if isinstance(rows, dict) else 0,
            file.name,
        )


def _check_belongs(content: Mapping[str, Any], file: str, name: str, commit: str | None) -> None:
    """lm-eval states the model, and of one on the Hub its commit."""
    config = _part(content, "config")
    stated = str(config.get("model_sha") or "")
    if commit and stated and stated != commit:
        raise ResultsError(
            f"{file} is of the commit {stated[:12]} of its model, and {name} is at {commit[:12]}; "
            "evaluate that commit, or pin it with @revision."
        )
    model = str(content.get("model_name") or "")
    if commit and not stated and "/" in model and not Path(model).exists() and model != name:
        raise ResultsError(f"{file} is of {model}, not of {name}.")


def _part(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part that is an object; an empty one where it is anything else."""
    part = content.get(key)
    return part if isinstance(part, dict) else {}


def _is_number(value: object) -> bool:
    """Whether it is one that a float can be."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max
