"""The Hub itself: its two servers, its repos, and what a test does to them."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from support.loopback_hub import accounts, committing, managing, reading, storage, uploading
from support.loopback_hub.faults import Faults
from support.loopback_hub.messages import Json, Request
from support.loopback_hub.repos import GIT_ATTRIBUTES, Blob, Commit, Repo, commit_target, is_lfs
from support.loopback_hub.server import Server
from support.loopback_hub.users import TOKENS, User
from support.loopback_hub.xet import XetStores

Files = Mapping[str, bytes]
HUB_ROUTES = (
    *accounts.ROUTES,
    *managing.ROUTES,
    *reading.ROUTES,
    *uploading.ROUTES,
    *committing.ROUTES,
)


class LoopbackHub(Faults):
    """The Hub: `with LoopbackHub() as hub:`, then `HfApi(endpoint=hub.url, token="hf_writer")`.

    A client that has hf_xet uploads nothing to a hub without Xet: give it HF_HUB_DISABLE_XET=1.
    Files over `multipart_threshold` go up in parts of `part_size`; None means that none do.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        tokens: Mapping[str, User] = TOKENS,
        xet: bool = False,
        multipart_threshold: int | None = None,
        part_size: int = 5_000_000,
    ) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory(prefix="loopback-hub-")
        folder = folder or Path(self._temporary.name)
        self.tokens = dict(tokens)
        self.multipart_threshold, self.part_size = multipart_threshold, part_size
        self.over = threading.Event()  # nobody waits any more
        self.hangs_for = 2.0  # seconds
        self.lfs = storage.LfsStore(folder / "lfs")
        self.xet = XetStores(folder / "xet") if xet else None
        self._servers = (
            Server(self, HUB_ROUTES, storage=False),
            Server(self, storage.ROUTES, storage=True),
        )
        self.url, self.storage_url = (server.url for server in self._servers)
        self.reset()

    def reset(self) -> None:
        """Forget all repos, faults and recorded requests."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.calm()
        self.trusting: set[str] = set()  # repos that trust the CI's job

    def start(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.over.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._temporary.cleanup()

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def add_repo(
        self,
        repo_id: str,
        files: Files | Path,
        repo_type: str = "model",
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """A repo with these files, in a commit on top of the one with .gitattributes. Its sha."""
        self.new_repo(repo_type, repo_id, private=private, gated=gated)
        return self.add_commit(repo_id, files, repo_type)

    def add_commit(
        self,
        repo_id: str,
        files: Files | Path,
        repo_type: str = "model",
        *,
        revision: str = "main",
        message: str = "Add files",
    ) -> str:
        """Add or replace these files at a branch, as if someone else pushed them. The sha."""
        repo = self.repos[repo_type, repo_id]
        sources = _walk(files) if isinstance(files, Path) else files
        with self.lock:
            ref, parent = commit_target(repo, revision, None, as_pr=False)
            added = {path: self._blob(repo, path, source) for path, source in sources.items()}
            return repo.commit(ref, {**parent.files, **added}, parent, message).sha

    def commits(
        self, repo_id: str, repo_type: str = "model", *, revision: str = "main"
    ) -> list[Commit]:
        """The commits that led to a revision, newest last."""
        return self.repos[repo_type, repo_id].history(revision)

    def files(
        self, repo_id: str, revision: str = "main", repo_type: str = "model"
    ) -> dict[str, bytes]:
        """Every file at a revision, .gitattributes included."""
        commit = self.repos[repo_type, repo_id].at(revision)
        return {path: blob.read() for path, blob in commit.files.items()}

    def new_repo(
        self, kind: str, repo_id: str, *, private: bool = False, gated: bool = False
    ) -> Repo:
        """Like the real Hub, start a repo with a commit of its .gitattributes."""
        with self.lock:
            if (kind, repo_id) in self.repos:
                raise ValueError(f"{kind} {repo_id} exists already")
            repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private, gated)
            files = {".gitattributes": Blob.regular(GIT_ATTRIBUTES.encode())}
            repo.commit("refs/heads/main", files, None, "initial commit")
            return repo

    def lfs_blob(self, path: Path) -> Blob:
        return Blob.lfs(path, self.xet.hash(path) if self.xet else None)

    def collect_xet_upload(self, repo: Repo, value: Json) -> Blob | None:
        """Take a file that a client uploaded by Xet over into the LFS store."""
        if self.xet is None or not (found := self.xet.find(repo.xet_uploads, value["oid"])):
            return None
        store, xet_hash = found
        path = self.lfs.path(value["oid"])
        self.xet.fetch(store, xet_hash, value["size"], path)
        repo.lfs[path.name] = Blob.lfs(path, xet_hash)
        return repo.lfs[path.name]

    def _blob(self, repo: Repo, name: str, source: bytes | Path) -> Blob:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        chunks = [source] if isinstance(source, bytes) else storage.file_chunks(source)
        if not is_lfs(name, size):
            return Blob.regular(b"".join(chunks))
        path = self.lfs.add(chunks)
        repo.lfs[path.name] = self.lfs_blob(path)
        return repo.lfs[path.name]


def _walk(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
