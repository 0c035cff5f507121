"""From the kept points to results.json, and from that to the tables and the figure of the docs.

    python benchmarks/real_model/report.py

Tables go between the marks `<!-- NAME -->` and `<!-- /NAME -->` of docs/results.md. With --cache
the points of another run, whole or not, are gathered, and its main tables printed:

    python benchmarks/real_model/report.py --cache DIR --size full --results FILE
"""

from __future__ import annotations

import argparse
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
RESULTS = HERE / "results.json"
SHOWN = ("sources", "recovered", "recovered-source")


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


def main() -> None:
    """Renew the docs, or show what another run has found so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of a run")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="where its points are gathered"
    )
    options = parser.parse_args()
    if options.cache is None or options.results is None:
        render(json.loads(RESULTS.read_text()))
        return
    write(options.cache, options.size, options.results)
    found = json.loads(options.results.read_text())
    sources = read_sources(found)
    for name in SHOWN if sources else ():
        print(f"{name}\n\n{TABLES[name](found, sources)}\n")
    print(f"{len(found['points'])} points of {len(sources)} sources")


if __name__ == "__main__":
    main()
