"""A LoRA adapter of PEFT as the unlearned side: which rows of the base it changes, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.checkpoint.architecture import Architecture, Place
from sage_hub.checkpoint.files import Files, read_json
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.layouts import INDEX, SINGLE
from sage_hub.checkpoint.quantized import refuse_quantized
from sage_hub.checkpoint.targets import adapts
from sage_hub.checkpoint.tensorfile import RowReader, check_names
from sage_hub.errors import (
    AdapterError,
    ArchitectureError,
    CorruptCheckpointError,
    MissingTensorError,
    NotFoundError,
    PickledWeightsError,
)
from sage_hub.runtime.limits import TooMuchError, limited

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of PEFT's LoraConfig that leave the update what it is, s·B A. Any other one that is set
# is refused by its name, those of later versions too.
UNDERSTOOD = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
    *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
}
# Other initializations take a part of the base's weights into the adapter.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """The two tensors of an update s·B A: A (r, in), B (out, r)."""

    a: str
    b: str
    scale: float  # s

    def outer(self, adapter: RowReader) -> Tensor:
        """R of the QR decomposition of s·B, (r, r): ‖s·B A x‖ = ‖R A x‖ for every x."""
        factor: Tensor = torch.linalg.qr(self.scale * adapter.read(self.b).double(), mode="r").R
        return factor


@dataclass(frozen=True)
class Change:
    """What an adapter does to some rows of a parameter: adds s·B A, or replaces them.

    A parameter stored (in, out), as an embedding is too, is changed by the transpose.
    """

    place: Place
    by: LowRank | str  # or the name of the tensor that replaces them
    transposed: bool = False

    def apply(self, adapter: RowReader, rows: Tensor, first: int) -> Tensor:
        """W_b + Δ for the base's `rows`, which begin at row `first` of the place.

        In float32 at least.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        b, last = rows.to(wide), first + len(rows)
        if isinstance(self.by, str):
            return adapter.read_rows(self.by, first, last).to(b)
        left, right = adapter.read(self.by.b).to(b), adapter.read(self.by.a).to(b)
        if self.transposed:
            left, right = right.T, left.T
        return b + self.by.scale * (left[first:last] @ right)


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """A LoRA adapter and the base model that it belongs to."""

    base: Checkpoint
    config_file = CONFIG

    @cached_property
    def architecture(self) -> Architecture:
        return self.base.architecture

    @property
    def of_model(self) -> Checkpoint:
        return self.base

    def passing(self, folder: Path) -> Adapter:
        return replace(self, files=self.files.passing(folder), base=self.base.passing(folder))

    @cached_property
    def changes(self) -> dict[str, Change]:
        """What it does to the base, by the tensor of the adapter: A's for a pair.

        Raises CorruptCheckpointError for a tensor without its partner or of the wrong shape,
        MissingTensorError for a module that the base has not, and for an empty tensor, AdapterError
        for a tensor that PEFT would ignore.
        """
        found = {}
        if empty := [tensor for tensor in self.shard_of if 0 in self.info(tensor).shape]:
            raise MissingTensorError(
                f"Tensor {empty[0]!r} of {self.name} is empty, as ZeRO-3 leaves what lies on "
                "other devices; gather the weights and save the adapter again."
            )
        self._check_patterns()
        for tensor in self.shard_of:
            change = self._change(tensor)
            if change is not None:
                found[tensor] = change
        return found

    def does_something(self) -> bool:
        """Whether any weight of the base is changed: of a new adapter every B is zero."""
        changes = [change.by for change in self.changes.values()]
        if any(isinstance(by, str) for by in changes):
            return True
        with self.open_shard(WEIGHTS) as tensors:
            pairs = (by for by in changes if isinstance(by, LowRank))
            return any(tensors.read(by.b).any() and tensors.read(by.a).any() for by in pairs)

    def _change(self, tensor: str) -> Change | None:
        if not tensor.startswith(PREFIX):
            raise self._ignored(tensor, f"its name does not begin with {PREFIX!r}")
        name = tensor.removeprefix(PREFIX)
        for a, b in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_embedding_A", ".lora_embedding_B"),
        ):
            if name.endswith(a):
                return self._pair(tensor, name.removesuffix(a), tensor.removesuffix(a) + b)
            if name.endswith(b):
                if tensor.removesuffix(b) + a not in self.shard_of:
                    raise self._broken(f"{tensor!r} has no partner")
                return None
        if ".lora_" in name or ".modules_to_save." in name:
            raise self._ignored(tensor, "its name is not one that save_pretrained gives")
        if f"{tensor.rpartition('.')[0]}.lora_A.weight" in self.shard_of:
            raise self._ignored(tensor, "its module is adapted, and has it as 'base_layer'")
        name = name.replace(".base_layer.", ".")
        return Change(self._place(name, self.info(tensor).shape), tensor)

    def _place(self, name: str, shape: tuple[int, ...]) -> Place:
        """Where a tensor `name` of the model lies, if it has this `shape`."""
        parameter = self.architecture.parameter(name)
        if parameter is not None and parameter != self.architecture.converted(name):
            raise self._ignored(f"{PREFIX}{name}", f"the model calls it {parameter!r}")
        whole = self.architecture.parameters.get(parameter or "", shape)
        of_tokens = self.architecture.embedding, self.architecture.head
        if parameter in of_tokens and whole[0] != shape[0] and whole[1:] == shape[1:]:
            raise ArchitectureError(
                f"The adapter {self.name} was trained on a base of {shape[0]} tokens, and "
                f"{self.base.name} has {whole[0]}; resize the base "
                f"(model.resize_token_embeddings({shape[0]})), save it, and pass that."
            )
        place = self.architecture.place(name, shape)
        if place is None:
            raise self._unknown(name)
        return place

    def _pair(self, tensor: str, module: str, partner: str) -> Change:
        if partner not in self.shard_of:
            raise self._broken(f"{tensor!r} has no partner")
        if not self._adapts(module):
            raise self._ignored(tensor, f"{module!r} is not of the modules that {CONFIG} adapts")
        a, b = self.info(tensor).shape, self.info(partner).shape
        rank = self._for_module("r", "rank_pattern", module)
        alpha = self._for_module("lora_alpha", "alpha_pattern", module)
        if len(a) != 2 or len(b) != 2:
            raise AdapterError(
                f"{tensor!r} of {self.name} adapts a convolution; sage-hub sanitizes LoRA on "
                "linear layers. Merge it into its base (merge_and_unload) and pass that."
            )
        if (a[0], b[1]) != (rank, rank):
            raise self._broken(
                f"the pair of {tensor!r} has the shapes {[*a]} and {[*b]}, the config gives it "
                f"the rank {rank}"
            )
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        transposed = self.architecture.stored_transposed(f"{module}.weight")
        shape = (a[1], b[0]) if transposed else (b[0], a[1])
        place = self._place(f"{module}.weight", shape)
        return Change(place, LowRank(tensor, partner, scale), transposed)

    def _adapts(self, module: str) -> bool:
        """Whether PEFT adapts `module`, by its name in the file or in the model."""
        names = {module, str(self.architecture.parameter(f"{module}.weight"))}
        try:
            return any(adapts(self.config, name.removesuffix(".weight")) for name in names)
        except (TypeError, re.error):
            raise self._wrong("target_modules") from None

    def _check_patterns(self) -> None:
        """Raise CorruptCheckpointError if the settings take too long to tell what is adapted.

        Of all modules, those of the model too, as PEFT will hold them against each.
        """
        own = (tensor.removeprefix(PREFIX) for tensor in self.shard_of)
        names = {*own, *self.architecture.parameters}
        try:
            with limited():
                parts = (accumulate(name.split("."), "{}.{}".format) for name in names)
                for module in set(chain.from_iterable(parts)):
                    adapts(self.config, module)
        except (TypeError, re.error, TooMuchError):
            raise self._wrong("target_modules") from None

    def _for_module(self, name: str, pattern: str, module: str) -> float:
        """The setting `name` for `module`, read as PEFT reads it: the first key of `pattern` that
        matches the end of the module's name (peft.utils.other.get_pattern_key), or for all."""
        value, patterns = self.config.get(name, 8), self.config.get(pattern) or {}
        try:
            with limited():
                for key, special in patterns.items():
                    if re.match(rf"(.*\.)?({key})$", module):
                        value = special
                        break
        except (AttributeError, re.error, TooMuchError):
            raise self._wrong(pattern) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{CONFIG} of {self.name} has no usable {name}; save the adapter again with PEFT."
        )

    def _broken(self, why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{WEIGHTS} of {self.name} is not whole: {why}; save the adapter again with PEFT."
        )

    def _ignored(self, tensor: str, why: str) -> AdapterError:
        return AdapterError(
            f"PEFT ignores the tensor {tensor!r} of {self.name}, because {why}, so the release "
            "would not do what the update does; save the adapter with PEFT (save_pretrained)."
        )

    def _unknown(self, name: str) -> MissingTensorError:
        return MissingTensorError(
            f"The adapter {self.name} changes {name!r}, which {self.base.name} has not; check "
            "that it was trained on this base."
        )


