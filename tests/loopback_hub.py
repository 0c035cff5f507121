"""A Hugging Face Hub on 127.0.0.1 that tests read from and publish to with the real client.

It speaks the part of the protocol that huggingface_hub uses for model and dataset repos, keeps
every commit and records every request. Two servers run, the Hub and the storage of LFS bytes:
they differ in port, so the client treats them as it treats huggingface.co and its CDN. A handler
is a plain function of the hub and a call; `HUB_ROUTES` and `STORAGE_ROUTES` list them all.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from email.message import Message
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

CHUNK = 1 << 20
EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)  # commits are dated from here, a minute apart
LFS_SIZE = 10_000_000  # a bigger file is LFS whatever its name
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".npz", ".parquet", ".pt", ".safetensors", ".zip")
GIT_ATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)

Json = dict[str, Any]
Files = Mapping[str, bytes]
Stream = BinaryIO | io.BufferedIOBase


@dataclass(frozen=True)
class User:
    """Who a token stands for. The role is the token's; `orgs` are namespaces of the user's, too.

    A fine-grained token writes in the namespaces and repos of `scopes` alone, and that of a
    trusted publisher in one repo, without being anybody.
    """

    name: str
    role: Literal["read", "write", "fineGrained"] = "write"
    orgs: tuple[str, ...] = ()
    role_in_orgs: Literal["admin", "write", "contributor", "read"] = "write"
    scopes: tuple[str, ...] = ()
    only: str = ""

    def owns(self, repo_id: str) -> bool:
        namespace = repo_id.split("/")[0]
        return repo_id == self.only or namespace in (self.name, *self.orgs)

    def writes(self, repo_id: str) -> bool:
        if self.only:
            return repo_id == self.only
        if self.role == "fineGrained":
            return repo_id in self.scopes or repo_id.split("/")[0] in self.scopes
        reads_only = self.role_in_orgs == "read" and repo_id.split("/")[0] in self.orgs
        return self.role == "write" and not reads_only


TOKENS: Mapping[str, User] = {
    "hf_writer": User("alice", "write", ("org",)),
    "hf_reader": User("alice", "read", ("org",)),
    "hf_stranger": User("mallory", "write"),
    "hf_guest": User("bob", "write", ("org",), "read"),
    "hf_fine": User("alice", "fineGrained", ("org",), scopes=("org",)),
    "hf_narrow": User("alice", "fineGrained", ("org",), scopes=("org/one", "other")),
}
CI_SECRET = "ci-request-token"  # with which a job asks its CI for an id token
ID_TOKEN = "loopback-id-token"  # what the CI of a trusted publisher says of itself


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


class LfsStore:
    """Files named by their SHA-256, so that a broken upload cannot stand in for a whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def add(self, chunks: Iterable[bytes]) -> Path:
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as stream:
            for chunk in chunks:
                digest.update(chunk)
                stream.write(chunk)
        return Path(stream.name).replace(self.path(digest.hexdigest()))


