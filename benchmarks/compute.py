"""Measure what running a model takes in each type, and which one is chosen on this machine.

    python benchmarks/compute.py --model /path/to/checkpoint --tokens 383 --rank 16

`sage-hub stats` on the general-purpose proxy, in float32 and in the type that the model is stored
in, in turn, each in a process of its own, hashing and imports included. The ratio is of one run.

A machine with AVX2 alone can be imitated on a newer one: the libraries then take the kernels that
they would take there, though a real one is slower in both types:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python …
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from calibration import timed
from streaming import machine, print_row

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.model.compute import compute_type, name_of, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=383)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    stored = open_checkpoint(args.model).architecture.dtype
    types = list(dict.fromkeys(["float32", name_of(stored)]))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in types}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.repeats):
            for name in types:
                out = Path(scratch, "statistics.safetensors")
                words = [sys.executable, "-m", "sage_hub", "stats", args.model, "--quiet"]
                words += ["--max-tokens", str(args.tokens), "--compute-dtype", name]
                words += ["--device", args.device, "--output", str(out)]
                words += ["--rank", str(args.rank)] if args.rank else []
                done = timed(name, args.tokens, words)
                runs[name].append((done.seconds, done.cpu))
                out.unlink()
    print(machine())
    chosen = name_of(compute_type("auto", stored, args.device))
    print(f"stored in {name_of(stored)}; --compute-dtype auto takes {chosen} on {args.device}")
    print_row("type", "CPU products, ms", "wall, s", "processor, s", "x float32")
    first = statistics.median(wall for wall, _ in runs["float32"])
    for name, own in runs.items():
        wall, cpu = (statistics.median(part) for part in zip(*own, strict=True))
        probe = 1e3 * seconds(compute_type(name, stored, "cpu"))
        print_row(name, f"{probe:.2f}", f"{wall:.1f}", f"{cpu:.1f}", f"{wall / first:.2f}")


if __name__ == "__main__":
    main()
