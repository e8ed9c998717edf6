"""The way from a site's link to its daemon: records go in, records come back, and nothing is ever raised.

The link's user has no right to the data, and this module no way to them: it imports neither torch nor a reader of
images, and passes records on without looking into them. It opens a connection for each message, so that neither a
daemon that was started anew nor one of another version is ever taken for the one before.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from common.errors import SiteRefusal

PROTOCOL = 1
"""What both ends of the socket must agree on besides the version of the package."""

PATIENCE_S = 2.0
"""Seconds after which the daemon answers that work is under way."""

HELLO_S = 5.0
"""Seconds that a daemon has to answer at all: also those in which one that is being started anew comes up."""

ANSWER_S = PATIENCE_S + 28.0
"""Seconds for a message there, its work and the answer back; with `HELLO_S` the longest that a relay takes."""

SERVICE = "consilium.Site"
KIND = "kind"
"""Key of the metadata that names the kind of a request."""

LIMITS = [(f"grpc.max_{way}_message_length", 2**31 - 1) for way in ("send", "receive")]

_OPTIONS = [
    *LIMITS,
    ("grpc.use_local_subchannel_pool", 1),  # else a failed connection delays those that come after it
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
]
Records = Any
"""Flower's `RecordDict`, which only the modules that look into one import."""

_log = logging.getLogger("consilium.link")


def address(socket: Path) -> str:
    """Return a unix socket's path as gRPC wants it."""
    return "unix:" + quote(os.fsencode(socket))


def hello(site: str) -> dict[str, Any]:
    """Return what both ends tell each other first."""
    return {"protocol": PROTOCOL, "version": importlib.metadata.version("consilium"), "site": site}


class Relay:
    """Passes messages to the daemon of a site.

    Args:
        socket: where it listens.
        site: its name, so that a wrong socket is noticed.
    """

    def __init__(self, socket: Path, site: str) -> None:
        self._socket = socket
        self._site = site

    def answer(self, kind: str, record: Records) -> Records:
        """Return the daemon's answer to a request, or a refusal: `unavailable`, `version_differs`, `malformed`."""
        from common.messages import MalformedMessage, refusal, unpacked  # Flower, which a question for a status spares

        try:
            return unpacked(self.pass_on(kind, record))
        except MalformedMessage:
            _log.error("the daemon's answer cannot be read")
            return refusal("internal")

    def pass_on(self, kind: str, record: Records) -> Records:
        """Return the same as records that are packed, as they travel best: nobody has looked into them here."""
        from common.messages import content_of, packed, refusal

        try:
            content = content_of(record)
        except Exception:  # noqa: BLE001  whatever came over the network: no record may stop the link
            return refusal("malformed")
        try:
            with self._connected() as channel:
                return packed(_call(channel, "Answer", content, ANSWER_S, ((KIND, kind),)))
        except SiteRefusal as error:
            return refusal(error.code)
        except grpc.RpcError as error:
            _log.warning("no answer from the daemon: %s", _name(error))
            return refusal("unavailable")
        except Exception as error:  # noqa: BLE001
            _log.error("a message could not be passed to the daemon: %s", type(error).__name__)
        return refusal("internal")

    def status(self) -> dict[str, Any]:
        """Return what the daemon says of itself; its state is `unavailable` if it says nothing."""
        try:
            with _channel(self._socket) as channel:
                found: dict[str, Any] = json.loads(_call(channel, "Status", b"", HELLO_S))
                return found
        except (grpc.RpcError, ValueError) as error:
            return {"state": "unavailable", "site": self._site, "code": _name(error)}

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Yield a channel to a daemon that is the right one.

        Raises:
            SiteRefusal: `version_differs`, or `unavailable` where another site answers.
            grpc.RpcError: nobody answers.
        """
        ours = hello(self._site)
        with _channel(self._socket) as channel:
            theirs = json.loads(_call(channel, "Hello", json.dumps(ours).encode(), HELLO_S))
            if (theirs["protocol"], theirs["version"]) != (ours["protocol"], ours["version"]):
                _log.error("the daemon runs version %s, this link %s", theirs["version"], ours["version"])
                raise SiteRefusal("version_differs")
            if theirs["site"] != self._site:
                _log.error("site %s answers on the socket of %s", theirs["site"], self._site)
                raise SiteRefusal("unavailable")
            yield channel


def _channel(socket: Path) -> Any:
    return grpc.insecure_channel(address(socket), _OPTIONS)


def _call(channel: Any, method: str, content: bytes, patience_s: float, metadata: Any = ()) -> bytes:
    """Return the bytes that a method answers with; a daemon that is not up yet is waited for."""
    call = channel.unary_unary(f"/{SERVICE}/{method}")
    answer: bytes = call(content, timeout=patience_s, metadata=metadata, wait_for_ready=True)
    return answer


def _name(error: Any) -> str:
    code = error.code() if hasattr(error, "code") else None
    return code.name if code is not None else type(error).__name__
