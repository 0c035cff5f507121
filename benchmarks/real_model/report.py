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
FIRST = "cpu"  # the size that most of the page is about
SHOWN = ("sources", "recovered", "recovered-source")


def results_of(size: str) -> Path:
    """The file with the results of a size."""
    return HERE / ("results.json" if size == FIRST else f"results-{size}.json")


def write(cache: Path, size: str, results: Path) -> None:
    """Gather the points in `cache` into `results`, and renew the docs if they are its source."""
    known = json.loads(results.read_text())["sources"] if results.is_file() else []
    found = gather(cache, size, known)
    results.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    if results.resolve() == results_of(size):
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


def main() -> None:
    """Renew the docs, or show what another run has found so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of a run")
    parser.add_argument("--size", choices=SIZES, default=FIRST)
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="where its points are gathered"
    )
    options = parser.parse_args()
    if options.cache is None or options.results is None:
        render()
        return
    write(options.cache, options.size, options.results)
    found = json.loads(options.results.read_text())
    sources = read_sources(found)
    for name in SHOWN if sources else ():
        print(f"{name}\n\n{TABLES[name](found, sources)}\n")
    print(f"{len(found['points'])} points of {len(sources)} sources")


if __name__ == "__main__":
    main()
