"""A page or three on 127.0.0.1, for a collector of metrics on the same machine: GET only, and never another address.

A page of the internet in a browser of this machine could send requests here and, with a name that it has resolve to
127.0.0.1, read the answers. So the header Host has to name this machine. Everybody on this machine may read.
"""

from __future__ import annotations

import http.server
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Generic, TypeVar

from common.errors import ConsiliumError

HOST = "127.0.0.1"
CONNECTIONS = 16
"""Connections at a time; what comes beyond is closed at once."""

WHOLE_S = 20.0
"""Seconds that a connection has from its first byte to its last."""

FRESH_S = 1.0
"""Seconds for which what was gathered is told again, so that scrapes are no load."""

_log = logging.getLogger("consilium.monitor")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Page:
    """What is answered."""

    status: int
    kind: str  # the content's type
    content: bytes


Pages = Mapping[str, Callable[[], Page]]
"""Path -> what makes its page."""


class Latest(Generic[Value]):
    """What is gathered when it is asked for: once a second at most, by one thread at a time, however many ask.

    Args:
        gather: returns it; may take as long as it likes.
        patience: seconds that whoever asks will wait.
        fresh: seconds for which it is told again.
    """

    def __init__(self, gather: Callable[[], Value], patience: float, fresh: float = FRESH_S) -> None:
        self._gather = gather
        self._patience = patience
        self._fresh = fresh
        self._changed = threading.Condition()
        self._value: Value | None = None
        self._at = float("-inf")
        self._busy = False

    def get(self) -> Value | None:
        """Return it, or None where it cannot be had in time."""
        until = time.monotonic() + self._patience
        with self._changed:
            while time.monotonic() - self._at > self._fresh:
                if not self._busy:
                    self._busy = True
                    threading.Thread(target=self._run, name="gather", daemon=True).start()
                if not self._changed.wait(until - time.monotonic()):
                    return None
            return self._value

    def _run(self) -> None:
        value = None
        try:
            value = self._gather()
        except Exception:  # noqa: BLE001  whoever asks learns that nothing is known, the log why
            _log.exception("nothing can be gathered")
        with self._changed:
            self._value, self._at, self._busy = value, time.monotonic(), False
            self._changed.notify_all()


class Loopback(socketserver.ThreadingTCPServer):
    """Serves pages on 127.0.0.1; `serve_forever` answers until `shutdown`.

    Args:
        port: 0 takes one that is free.
        pages: by path.

    Raises:
        ConsiliumError: the port cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(self, port: int, pages: Pages) -> None:
        self.pages = pages
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConsiliumError(
                f"{HOST}:{port}: cannot be listened at ({os.strerror(error.errno or 0)}); "
                "stop what uses it, or name another [monitor] port"
            ) from None
        self.port = int(self.server_address[1])

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        """Return whether one more connection can be seen to."""
        return self._free.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection, for a bounded time."""
        limit = threading.Timer(WHOLE_S, _cut, (request,))
        limit.daemon = True
        limit.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            limit.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that broke off: it was the other end's."""


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has just ended
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Loopback
    timeout = 5.0

    def do_GET(self) -> None:
        """Answer with a page."""
        page = self.server.pages.get(self.path.partition("?")[0])
        if not self._is_for_us():
            self._answer(_said(HTTPStatus.MISDIRECTED_REQUEST))
        elif page is None:
            self._answer(_said(HTTPStatus.NOT_FOUND))
        else:
            self._answer(self._made(page))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answer what is no GET, or no request at all, without a word of what came."""
        unknown = code == HTTPStatus.NOT_IMPLEMENTED
        self._answer(_said(HTTPStatus.METHOD_NOT_ALLOWED if unknown else HTTPStatus(code)))

    def version_string(self) -> str:
        """Say who answers, and of what version to nobody."""
        return "consilium"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: a line a request would fill the log."""

    def _is_for_us(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        return len(hosts) == 1 and hosts[0].strip().lower() in {
            form for name in (HOST, "localhost") for form in (name, f"{name}:{self.server.port}")
        }

    def _made(self, page: Callable[[], Page]) -> Page:
        try:
            return page()
        except Exception:  # noqa: BLE001  its text is nobody's business here
            _log.exception("a page cannot be made")
            return _said(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _answer(self, page: Page) -> None:
        self.close_connection = True
        self.request_version = "HTTP/1.0"  # also of what was no request: without it no header would be sent
        self.send_response(page.status)
        headers = {
            "Content-Type": page.kind,
            "Content-Length": str(len(page.content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
        }
        if page.status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(page.content)


def _said(status: HTTPStatus) -> Page:
    return Page(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode())
