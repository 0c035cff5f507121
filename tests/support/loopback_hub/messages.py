"""Requests and answers, and what a handler is given of a request."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any, BinaryIO

from support.loopback_hub.users import User

if TYPE_CHECKING:
    from support.loopback_hub.repos import Repo

CHUNK = 1 << 20
Json = dict[str, Any]
Stream = BinaryIO | io.BufferedIOBase


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
        self.chunks = exactly(stream, int(headers.get("Content-Length", 0)))

    def read(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.read())


def exactly(stream: Stream, size: int) -> Iterator[bytes]:
    while size:
        piece = stream.read(min(size, CHUNK))
        if not piece:
            raise ConnectionError("the client hung up in the middle of a body")
        size -= len(piece)
        yield piece


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


Routes = tuple[tuple[str, str, Callable[[Any, Call], Response]], ...]
API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+?)"
REV = r"/(?P<rev>[^/]+)"
OID = r"/lfs/(?P<oid>[0-9a-f]{64})"
