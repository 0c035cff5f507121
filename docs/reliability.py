"""Write the figures of docs/reliability.md: `python docs/reliability.py FIGURES.json …`.

The files are those that `pytest -m soak --figures=FILE` writes, of a whole soak or of its parts.
They are kept, as one, in docs/reliability.json; without a file the page is made of that.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("reliability.md")
KEPT = Path(__file__).with_name("reliability.json")
MADE = re.compile(
    r"(<!-- the figures: made by docs/reliability.py -->\n\n).*?(?=<!-- to here -->)", re.S
)
ASIDE = "Hub faults, by phase"  # the same faults, told apart otherwise


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several runs as those of one."""
    ended: Counter[tuple[str, str, str]] = Counter()
    seconds: Counter[str] = Counter()
    for run in runs:
        ended.update({(part, kind, ending): n for part, kind, ending, n in run["ended"]})
        seconds.update(run["seconds"])
    last = max(runs, key=lambda run: run["date"])
    return {
        **last,
        "whole": all(run["whole"] for run in runs),
        "failures": sum(run["failures"] for run in runs),
        "seconds": dict(sorted(seconds.items())),
        "ended": [[*key, n] for key, n in sorted(ended.items())],
    }


def page(text: str, figures: dict[str, Any]) -> str:
    """docs/reliability.md with these figures."""
    return MADE.sub(lambda found: found[1] + _figures(figures), text)


def _figures(figures: dict[str, Any]) -> str:
    tried: dict[str, Counter[str]] = {}
    kinds: dict[tuple[str, str], Counter[str]] = {}
    for part, kind, ending, n in figures["ended"]:
        tried.setdefault(part, Counter())[ending] += n
        kinds.setdefault((part, kind), Counter())[ending] += n
    phases = tried.pop(ASIDE, Counter())
    failures = figures["failures"] or "none"
    lines = [
        f"On {figures['date']}, {figures['machine']}, Python {figures['python']}. "
        f"Tests that failed: {failures}."
        + " The run was stopped before it had tried all that it tries."
        * (not figures["whole"]),
        "",
        *("| what was done | times | how it ended | minutes |", "|---|---|---|---|"),
        *(
            f"| {part} | {sum(own.values()):,} | {_told(own)} | "
            f"{figures['seconds'].get(part, 0) / 60:.1f} |"
            for part, own in tried.items()
        ),
        "",
    ]
    if phases:
        aimed = {kind: sum(own.values()) for (part, kind), own in kinds.items() if part == ASIDE}
        said = ", ".join(f"{n} at {phase}" for phase, n in sorted(aimed.items()))
        lines += [f"The faults were aimed at each phase of a run: {said}.", ""]
    lines += ["| part | kind | times | how it ended |", "|---|---|---|---|"]
    lines += [
        f"| {part} | {kind} | {sum(own.values()):,} | {_told(own)} |"
        for (part, kind), own in kinds.items()
        if part != ASIDE
    ]
    return "\n".join([*lines, "", ""])


def _told(own: Counter[str]) -> str:
    return "; ".join(f"{n:,} {ending}" for ending, n in own.most_common())


if __name__ == "__main__":
    if sys.argv[1:]:
        runs = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
        text = json.dumps(together(runs), indent=1, ensure_ascii=False)
        KEPT.write_text(text + "\n", encoding="utf-8")
    figures = json.loads(KEPT.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
