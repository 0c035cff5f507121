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

from figure import draw, draw_readme
from points import gather, read_sources
from tables import TABLES

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
RESULTS = HERE / "results.json"


def write(cache: Path, size: str, results: Path = RESULTS) -> None:
    """Gather the points in `cache` into `results`, and renew the docs if they are of that size."""
    found = gather(cache, size)
    results.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    if results == RESULTS:
        render(found)


def render(results: Mapping[str, Any], page: Path = DOCS / "results.md") -> None:
    """Renew the tables of `page` and its figure."""
    sources = read_sources(results)
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n\n{table(results, sources)}\n\n<!-- /{name} -->"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        text = pattern.sub(lambda _, block=block: block, text)
    page.write_text(text, encoding="utf-8")
    draw(sources, DOCS / "frontiers.svg")
    draw_readme(sources, DOCS / "tradeoff.svg")


if __name__ == "__main__":
    render(json.loads(RESULTS.read_text()))
