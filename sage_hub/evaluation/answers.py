"""What each model made of each row: a file beside a release, and never in it.

The answers to a forget set are what had to go. So whatever has such a name stays on this machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_hub.errors import NotFoundError, ResultsError, TargetError
from sage_hub.evaluation.metrics import METRICS, Seen
from sage_hub.rows.proxies import Row
from sage_hub.runtime.disk import write_whole

FORMAT, VERSION = "sage-hub-answers", 1
SUFFIX, PAGE = ".answers.jsonl", ".review.html"  # a page of answers has them in it
FIGURES = (
    *("probability", "accuracy", "truth_ratio", "rougeL_recall", "loss"),
    *("extraction_strength", "exact_memorization"),
)
AsSeen = Mapping[str, Mapping[str, Sequence[Seen]]]  # model -> set -> its rows


@dataclass(frozen=True)
class Answers:
    """The rows of a file, each with what the `models` made of it (docs/formats.md)."""

    models: tuple[str, ...]
    release: str | None  # the fingerprint of the release that they are of, if of one
    rows: tuple[Mapping[str, Any], ...]


def beside(folder: Path, suffix: str = SUFFIX) -> Path:
    """Where the answers of the release in `folder` are kept, or another file about them."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}{suffix}")


def stays_here(name: str) -> bool:
    """Whether a file of this name holds answers, so that it is never published."""
    return name.endswith((SUFFIX, PAGE))


def check_place(path: Path, option: str, folders: Sequence[Path | None] = ()) -> None:
    """Raise an error if answers cannot be written to `path`, or lie in one of `folders` then.

    TargetError for something that is there and holds no answers, NotFoundError for no folder.
    """
    if not path.parent.is_dir():
        raise NotFoundError(f"{option} {path}: there is no folder {path.parent}.")
    for folder in folders:
        if folder is not None and path.resolve().is_relative_to(folder.resolve()):
            raise TargetError(
                f"{option} {path} lies in {folder}, and would be published with it; answers to a "
                "forget set are what had to go. Choose a file outside of it."
            )
    check_ours(path, option)


def check_ours(path: Path, said: str) -> None:
    """Raise TargetError if `path` is there and is no file of answers that sage-hub wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        with path.open("rb") as file:
            if FORMAT.encode() in file.read(400):
                return
    raise TargetError(f"{said} {path} is there and none of sage-hub's; choose another place.")


def write_answers(path: Path, seen: AsSeen, release: str | None = None) -> None:
    """Write what the models of `seen` made of each row, readable by its owner alone."""
    head = {"format": FORMAT, "format_version": VERSION, "release": release, "models": [*seen]}
    first = next(iter(seen.values()), {})
    lines: list[Any] = [head]
    for which, rows in first.items():
        for number, one in enumerate(rows):
            made = {name: _made(views[which][number]) for name, views in seen.items()}
            place = one.row.place or f"row {number + 1}"
            asked, wanted = _question(one.row), one.row.answer.strip()
            lines.append(
                {"set": which, "row": place, "question": asked, "wanted": wanted, "models": made}
            )
    write_for_owner(path, "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))


def write_for_owner(path: Path, text: str) -> None:
    """Write `text`, whole or not at all, so that no other user of the machine can read it."""
    write_whole(path, text, mode=0o600)


def read_answers(path: Path) -> Answers:
    """What `write_answers` wrote. Raises NotFoundError or ResultsError, with the line."""
    if not path.is_file():
        raise NotFoundError(f"There is no file of answers {path}.")
    lines: list[Any] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                lines.append(json.loads(line, parse_constant=_refuse))
                well = _is_head(lines[0]) and (number == 1 or _is_row(lines[-1]))
            except (ValueError, RecursionError):
                well = False
            if not well:
                raise ResultsError(
                    f"{path.name}, line {number}: no answers as sage-hub {VERSION} writes them; "
                    "make the file anew with `sage-hub eval … --answers`."
                )
    if not lines:
        raise ResultsError(f"{path.name} is empty; make it anew with `sage-hub eval … --answers`.")
    return Answers(tuple(lines[0]["models"]), lines[0].get("release"), tuple(lines[1:]))


def _is_head(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and (line.get("format"), line.get("format_version")) == (FORMAT, VERSION)
        and isinstance(line.get("models"), list)
        and all(isinstance(name, str) for name in line["models"])
        and isinstance(line.get("release"), (str, type(None)))
    )


def _is_row(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and all(isinstance(line.get(key), str) for key in ("set", "row", "question", "wanted"))
        and isinstance(line.get("models"), dict)
        and all(isinstance(made, dict) for made in line["models"].values())
        and all(
            isinstance(value, str if key == "said" else (int, float))
            for made in line["models"].values()
            for key, value in made.items()
        )
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _made(seen: Seen) -> dict[str, Any]:
    """The figures of a row that it has, and what was said."""
    figures = {name: METRICS[name].of(seen) for name in FIGURES}
    known = {
        name: float(f"{value:.6g}")
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    }
    return known if seen.said is None else {**known, "said": seen.said}


def _question(row: Row) -> str:
    """What is asked, without what a template puts around it."""
    if len(row.turns) == 1:
        return row.turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in row.turns) or row.prompt.strip()
