"""What lies beside the weights: which files come along with a release, and which stay behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.files import read_json
from sage_hub.checkpoint.index import INDEX, PICKLES, SINGLE, Checkpoint
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.repair.plan import Plan

OTHER_WEIGHTS = (
    ".safetensors",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".npz",
    ".mlpackage",
    ".ot",
)
DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
# What training frameworks leave beside a model. Scores there are the source's.
TRAINING = re.compile(
    r"(runs|logs|wandb|checkpoint-\d+|global_step\d+)/|.*\.tfevents\.|.*\.log$"
    r"|(.*/)?(trainer_state|trainer_log)\.jsonl?$"
)
RESULTS = re.compile(
    r"evals?/|(.*/)?([A-Z]+_(EVAL|SUMMARY)|(all|train|eval)_results|results_[^/]*)\.json$"
)


def sort_files(unlearned: Checkpoint) -> tuple[tuple[str, ...], dict[str, str]]:
    carried, left_behind = [], {}
    for name in sorted(unlearned.files.sizes):
        if name in unlearned.headers or name in (INDEX, "README.md", ".gitattributes"):
            continue  # written anew, or the Hub's own
        if name.startswith("sage/"):
            left_behind[name] = "the record of an earlier release"
        elif name.endswith(PICKLES):
            left_behind[name] = "a pickle"
        elif name.endswith(OTHER_WEIGHTS) or name.endswith(".safetensors.index.json"):
            left_behind[name] = "weights that were not sanitized"
        elif any(part.startswith(".") for part in name.split("/")):
            left_behind[name] = "a hidden file"  # .env and its like hold tokens
        elif name == "sage.yaml":
            left_behind[name] = "settings of this run"
        elif name.endswith(DATA):
            left_behind[name] = "data, not the model"  # it may be what had to be forgotten
        elif TRAINING.match(name):
            left_behind[name] = "of the training, not of the model"
        elif RESULTS.match(name):
            left_behind[name] = "results of another model than the release"
        else:
            carried.append(name)
    return tuple(carried), left_behind


def carry_files(plan: Plan, folder: Path, dtype: str | None = None) -> dict[str, str]:
    """Copy everything of the unlearned side that comes along verbatim; return their SHA-256.

    If the weights are stored as another `dtype`, config.json says so.
    """
    hashes = {}
    for name in plan.carried:
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.unlearned.files.path(name), destination)
        if name == "config.json" and dtype is not None:
            config = _with_dtype(plan.unlearned.config, dtype)
            destination.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        hashes[name] = file_sha256(destination)
    return hashes


def write_index(plan: Plan, folder: Path) -> dict[str, str]:
    """Write the index of the shards into `folder`, if there is to be one; its name and SHA-256."""
    unlearned = plan.unlearned
    if SINGLE in unlearned.shards or INDEX not in unlearned.files.sizes:
        return {}
    metadata: dict[str, Any] = dict(read_json(unlearned.files, INDEX).get("metadata") or {})
    metadata["total_size"] = sum(
        info.nbytes for shard in unlearned.shards for info in plan.layout(shard).values()
    )
    index = {"metadata": metadata, "weight_map": dict(sorted(unlearned.shard_of.items()))}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    return {INDEX: file_sha256(folder / INDEX)}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A model's config with its type changed, wherever it is stated, or stated on top."""

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        return {
            key: dtype
            if key in ("dtype", "torch_dtype")
            else (changed(value) if isinstance(value, dict) else value)
            for key, value in part.items()
        }

    return changed({"dtype": dtype, **config})
