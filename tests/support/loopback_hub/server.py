"""The HTTP servers: a request finds its handler, or meets a fault."""

from __future__ import annotations

import io
import re
import socket
import sys
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.loopback_hub.messages import Body, Call, HubError, Request, Response, Routes, exactly
from support.loopback_hub.users import CI_SECRET, User

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


class Server(ThreadingHTTPServer):
    daemon_threads = True  # an idle keep-alive connection must not hold up the end of a test
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, routes: Routes, *, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
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


class Connection(BaseHTTPRequestHandler):
    server: Server
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
            content = b"".join(exactly(response.stream, response.length))
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
                self.wfile.writelines(exactly(stream, length))
        if cut:
            self._hang_up()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are recorded."""
