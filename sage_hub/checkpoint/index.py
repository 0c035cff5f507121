"""A checkpoint as an index of tensors: which one lies in which shard, read from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from sage_hub.checkpoint.architecture import Architecture, Place, architecture_of, build_empty
from sage_hub.checkpoint.coverage import check_covered
from sage_hub.checkpoint.dequantized import Dequantized, dequantized
from sage_hub.checkpoint.files import Files, digest, open_files, read_json
from sage_hub.checkpoint.layouts import read_headers
from sage_hub.checkpoint.pickled import Unpickled, unpickled
from sage_hub.checkpoint.quantized import refuse_quantized
from sage_hub.checkpoint.tensorfile import (
    DTYPES,
    FLOATS,
    Header,
    RowReader,
    TensorInfo,
    check_names,
)
from sage_hub.errors import (
    ArchitectureError,
    CorruptCheckpointError,
    NotFoundError,
)
from sage_hub.runtime.progress import SILENT, Progress

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
NAMED_TEMPLATES = "additional_chat_templates/"
HASHING = 4  # files at a time


@dataclass(frozen=True)
class Checkpoint:
    """One side of the update: its files, and which tensor lies in which shard."""

    files: Files
    headers: dict[str, Header]  # shard file -> its header, in the order of the index
    # Whose tokenizer is used, if not its own.
    tokenizer: Files | None = field(default=None, kw_only=True)
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
            with self.files.open(shard) as reader:
                if reader.header.tensors != self.headers[shard].tensors:
                    raise CorruptCheckpointError(
                        f"{shard} of {self.name} changed since its header was read; start again."
                    )
                yield reader
        finally:
            self.files.close(shard)

    def passing(self, folder: Path) -> Checkpoint:
        """The same, keeping a downloaded shard, in `folder`, only while it is open."""
        return replace(self, files=self.files.passing(folder))

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the config file says. Raises NotFoundError or CorruptCheckpointError."""
        return read_json(self.files, self.config_file)

    def empty_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model that the config describes, its weights on "meta"; a new one at each call.

        They are of the type `dtype`, or of the stored one. Raises ArchitectureError for one that
        transformers does not know without remote code.
        """
        self.config  # noqa: B018 - its own errors are clearer than transformers'
        infos = (info for header in self.headers.values() for info in header.tensors.values())
        first = next((DTYPES[i.dtype] for i in infos if i.dtype in FLOATS), torch.float32)
        return build_empty(self.files.path("config.json").parent, self.name, first, dtype)

    @cached_property
    def architecture(self) -> Architecture:
        """The parameters of its model and where tensors lie in them; no weight is read."""
        return architecture_of(self.empty_model())

    @cached_property
    def places(self) -> dict[str, Place | None]:
        """Tensor name -> where it lies in the model, None if in no rows of it.

        Raises ArchitectureError for one that does not fit in. An empty one lies nowhere.
        """
        found: dict[str, Place | None] = {}
        for tensor in self.shard_of:
            shape = self.info(tensor).shape
            try:
                found[tensor] = None if 0 in shape else self.architecture.place(tensor, shape)
            except ArchitectureError as error:
                raise ArchitectureError(f"{self.name}: {error}") from None
        return found

    @cached_property
    def holders(self) -> dict[str, list[str]]:
        """Parameter -> the tensors that hold rows of it, in order."""
        found: dict[str, list[tuple[int, str]]] = {}
        for tensor, place in self.places.items():
            if place is not None:
                found.setdefault(place.parameter, []).append((place.start, tensor))
        return {name: [tensor for _, tensor in sorted(own)] for name, own in found.items()}

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
        """Whether there is a tokenizer, as of adapters there need not be."""
        return any(name in TOKENIZER_FILES for name in self.tokenizer_files)

    @property
    def read_from(self) -> Files:
        """The files that its tokenizer is among."""
        return self.tokenizer or self.files

    @property
    def tokenizer_files(self) -> list[str]:
        """The tokenizer's files, and those of chat templates that have a name."""
        there = self.read_from.sizes
        named = [name for name in there if name.startswith(NAMED_TEMPLATES)]
        return [*(name for name in TOKENIZER_FILES if name in there), *named]

    def tokenizer_fingerprint(self) -> str:
        """A SHA-256 over the tokenizer's files."""
        names = self.tokenizer_files
        return digest({name: self.read_from.sha256(name) for name in names})

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError if a file, or one of its tokenizer, is not what it was."""
        self.files.check_unchanged()
        self.read_from.check_unchanged()

    def tokenizer_folder(self) -> Path:
        """A local folder with the tokenizer, and the config beside it. Raises NotFoundError."""
        if not self.has_tokenizer:
            raise NotFoundError(
                f"{self.name} has no tokenizer, and nothing else that was given has one; name a "
                "repo or folder that has the model's with --tokenizer."
            )
        config = ["config.json"] * ("config.json" in self.read_from.sizes)
        return self.read_from.folder([*config, *self.tokenizer_files])

    def reading_with(self, named: str | None, others: Iterable[Checkpoint] = ()) -> Checkpoint:
        """The same with the tokenizer that `named` names, else its own, else one of `others`.

        Raises NotFoundError if `named` has none.
        """
        if named is not None:
            files = open_files(named)
            if not any(name in files.sizes for name in TOKENIZER_FILES):
                raise NotFoundError(f"--tokenizer {named}: there is no tokenizer in {files.name}.")
            return replace(self, tokenizer=files)
        if self.has_tokenizer:
            return self
        found = (other for other in others if other.has_tokenizer)
        return next((replace(self, tokenizer=other.files) for other in found), self)


def open_checkpoint(text: str, *, pickled: bool = False, dequantize: bool = False) -> Checkpoint:
    """Open the checkpoint that `text` names: config, index and headers, no weights.

    With `pickled`, weights that are there as pickles alone are read too, and with `dequantize`
    those that are quantized in a known way. Raises the errors of `sage_hub.errors` for all that
    would stop a run later: missing, private, pickled, quantized, corrupt, not whole.
    """
    files = open_files(text)
    checkpoint = read_index(unpickled(files) if pickled else files, dequantize=dequantize)
    check_covered(checkpoint)
    return checkpoint


def read_index(files: Files, *, dequantize: bool = False) -> Checkpoint:
    """The checkpoint in `files`, of whatever model: which tensor lies in which shard."""
    if isinstance(files, Unpickled):
        checkpoint = _unpickled(files)
    else:
        checkpoint = Checkpoint(files, read_headers(files))
    if dequantize:
        checkpoint = dequantized(checkpoint)
    known = isinstance(checkpoint.files, Dequantized)
    refuse_quantized(checkpoint.name, {} if known else checkpoint.config, checkpoint.headers)
    seen: set[str] = set()
    for shard, header in checkpoint.headers.items():
        check_names(header, f"{shard} of {files.name}")
        if repeated := seen & header.tensors.keys():
            raise CorruptCheckpointError(
                f"Tensor {min(repeated)!r} of {files.name} is in {shard} and in another shard; "
                "remove the files that are not part of the model."
            )
        seen |= header.tensors.keys()
    return checkpoint


def _unpickled(files: Unpickled) -> Checkpoint:
    """Of weights that the model ties, a pickle holds one under both names, where it is one."""
    checkpoint = Checkpoint(files, {shard: files.header(shard) for shard in files.shards})
    architecture = checkpoint.architecture

    def tied(tensor: str) -> bool:
        parameter = architecture.parameter(tensor) or ""
        return len(architecture.twins(parameter)) > 1

    files = files.without_twins(tied)
    return Checkpoint(files, {shard: files.header(shard) for shard in files.shards})


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
