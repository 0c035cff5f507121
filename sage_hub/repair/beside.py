"""What lies beside the weights: which files come along with a release, and which stay behind.

Nothing comes along unasked but what is known to belong to a model.
"""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.files import read_json
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.layouts import INDEX, PICKLES, SINGLE
from sage_hub.checkpoint.tensorfile import file_sha256
from sage_hub.errors import CorruptCheckpointError, SageHubError, UsageError
from sage_hub.evaluation.answers import stays_here
from sage_hub.repair.belongs import belongs, code_of
from sage_hub.repair.plan import UNKNOWN, Plan

OTHER_WEIGHTS = (
    *(".safetensors", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx"),
    *(".onnx_data", ".tflite", ".npz", ".npy", ".mlpackage", ".mlmodel", ".ot", ".pb"),
    *(".distcp", ".nemo", ".engine", ".index.json"),
)
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".lz4")
DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
# What training frameworks leave beside a model. Scores there are the source's.
TRAINING = re.compile(
    r"(runs|logs|wandb|checkpoint-\d+|global_step\d+)/|.*\.tfevents\.|.*\.log$"
    r"|(.*/)?(trainer_state|trainer_log)\.jsonl?$"
)
RESULTS = re.compile(
    r"evals?/|(.*/)?([A-Z]+_(EVAL|SUMMARY)|(all|train|eval)_results|results_[^/]*)\.json$"
)
PATH = re.compile(r"[/~\\]|\.{1,2}/|[A-Za-z]:[/\\]")  # of a machine; no repo begins so
PICKLE, WEIGHTS, ARCHIVE = "a pickle", "weights that were not sanitized", "an archive"
RECORD, HIDDEN = "the record of an earlier release", "a hidden file"
ANSWERS = "answers of models, which may be what had to go"
ALIKE = "named as another file but for its case, which not every disk tells apart"
NEVER = (PICKLE, WEIGHTS, ARCHIVE, RECORD, ANSWERS, ALIKE)  # whoever asks for it


def sort_files(unlearned: Checkpoint) -> tuple[tuple[str, ...], dict[str, str]]:
    """The files that come along, and those that stay behind with the reason."""
    carried, left_behind = [], {}
    code = code_of(unlearned.files)
    for name in sorted(unlearned.files.sizes):
        if name in unlearned.headers or name in (INDEX, "README.md", ".gitattributes"):
            continue  # written anew, or the Hub's own
        if name == ADAPTER_CONFIG:
            if isinstance(unlearned, Adapter):
                carried.append(name)
            else:
                left_behind[name] = "of an adapter, and this is a whole model"
        elif belongs(name) or name in code:
            carried.append(name)
        else:
            left_behind[name] = why_left(name)
    alike = _alike(unlearned, (), carried)
    left_behind |= dict.fromkeys(alike, ALIKE)
    return tuple(name for name in carried if name not in alike), left_behind


def check_cases(unlearned: Checkpoint) -> None:
    """Raise CorruptCheckpointError if two shards are one file where case is not told apart."""
    seen: dict[str, str] = {}
    for shard in unlearned.headers:
        if (other := seen.setdefault(_folded(shard), shard)) != shard:
            raise CorruptCheckpointError(
                f"{other} and {shard} of {unlearned.name} differ in case alone, and would be one "
                "file on many disks; save the model again under names of its own."
            )


def _alike(unlearned: Checkpoint, carried: Sequence[str], more: Iterable[str]) -> set[str]:
    """Those of `more` that many disks would take for a file of the release, or for one before."""
    written = (*unlearned.headers, INDEX, "README.md", "SHA256SUMS", *carried)
    taken = {_folded(name): name for name in written}
    return {
        name
        for name in more
        if taken.setdefault(_folded(name), name) != name or _folded(name).startswith("sage/")
    }


def _folded(name: str) -> str:
    """The same for names that a disk may take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def why_left(name: str) -> str:
    """Why a file that is not known to belong to a model stays behind."""
    if name.startswith("sage/") or name.startswith("SHA256SUMS"):
        return RECORD
    if stays_here(name):
        return ANSWERS
    if _has_suffix(name, PICKLES) and not name.endswith(".index.json"):
        return PICKLE
    if _has_suffix(name, OTHER_WEIGHTS):
        return WEIGHTS
    if any(part.startswith(".") for part in name.split("/")):
        return HIDDEN  # .env and its like hold tokens
    if name == "sage.yaml":
        return "settings of this run"
    if _has_suffix(name, DATA):
        return "data, not the model"  # it may be what had to be forgotten
    if TRAINING.match(name):
        return "of the training, not of the model"
    if _has_suffix(name, ARCHIVES):
        return ARCHIVE
    if RESULTS.match(name):
        return "results of another model than the release"
    return UNKNOWN


def _has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Whether one of `suffixes` is in `name`, at its end or before another, as in `.bin.1`."""
    found = "|".join(map(re.escape, suffixes))
    return re.search(rf"({found})(?![a-z])", name.lower()) is not None


