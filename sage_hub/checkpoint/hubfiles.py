"""The files of a Hub repo at one commit, compared with the Hub's own hashes as they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import BinaryIO, TypeVar

from huggingface_hub import DatasetInfo, HfApi, HfFileSystem, ModelInfo, hf_hub_download
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils.sha import git_hash

from sage_hub.checkpoint.location import Location
from sage_hub.checkpoint.tensorfile import (
    Header,
    OpenTensors,
    TensorReader,
    check_header,
    file_sha256,
)
from sage_hub.errors import CorruptCheckpointError, NotFoundError
from sage_hub.hub.client import DamagedError, ask, reading_token

T = TypeVar("T")

DOWNLOADING = 4  # files at a time
WEIGHTS = (".safetensors", ".bin")
AT_A_TIME = 1 << 20  # bytes of a file of which parts are read
BRANCHES = 10  # of those in which weights are looked for


class HubFiles:
    """The files of a Hub repo at one commit, resolved before the first byte is read.

    Of a folder `below` its top, if there is one, and named from there.

    What is read is compared with the hash that the Hub has of it, and fetched anew if it differs.
    """

    reading = ""

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        *,
        kind: str = "model",
        api: HfApi | None = None,
        below: str = "",
    ) -> None:
        self._kind = kind
        self._repo, self._below = repo, f"{below}/" if below else ""
        self._api = api or HfApi(token=reading_token())
        self._shown = repo if kind == "model" else f"{kind} {repo}"
        about = self._api.model_info if kind == "model" else self._api.dataset_info
        info: ModelInfo | DatasetInfo = ask(
            self._shown,
            lambda: about(repo, revision=revision, files_metadata=True),
            revision,
            first=api is None,  # one's own is of a target, which is looked at after the work too
        )
        if info.sha is None or info.siblings is None:
            raise NotFoundError(f"{repo} has no commit yet; push to it first, or check the name.")
        self.location = Location(None, repo, revision, below)
        self.name = self.location.name
        self.commit: str = info.sha
        self.private = bool(info.private)
        own = {
            s.rfilename.removeprefix(self._below): s
            for s in info.siblings
            if s.rfilename.startswith(self._below)
        }
        if below and not own:
            raise NotFoundError(
                f"{repo} has no folder {below!r} at {revision or 'main'}; check it, or pass "
                "another @revision."
            )
        self.sizes = {name: s.size or 0 for name, s in own.items()}
        self._lfs = {name: s.lfs.sha256 for name, s in own.items() if s.lfs is not None}
        self._git = {name: s.blob_id for name, s in own.items()}
        self._compared: set[str] = set()
        self._passing: Path | None = None

    def path(self, file: str) -> Path:
        passes = bool(self._passing and file.endswith(WEIGHTS) and self.missing_bytes([file]))
        anew = False

        def fetch() -> Path:
            nonlocal anew
            path = Path(
                hf_hub_download(
                    self._repo,
                    f"{self._below}{file}",
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

    def look(self, file: str, take: Callable[[BinaryIO], T]) -> T:
        system = HfFileSystem(endpoint=self._api.endpoint, token=self._api.token)
        place = "datasets/" * (self._kind == "dataset") + f"{self._repo}@{self.commit}"

        def looked() -> T:
            with system.open(f"{place}/{self._below}{file}", "rb", block_size=AT_A_TIME) as stream:
                return take(stream)

        return ask(self._shown, looked, self.commit)

    def open(self, file: str) -> AbstractContextManager[OpenTensors]:
        return TensorReader(self.path(file))

    def header(self, file: str) -> Header:
        try:
            found = ask(
                self._shown,
                lambda: self._api.parse_safetensors_file_metadata(
                    self._repo, f"{self._below}{file}", revision=self.commit
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

    def check_unchanged(self) -> None:
        pass  # a commit stays as it is

    def missing_bytes(self, files: list[str]) -> int:
        from huggingface_hub import try_to_load_from_cache

        return sum(
            self.sizes[file]
            for file in files
            if not isinstance(
                try_to_load_from_cache(
                    self._repo,
                    f"{self._below}{file}",
                    revision=self.commit,
                    repo_type=self._kind,
                ),
                (str, Path),
            )
        )

    def close(self, file: str) -> None:
        if self._passing is not None:
            (self._passing / f"{self._below}{file}").unlink(missing_ok=True)

    def other_branches(self, wanted: Callable[[Sequence[str]], object]) -> list[str]:
        """Branches whose files are what is `wanted`; the first BRANCHES are looked at."""
        refs = ask(self._shown, lambda: self._api.list_repo_refs(self._repo, repo_type=self._kind))
        found = []
        for branch in [b.name for b in refs.branches if b.target_commit != self.commit][:BRANCHES]:
            files = HubFiles(self._repo, branch, kind=self._kind, api=self._api)
            if wanted([*files.sizes]):
                found.append(branch)
        return found
