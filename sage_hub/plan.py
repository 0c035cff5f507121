"""What will be done with every tensor and file, decided from headers before any work starts."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from sage_hub.architecture import Architecture, read_architecture
from sage_hub.checkpoint import INDEX, PICKLES, Checkpoint
from sage_hub.errors import ArchitectureError, DiskSpaceError, MissingTensorError
from sage_hub.tensorfile import FLOATS, TensorInfo

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


@dataclass(frozen=True)
class Operation:
    """What to do with one tensor of the unlearned side: filter it, or copy it and say why."""

    tensor: str
    shard: str
    info: TensorInfo
    base: str | None  # the tensor's name on the base side
    module: str | None  # the linear module whose weight it is; None if it is not filtered
    transposed: bool = False
    reason: str = ""  # why it is not filtered


@dataclass(frozen=True)
class Plan:
    """The whole run as data: it can be printed, counted and checked off."""

    base: Checkpoint
    unlearned: Checkpoint
    operations: tuple[Operation, ...]
    carried: tuple[str, ...]  # files that come along verbatim
    left_behind: dict[str, str]  # files that don't, and why
    statistics_bytes: int  # at most

    @property
    def output_bytes(self) -> int:
        """The size of the release in bytes, but for the record."""
        carried = sum(self.unlearned.files.sizes[name] for name in self.carried)
        return self.unlearned.weight_bytes + carried

    @property
    def download_bytes(self) -> int:
        """The weights that are not on this machine yet, in bytes."""
        return sum(side.files.missing_bytes(side.shards) for side in (self.base, self.unlearned))

    def to_filter(self) -> list[Operation]:
        """The operations that filter."""
        return [operation for operation in self.operations if operation.module is not None]

    def observed(self, modules: Iterable[str]) -> Plan:
        """The plan when only `modules` have a site: the others' weights are copied."""
        known = set(modules)
        reason = "its module saw no input during calibration"
        return replace(
            self,
            operations=tuple(
                operation
                if operation.module is None or operation.module in known
                else replace(operation, module=None, reason=reason)
                for operation in self.operations
            ),
        )

    def describe(self) -> dict[str, Any]:
        """The plan for `--json`."""
        return {
            "base": {"name": self.base.name, "commit": self.base.commit},
            "unlearned": {"name": self.unlearned.name, "commit": self.unlearned.commit},
            "tensors": len(self.operations),
            "filter": len(self.to_filter()),
            "copy": dict(Counter(op.reason for op in self.operations if op.module is None)),
            "carried": list(self.carried),
            "left_behind": self.left_behind,
            "download_bytes": self.download_bytes,
            "output_bytes": self.output_bytes,
            "statistics_bytes_at_most": self.statistics_bytes,
        }


def make_plan(base: Checkpoint, unlearned: Checkpoint) -> Plan:
    """Match the two sides tensor by tensor and decide what happens to each.

    Raises ArchitectureError for different models or shapes, MissingTensorError for a tensor that
    only one side has.
    """
    theirs, ours = read_architecture(base), read_architecture(unlearned)
    if theirs.model_type != ours.model_type:
        raise ArchitectureError(
            f"{base.name} is a {theirs.model_type} model and {unlearned.name} a "
            f"{ours.model_type} model; the base must be the model that was unlearned."
        )
    base_names = {theirs.parameter(name) or name: name for name in base.shard_of}
    names = {ours.parameter(name) or name: name for name in unlearned.shard_of}
    for parameter in base_names.keys() - names.keys():
        if not ours.may_be_absent(parameter):
            raise _missing(parameter, base, unlearned)
    operations = []
    for shard, header in unlearned.headers.items():
        for tensor, info in header.tensors.items():
            parameter = ours.parameter(tensor) or tensor
            twin = base_names.get(parameter)
            if twin is None and not theirs.may_be_absent(parameter):
                raise _missing(tensor, unlearned, base)
            if twin is not None and base.info(twin).shape != info.shape:
                raise ArchitectureError(
                    f"Tensor {tensor!r} has the shape {list(base.info(twin).shape)} in "
                    f"{base.name} and {list(info.shape)} in {unlearned.name}; the base must be "
                    "the model that was unlearned."
                )
            operations.append(_decide(ours, tensor, shard, info, twin))
    carried, left_behind = _sort_files(unlearned)
    return Plan(
        base,
        unlearned,
        tuple(operations),
        carried,
        left_behind,
        _statistics_bytes(ours),
    )


def check_disk(plan: Plan, output: Path) -> None:
    """Raise DiskSpaceError if output, statistics and downloads don't fit where they go."""
    needs = {output: plan.output_bytes + plan.statistics_bytes}
    if plan.download_bytes:
        needs[Path(HF_HUB_CACHE)] = plan.download_bytes
    per_device: dict[int, tuple[Path, int]] = {}
    for path, size in needs.items():
        while not path.exists():
            path = path.resolve().parent
        device = os.stat(path).st_dev
        first, total = per_device.get(device, (path, 0))
        per_device[device] = (first, total + size)
    for path, size in per_device.values():
        free = shutil.disk_usage(path).free
        if size > free:
            raise DiskSpaceError(
                f"The run needs {size / 1e9:.1f} GB at {path}, where {free / 1e9:.1f} GB are "
                "free; free some, or set --output or HF_HOME to a larger disk."
            )


def _missing(tensor: str, holder: Checkpoint, other: Checkpoint) -> MissingTensorError:
    return MissingTensorError(
        f"Tensor {tensor!r} is in {holder.name} but not in {other.name}; the two must be "
        "checkpoints of one model."
    )


def _decide(
    architecture: Architecture, tensor: str, shard: str, info: TensorInfo, twin: str | None
) -> Operation:
    parameter = architecture.parameter(tensor)
    linear = architecture.linear_of(tensor)
    if twin is None:
        reason = "the base has no tensor of its own for it (tied or derived)"
    elif parameter is None:
        reason = "transformers merges, splits or ignores it at load"
    elif info.dtype not in FLOATS:
        reason = "not floating point"
    elif linear is not None:
        module, kind = linear
        return Operation(tensor, shard, info, twin, module, kind.transposed)
    elif parameter == architecture.embedding:
        reason = "token embedding"
    elif parameter == architecture.head:
        reason = "LM head"
    elif len(info.shape) < 2:
        reason = "bias" if parameter.endswith("bias") else "norm or other vector"
    else:
        reason = "not the weight of a linear layer"
    return Operation(tensor, shard, info, twin, None, reason=reason)


def _sort_files(unlearned: Checkpoint) -> tuple[tuple[str, ...], dict[str, str]]:
    carried, left_behind = [], {}
    for name in sorted(unlearned.files.sizes):
        base = name.rpartition("/")[2]
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
        elif name.startswith("runs/") or ".tfevents." in base:
            left_behind[name] = "a log of the training machine"
        else:
            carried.append(name)
    return tuple(carried), left_behind


def _statistics_bytes(architecture: Architecture) -> int:
    # Modules of one parent with inputs of one size usually share a site.
    sites = {
        (name.rpartition(".")[0], linear.features) for name, linear in architecture.linears.items()
    }
    return sum(4 * features**2 for _, features in sites)
