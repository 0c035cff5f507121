"""From the kept points to results.json, and from that to the tables and the figure of the docs.

    python benchmarks/real_model/report.py

Tables go between the marks `<!-- NAME -->` and `<!-- /NAME -->` of docs/results.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data import SIZES
from figure import draw, draw_readme
from points import gather, read_sources
from tables import TABLES

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
FIRST = "cpu"  # the size that most of the page is about


def results_of(size: str) -> Path:
    """The file with the results of a size."""
    return HERE / ("results.json" if size == FIRST else f"results-{size}.json")


def write(cache: Path, size: str, results: Path) -> None:
    """Gather the points in `cache` into `results`, and renew the docs if they are its source."""
    known = json.loads(results.read_text())["sources"] if results.is_file() else []
    found = gather(cache, size, known)
    results.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    if results == results_of(size):
        render()


def render(page: Path = DOCS / "results.md") -> None:
    """Renew the tables of `page` and the figures."""
    for size in SIZES:
        if (file := results_of(size)).is_file():
            _render(json.loads(file.read_text()), page)


def _render(results: Mapping[str, Any], page: Path) -> None:
    """The tables that are of one size; those of a size that is not the first end with its name."""
    sources = read_sources(results)
    text = page.read_text(encoding="utf-8")
    size = results["size"]
    for base, table in TABLES.items():
        name = base if size == FIRST else f"{base}-{size}"
        block = f"<!-- {name} -->\n\n{table(results, sources)}\n\n<!-- /{name} -->"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        text = pattern.sub(lambda _, block=block: block, text)
    page.write_text(text, encoding="utf-8")
    if size == FIRST:
        draw(sources, DOCS / "frontiers.svg")
        draw_readme(sources, DOCS / "tradeoff.svg")


if __name__ == "__main__":
    render()
