"""Measure wall time and peak memory of `sage-hub stats` against plain inference.

    python benchmarks/calibration.py --model /path/to/checkpoint --tokens 4000 16000

These run in turn, each in a process of its own, on the general-purpose proxy or on `--proxy`, with
the same rows in the same batches:

- forward: transformers loads the model whole and runs its decoder, nothing else;
- exact, sketch, rank 64: `sage-hub stats` with exact and sketched second moments, and with
  sketches for 64 directions per site; hashing the weights, decomposing and writing included;
- llm-compressor (`--peer PYTHON`): the Hessians that its GPTQ collects of every linear layer, by
  its own sequential pipeline in one pass; nothing is factorized, quantized or written;
- the import of each alone, to be subtracted.

Seconds are of the wall and of the processors; on a machine that others use too, the latter tell
more, with one thread (OMP_NUM_THREADS=1).

llm-compressor wants an older transformers, so it gets an environment of its own:

    python3 -m venv /tmp/peer-venv
    /tmp/peer-venv/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

`--llama GB` builds a random Llama checkpoint of that size in `--folder` and takes that.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streaming import HERE, Run, in_turn, machine, measure, print_row, profile

OPTIONS = {
    "exact": ["--moments", "exact"],
    "sketch": ["--moments", "sketch"],
    "rank 64": ["--moments", "sketch", "--rank", "64"],
}
LENGTH = 512  # of the longest row, in tokens
PEER = "llm-compressor"
IMPORTS = {"forward": "import forward", PEER: f"import {PEER}"}  # of all others: sage-hub's


@dataclass(frozen=True)
class Timed(Run):
    """A measured process, with the seconds that it took of all processors."""

    cpu: float


def timed(job: str, tokens: int, command: list[str]) -> Timed:
    """Run and measure `command`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak = measure(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timed(job, tokens, seconds, peak, cpu)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a checkpoint")
    source.add_argument("--llama", type=float, metavar="GB", help="a random Llama of that size")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000, 16_000], metavar="N")
    parser.add_argument("--proxy", type=Path, metavar="FILE", help="rows, if more are wanted")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--memory", type=float, default=8, metavar="GB", help="the budget")
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda; the peer takes its own")
    parser.add_argument("--peer", metavar="PYTHON", help=f"a python that has {PEER}")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "sage-llamas"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--profile", action="store_true", help="only show where the time goes")
    args = parser.parse_args()
    model = args.model or build(args.folder, args.llama)
    stats = ["stats", str(model.resolve()), "--quiet", "--max-length", str(LENGTH)]
    proxy = [str(args.proxy.resolve())] if args.proxy else []
    stats += [*(["--retain"] * len(proxy)), *proxy, "--memory", str(args.memory)]
    stats += ["--device", args.device, "--output"]
    runs: list[Timed] = []
    with tempfile.TemporaryDirectory(dir=args.folder if args.llama else None) as scratch:
        stats.append(f"{scratch}/statistics.safetensors")
        if args.profile:
            options = [*OPTIONS[args.only[0]], "--max-tokens", str(args.tokens[-1])]
            profile(*stats, *options)
            return
        sage_hub = [sys.executable, "-m", "sage_hub.cli.main", *stats]
        imports = {
            "import forward": [sys.executable, "-c", "from transformers import LlamaForCausalLM"],
            "import sage-hub": [sys.executable, "-c", "import sage_hub.commands.push"],
        }
        if args.peer:
            imports[IMPORTS[PEER]] = [
                args.peer,
                "-c",
                "import calibration; calibration.load_peer()",
            ]
        for job in in_turn(imports, args.repeats):
            runs.append(timed(job, 0, imports[job]))
        for tokens in args.tokens:
            jobs = {
                job: [*sage_hub, *OPTIONS[job], "--max-tokens", str(tokens)] for job in args.only
            }
            rows = f"{scratch}/rows.json"
            code = "import sys, calibration; calibration.write_rows(*sys.argv[1:])"
            measure([sys.executable, "-c", code, str(model.resolve()), str(tokens), rows, *proxy])
            code = "import sys, calibration; getattr(calibration, sys.argv[1])(*sys.argv[2:])"
            plain = ["forward", str(model.resolve()), rows, args.device]
            jobs["forward"] = [sys.executable, "-c", code, *plain]
            if args.peer:
                jobs[PEER] = [args.peer, "-c", code, "hessians", str(model.resolve()), rows]
            measure(jobs["forward"])  # warms the page cache
            for job in in_turn(jobs, args.repeats):
                run = timed(job, tokens, jobs[job])
                print(f"{job}: {run.seconds:.2f} s, {run.peak_mb:.0f} MB", file=sys.stderr)
                runs.append(run)
    about = machine() | {"device": args.device}
    print(json.dumps(about, indent=2))
    print_tables(runs, sum(f.stat().st_size for f in model.glob("*.safetensors")) / 1e6)
    if args.json:
        found = {"machine": about, "runs": [asdict(run) for run in runs]}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def build(folder: Path, size: float) -> Path:
    """A random Llama of `size` gigabytes in `folder`, made once."""
    pair = folder.resolve() / f"{size:g}GB"
    if not pair.exists():
        code = "import sys, streaming; streaming.build_checkpoints(sys.argv[1], float(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", code, str(pair), str(size)], cwd=HERE, check=True)
    return pair / "base"