class XetStores:
    """Local Xet stores, a fresh one for every token: a process that opens a store locks it."""

    def __init__(self, folder: Path) -> None:
        import hf_xet  # type: ignore[import-untyped]  # not sooner: it opens a log at import

        self.folder = folder
        self._hf_xet: Any = hf_xet
        self._numbers = itertools.count()

    @staticmethod
    def access(store: Path) -> Json:
        expiry = int(time.time()) + 3600
        return {"endpoint": f"local://{store}", "token": "t", "token_expiry_unix_secs": expiry}

    def lend(self, blobs: Iterable[Blob] = ()) -> Path:
        """A new store that holds these files."""
        store = self.folder / str(next(self._numbers))
        store.mkdir(parents=True)
        if files := [str(blob.content) for blob in blobs if blob.xet_hash]:
            with self._hf_xet.XetSession().new_upload_commit(**self.access(store)) as upload:
                for file in files:
                    upload.start_upload_file(file)
        return store

    def hash(self, path: Path) -> str:
        return str(self._hf_xet.hash_files([str(path)])[0].hash)

    def find(self, stores: Iterable[Path], sha256: str) -> tuple[Path, str] | None:
        """The store that a client put this file into, and the file's Xet hash."""
        for store in stores:
            for shard in store.rglob("shards/*.mdb"):
                if xet_hash := dict(_shard_files(shard.read_bytes())).get(sha256):
                    return store, xet_hash
        return None

    def fetch(self, store: Path, xet_hash: str, size: int, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            # The client may hold the lock still, so open a copy. The lock is on the database file.
            copy = shutil.copytree(store, Path(folder) / "store", copy_function=_link_or_copy)
            session, info = self._hf_xet.XetSession(), self._hf_xet.XetFileInfo(xet_hash, size)
            with session.new_file_download_group(**self.access(copy)) as download:
                download.start_download_file(info, str(target))


def _link_or_copy(source: str, target: str) -> None:
    (shutil.copyfile if source.endswith(".redb") else os.link)(source, target)


def _shard_files(shard: bytes) -> Iterator[tuple[str, str]]:
    """SHA-256 and Xet hash of each file in a shard, as hf_xet 1.8 lays it out in rows of 48 bytes.

    A commit names a file by its SHA-256 only; the shard is where the client says both.
    """
    row, has_verification, has_sha256 = 48, 1 << 31, 1 << 30
    at = row  # behind the shard's own header
    while shard[at : at + 32] != b"\xff" * 32:
        xet_hash = _xet_hex(shard[at : at + 32])
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        at += row * (1 + segments * (2 if flags & has_verification else 1))
        if flags & has_sha256:
            yield _xet_hex(shard[at : at + 32]), xet_hash
            at += row


def _xet_hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


@dataclass(frozen=True)
class Request:
    """A request that was answered; `storage` tells which of the two servers it went to."""

    method: str
    path: str  # as sent, with its query
    headers: dict[str, str]  # names in lower case
    status: int
    storage: bool


@dataclass
class Response:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stream: BinaryIO = field(default_factory=io.BytesIO)
    length: int = 0  # bytes to send from where the stream stands


class HubError(Exception):
    """An answer other than success, in the headers that the client reads its exceptions from."""

    def __init__(
        self, status: int, text: str, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        message = text.encode("ascii", "backslashreplace").decode()  # headers know no Unicode
        self.headers = {**(headers or {}), "X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code

    def response(self) -> Response:
        return as_json({"error": str(self)}, self.status, self.headers)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value).encode()
    typed = {"Content-Type": "application/json", **(headers or {})}
    return Response(status, typed, io.BytesIO(body), len(body))


class Body:
    """A request's body, read once and in pieces. The client announces the size of all it sends."""

    def __init__(self, stream: Stream, headers: Message) -> None:
        self.chunks = _exactly(stream, int(headers.get("Content-Length", 0)))

    def read(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.read())


def _exactly(stream: Stream, size: int) -> Iterator[bytes]:
    while size:
        piece = stream.read(min(size, CHUNK))
        if not piece:
            raise ConnectionError("the client hung up in the middle of a body")
        size -= len(piece)
        yield piece


def _file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


@dataclass
class Call:
    """A request on its way through a handler; indexing gives the parts of its path."""

    headers: Mapping[str, str]
    parts: Mapping[str, str]
    query: Mapping[str, str]
    body: Body
    user: User | None

    def __getitem__(self, part: str) -> str:
        return self.parts[part]

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def owns(self, repo: Repo) -> bool:
        return self.user is not None and self.user.owns(repo.id)

    def require_writer(self, repo_id: str, *, anyone: bool = False) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self.user.writes(repo_id) or not (anyone or self.user.owns(repo_id)):
            raise HubError(403, "You don't have the rights to write to this repo")


def visible(hub: LoopbackHub, call: Call) -> Repo:
    """The repo that a call is about. What is hidden from the caller looks like what is missing."""
    kind = "dataset" if call["kind"] == "datasets" else "model"
    repo = hub.repos.get((kind, call["repo"]))
    if repo is None or (repo.private and not call.owns(repo)):
        raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")
    return repo


def downloadable(hub: LoopbackHub, call: Call) -> Repo:
    """As on the real Hub, gating closes the files of a repo but not its listings."""
    repo = visible(hub, call)
    if repo.gated and not call.owns(repo):
        text = f"Access to {repo.kind} {repo.id} is restricted"
        raise HubError(403 if call.user else 401, text, "GatedRepo")
    return repo


def writable(hub: LoopbackHub, call: Call, *, by_pull_request: bool = False) -> Repo:
    """Anyone with a write token may propose a change; only owners may make one."""
    repo = visible(hub, call)
    proposed = by_pull_request or repo.authored(call.parts.get("rev", ""), call.user)
    call.require_writer(repo.id, anyone=proposed)
    return repo


def whoami(hub: LoopbackHub, call: Call) -> Response:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    if call.user.only:
        raise HubError(403, "This token is nobody's")
    name, role = call.user.name, call.user.role_in_orgs
    orgs = [{"name": org, "roleInOrg": role} for org in call.user.orgs]
    token: Json = {"displayName": "t", "role": call.user.role}
    if call.user.role == "fineGrained":
        token["fineGrained"] = {
            "canReadGatedRepos": True,
            "global": [],
            "scoped": [
                {
                    "entity": {"type": "model" if "/" in scope else "org", "name": scope},
                    "permissions": ["repo.content.read", "repo.write"],
                }
                for scope in call.user.scopes
            ],
        }
    auth = {"type": "access_token", "accessToken": token}
    return as_json({"type": "user", "id": name, "name": name, "orgs": orgs, "auth": auth})


def id_token(hub: LoopbackHub, call: Call) -> Response:
    """Not the Hub's, but the CI's: what it says of the running job."""
    if call.query.get("audience") != hub.url:
        raise HubError(400, "wrong audience")
    return as_json({"value": ID_TOKEN})


def exchange_token(hub: LoopbackHub, call: Call) -> Response:
    """A token for a repo that trusts the job."""
    asked = call.body.json()
    if asked["subject_token"] != ID_TOKEN or asked["resource"] not in hub.trusting:
        raise HubError(400, "invalid_grant")
    token = "hf_jwt_" + asked["resource"].replace("/", "_")
    hub.tokens[token] = User("", "write", only=asked["resource"])
    return as_json({"access_token": token, "token_type": "bearer", "expires_in": 3600})


def auth_check(hub: LoopbackHub, call: Call) -> Response:
    repo = downloadable(hub, call)
    if call["write"]:
        call.require_writer(repo.id)
    return Response()


def discussions(hub: LoopbackHub, call: Call) -> Response:
    """One page of the pull requests; nobody discusses here."""
    repo, per_page, page = visible(hub, call), 2, int(call.query.get("p", 0))
    rows = [
        {
            "num": pr.num,
            "title": pr.title,
            "author": {"name": pr.author},
            "createdAt": f"{EPOCH:%Y-%m-%dT%H:%M:%S.000Z}",
            "status": pr.status,
            "repo": {"name": repo.id, "type": repo.kind},
            "isPullRequest": True,
        }
        for pr in repo.pull_requests
        if call.query.get("status") in (None, pr.status)
        and call.query.get("author") in (None, pr.author)
    ]
    shown = rows[page * per_page :][:per_page]
    return as_json({"count": len(rows), "start": page * per_page, "discussions": shown})


def validate_yaml(hub: LoopbackHub, call: Call) -> Response:
    """Is the front matter of a README a YAML mapping? The real Hub also checks its fields."""
    content = call.body.json()["content"]
    front_matter = re.match(r"---\n(.*?)^---", content, re.DOTALL | re.MULTILINE)
    try:
        dict(yaml.safe_load(front_matter[1]) or {} if front_matter else {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return as_json({"errors": [], "warnings": []})


def _named_repo(call: Call) -> tuple[str, str, Json]:
    asked = call.body.json()
    namespace = asked.get("organization") or (call.user.name if call.user else "")
    repo_id = f"{namespace}/{asked['name']}"
    call.require_writer(repo_id)
    return asked.get("type", "model"), repo_id, asked


def create_repo(hub: LoopbackHub, call: Call) -> Response:
    kind, repo_id, asked = _named_repo(call)
    with hub.lock:
        if old := hub.repos.get((kind, repo_id)):
            # With `exist_ok=True` the client goes on, and wants the url.
            text = f"You already created this {kind} repo"
            return as_json({"error": text, "url": f"{hub.url}/{old.path}"}, 409)
        repo = hub.new_repo(kind, repo_id, private=asked.get("visibility") == "private")
    return as_json({"url": f"{hub.url}/{repo.path}", "name": repo.id})


def delete_repo(hub: LoopbackHub, call: Call) -> Response:
    kind, repo_id, _ = _named_repo(call)
    if hub.repos.pop((kind, repo_id), None) is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return Response()


def repo_info(hub: LoopbackHub, call: Call) -> Response:
    repo = visible(hub, call)
    commit = repo.at(call["rev"] or "main")
    names = {"_id": git_oid(repo.path.encode()), "id": repo.id, "author": repo.id.split("/")[0]}
    state = {"sha": commit.sha, "lastModified": commit.date, "tags": [], "downloads": 0}
    access = {"private": repo.private, "gated": "manual" if repo.gated else False}
    siblings = [
        {"rfilename": path, **(_blob_fields(blob) if call.flag("blobs") else {})}
        for path, blob in sorted(commit.files.items())
    ]
    return as_json({**names, **state, **access, "siblings": siblings})


def _blob_fields(blob: Blob) -> Json:
    """What listings say of a blob. Repo info and trees name some of it differently: say both."""
    fields: Json = {"oid": blob.oid, "blobId": blob.oid, "size": blob.size}
    if blob.sha256:
        sizes = {"size": blob.size, "pointerSize": blob.pointer_size}
        fields["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, **sizes}
    if blob.xet_hash:
        fields["xetHash"] = blob.xet_hash
    return fields


def _entries(commit: Commit) -> list[Json]:
    """Every file and folder of a commit."""
    folders = {str(f) for path in commit.files for f in PurePosixPath(path).parents} - {"."}
    rows: list[Json] = [
        {"type": "directory", "path": f, "oid": git_oid(f.encode()), "size": 0} for f in folders
    ]
    rows += ({"type": "file", "path": p, **_blob_fields(b)} for p, b in commit.files.items())
    return sorted(rows, key=lambda row: str(row["path"]))


def tree(hub: LoopbackHub, call: Call) -> Response:
    folder = PurePosixPath(call["path"])
    rows = _entries(visible(hub, call).at(call["rev"]))
    rows = [row for row in rows if folder in PurePosixPath(row["path"]).parents]
    if call["path"] and not rows:
        raise HubError(404, f"{folder} does not exist at {call['rev']}", "EntryNotFound")
    if not call.flag("recursive"):
        rows = [row for row in rows if PurePosixPath(row["path"]).parent == folder]
    return as_json(rows)


def paths_info(hub: LoopbackHub, call: Call) -> Response:
    commit = visible(hub, call).at(call["rev"])
    asked = parse_qs(call.body.read().decode()).get("paths", [])
    return as_json([row for row in _entries(commit) if row["path"] in asked])


def refs(hub: LoopbackHub, call: Call) -> Response:
    rows = [
        {"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha}
        for ref, sha in visible(hub, call).refs.items()
    ]

    def under(kind: str) -> list[Json]:
        return [row for row in rows if row["ref"].startswith(f"refs/{kind}/")]

    listed = {"pullRequests": under("pr")} if call.flag("include_prs") else {}
    return as_json({"branches": under("heads"), "converts": [], "tags": under("tags"), **listed})


def resolve(hub: LoopbackHub, call: Call) -> Response:
    repo = downloadable(hub, call)
    commit = repo.at(call["rev"])
    blob = commit.files.get(call["path"])
    headers = {"X-Repo-Commit": commit.sha}
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{blob.sha256 or blob.oid}"'
    if blob.sha256 is None:
        return send_file(call, blob, headers)
    headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(blob.size)}
    headers["Location"] = f"{hub.storage_url}/lfs/{blob.sha256}"
    if blob.xet_hash:
        auth = f"{hub.url}/api/{repo.kind}s/{repo.id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{auth}>; rel="xet-auth"'}
    return Response(302, headers)


def send_file(call: Call, blob: Blob, headers: Mapping[str, str]) -> Response:
    """The whole file, or the one range of it that was asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if asked is None:
        return Response(200, headers, blob.open(), blob.size)
    first, last = asked.groups()
    start = int(first) if first else max(0, blob.size - int(last))
    stop = min(int(last) + 1, blob.size) if first and last else blob.size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", "", {"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    stream = blob.open()
    stream.seek(start)
    return Response(206, headers, stream, stop - start)


def create_branch(hub: LoopbackHub, call: Call) -> Response:
    repo, ref = writable(hub, call), f"refs/heads/{call['rev']}"
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(call.body.json().get("startingPoint", "main")).sha
    return Response(201)


def create_tag(hub: LoopbackHub, call: Call) -> Response:
    repo, ref = writable(hub, call), f"refs/tags/{call.body.json()['tag']}"
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(call["rev"]).sha
    return Response(201)


def preupload(hub: LoopbackHub, call: Call) -> Response:
    repo = writable(hub, call, by_pull_request=call.flag("create_pr"))
    present = repo.at(call["rev"]).files
    asked = call.body.json()
    committed = present[".gitignore"].read().decode() if ".gitignore" in present else ""
    rules = [rule for rule in asked.get("gitIgnore", committed).splitlines() if rule]

    def verdict(path: str, size: int) -> Json:
        ignored = any(fnmatch(p, rule) for p in (path, PurePosixPath(path).name) for rule in rules)
        mode = "lfs" if is_lfs(path, size) else "regular"
        blob = present.get(path)
        known = {"oid": blob.sha256 or blob.oid} if blob else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": ignored, **known}

    return as_json({"files": [verdict(file["path"], file["size"]) for file in asked["files"]]})


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def lfs_batch(hub: LoopbackHub, call: Call) -> Response:
    asked = call.body.json()
    # What opens a pull request names no ref, and what goes on with one names its own.
    rev = asked.get("ref", {}).get("name", "")
    call = replace(call, parts={**call.parts, "rev": rev})
    repo = writable(hub, call, by_pull_request=not rev)
    verify = {"href": f"{hub.url}/{repo.path}.git/info/lfs/verify"}

    def instructions(oid: str, size: int) -> Json:
        if oid in repo.lfs:
            return {"oid": oid, "size": size}  # no actions: nothing to upload
        actions = {"upload": _upload_action(hub, oid, size), "verify": verify}
        return {"oid": oid, "size": size, "actions": actions}

    return as_json({"transfer": "basic", "objects": [instructions(**o) for o in asked["objects"]]})


def _upload_action(hub: LoopbackHub, oid: str, size: int) -> Json:
    href = f"{hub.storage_url}/lfs/{oid}"
    if hub.multipart_threshold is None or size <= hub.multipart_threshold:
        return {"href": href}
    numbers = range(1, -(-size // hub.part_size) + 1)
    parts = {f"{number:05}": f"{href}?part={number}" for number in numbers}
    return {"href": href, "header": {"chunk_size": str(hub.part_size), **parts}}


def lfs_verify(hub: LoopbackHub, call: Call) -> Response:
    repo = writable(hub, call, by_pull_request=True)
    asked = call.body.json()
    path = hub.lfs.path(asked["oid"])
    if not path.is_file() or path.stat().st_size != asked["size"]:
        raise HubError(404, f"LFS object {asked['oid']} was not uploaded")
    repo.lfs[path.name] = hub.lfs_blob(path)
    return Response()


def duplicate_lfs(hub: LoopbackHub, call: Call) -> Response:
    """Make files of this repo known to another, so that a commit there may name them."""
    source, asked = downloadable(hub, call), call.body.json()
    parts = {"kind": f"{asked['target']['type']}s", "repo": asked["target"]["name"]}
    target = writable(hub, replace(call, parts=parts), by_pull_request=True)
    wanted = {file["sha256"] for file in asked["files"]}
    target.lfs.update({oid: source.lfs[oid] for oid in wanted & source.lfs.keys()})
    failed = [{"sha256": oid, "error": "not found"} for oid in wanted - source.lfs.keys()]
    return as_json({"failed": failed})


def xet_write_token(hub: LoopbackHub, call: Call) -> Response:
    repo = writable(hub, call, by_pull_request=call.flag("create_pr"))
    store = _xet_stores(hub).lend()
    repo.xet_uploads.append(store)
    return _xet_token(store)


def xet_read_token(hub: LoopbackHub, call: Call) -> Response:
    commit = downloadable(hub, call).at(call["rev"])
    return _xet_token(_xet_stores(hub).lend(commit.files.values()))


def _xet_stores(hub: LoopbackHub) -> XetStores:
    if hub.xet is None:
        raise HubError(404, "This loopback Hub runs without Xet: set HF_HUB_DISABLE_XET=1")
    return hub.xet


def _xet_token(store: Path) -> Response:
    """In the body for hf_xet, in the headers for huggingface_hub."""
    url, token, expiry = XetStores.access(store).values()
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token}
    headers["X-Xet-Token-Expiration"] = str(expiry)
    return as_json({"casUrl": url, "accessToken": token, "exp": expiry}, headers=headers)


def create_commit(hub: LoopbackHub, call: Call) -> Response:
    as_pr = call.flag("create_pr")
    repo = writable(hub, call, by_pull_request=as_pr)
    header, *operations = (json.loads(line) for line in call.body.read().splitlines())
    about = header["value"]
    with hub.lock:
        ref, parent = _commit_target(repo, call["rev"], about.get("parentCommit"), as_pr)
        files = dict(parent.files)
        for operation in operations:
            OPERATIONS[operation["key"]](hub, repo, files, operation["value"])
        author = call.user.name if call.user else ""
        made = repo.commit(ref, files, parent, about["summary"], about["description"], author)
        if as_pr:
            number = int(ref.removeprefix("refs/pr/"))
            repo.pull_requests.append(PullRequest(number, about["summary"], author))
    url = f"{hub.url}/{repo.path}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}"}
    if as_pr:
        number = ref.removeprefix("refs/pr/")
        answer |= {"pullRequestUrl": f"{url}/discussions/{number}", "pullRequestNum": number}
    return as_json(answer)


def _commit_target(
    repo: Repo, revision: str, parent: str | None, as_pr: bool
) -> tuple[str, Commit]:
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


def add_file(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))


def add_lfs_file(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    blob = repo.lfs.get(value["oid"]) or hub.collect_xet_upload(repo, value)
    if blob is None:
        text = f"{value['path']}: the LFS pointer pointed to a file that does not exist"
        raise HubError(400, text)
    files[value["path"]] = blob


def delete_file(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    if files.pop(value["path"], None) is None:
        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")


def delete_folder(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    doomed = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
    if not doomed:
        raise HubError(404, "A folder with this name doesn't exist", "EntryNotFound")
    for path in doomed:
        del files[path]


# A copy has no key of its own: the client sends it as the file, or the LFS file, that it copies.
OPERATIONS: Mapping[str, Callable[[LoopbackHub, Repo, dict[str, Blob], Json], None]] = {
    "file": add_file,
    "lfsFile": add_lfs_file,
    "deletedFile": delete_file,
    "deletedFolder": delete_folder,
}


def storage_get(hub: LoopbackHub, call: Call) -> Response:
    path = hub.lfs.path(call["oid"])
    if not path.is_file():
        raise HubError(404, "no such object")
    return send_file(call, Blob.lfs(path), {"ETag": f'"{path.name}"'})


def storage_put(hub: LoopbackHub, call: Call) -> Response:
    path = hub.lfs.add(call.body.chunks)
    if "part" not in call.query and path.name != call["oid"]:
        raise HubError(400, "The content does not have the announced SHA-256")
    return Response(200, {"ETag": f'"{path.name}"'})


def storage_complete(hub: LoopbackHub, call: Call) -> Response:
    """Join the parts of a multipart upload: their ETags are the names they are stored under."""
    parts = [hub.lfs.path(part["etag"].strip('"')) for part in call.body.json()["parts"]]
    whole = hub.lfs.add(itertools.chain.from_iterable(_file_chunks(part) for part in parts))
    if whole.name != call["oid"]:
        raise HubError(400, "The parts do not make the announced SHA-256")
    return Response()


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+?)"
REV = r"/(?P<rev>[^/]+)"
OID = r"/lfs/(?P<oid>[0-9a-f]{64})"

Routes = tuple[tuple[str, str, Callable[["LoopbackHub", Call], Response]], ...]
HUB_ROUTES: Routes = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("GET", f"{API}(?:/revision{REV})?", repo_info),
    ("GET", f"{API}/auth-check(?P<write>/write)?", auth_check),
    ("GET", f"{API}/discussions", discussions),
    ("GET", "/ci/id-token", id_token),
    ("POST", "/oauth/token", exchange_token),
    ("POST", f"{API}/tag{REV}", create_tag),
    ("GET", f"{API}/tree{REV}(?:/(?P<path>.+))?", tree),
    ("POST", f"{API}/paths-info{REV}", paths_info),
    ("GET", f"{API}/refs", refs),
    ("POST", f"{API}/branch{REV}", create_branch),
    ("POST", f"{API}/preupload{REV}", preupload),
    ("POST", f"{API}/commit{REV}", create_commit),
    ("POST", f"{API}/lfs-files/duplicate", duplicate_lfs),
    ("GET", f"{API}/xet-write-token{REV}", xet_write_token),
    ("GET", f"{API}/xet-read-token{REV}", xet_read_token),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"{PAGE}\.git/info/lfs/verify", lfs_verify),
    ("GET", f"{PAGE}/resolve{REV}/(?P<path>.+)", resolve),
)
STORAGE_ROUTES: Routes = (
    ("GET", OID, storage_get),
    ("PUT", OID, storage_put),
    ("POST", OID, storage_complete),
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # an idle keep-alive connection must not hold up the end of a test
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, routes: Routes, *, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.hub, self.routes, self.storage = hub, routes, storage
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, target: str, headers: dict[str, str], body: Body) -> Response:
        url = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        for verb, pattern, handler in self.routes:
            # Matched before it is unquoted: the revision refs/pr/1 travels as refs%2Fpr%2F1.
            match = re.fullmatch(pattern, url.path)
            if match and verb == ("GET" if method == "HEAD" else method):
                parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                return handler(self.hub, Call(headers, parts, query, body, self._user(headers)))
        raise HubError(404, f"The loopback Hub does not know {method} {url.path}")

    def _user(self, headers: dict[str, str]) -> User | None:
        authorization = headers.get("authorization")
        if authorization is None:
            return None
        if self.storage:  # S3, too, refuses a token beside the signature in its URLs
            raise HubError(400, "A token was sent to the storage")
        token = authorization.removeprefix("Bearer ")
        if token == CI_SECRET:  # for the CI, which is not the Hub
            return None
        if token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may hang up
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, 40 ms apart with it

    def respond(self) -> None:
        body = Body(self.rfile, self.headers)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub = self.server.hub
        trouble = hub.trouble_with(self.command, self.path)
        if trouble == "hang":
            hub.over.wait(hub.hangs_for)
        if trouble == "hang" or (trouble == "cut" and self.command in ("PUT", "POST")):
            next(body.chunks, None)
            self._hang_up()
            return
        response = self._answer(headers, body)
        for _ in body.chunks:  # what was left unread would be taken for the next request
            pass
        seen = Request(self.command, self.path, headers, response.status, self.server.storage)
        hub.requests.append(seen)
        if trouble == "lost":
            self._hang_up()
            return
        if trouble in ("wrong", "short") and response.length:
            content = b"".join(_exactly(response.stream, response.length))
            middle = len(content) // 2
            flipped = bytes([content[middle] ^ 1])
            content = content[:middle] + (flipped + content[middle + 1 :]) * (trouble == "wrong")
            response.stream, response.length = io.BytesIO(content), len(content)
        self._send(response, cut=trouble == "cut")

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond  # noqa: N815

    def _answer(self, headers: dict[str, str], body: Body) -> Response:
        try:
            self.server.hub.raise_fault(self.command, self.path)
            return self.server.answer(self.command, self.path, headers, body)
        except HubError as error:
            return error.response()
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc()
            # Not 500, which the client would try again for half a minute.
            return HubError(501, "The loopback Hub failed: see its traceback on stderr").response()

    def _send(self, response: Response, *, cut: bool = False) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(response.length))
        self.end_headers()
        with response.stream as stream:
            if self.command != "HEAD":
                length = response.length // 2 if cut else response.length
                self.wfile.writelines(_exactly(stream, length))
        if cut:
            self._hang_up()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are recorded."""


# What may happen to a request beside an error: the connection breaks off in the middle of a body,
# no answer comes for long, or none though the request was obeyed, half of the bytes come and are
# announced as all, or a wrong one comes.
Trouble = Literal["cut", "hang", "lost", "short", "wrong"]


@dataclass
class _Fault:
    method: str
    path: re.Pattern[str]
    happens: HubError | Trouble | Callable[[], object]
    times: int
    skip: int = 0  # requests that are let through before
    happened: bool = False

    def strikes(self, method: str, path: str) -> bool:
        """Whether it happens to this request; it happens so often, and then no more."""
        if not self.times or self.method != method or not self.path.search(path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        self.happened = True
        return True


class LoopbackHub:
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
        self._temporary = tempfile.TemporaryDirectory(prefix="loopback-hub-")
        folder = folder or Path(self._temporary.name)
        self.tokens = dict(tokens)
        self.multipart_threshold, self.part_size = multipart_threshold, part_size
        self.lock = threading.RLock()
        self.over = threading.Event()  # nobody waits any more
        self.hangs_for = 2.0  # seconds
        self.lfs = LfsStore(folder / "lfs")
        self.xet = XetStores(folder / "xet") if xet else None
        self._servers = (
            _Server(self, HUB_ROUTES, storage=False),
            _Server(self, STORAGE_ROUTES, storage=True),
        )
        self.url, self.storage_url = (server.url for server in self._servers)
        self.reset()

    def reset(self) -> None:
        """Forget all repos, faults and recorded requests."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self._faults: list[_Fault] = []
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
            ref, parent = _commit_target(repo, revision, None, as_pr=False)
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

    def fail(
        self,
        method: str,
        path_regex: str,
        status: int,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        skip: int = 0,
    ) -> None:
        """Answer the next requests that match, at either server, with this status.

        The expression is searched in the path as sent: percent-encoded and with its query.
        """
        error = HubError(status, f"injected fault {status}", headers=headers)
        self._faults.append(_Fault(method, re.compile(path_regex), error, times, skip))

    def disturb(
        self,
        method: str,
        path_regex: str,
        what: Trouble | Callable[[], object],
        times: int = 1,
        skip: int = 0,
    ) -> None:
        """The same with a trouble, or with a function that is called before the answer."""
        self._faults.append(_Fault(method, re.compile(path_regex), what, times, skip))

    @property
    def struck(self) -> int:
        """How many of the faults have happened."""
        return sum(fault.happened for fault in self._faults)

    def calm(self) -> None:
        """From now on nothing happens."""
        self._faults.clear()

    def raise_fault(self, method: str, path: str) -> None:
        with self.lock:
            for fault in self._faults:
                if not isinstance(fault.happens, str) and fault.strikes(method, path):
                    if isinstance(fault.happens, HubError):
                        raise fault.happens
                    fault.happens()

    def trouble_with(self, method: str, path: str) -> str | None:
        with self.lock:
            for fault in self._faults:
                if isinstance(fault.happens, str) and fault.strikes(method, path):
                    return fault.happens
        return None

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
        chunks = [source] if isinstance(source, bytes) else _file_chunks(source)
        if not is_lfs(name, size):
            return Blob.regular(b"".join(chunks))
        path = self.lfs.add(chunks)
        repo.lfs[path.name] = self.lfs_blob(path)
        return repo.lfs[path.name]


def _walk(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
