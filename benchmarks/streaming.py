"""Measure wall time and peak memory of `sage-hub sanitize` against a plain copy and mergekit.

    python benchmarks/streaming.py --folder /tmp/pairs --mergekit /tmp/mergekit-venv/bin/python

Pairs of random Llama checkpoints are built once, a shard at a time. Then these run in turn, each
in a process of its own, on a warm page cache:

- copy: reads both sides whole and writes one, in blocks of 4 MB, every file synced to disk;
- sage-hub: the whole command, with ready statistics and no proxies, so nothing is evaluated; it
  also hashes and checks both sides, syncs every file, and writes the card and the record;
- mergekit: task_arithmetic to bfloat16, in shards of the pair's size, without tokenizer and card;
  it does not sync;
- the import of each tool alone, to be subtracted.

mergekit gets an environment of its own (with transformers 5 it fails in pydantic):

    python3 -m venv /tmp/mergekit-venv
    /tmp/mergekit-venv/bin/pip install torch==2.13.0 mergekit==0.1.4 'transformers<5'

This process imports the standard library only, and functions that need more run in children:
Linux counts the memory of the parent into the peak of a child.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARD_BYTES = 50_000_000
BLOCK_BYTES = 4_000_000
VOCABULARY = 8_192  # small, because embeddings are only copied
HEAD = 128
IMPORTS = {"sage-hub": "import sage-hub", "mergekit": "import mergekit"}


@dataclass(frozen=True)
class Run:
    """One measured process."""

    job: str
    size: float  # GB of one side, or tokens; 0 for an import
    seconds: float
    peak_mb: float


def main() -> None:
    """Build, measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4], metavar="GB")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--rank", type=int, default=64, metavar="K", help="directions per site")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "sage-pairs"))
    parser.add_argument("--device", default="cpu", help="of sage-hub: cpu or cuda")
    parser.add_argument("--mergekit", metavar="PYTHON", help="a python that has mergekit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--profile", action="store_true", help="only show where the time goes")
    args = parser.parse_args()
    pairs = [args.folder.resolve() / f"{size:g}GB" for size in args.gigabytes]
    for pair, size in zip(pairs, args.gigabytes, strict=True):
        if not pair.exists():
            subprocess.run(own(build_checkpoints, str(pair), size), cwd=HERE, check=True)
        subprocess.run(own(build_statistics, str(pair), args.rank), cwd=HERE, check=True)
    if args.profile:
        for pair in pairs:
            subprocess.run(own(profile, *sanitize(pair, args.device)), cwd=HERE, check=True)
            remove_output(pair)
        return
    runs = list(measure_all(pairs, args.repeats, args.device, args.mergekit))
    print_tables(pairs, runs, args.rank)
    if args.json:
        asked = {"rank": args.rank, "shard_bytes": SHARD_BYTES, "device": args.device}
        content = {**asked, "machine": machine(), "runs": [asdict(run) for run in runs]}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build_checkpoints(pair: str, gigabytes: float) -> None:
    """Write base, and unlearned = base + noise on the linear weights, a shard at a time."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    config = llama_config(gigabytes * 1e9)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(2 * tensors[n].numel() for n in (*shards[-1], name)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    total = sum(2 * tensor.numel() for tensor in tensors.values())

    partial = Path(f"{pair}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for side in ("base", "unlearned"):
        config.save_pretrained(partial / side)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
        tokenizer.save_pretrained(partial / side)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / side / "model.safetensors.index.json").write_text(json.dumps(index))
    generator = torch.Generator().manual_seed(0)

    def noise(name: str, size: float) -> torch.Tensor:
        empty = torch.empty(tensors[name].shape, dtype=torch.bfloat16)
        return empty.normal_(0, size, generator=generator)

    for file, names in zip(files, shards, strict=True):
        weights = {name: noise(name, 0.02) for name in names}
        save_file(weights, partial / "base" / file, {"format": "pt"})
        for name in names:
            if name.endswith("_proj.weight"):
                weights[name] += noise(name, 0.001)
        save_file(weights, partial / "unlearned" / file, {"format": "pt"})
    partial.rename(pair)


def llama_config(size: float) -> Any:
    """The config of a Llama of about `size` bytes in bfloat16, in the usual proportions."""
    from transformers import LlamaConfig

    # A layer has 12 hidden² weights of 2 bytes, and there are about hidden / 128 layers.
    hidden = HEAD * max(1, round((size * 128 / 24) ** (1 / 3) / HEAD))
    intermediate = HEAD * round(hidden * 8 / 3 / HEAD)
    layer = 2 * (4 * hidden**2 + 3 * hidden * intermediate)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=max(1, round((size - 4 * VOCABULARY * hidden) / layer)),
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_statistics(pair: str, rank: int) -> None:
    """Write statistics of the base with `rank` random orthonormal directions at every site.

    What this benchmark knows of the inside of sage-hub is all here.
    """
    import torch

    from sage_hub.calibration.journal import Journal, journal_of
    from sage_hub.calibration.statistics import Origin, write_statistics
    from sage_hub.checkpoint.index import open_checkpoint
    from sage_hub.method.spectra import Spectrum
    from sage_hub.model.sites import find_sites
    from sage_hub.rows.sources import read_proxy
    from sage_hub.settings import Settings

    base, energy = open_checkpoint(f"{pair}/base"), Settings().sharpness[1]
    sites = [site for site in find_sites(base.empty_model()) if not site.expert]
    used = {"rows_used": 0, "tokens_used": 0, "rows_truncated": 0, "row_hashes": []}
    origin = Origin(
        model=base.name,
        commit=base.commit,
        weights=base.fingerprint(),
        tokenizer=base.tokenizer_fingerprint(),
        data={"retain": {**read_proxy(None).describe(), **used, "name": "random directions"}},
        settings={"energy": energy, "rank": None},
    )
    path = Path(pair, "statistics.safetensors")
    with Journal(journal_of(path), "random") as journal:
        for site in sites:
            basis = torch.linalg.qr(torch.randn(site.size, min(rank, site.size))).Q.T.contiguous()
            values = 1 / torch.arange(1, len(basis) + 1, dtype=torch.float64)
            # The last direction is needed to hold the filter's share of the energy.
            found = Spectrum(basis, values, float(values.sum()) / energy, 1)
            journal.add(f"retain/{site.name}", found, dict.fromkeys(site.modules, 1.0))
        journal.finish_block({})
        write_statistics(path, origin, sites, journal)
        journal.remove()


def measure_all(
    pairs: list[Path], repeats: int, device: str, mergekit: str | None
) -> Iterator[Run]:
    """Measure every job `repeats` times; in each round another one comes first."""
    imports = {IMPORTS["sage-hub"]: [sys.executable, "-c", "import sage_hub.commands.push"]}
    if mergekit:
        imports[IMPORTS["mergekit"]] = [mergekit, "-c", "import mergekit.scripts.run_yaml"]
    for job in in_turn(imports, repeats):
        yield Run(job, 0, *measure(imports[job]))
    for pair in pairs:
        jobs = {
            "copy": own(copy, str(pair)),
            "sage-hub": [sys.executable, "-m", "sage_hub.cli.main", *sanitize(pair, device)],
        }
        if mergekit:
            jobs["mergekit"] = merge(mergekit, pair)
        remove_output(pair)
        measure(jobs["copy"])  # warms the page cache
        for job in in_turn(jobs, repeats):
            remove_output(pair)
            run = Run(job, gigabytes(pair / "unlearned"), *measure(jobs[job]))
            print(f"{job}: {run.seconds:.2f} s, {run.peak_mb:.0f} MB", file=sys.stderr)
            check_output(job, pair)
            yield run
        remove_output(pair)


def in_turn(jobs: dict[str, list[str]], repeats: int) -> Iterator[str]:
    """The names of `jobs` in every round, each time from the next one on."""
    names = list(jobs)
    for turn in range(repeats):
        start = turn % len(names)
        yield from names[start:] + names[:start]


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident memory in MB of `command`. Ends all if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed ({process.returncode}):\n{log.read()[-4000:]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def own(function: Callable[..., None], *arguments: object) -> list[str]:
    """The command that calls a function of this file in a process of its own."""
    code = "import json, sys, streaming; getattr(streaming, sys.argv[1])(*json.loads(sys.argv[2]))"
    return [sys.executable, "-c", code, function.__name__, json.dumps(arguments)]


def copy(pair: str) -> None:
    """Read all of both sides and write the second: the least that any such tool has to do."""
    Path(pair, "output").mkdir()
    for source in sorted(Path(pair, "unlearned").glob("*.safetensors")):
        with Path(pair, "base", source.name).open("rb", buffering=0) as base:
            while base.read(BLOCK_BYTES):
                pass
        with source.open("rb") as read, Path(pair, "output", source.name).open("wb") as written:
            shutil.copyfileobj(read, written, BLOCK_BYTES)
            written.flush()
            os.fsync(written.fileno())


def sanitize(pair: Path, device: str) -> list[str]:
    """The arguments of sage-hub: its defaults, with the statistics that were built."""
    options = ["--output", f"{pair}/output", "--stats", f"{pair}/statistics.safetensors"]
    sides = [f"{pair}/base", f"{pair}/unlearned"]
    return ["sanitize", *sides, *options, "--gain", "1", "--device", device, "--quiet"]


def merge(python: str, pair: Path) -> list[str]:
    """The nearest thing that mergekit does: base + ½ (unlearned − base), tensor by tensor."""
    config = {
        "merge_method": "task_arithmetic",
        "base_model": f"{pair}/base",
        "models": [{"model": f"{pair}/unlearned", "parameters": {"weight": 0.5}}],
        "dtype": "bfloat16",
    }
    (pair / "mergekit.yaml").write_text(json.dumps(config))  # JSON is YAML
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    options += ["--out-shard-size", str(SHARD_BYTES)]
    program = Path(python).with_name("mergekit-yaml")
    return [str(program), f"{pair}/mergekit.yaml", f"{pair}/output", *options]


def profile(*arguments: str) -> None:
    """Run sage-hub under the profiler and print what took longest.

    Only the main thread is seen; what others do shows as waiting for a lock.
    """
    import cProfile
    import pstats

    from sage_hub.cli.main import main as sage_hub

    profiler = cProfile.Profile()
    if status := profiler.runcall(sage_hub, arguments):
        sys.exit(status)
    found = pstats.Stats(profiler)
    found.sort_stats("cumtime").print_stats("sage_hub/", 20)
    found.strip_dirs().sort_stats("tottime").print_stats(20)


def remove_output(pair: Path) -> None:
    """Leave neither files nor unwritten pages to the next run."""
    shutil.rmtree(pair / "output", ignore_errors=True)
    os.sync()


def check_output(job: str, pair: Path) -> None:
    """End all if `job` did less than it was measured for."""
    expected, found = gigabytes(pair / "unlearned"), gigabytes(pair / "output")
    if abs(found - expected) > 0.01 * expected:
        sys.exit(f"{job} wrote {found:.3f} GB of weights, not {expected:.3f}.")
    if job == "sage-hub":
        counts = json.loads((pair / "output/sage/manifest.json").read_text())["counts"]
        layers = json.loads((pair / "base/config.json").read_text())["num_hidden_layers"]
        if counts["filtered"] != 7 * layers:
            sys.exit(f"sage-hub filtered {counts['filtered']} weights, not {7 * layers}.")


def gigabytes(folder: Path) -> float:
    """The weights in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def print_tables(pairs: list[Path], runs: list[Run], rank: int) -> None:
    """Medians per size, then each job against size."""
    middle: dict[tuple[str, float], tuple[float, float]] = {}
    for key in dict.fromkeys((run.job, run.size) for run in runs):
        here = [run for run in runs if (run.job, run.size) == key]
        times, peaks = [run.seconds for run in here], [run.peak_mb for run in here]
        middle[key] = statistics.median(times), statistics.median(peaks)
    head = ("wall s", "(min–max)", "× copy", "× mergekit", "peak MB", "− import", "× mergekit")
    for size in (0.0, *(gigabytes(pair / "unlearned") for pair in pairs)):
        print(f"\n{size:.2f} GB a side, {rank} directions per site" if size else "\nimports")
        print_row("", *head)
        for job in (job for job, of in middle if of == size):
            wall, peak = middle[job, size]
            times = [run.seconds for run in runs if (run.job, run.size) == (job, size)]
            copied, merged = (middle.get((other, size), (0, 0)) for other in ("copy", "mergekit"))
            imported = middle.get((IMPORTS.get(job, ""), 0))
            print_row(
                job,
                f"{wall:.2f}",
                f"({min(times):.2f}–{max(times):.2f})",
                f"{wall / copied[0]:.2f}" if copied[0] else "",
                f"{wall / merged[0]:.2f}" if merged[0] else "",
                f"{peak:.0f}",
                f"{peak - imported[1]:.0f}" if imported else "",
                f"{peak / merged[1]:.2f}" if merged[1] else "",
            )
        if size and ("mergekit", size) not in middle:
            print_row("mergekit", "not run", "(no --mergekit)")
    sizes = [size for _, size in middle if size]
    small, large = min(sizes), max(sizes)
    if small < large:
        print(f"\nfrom {small:.2f} to {large:.2f} GB a side")
        print_row("", "s per GB", "wall ×", "peak MB ×")
        for job in (job for job, of in middle if of == small):
            (before, less), (after, more) = middle[job, small], middle[job, large]
            slope = (after - before) / (large - small)
            print_row(job, f"{slope:.2f}", f"{after / before:.2f}", f"{more / less:.2f}")


def print_row(job: str, *cells: str) -> None:
    print(f"{job:16}" + "".join(f"{cell:>15}" for cell in cells))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    code = "import json, torch; print(json.dumps([torch.__version__, torch.get_num_threads()]))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    torch_version, threads = json.loads(asked.stdout)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch_version,
        "threads": threads,
    }


if __name__ == "__main__":
    main()