def write_rows(model: str, tokens: str, file: str, proxy: str | None = None) -> None:
    """Write the batches that `sage-hub stats` runs into `file`: ids and mask of each."""
    from sage_hub.checkpoint.index import open_checkpoint
    from sage_hub.rows.encoding import batches, encoder_of, take_rows
    from sage_hub.rows.sources import read_proxy
    from sage_hub.settings import Settings

    settings = Settings(max_tokens=int(tokens), max_length=LENGTH)
    rows, _ = take_rows(read_proxy(proxy), encoder_of(open_checkpoint(model), settings), settings)
    made = [
        (batch.ids.tolist(), batch.mask.tolist()) for batch in batches(rows, settings.batch_size)
    ]
    Path(file).write_text(json.dumps(made))


def read_rows(file: str) -> list[dict[str, Any]]:
    """What `write_rows` wrote, as the arguments of a model."""
    import torch

    names = "input_ids", "attention_mask"
    batches = json.loads(Path(file).read_text())
    return [dict(zip(names, map(torch.tensor, batch), strict=True)) for batch in batches]


def forward(model: str, rows: str, device: str) -> None:
    """Run the decoder of `model` on `device`, on the rows that `sage-hub stats` takes."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
    decoder = whole.get_decoder()
    with torch.inference_mode():
        for batch in read_rows(rows):
            decoder(**{name: one.to(device) for name, one in batch.items()}, use_cache=False)
    if device != "cpu":
        torch.accelerator.synchronize()  # its work is not done when the last call is


def load_peer() -> Any:
    """llm-compressor's GPTQ, which drops the Hessians of a layer instead of using them."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import LlamaForCausalLM  # noqa: F401 - to be counted as import

    class Collect(GPTQModifier):
        def compress_module_list(self, module_list: list[Any]) -> None:
            for module in module_list:
                tokens, hessian = self._num_samples.pop(module), self._hessians.pop(module)
                assert tokens > 0
                assert hessian.diagonal().sum() > 0

    return Collect


def hessians(model: str, rows: str) -> None:
    """Collect the Hessians of every linear layer but the head, on the same rows."""
    collect = load_peer()
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    weights = QuantizationArgs(num_bits=8, strategy="channel")  # any that fits all widths
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval(),
        dataset=DataLoader(read_rows(rows), batch_size=None),
        recipe=[collect(config_groups={"all": scheme}, ignore=["lm_head"])],
        pipeline="sequential",
        propagate_error=False,  # or every layer would run twice
    )


def print_tables(runs: list[Timed], megabytes: float) -> None:
    """Medians per number of tokens, against the plain forward pass and the size of the model."""
    middle = {
        key: [
            statistics.median(getattr(run, what) for run in runs if (run.job, run.size) == key)
            for what in ("seconds", "cpu", "peak_mb")
        ]
        for key in dict.fromkeys((run.job, run.size) for run in runs)
    }

    def above_import(job: str, tokens: float) -> list[float]:
        own = middle[IMPORTS.get(job, "import sage-hub"), 0]
        return [all_in - of for all_in, of in zip(middle[job, tokens], own, strict=True)]

    for tokens in sorted({size for _, size in middle}):
        print(f"\n{tokens:.0f} tokens" if tokens else "\nimports")
        print_row("", "wall s", "× forward", "cpu s", "× forward", "peak MB", "× model")
        for job in (job for job, of in middle if of == tokens):
            if not tokens:
                wall, cpu, peak = middle[job, tokens]
                print_row(job, f"{wall:.2f}", "", f"{cpu:.2f}", "", f"{peak:.0f}")
                continue
            (wall, cpu, peak), plain = above_import(job, tokens), above_import("forward", tokens)
            print_row(
                job,
                f"{wall:.2f}",
                f"{wall / plain[0]:.2f}",
                f"{cpu:.2f}",
                f"{cpu / plain[1]:.2f}",
                f"{peak:.0f}",
                f"{peak / megabytes:.2f}",
            )
        if tokens and (PEER, tokens) not in middle:
            print_row(PEER, "not run", "(no --peer)")
    print("\nImports are taken off from all that is measured with tokens.")


if __name__ == "__main__":
    main()
