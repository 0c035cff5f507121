"""Lay out one source of the benchmark as sage-hub takes it: two checkpoints, three sets of rows.

    python benchmarks/real_model/pair.py DIR --tofu DIR --method NPO

DIR/base and DIR/unlearned are links to what is kept in --cache, as run.py makes and keeps it;
retain.jsonl, forget.jsonl and heldout.jsonl are the rows of the seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from build import METHODS, Workshop
from data import MAIN, SIZES

from sage_hub.rows.proxies import Proxy


def main() -> None:
    """Make what is missing, and lay all of it out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tofu", help="folder of TOFU's files; without it they come from the Hub")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sage-hub-benchmark")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, default="NPO")
    parser.add_argument("--level", choices=["strong", "mild", "collapsed"], default="strong")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    size = SIZES[options.size]
    shop = Workshop(options.cache.resolve(), size, options.seed, options.tofu, device, say)
    lay_out(shop, options.method, options.level, options.folder)


def lay_out(shop: Workshop, method: str, level: str, folder: Path) -> None:
    """Fill `folder` with links to both sides, and with the sets."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in {"base": shop.base, "unlearned": shop.source(method, level)}.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(side.resolve(), target_is_directory=True)
    rows = shop.rows
    sets = {"retain": rows.proxies[MAIN], "forget": rows.forget, "heldout": rows.heldout}
    for name, proxy in sets.items():
        (folder / f"{name}.jsonl").write_text(_lines(proxy), encoding="utf-8")


def _lines(proxy: Proxy) -> str:
    asked = [{"question": row.turns[0][1], "answer": row.answer.strip()} for row in proxy.rows]
    return "".join(json.dumps(row) + "\n" for row in asked)


if __name__ == "__main__":
    main()
