"""Hold a release made on a device against the method on whole models in float64.

    python benchmarks/reference.py PAIR --device cuda cpu

PAIR is a folder as real_model/pair.py lays one out. What a release misses is its distance from the
reference of tests/support, in parts of what the filter does: in float32 no more than the tests
allow, or this ends with status 1; in the stored type, in which models are run by default, as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from streaming import print_row
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sage_hub.cli.main import main as sage_hub

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.checkpoints import load_weights
from support.reference import sanitized_reference

HOW = {"strength": 10, "energy": 0.9, "gain": 1}
ALLOWED = 1e-4  # of tests/model/test_compute.py


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pair", type=Path, metavar="PAIR")
    parser.add_argument("--device", nargs="+", default=["cpu"])
    parser.add_argument("--rows", type=int, default=24, metavar="N", help="of the retain proxy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    args = parser.parse_args()
    disable_progress_bar()
    lines = (args.pair / "retain.jsonl").read_text(encoding="utf-8").splitlines()[: args.rows]
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        retain = Path(scratch, "retain.jsonl")
        retain.write_text("\n".join(lines), encoding="utf-8")
        wide = [widened(args.pair / side, Path(scratch, side)) for side in ("base", "unlearned")]
        rows = [json.loads(line) for line in lines]
        expected = sanitized_reference(*wide, rows, **HOW, shares={})
        source = load_weights(wide[1])
        stored = str(next(iter(load_weights(args.pair / "base").values())).dtype)
        types = dict.fromkeys(["float32", stored.removeprefix("torch.")])
        print_row("", "missed", "largest error")
        for device, dtype in itertools.product(args.device, types):
            out = Path(scratch, f"{device}-{dtype}".replace(":", "-"))
            release(args.pair, retain, out, device, dtype)
            made = load_weights(out)
            missed = apart(made, expected) / apart(source, expected)
            largest = max(float((made[n].double() - t).abs().max()) for n, t in expected.items())
            print_row(f"{device} {dtype}", f"{missed:.1e}", f"{largest:.1e}")
            found.append({"device": device, "dtype": dtype, "missed": missed, "largest": largest})
    if args.json:
        args.json.write_text(json.dumps({"rows": len(rows), "found": found}, indent=2) + "\n")
    worst = max(one["missed"] for one in found if one["dtype"] == "float32")
    if not worst < ALLOWED:  # NaN passes nothing
        sys.exit(f"float32 misses the reference by {worst:.1e}; {ALLOWED:g} is allowed")
    print(f"float32 misses the reference by {worst:.1e} at most; {ALLOWED:g} is allowed")


def widened(side: Path, to: Path) -> Path:
    """The same numbers in float32, for the reference to run in that."""
    AutoModelForCausalLM.from_pretrained(side, dtype=torch.float32).save_pretrained(to)
    AutoTokenizer.from_pretrained(side).save_pretrained(to)
    return to


def release(pair: Path, retain: Path, out: Path, device: str, dtype: str) -> None:
    """Write the release `out`, stored in float32; nothing but the retain proxy is evaluated."""
    words = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--retain", str(retain)]
    words += [word for name, value in HOW.items() for word in (f"--{name}", str(value))]
    words += ["--device", device, "--compute-dtype", dtype, "--out-dtype", "float32"]
    words += ["--no-chat-template", "--generate-rows", "0", "--output", str(out), "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = sage_hub(words)
    if status:
        sys.exit(status)


def apart(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The distance of all tensors together, in float64."""
    return math.hypot(*(float((weights[n].double() - t).norm()) for n, t in expected.items()))


if __name__ == "__main__":
    main()
