"""A checkpoint as an index of tensors, in a local folder or a Hub repo pinned to one commit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils.sha import git_hash

from sage_hub.errors import (
    CorruptCheckpointError,
    NotFoundError,
    PickledWeightsError,
    QuantizedError,
    UsageError,
)
from sage_hub.hub import DamagedError, ask, reading_token
from sage_hub.progress import SILENT, Progress
from sage_hub.tensorfile import (
    Header,
    RowReader,
    TensorInfo,
    TensorReader,
    check_header,
    file_sha256,
    read_header,
)

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
DOWNLOADING = 4
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Location:
    """Where the user says something lies: a local folder, or a Hub repo at a revision."""

    folder: Path | None
    repo: str = ""
    revision: str | None = None

    @property
    def name(self) -> str:
        """A name fit to publish: the repo id, or the folder's own name without its path."""
        return self.repo if self.folder is None else self.folder.resolve().name


def parse_location(text: str) -> Location:
    """Read `org/name`, `org/name@revision` or a folder.

    As everywhere in the ecosystem a folder is a path that exists or starts with `./`, `../`, `/`
    or `~`. Raises UsageError for anything else.
    """
    path = Path(text).expanduser()
    if path.is_dir() or text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        return Location(folder=path)
    repo, _, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or (not revision and "@" in text):
        raise UsageError(
            f"{text!r} is neither a folder nor a Hub repo; write org/name, org/name@revision, "
            "or a path that starts with ./ or /."
        )
    return Location(folder=None, repo=repo, revision=revision or None)


class Files(Protocol):
    """The files of one checkpoint, wherever they are."""

    @property
    def name(self) -> str:
        """A name fit to publish: no path of this machine."""

    @property
    def commit(self) -> str | None:
        """The commit SHA on the Hub, None for a folder."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every file with its size in bytes."""

    def path(self, file: str) -> Path:
        """A local path with the bytes of `file`, fetched if need be."""

    def folder(self, files: list[str]) -> Path:
        """A local folder that holds `files`."""

    def header(self, file: str) -> Header:
        """The header of a safetensors file, without its data."""

    def sha256(self, file: str) -> str:
        """The SHA-256 of `file` in hex."""

    def missing_bytes(self, files: list[str]) -> int:
        """How many bytes of `files` would have to be downloaded."""

    def close(self, file: str) -> None:
        """`file` is not needed for now."""


def _is_bookkeeping(parts: Sequence[str]) -> bool:
    """Whether a file is git's, or what `hf download` keeps beside what it has fetched."""
    return ".git" in parts or parts[:2] == (".cache", "huggingface")


class LocalFiles:
    """The files below a local folder."""

    commit: str | None = None

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise NotFoundError(f"The folder {folder} does not exist.")
        _check_links(folder)
        self._folder = folder
        self.name = folder.resolve().name
        self.sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not _is_bookkeeping(path.relative_to(folder).parts)
        }
        self._hashes: dict[str, str] = {}

    def path(self, file: str) -> Path:
        return self._folder / file

    def folder(self, files: list[str]) -> Path:
        return self._folder

    def header(self, file: str) -> Header:
        return read_header(self._folder / file)

    def sha256(self, file: str) -> str:
        if file not in self._hashes:
            self._hashes[file] = file_sha256(self._folder / file)
        return self._hashes[file]

    def missing_bytes(self, files: list[str]) -> int:
        return 0

    def close(self, file: str) -> None:
        pass


def _check_links(folder: Path) -> None:
    """Raise UsageError if a file of `folder` is a link out of it.

    A snapshot in the Hub's cache, whose files are links to the blobs beside it, is whole.
    """
    root = folder.resolve()
    places = [root]
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            places.append(place.parent.with_name("blobs"))
    for path in folder.rglob("*"):
        if path.is_file() and not any(path.resolve().is_relative_to(p) for p in places):
            raise UsageError(
                f"{path.relative_to(folder)} of {folder.name} is a link to a file outside the "
                "folder; replace it by a copy of the file."
            )


