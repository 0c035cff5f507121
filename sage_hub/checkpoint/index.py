"""A checkpoint as an index of tensors: which one lies in which shard, read from headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from sage_hub.checkpoint.architecture import Architecture, architecture_of, build_empty
from sage_hub.checkpoint.files import Files, digest, open_files, read_json
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.tensorfile import (
    DTYPES,
    FLOATS,
    Header,
    RowReader,
    TensorInfo,
    TensorReader,
    file_sha256,
)
from sage_hub.errors import (
    CorruptCheckpointError,
    NotFoundError,
    PickledWeightsError,
    QuantizedError,
)
from sage_hub.runtime.progress import SILENT, Progress

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
HASHING = 4  # files at a time


@dataclass(frozen=True)
class Checkpoint:
    """One side of the update: its files, and which tensor lies in which shard."""

    files: Files
    headers: dict[str, Header]  # shard file -> its header, in the order of the index
    config_file: ClassVar[str] = "config.json"

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def commit(self) -> str | None:
        """The commit SHA on the Hub, None for a local folder."""
        return self.files.commit

    @property
    def shards(self) -> list[str]:
        return list(self.headers)

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """Tensor name -> the shard it lies in."""
        return {name: shard for shard, header in self.headers.items() for name in header.tensors}

    def info(self, tensor: str) -> TensorInfo:
        """Type, shape and place of `tensor`."""
        return self.headers[self.shard_of[tensor]].tensors[tensor]

    @property
    def weight_bytes(self) -> int:
        return sum(self.files.sizes[shard] for shard in self.headers)

    @contextmanager
    def open_shard(self, shard: str) -> Iterator[RowReader]:
        """Fetch `shard` if need be and open it, checking that it holds what the plan read."""
        try:
            with TensorReader(self.files.path(shard)) as reader:
                if reader.header.tensors != self.headers[shard].tensors:
                    raise CorruptCheckpointError(
                        f"{shard} of {self.name} changed since its header was read; start again."
                    )
                yield reader
        finally:
            self.files.close(shard)

    def passing(self, folder: Path) -> Checkpoint:
        """The same, keeping a downloaded shard, in `folder`, only while it is open."""
        if not isinstance(self.files, HubFiles):
            return self
        return replace(self, files=self.files.passing(folder))

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the config file says. Raises NotFoundError or CorruptCheckpointError."""
        return read_json(self.files, self.config_file)

    def empty_model(self) -> PreTrainedModel:
        """The model that the config describes, its weights on "meta"; a new one at each call.

        Raises ArchitectureError for one that transformers does not know without remote code.
        """
        self.config  # noqa: B018 - its own errors are clearer than transformers'
        infos = (info for header in self.headers.values() for info in header.tensors.values())
        first = next((DTYPES[i.dtype] for i in infos if i.dtype in FLOATS), torch.float32)
        return build_empty(self.files.path("config.json").parent, self.name, first)

    @cached_property
    def architecture(self) -> Architecture:
        """The parameters of its model and where tensors lie in them; no weight is read."""
        return architecture_of(self.empty_model())

    @property
    def of_model(self) -> Checkpoint:
        """The checkpoint whose config describes the model: of an adapter its base."""
        return self

    def fingerprint(self, progress: Progress = SILENT) -> str:
        """A SHA-256 over the config file and the bytes of all weight files.

        The same for a Hub repo and for a copy of it in a folder, so statistics of the one can be
        used with the other.
        """
        names = [self.config_file, *sorted(self.headers)]
        with ThreadPoolExecutor(HASHING) as pool:
            found = pool.map(self.files.sha256, names)
            hashes = progress.each(f"Hashing {self.name}", found, len(names), "file")
            return digest(dict(zip(names, hashes, strict=True)))

    @property
    def has_tokenizer(self) -> bool:
        """Whether it comes with a tokenizer, as adapters need not."""
        return any(name in self.files.sizes for name in TOKENIZER_FILES)

    def tokenizer_fingerprint(self) -> str:
        """A SHA-256 over the tokenizer's files."""
        names = [name for name in TOKENIZER_FILES if name in self.files.sizes]
        return digest({name: file_sha256(self.files.path(name)) for name in names})

    def tokenizer_folder(self) -> Path:
        """A local folder with the tokenizer and the config."""
        wanted = ["config.json", *TOKENIZER_FILES]
        return self.files.folder([name for name in wanted if name in self.files.sizes])

    def model_folder(self) -> Path:
        """A local folder with all that `from_pretrained` needs, and no pickles."""
        wanted = [*self.headers, "config.json", "generation_config.json", INDEX, *TOKENIZER_FILES]
        return self.files.folder([name for name in wanted if name in self.files.sizes])


