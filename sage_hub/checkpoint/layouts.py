"""Where the weights of a checkpoint are; and where they are not, what is there instead."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sage_hub.checkpoint.files import Files, read_json
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.tensorfile import Header
from sage_hub.errors import (
    CorruptCheckpointError,
    NotFoundError,
    PickledWeightsError,
    SageHubError,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")

# What a trainer keeps beside the weights, pickled or not.
OF_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*|trainer_state)\.\w+"
)
# Folders in which somebody could have meant the model to be found.
WEIGHTS = re.compile(
    r"(model(\.safetensors\.index|-0*1-of-\d+)?|adapter_model|pytorch_model(\.bin\.index)?)"
    r"\.(safetensors|bin|json)"
)
# Files of other formats, and what makes a checkpoint of them.
FORMATS = (
    (
        r"zero_to_fp32\.py|(.*/)?(bf16_)?zero_pp_rank_.*|(.*/)?mp_rank_\d+_model_states\.pt",
        "a checkpoint of DeepSpeed; run its zero_to_fp32.py, with --safe_serialization",
    ),
    (
        r"(.*/)?(.*\.distcp|\.metadata)",
        "a distributed checkpoint of FSDP; run `accelerate merge-weights`",
    ),
    (
        r".*\.gguf",
        "GGUF, which is for inference, and quantized as a rule; pass the checkpoint that it was "
        "made of",
    ),
    (
        r"consolidated.*\.(safetensors|pth)",
        "weights with the names of their maker; convert them (transformers has a "
        "convert_…_weights_to_hf.py for each)",
    ),
    (
        r"(tf_model.*\.h5|flax_model.*\.msgpack)",
        "weights of TensorFlow or Flax; load them with a transformers before 5 (from_tf, "
        "from_flax), and save them again",
    ),
)
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def read_headers(files: Files) -> dict[str, Header]:
    """Shard file -> its header. Raises the error that says what is there, if there is none."""
    # transformers prefers the single file where both exist; so do we.
    if SINGLE in files.sizes:
        return {SINGLE: files.header(SINGLE)}
    if INDEX in files.sizes:
        return _read_sharded_headers(files)
    raise _instead(files)


def _read_sharded_headers(files: Files) -> dict[str, Header]:
    weight_map = read_json(files, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(
            f"{INDEX} of {files.name} has no weight_map; fetch or save the checkpoint again."
        )
    indexed: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CorruptCheckpointError(
                f"{INDEX} of {files.name} points to {shard!r}, which is not a safetensors file "
                "in its own folder; save the checkpoint again."
            )
        if shard not in files.sizes:
            raise CorruptCheckpointError(
                f"{files.name} lacks {shard}, where its index places tensor {tensor!r}; fetch it."
            )
        indexed.setdefault(shard, set()).add(tensor)
    headers = {shard: files.header(shard) for shard in sorted(indexed)}
    for shard, tensors in indexed.items():
        if absent := tensors - headers[shard].tensors.keys():
            raise CorruptCheckpointError(
                f"{shard} of {files.name} lacks tensor {min(absent)!r}, which the index "
                "places there; fetch or save the checkpoint again."
            )
    return headers


def _instead(files: Files) -> SageHubError:
    """The error for `files` without weights that can be read: what they have, and what to do."""
    names = [name for name in files.sizes if not OF_TRAINING.fullmatch(name.rpartition("/")[2])]
    if "adapter_config.json" in names:
        return NotFoundError(
            f"{files.name} is an adapter and no whole model; only the unlearned side may be one. "
            "Pass its base, or the two merged."
        )
    for pattern, what in FORMATS:
        if found := next((name for name in names if re.fullmatch(pattern, name)), None):
            return NotFoundError(f"{files.name} has no {SINGLE}, but {found}: {what}.")
    here = [name for name in names if "/" not in name]
    if tensors := [name for name in here if name.endswith(".safetensors")]:
        return NotFoundError(f"{files.name} has no {SINGLE}, but {_misnamed(tensors)}.")
    if pickles := [name for name in here if name.endswith(PICKLES)]:
        return PickledWeightsError(
            f"{files.name} has only pickled weights ({pickles[0]}), which are not read unasked; "
            "convert them to safetensors (save_pretrained does), or give --pickled-weights, with "
            "which tensors are taken from them, and no code is run."
        )
    if deeper := _folders_with_weights(names):
        return NotFoundError(
            f"The weights of {files.name} lie deeper; pass one of its folders: "
            f"{_some([f'{files.name}/{folder}' for folder in deeper])}."
        )
    if isinstance(files, HubFiles) and (branches := files.other_branches(_folders_with_weights)):
        return NotFoundError(
            f"{files.name} has no weights at this revision; pass a branch that has some: "
            f"{_some([f'{files.name}@{branch}' for branch in branches])}."
        )
    there = f", only {_some(sorted(here))}" if here else ""
    return NotFoundError(
        f"{files.name} has neither {SINGLE} nor {INDEX}{there}; pass a folder or repo that has."
    )


def _misnamed(tensors: Sequence[str]) -> str:
    """What safetensors files without an index are, and how they get one."""
    first = tensors[0]
    shards = [match for name in tensors if (match := SHARD.fullmatch(name))]
    if shards and int(shards[0][2]) == 1:
        return f"{first}, which is all of it: rename it to {SINGLE}"
    if shards:
        return (
            f"shards ({first}) without their index, {INDEX}; fetch that too, or save the model "
            "again"
        )
    return f"{first}; rename it to {SINGLE} if it is the whole model"


def _folders_with_weights(names: Sequence[str]) -> list[str]:
    """The folders that a model could lie in, "" for the top."""
    found = (name.rpartition("/") for name in names)
    return sorted({folder for folder, _, file in found if WEIGHTS.fullmatch(file)})


def _some(names: Sequence[str]) -> str:
    """A few of `names`, and how many there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")
