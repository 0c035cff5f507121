"""A finished release is opened once, as its users will, before it gets its name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from sage_hub.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from sage_hub.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from sage_hub.checkpoint.adapter import Adapter
from sage_hub.checkpoint.architecture import architecture_of, quiet_transformers
from sage_hub.checkpoint.files import LocalFiles, read_json
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.layouts import INDEX, SINGLE
from sage_hub.errors import PublishError, first_line, note_kept
from sage_hub.repair.readable import tokenizer_fault

Shapes = Mapping[str, "tuple[int, ...] | None"]  # of the tensors; None where the shard is not here


def open_as_user(folder: Path, base: Checkpoint) -> None:
    """Open the release in `folder`, its weights on "meta"; that of an adapter with its `base`.

    Raises PublishError for what cannot be opened.
    """
    files = LocalFiles(folder)
    adapter = ADAPTER_CONFIG in files.sizes
    steps: dict[str, Callable[[], object]] = {
        "generation config": lambda: _open_generation_config(files),
        "tokenizer": lambda: _open_tokenizer(files),
        "model": lambda: _open_adapter(files, base) if adapter else _open_model(files),
    }
    for what, step in steps.items():
        try:
            with quiet_transformers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step()
        except Exception as error:  # whatever it is, a user would meet it
            failure = PublishError(
                f"The finished release cannot be opened as its users would; its {what} fails: "
                f"{first_line(error).rstrip('.')}. It is kept in {folder}, and nothing was "
                "published."
            )
            note_kept(failure, "the release", folder)
            raise failure from None


def _open_generation_config(files: LocalFiles) -> None:
    if "generation_config.json" in files.sizes:
        GenerationConfig.from_pretrained(files.folder([]))


def _open_tokenizer(files: LocalFiles) -> None:
    if why := tokenizer_fault(files, lambda: files.folder([])):
        raise ValueError(why)


def _open_model(files: LocalFiles) -> None:
    """Each parameter of the language model must have a tensor, by the rules of transformers."""
    index = read_json(files, INDEX)["weight_map"] if INDEX in files.sizes else {}
    here = [shard for shard in {SINGLE, *index.values()} if shard in files.sizes]
    release = Checkpoint(files, {shard: files.header(shard) for shard in here})
    shapes: Shapes = {
        **dict.fromkeys(index),
        **{t: release.info(t).shape for t in release.shard_of},
    }
    if not shapes:  # the only shard is sent, and gone
        return
    model = release.empty_model()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    wanted, covered = model.state_dict(), set()
    for tensor, shape in shapes.items():
        name, converted = rename_source_key(
            tensor, renamings, converters, model.base_model_prefix, wanted
        )
        covered.add(name)
        if name in wanted and converted is None and shape is not None:
            _compare(tensor, shape, wanted[name])
    architecture = architecture_of(model)
    covered |= {one for pair in architecture.tied.items() if covered & {*pair} for one in pair}
    ignored = model._keys_to_ignore_on_load_missing or ()
    for name in wanted:
        needed = not name.startswith(architecture.outside)
        if needed and name not in covered and not any(re.search(p, name) for p in ignored):
            raise ValueError(f"no tensor is its {name}")


def _open_adapter(files: LocalFiles, base: Checkpoint) -> None:
    """Each module of the adapter must be one of the base, by the rules of PEFT if it is here."""
    adapter = Adapter(files, {}, base)
    if ADAPTER_WEIGHTS in files.sizes:
        adapter = Adapter(files, {ADAPTER_WEIGHTS: files.header(ADAPTER_WEIGHTS)}, base)
    adapter.changes  # noqa: B018 - raises for a module that the base has not
    if find_spec("peft") is None or not adapter.headers:
        return
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        model = get_peft_model(
            base.empty_model(), PeftConfig.from_pretrained(str(files.folder([])))
        )
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, value in wanted.items():
        if name in adapter.shard_of:
            _compare(name, adapter.info(name).shape, value)
        elif "lora_" not in name:  # a pair that is not in the file starts as no change
            raise ValueError(f"no tensor is its {name}")


def _compare(tensor: str, shape: tuple[int, ...], wanted: Tensor) -> None:
    if shape != tuple(wanted.shape):
        raise ValueError(f"{tensor} has the shape {[*shape]}, and not {[*wanted.shape]}")