def bring(plan: Plan, globs: Sequence[str]) -> Plan:
    """The plan when files that match one of `globs` come along too.

    Not what may hold weights: they were not sanitized. A hidden file must be named in full. A glob
    that brings nothing is a problem of the plan.
    """
    carried, left = set(plan.carried), plan.left_behind
    problems = list[SageHubError]()
    for glob in globs:
        asked = {n: why for n, why in plan.left_behind.items() if fnmatchcase(n, glob)}
        brought = {
            n for n, why in asked.items() if why not in NEVER and (why != HIDDEN or n == glob)
        }
        alike = dict.fromkeys(_alike(plan.unlearned, sorted(carried), sorted(brought)), ALIKE)
        asked, left, brought = asked | alike, left | alike, brought - alike.keys()
        carried |= brought
        if not brought and not any(fnmatchcase(name, glob) for name in plan.carried):
            problems.append(
                UsageError(f"--carry {glob} brings nothing: {_why_nothing(plan, asked)}")
            )
    return replace(
        plan,
        carried=tuple(sorted(carried)),
        left_behind={n: why for n, why in left.items() if n not in carried},
        problems=(*plan.problems, *problems),
    )


def _why_nothing(plan: Plan, asked: dict[str, str]) -> str:
    if not asked:
        return f"{plan.unlearned.name} has no such file; check the name."
    name, why = next(iter(asked.items()))
    if why == HIDDEN:
        return f"{name} is a hidden file; name it in full if it is to be published."
    return f"{name} stays behind whoever asks ({why}); leave the option away."


def carry_files(plan: Plan, folder: Path, dtype: str | None = None) -> dict[str, str]:
    """Copy everything of the unlearned side that comes along verbatim; return their SHA-256.

    If the weights are stored as another `dtype`, config.json says so, and the config of an adapter
    names the base that it was sanitized with.
    """
    hashes = {}
    for name in plan.carried:
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.unlearned.files.path(name), destination)
        if name == "config.json" and dtype is not None:
            _write_json(destination, _with_dtype(plan.unlearned.config, dtype))
        if name == ADAPTER_CONFIG and _names_another_base(plan):
            revision = {"revision": None} if "revision" in plan.unlearned.config else {}
            named = {"base_model_name_or_path": plan.base.name, **revision}
            _write_json(destination, plan.unlearned.config | named)
        hashes[name] = file_sha256(destination)
    return hashes


def path_warnings(plan: Plan) -> Iterator[str]:
    """A warning for each path of somebody's machine that a config names and the release would."""
    side = plan.unlearned
    for key in ("_name_or_path", "base_model_name_or_path"):
        mended = key == "base_model_name_or_path" and _names_another_base(plan)
        if mended and key in side.config:
            yield (
                f"{side.config_file} of the unlearned side names another base than "
                f"{plan.base.name}; that of the release names this one."
            )
        elif not mended and PATH.match(str(side.config.get(key, ""))):
            yield (
                f"{side.config_file} of the unlearned model names a folder of the machine it "
                f"was made on ({key}) and comes along verbatim; change that line first if it is "
                "private."
            )


def _names_another_base(plan: Plan) -> bool:
    """Whether the config of an adapter does not name its base, which is on the Hub."""
    if not isinstance(plan.unlearned, Adapter) or plan.base.commit is None:
        return False
    return bool(plan.unlearned.config.get("base_model_name_or_path") != plan.base.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_index(plan: Plan, folder: Path) -> dict[str, str]:
    """Write the index of the shards into `folder`, if there is to be one; its name and SHA-256."""
    unlearned = plan.unlearned
    if SINGLE in unlearned.shards or INDEX not in unlearned.files.sizes:
        return {}
    stated = read_json(unlearned.files, INDEX).get("metadata")
    metadata: dict[str, Any] = dict(stated) if isinstance(stated, dict) else {}
    metadata["total_size"] = sum(
        info.nbytes for shard in unlearned.shards for info in plan.layout(shard).values()
    )
    places = {operation.name: operation.shard for operation in plan.operations}
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
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