def open_adapter(files: Files, base: Checkpoint) -> Adapter:
    """The adapter in `files`, of `base`.

    Raises AdapterError for one that is not a plain LoRA, PickledWeightsError or NotFoundError
    where there are no weights to read.
    """
    if "adapter_model.bin" in files.sizes and WEIGHTS not in files.sizes:
        raise PickledWeightsError(
            f"{files.name} has only pickled weights (adapter_model.bin), which are not read "
            "unasked; save the adapter again with a PEFT of today, which writes safetensors, or "
            "give --pickled-weights, with which tensors are taken from them, and no code is run."
        )
    if WEIGHTS not in files.sizes:
        raise NotFoundError(
            f"{files.name} has an {CONFIG}, but no {WEIGHTS}; fetch or save the adapter again."
        )
    _refuse(read_json(files, CONFIG), files.name)
    adapter = Adapter(files, {WEIGHTS: files.header(WEIGHTS)}, base)
    check_names(adapter.headers[WEIGHTS], f"{WEIGHTS} of {adapter.name}")
    refuse_quantized(adapter.name, adapter.config, adapter.headers)
    return adapter


def is_adapter(files: Files) -> bool:
    """Whether `files` are an adapter and no whole model."""
    return CONFIG in files.sizes and not {SINGLE, INDEX} & files.sizes.keys()


def _refuse(config: Mapping[str, Any], name: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{name} is a PEFT adapter of the type {kind}; sage-hub takes LORA. Merge it into "
            "its base (merge_and_unload) and pass the merged model."
        )
    start = config.get("init_lora_weights", True)
    strange = [field for field, value in config.items() if value and field not in UNDERSTOOD]
    if start not in INITIALIZATIONS:
        strange.append(f"init_lora_weights={start}")
    if strange:
        raise AdapterError(
            f"The LoRA adapter {name} uses {', '.join(sorted(strange))}, with which its update "
            "is not B A alone. Merge it into its base (merge_and_unload) and pass the merged "
            "model."
        )
