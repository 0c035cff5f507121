"""Measure wall time and peak memory of `sage-hub stats` against plain inference.

    python benchmarks/calibration.py --model /path/to/checkpoint --tokens 4000 16000

These run in turn, each in a process of its own, on the general-purpose proxy, with the same rows in
the same batches:

- forward: transformers loads the model whole and runs its decoder, nothing else;
- exact, sketch, rank 64: `sage-hub stats` with exact and sketched second moments, and with
  sketches for 64 directions per site; hashing the weights, decomposing and writing included;
- the import of each alone, to be subtracted.

`--llama GB` builds a random Llama checkpoint of that size in `--folder` and takes that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from streaming import HERE, Run, in_turn, machine, measure, print_row, profile

OPTIONS = {
    "exact": ["--moments", "exact"],
    "sketch": ["--moments", "sketch"],
    "rank 64": ["--moments", "sketch", "--rank", "64"],
}
LENGTH = 512  # of the longest row, in tokens


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a checkpoint")
    source.add_argument("--llama", type=float, metavar="GB", help="a random Llama of that size")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000, 16_000], metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--memory", type=float, default=8, metavar="GB", help="the budget")
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "sage-llamas"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--profile", action="store_true", help="only show where the time goes")
    args = parser.parse_args()
    model = args.model or build(args.folder, args.llama)
    stats = ["stats", str(model.resolve()), "--quiet", "--max-length", str(LENGTH)]
    stats += ["--memory", str(args.memory), "--output"]
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=args.folder if args.llama else None) as scratch:
        stats.append(f"{scratch}/statistics.safetensors")
        if args.profile:
            options = [*OPTIONS[args.only[0]], "--max-tokens", str(args.tokens[-1])]
            profile(*stats, *options)
            return
        sage_hub = [sys.executable, "-m", "sage_hub.cli", *stats]
        imports = {
            "import forward": [sys.executable, "-c", "from transformers import LlamaForCausalLM"],
            "import sage-hub": [sys.executable, "-c", "import sage_hub.release"],
        }
        for job in in_turn(imports, args.repeats):
            runs.append(Run(job, 0, *measure(imports[job])))
        for tokens in args.tokens:
            jobs = {
                job: [*sage_hub, *OPTIONS[job], "--max-tokens", str(tokens)] for job in args.only
            }
            code = "import sys, calibration; calibration.forward(sys.argv[1], int(sys.argv[2]))"
            jobs["forward"] = [sys.executable, "-c", code, str(model.resolve()), str(tokens)]
            measure(jobs["forward"])  # warms the page cache
            for job in in_turn(jobs, args.repeats):
                run = Run(job, tokens, *measure(jobs[job]))
                print(f"{job}: {run.seconds:.2f} s, {run.peak_mb:.0f} MB", file=sys.stderr)
                runs.append(run)
    print(json.dumps(machine(), indent=2))
    print_tables(runs, sum(f.stat().st_size for f in model.glob("*.safetensors")) / 1e6)
    if args.json:
        found = {"machine": machine(), "runs": [asdict(run) for run in runs]}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def build(folder: Path, size: float) -> Path:
    """A random Llama of `size` gigabytes in `folder`, made once."""
    pair = folder.resolve() / f"{size:g}GB"
    if not pair.exists():
        code = "import sys, streaming; streaming.build_checkpoints(sys.argv[1], float(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", code, str(pair), str(size)], cwd=HERE, check=True)
    return pair / "base"


def forward(model: str, tokens: int) -> None:
    """Run the decoder of `model` on the rows that `sage-hub stats` takes."""
    import torch
    from transformers import AutoModelForCausalLM

    from sage_hub.checkpoint import open_checkpoint
    from sage_hub.encoding import batches, encode, load_tokenizer, row_limit, take_tokens
    from sage_hub.proxies import read_proxy

    checkpoint = open_checkpoint(model)
    length = row_limit(checkpoint, LENGTH)
    rows = encode(
        read_proxy(None), load_tokenizer(checkpoint), chat_template=True, max_length=length
    )
    used = [rows[place] for place in take_tokens(rows, tokens, seed=0)]
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval().get_decoder()
    with torch.inference_mode():
        for batch in batches(used, 8):
            decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


def print_tables(runs: list[Run], megabytes: float) -> None:
    """Medians per number of tokens, against the plain forward pass and the size of the model."""
    middle = {
        key: (
            statistics.median(r.seconds for r in runs if (r.job, r.size) == key),
            statistics.median(r.peak_mb for r in runs if (r.job, r.size) == key),
        )
        for key in dict.fromkeys((run.job, run.size) for run in runs)
    }
    for tokens in sorted({size for _, size in middle}):
        print(f"\n{tokens:.0f} tokens" if tokens else "\nimports")
        print_row("", "wall s", "− import", "× forward", "peak MB", "− import", "× model")
        plain = middle.get(("forward", tokens), (0.0, 0.0))[0] - middle["import forward", 0][0]
        for job in (job for job, of in middle if of == tokens):
            wall, peak = middle[job, tokens]
            if not tokens:
                print_row(job, f"{wall:.2f}", "", "", f"{peak:.0f}")
                continue
            own = middle["import forward" if job == "forward" else "import sage-hub", 0]
            print_row(
                job,
                f"{wall:.2f}",
                f"{wall - own[0]:.2f}",
                f"{(wall - own[0]) / plain:.2f}",
                f"{peak:.0f}",
                f"{peak - own[1]:.0f}",
                f"{(peak - own[1]) / megabytes:.2f}",
            )


if __name__ == "__main__":
    main()
