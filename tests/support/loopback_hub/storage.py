"""The storage of LFS bytes, and how a file is sent."""

from __future__ import annotations

import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from support.loopback_hub.messages import CHUNK, OID, Call, HubError, Response, Routes
from support.loopback_hub.repos import Blob

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


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


def file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


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
    whole = hub.lfs.add(itertools.chain.from_iterable(file_chunks(part) for part in parts))
    if whole.name != call["oid"]:
        raise HubError(400, "The parts do not make the announced SHA-256")
    return Response()


ROUTES: Routes = (
    ("GET", OID, storage_get),
    ("PUT", OID, storage_put),
    ("POST", OID, storage_complete),
)