def open_checkpoint(text: str) -> Checkpoint:
    """Open the checkpoint that `text` names: config, index and headers, no weights.

    Raises the errors of `sage_hub.errors` for all that would stop a run later: missing, private,
    pickled, quantized, corrupt.
    """
    files = open_files(text)
    checkpoint = Checkpoint(files, _read_headers(files))
    _refuse_quantized(checkpoint)
    seen: set[str] = set()
    for shard, header in checkpoint.headers.items():
        if repeated := seen & header.tensors.keys():
            raise CorruptCheckpointError(
                f"Tensor {min(repeated)!r} of {files.name} is in {shard} and in another shard; "
                "remove the files that are not part of the model."
            )
        seen |= header.tensors.keys()
    return checkpoint


@contextmanager
def open_shards(side: Checkpoint, limit: int | None = None) -> Iterator[Callable[[str], RowReader]]:
    """Shard file -> a reader of it, of which the last `limit` stay open.

    Without a limit all: they hold a file handle each, and no memory.
    """
    opened: dict[str, tuple[RowReader, ExitStack]] = {}

    def reader(shard: str) -> RowReader:
        if shard not in opened:
            while limit is not None and len(opened) >= limit:
                opened.pop(next(iter(opened)))[1].close()
            stack = everything.enter_context(ExitStack())
            opened[shard] = stack.enter_context(side.open_shard(shard)), stack
        return opened[shard][0]

    with ExitStack() as everything:
        yield reader


def _read_headers(files: Files) -> dict[str, Header]:
    # transformers prefers the single file where both exist; so do we.
    if SINGLE in files.sizes:
        return {SINGLE: files.header(SINGLE)}
    if INDEX in files.sizes:
        return _read_sharded_headers(files)
    if "adapter_config.json" in files.sizes:
        raise NotFoundError(
            f"{files.name} is an adapter and no whole model; only the unlearned side may be one."
        )
    if pickles := [name for name in files.sizes if name.endswith(PICKLES)]:
        raise PickledWeightsError(
            f"{files.name} has only pickled weights ({pickles[0]}), which sage-hub never loads; "
            "convert them to safetensors first (save_pretrained does)."
        )
    raise NotFoundError(f"{files.name} has neither {SINGLE} nor {INDEX}.")


def _read_sharded_headers(files: Files) -> dict[str, Header]:
    weight_map = read_json(files, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{INDEX} of {files.name} has no weight_map.")
    indexed: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CorruptCheckpointError(
                f"{INDEX} of {files.name} points to {shard!r}, which is not a safetensors file "
                "in its own folder."
            )
        if shard not in files.sizes:
            raise CorruptCheckpointError(
                f"{files.name} lacks {shard}, where its index places tensor {tensor!r}."
            )
        indexed.setdefault(shard, set()).add(tensor)
    headers = {shard: files.header(shard) for shard in sorted(indexed)}
    for shard, tensors in indexed.items():
        if absent := tensors - headers[shard].tensors.keys():
            raise CorruptCheckpointError(
                f"{shard} of {files.name} lacks tensor {min(absent)!r}, which the index "
                "places there."
            )
    return headers


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise QuantizedError(
            f"{checkpoint.name} is quantized ({kind}); pass the checkpoint it was made from, "
            "and quantize the sanitized one."
        )
    for header in checkpoint.headers.values():
        for name, info in header.tensors.items():
            if re.fullmatch(r"F[468](_\w+)?", info.dtype):
                raise QuantizedError(
                    f"Tensor {name!r} of {checkpoint.name} is stored as {info.dtype}; pass a "
                    "bfloat16, float16 or float32 checkpoint."
                )
