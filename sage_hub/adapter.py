"""A LoRA adapter of PEFT as the unlearned side: which rows of the base it changes, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.architecture import Architecture, Place, read_architecture
from sage_hub.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    Files,
    digest,
    open_checkpoint,
    open_files,
    read_json,
)
from sage_hub.errors import (
    AdapterError,
    CorruptCheckpointError,
    MissingTensorError,
    NotFoundError,
    PickledWeightsError,
    UsageError,
)
from sage_hub.progress import SILENT, Progress
from sage_hub.tensorfile import Header, RowReader

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
    architecture: Architecture  # of the base
    config_file = CONFIG

    @cached_property
    def changes(self) -> dict[str, Change]:
        """What it does to the base, by the tensor of the adapter: A's for a pair.

        Raises CorruptCheckpointError for a tensor without its partner or of the wrong shape,
        MissingTensorError for a module that the base has not.
        """
        found = {}
        for tensor in self.shard_of:
            change = self._change(tensor)
            if change is not None:
                found[tensor] = change
        return found

    def _change(self, tensor: str) -> Change | None:
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
        for part in (".base_layer.", ".modules_to_save."):
            name = name.replace(part, ".")
        place = self.architecture.place(name, self.info(tensor).shape)
        if place is None:
            raise self._unknown(name)
        return Change(place, tensor)

    def _pair(self, tensor: str, module: str, partner: str) -> Change:
        if partner not in self.shard_of:
            raise self._broken(f"{tensor!r} has no partner")
        a, b = self.info(tensor).shape, self.info(partner).shape
        rank = self._for_module("r", "rank_pattern", module)
        alpha = self._for_module("lora_alpha", "alpha_pattern", module)
        if len(a) != 2 or len(b) != 2:
            raise AdapterError(
                f"{tensor!r} of {self.name} adapts a convolution; sage-hub sanitizes LoRA on "
                "linear layers."
            )
        if (a[0], b[1]) != (rank, rank):
            raise self._broken(
                f"the pair of {tensor!r} has the shapes {[*a]} and {[*b]}, the config gives it "
                f"the rank {rank}"
            )
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        transposed = self.architecture.stored_transposed(f"{module}.weight")
        shape = (a[1], b[0]) if transposed else (b[0], a[1])
        place = self.architecture.place(f"{module}.weight", shape)
        if place is None:
            raise self._unknown(module)
        return Change(place, LowRank(tensor, partner, scale), transposed)

    def _for_module(self, name: str, pattern: str, module: str) -> float:
        """The setting `name` for `module`, read as PEFT reads it: the first key of `pattern` that
        matches the end of the module's name (peft.utils.other.get_pattern_key), or for all."""
        value, patterns = self.config.get(name, 8), self.config.get(pattern) or {}
        try:
            for key, special in patterns.items():
                if re.match(rf"(.*\.)?({key})$", module):
                    value = special
                    break
        except (AttributeError, re.error):
            raise self._wrong(pattern) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{CONFIG} of {self.name} has no usable {name}.")

    def _broken(self, why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{WEIGHTS} of {self.name} is not whole: {why}.")

    def _unknown(self, name: str) -> MissingTensorError:
        return MissingTensorError(
            f"The adapter {self.name} changes {name!r}, which {self.base.name} has not; check "
            "that it was trained on this base."
        )


@dataclass(frozen=True)
class Merged(Checkpoint):
    """The base with an adapter merged in, computed row by row as it is read."""

    adapter: Adapter

    @contextmanager
    def open_shard(self, shard: str) -> Iterator[RowReader]:
        with ExitStack() as stack:
            base = stack.enter_context(self.adapter.base.open_shard(shard))
            adapter = stack.enter_context(self.adapter.open_shard(WEIGHTS))
            yield _MergedReader(base, adapter, self.adapter, self.headers[shard])

    def passing(self, folder: Path) -> Merged:
        base = self.adapter.base.passing(folder)
        return replace(self, adapter=replace(self.adapter, base=base))

    def fingerprint(self, progress: Progress = SILENT) -> str:
        sides = {"base": self.adapter.base, "adapter": self.adapter}
        return digest({name: side.fingerprint(progress) for name, side in sides.items()})


@dataclass(frozen=True)
class _MergedReader:
    base: RowReader
    tensors: RowReader
    adapter: Adapter
    header: Header

    def read(self, name: str) -> Tensor:
        info = self.header.tensors[name]
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.base.read_rows(name, start, stop)
        place = self.adapter.architecture.place(name, self.header.tensors[name].shape)
        if place is None:
            return rows
        for change in self.adapter.changes.values():
            if change.place.parameter != place.parameter:
                continue
            first = max(place.start + start, change.place.start)
            last = min(place.start + stop, change.place.stop)
            if first < last:
                mine = slice(first - place.start - start, last - place.start - start)
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                rows[mine] = change.apply(self.tensors, rows[mine], first - change.place.start)
        return rows


@dataclass(frozen=True)
class _Overlay:
    """The files of a merged model: the base's, under the adapter's name, with its tokenizer."""

    base: Files
    adapter: Files

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def commit(self) -> str | None:
        return self.adapter.commit

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        own = {n: s for n, s in self.adapter.sizes.items() if self._holder(n) is self.adapter}
        return {**self.base.sizes, **own}

    def path(self, file: str) -> Path:
        return self._holder(file).path(file)

    def folder(self, files: list[str]) -> Path:
        raise NotImplementedError("a merged model lies in no folder")

    def header(self, file: str) -> Header:
        return self._holder(file).header(file)

    def sha256(self, file: str) -> str:
        return self._holder(file).sha256(file)

    def missing_bytes(self, files: list[str]) -> int:
        return self.adapter.missing_bytes([WEIGHTS])

    def close(self, file: str) -> None:
        self._holder(file).close(file)

    def _holder(self, file: str) -> Files:
        taken = file in (*TOKENIZER_FILES, "README.md", "LICENSE")
        return self.adapter if taken and file in self.adapter.sizes else self.base


def open_unlearned(text: str, base: Checkpoint, *, merge: bool = False) -> Checkpoint:
    """Open the unlearned side that `text` names: a whole model, or an adapter of `base`.

    With `merge` an adapter is seen as the whole model that it makes of the base. Raises
    AdapterError for an adapter that is not a plain LoRA, UsageError if there is nothing to merge.
    """
    files = open_files(text)
    if not is_adapter(files):
        if merge:
            raise UsageError(f"--merge is for adapters, and {files.name} is a whole model.")
        return open_checkpoint(text)
    if "adapter_model.bin" in files.sizes and WEIGHTS not in files.sizes:
        raise PickledWeightsError(
            f"{files.name} has only pickled weights (adapter_model.bin), which sage-hub never "
            "loads; save the adapter again with a PEFT of today, which writes safetensors."
        )
    if WEIGHTS not in files.sizes:
        raise NotFoundError(f"{files.name} has an {CONFIG}, but no {WEIGHTS}.")
    _refuse(read_json(files, CONFIG), files.name)
    adapter = Adapter(files, {WEIGHTS: files.header(WEIGHTS)}, base, read_architecture(base))
    if not merge:
        return adapter
    _refuse_tied(adapter)
    return Merged(_Overlay(base.files, files), base.headers, adapter)


def is_adapter(files: Files) -> bool:
    """Whether `files` are an adapter and no whole model."""
    return CONFIG in files.sizes and not any(
        name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
        for name in files.sizes
    )


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


def _refuse_tied(adapter: Adapter) -> None:
    tied = adapter.architecture.tied
    for change in adapter.changes.values():
        if change.place.parameter in (*tied, *tied.values()):
            raise AdapterError(
                f"The adapter {adapter.name} changes {change.place.parameter!r}, which the base "
                "ties to another weight; merging would change both. Leave out --merge."
            )