class HubFiles:
    """The files of a Hub repo at one commit, resolved before the first byte is read.

    What is read is compared with the hash that the Hub has of it, and fetched anew if it differs.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        *,
        kind: str = "model",
        api: HfApi | None = None,
    ) -> None:
        self._kind = kind
        self._api = api or HfApi(token=reading_token())
        self._shown = repo if kind == "model" else f"{kind} {repo}"
        about = self._api.model_info if kind == "model" else self._api.dataset_info
        info: ModelInfo | DatasetInfo = ask(
            self._shown,
            lambda: about(repo, revision=revision, files_metadata=True),
            revision,
        )
        if info.sha is None or info.siblings is None:
            raise NotFoundError(f"{repo} has no commit yet.")
        self.name = repo
        self.commit: str = info.sha
        self.private = bool(info.private)
        self.sizes = {s.rfilename: s.size or 0 for s in info.siblings}
        self._lfs = {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs is not None}
        self._git = {s.rfilename: s.blob_id for s in info.siblings}
        self._compared: set[str] = set()
        self._passing: Path | None = None

    def path(self, file: str) -> Path:
        passes = bool(
            self._passing and file.endswith(".safetensors") and self.missing_bytes([file])
        )
        anew = False

        def fetch() -> Path:
            nonlocal anew
            path = Path(
                hf_hub_download(
                    self.name,
                    file,
                    repo_type=self._kind,
                    revision=self.commit,
                    local_dir=self._passing if passes else None,
                    force_download=anew,
                    token=self._api.token,
                )
            )
            if passes or file not in self._compared:
                anew = True
                self._compare(file, path)
                self._compared.add(file)
            return path

        return ask(self._shown, fetch, self.commit)

    def _compare(self, file: str, path: Path) -> None:
        """Raise DamagedError if `path` has other bytes than `file` has on the Hub."""
        if file in self._lfs:
            same = file_sha256(path) == self._lfs[file]
        else:
            same = self._git[file] in (None, git_hash(path.read_bytes()))
        if not same:
            raise DamagedError(f"{file} has another hash than on the Hub")

    def passing(self, folder: Path) -> HubFiles:
        """The same files, of which weights come into `folder` and go when they are closed.

        What is in the cache already is used from there, and stays.
        """
        files = copy(self)
        files._passing = folder
        return files

    def folder(self, files: list[str]) -> Path:
        with ThreadPoolExecutor(DOWNLOADING) as pool:
            paths = list(pool.map(self.path, files))
        return paths[0].parents[files[0].count("/")]

    def header(self, file: str) -> Header:
        try:
            found = ask(
                self._shown,
                lambda: self._api.parse_safetensors_file_metadata(
                    self.name, file, revision=self.commit
                ),
                self.commit,
            )
        except (SafetensorsParsingError, TypeError, AttributeError):
            # The client catches some shapes of garbage and stumbles over others.
            raise CorruptCheckpointError(
                f"{file} in {self.name} is not a valid safetensors file (its header cannot be "
                "read); upload it again."
            ) from None
        fields = {
            name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for name, t in found.tensors.items()
        }
        # Where the data starts is known only once the file is here, and needed only then.
        return check_header(fields, found.metadata or {}, 0, f"{file} in {self.name}")

    def sha256(self, file: str) -> str:
        if file in self._lfs:
            return self._lfs[file]
        return file_sha256(self.path(file))

    def missing_bytes(self, files: list[str]) -> int:
        from huggingface_hub import try_to_load_from_cache

        return sum(
            self.sizes[file]
            for file in files
            if not isinstance(
                try_to_load_from_cache(self.name, file, revision=self.commit, repo_type=self._kind),
                (str, Path),
            )
        )

    def close(self, file: str) -> None:
        if self._passing is not None:
            (self._passing / file).unlink(missing_ok=True)


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


def open_files(text: str) -> Files:
    """The files of the repo or folder that `text` names. Raises NotFoundError or AccessError."""
    location = parse_location(text)
    if location.folder is None:
        return HubFiles(location.repo, location.revision)
    return LocalFiles(location.folder)


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


def read_json(files: Files, name: str) -> dict[str, Any]:
    """The JSON object in file `name`. Raises NotFoundError or CorruptCheckpointError."""
    if name not in files.sizes:
        raise NotFoundError(f"{files.name} has no {name}; it is not a transformers checkpoint.")
    try:
        content = json.loads(files.path(name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{name} of {files.name} is not a JSON object.")
    return content


def digest(content: Mapping[str, Any]) -> str:
    """A SHA-256 over `content`, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
