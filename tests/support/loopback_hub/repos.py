"""Repos, their commits and the files in them, all in memory but for what is LFS."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import BinaryIO

from support.loopback_hub.messages import HubError
from support.loopback_hub.users import User

EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)  # commits are dated from here, a minute apart
LFS_SIZE = 10_000_000  # a bigger file is LFS whatever its name
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".npz", ".parquet", ".pt", ".safetensors", ".zip")
GIT_ATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)


@dataclass(frozen=True)
class Blob:
    """One version of a file: its bytes or, for an LFS file, where they lie."""

    content: bytes | Path
    size: int
    oid: str  # the id git gives it; for an LFS file, the id of its pointer
    sha256: str | None = None  # of LFS files only
    xet_hash: str | None = None
    pointer_size: int = 0

    @classmethod
    def regular(cls, content: bytes) -> Blob:
        return cls(content, len(content), git_oid(content))

    @classmethod
    def lfs(cls, path: Path, xet_hash: str | None = None) -> Blob:
        sha256, size = path.name, path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(path, size, git_oid(pointer.encode()), sha256, xet_hash, len(pointer))

    def open(self) -> BinaryIO:
        content = self.content
        return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")

    def read(self) -> bytes:
        with self.open() as stream:
            return stream.read()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    message: str
    description: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    status: str = "open"


@dataclass
class Repo:
    kind: str  # "model" or "dataset"
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)  # what an lfsFile operation may name
    xet_uploads: list[Path] = field(default_factory=list)  # stores lent to uploading clients
    pull_requests: list[PullRequest] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"datasets/{self.id}" if self.kind == "dataset" else self.id

    def ref(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((r for r in names if r in self.refs), None)

    def authored(self, revision: str, user: User | None) -> bool:
        """Whether a revision is a pull request of the user's own."""
        return any(
            revision == f"refs/pr/{pr.num}" and user is not None and pr.author == user.name
            for pr in self.pull_requests
        )

    def at(self, revision: str) -> Commit:
        ref = self.ref(revision)
        sha = self.refs[ref] if ref else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        line = [self.at(revision)]
        while parent := line[-1].parent:
            line.append(self.commits[parent])
        return line[::-1]

    def commit(
        self,
        ref: str,
        files: Mapping[str, Blob],
        parent: Commit | None,
        message: str,
        description: str = "",
        author: str = "",
    ) -> Commit:
        root = parent.sha if parent else f"{self.kind} {self.id}"
        content = [root, message, description, *(f"{p} {files[p].oid}" for p in sorted(files))]
        sha = hashlib.sha1("\n".join(content).encode()).hexdigest()
        date = f"{EPOCH + timedelta(minutes=len(self.commits)):%Y-%m-%dT%H:%M:%S.000Z}"
        before = parent.sha if parent else None
        made = Commit(sha, before, message, description, author, date, dict(files))
        self.commits[sha], self.refs[ref] = made, sha
        return made


def commit_target(repo: Repo, revision: str, parent: str | None, as_pr: bool) -> tuple[str, Commit]:
    """The ref a commit goes to, and the commit it builds on."""
    if as_pr:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        return f"refs/pr/{number}", repo.at(parent or revision)
    head, ref = repo.at(revision), repo.ref(revision)
    if ref is None:
        raise HubError(400, f"{revision} is no branch to commit to")
    if parent not in (None, head.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    return ref, head
