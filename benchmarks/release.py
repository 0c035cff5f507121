"""Measure the stages of a whole release, on one device beside another.

    python benchmarks/release.py PAIR --device cuda cpu

PAIR is a folder as real_model/pair.py lays one out. Each release is made in a process of its own,
its imports not counted: once with a gain that is searched for, and once with γ = 1, which leaves
the pass alone. With --robustness all that --robustness asks is evaluated too, and not the pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from streaming import machine, print_row

STAGES = ("calibrate", "sanitize", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pair", type=Path, metavar="PAIR")
    parser.add_argument("--device", nargs="+", default=["cpu"])
    parser.add_argument("--rows", type=int, metavar="N", help="of each set, at most")
    parser.add_argument("--robustness", action="store_true", help="evaluate that too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write times and figures")
    args = parser.parse_args()
    kinds = {"search": [], "pass": ["--gain", "1", "--generate-rows", "0"]}
    if args.robustness:
        kinds = {"robust": ["--robustness"]}
    print(json.dumps(machine(), indent=2))
    print_row("", *(f"{stage}, s" for stage in STAGES))
    found = []
    for device in args.device:
        for kind, options in kinds.items():
            report = release(args.pair, [*options, "--device", device], args.rows)
            found.append({"device": device, "kind": kind, "report": report})
            print_row(f"{device} {kind}", *(f"{report['seconds'][s]:.1f}" for s in STAGES))
            if args.json:  # as it comes
                made = {"machine": machine(), "runs": found}
                args.json.write_text(json.dumps(made, indent=1) + "\n")


def release(pair: Path, options: list[str], rows: int | None) -> dict[str, Any]:
    """The report of a release of `pair`, which is not kept; `rows` of each set, or all."""
    with tempfile.TemporaryDirectory() as scratch:
        words = ["sanitize", str(pair / "base"), str(pair / "unlearned"), *options]
        for name in ("retain", "forget", "heldout"):
            lines = (pair / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            some = Path(scratch, f"{name}.jsonl")
            some.write_text("\n".join(lines[:rows]), encoding="utf-8")
            words += [f"--{name}", str(some)]
        words += ["--no-chat-template", "--quiet", "--output", f"{scratch}/release"]
        command = [sys.executable, "-m", "sage_hub", *words]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit(status)
        found: dict[str, Any] = json.loads(Path(scratch, "release/sage/report.json").read_text())
    return found


if __name__ == "__main__":
    main()
