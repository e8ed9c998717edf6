"""What went wrong on the way to the coordinator, as a code of `client.link_status.WORDS`."""

from __future__ import annotations

import errno
import json
import socket
import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import httpx

VERSION_INCOMPATIBLE = 1001
"""Flower's code for a peer of another version."""

_AHEAD, _BEHIND = 4.0, 290.0  # seconds of clock that Flower forgives, less what an HTTP date leaves unsaid
_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EPERM, errno.EACCES}
_WRONG_HOST = {62, 64}  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH
_NOT_NOW = {9, 10}  # X509_V_ERR_CERT_NOT_YET_VALID, _CERT_HAS_EXPIRED


class Trouble(Exception):
    """Trouble whose code is known where it is met."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def code_of(error: Exception, *, proxied: bool) -> str:
    """Return the code of whatever an exchange with the coordinator ended in.

    Args:
        error: what was raised.
        proxied: whether connections go to a proxy, so that failing to connect says nothing of the coordinator.
    """
    if isinstance(error, Trouble):
        return error.code
    if isinstance(error, httpx.HTTPStatusError):
        return _of_answer(error.response)
    if isinstance(error, httpx.ProxyError):
        return "proxy_refuses"
    if isinstance(error, httpx.TransportError):
        return _of_transport(error, proxied)
    if isinstance(error, ValueError) and "protobuf" in str(error):
        return "foreign"
    return "failed"


def flower_code(response: httpx.Response) -> int | None:
    """Return Flower's own code of an error, if the answer carries one."""
    try:
        value = json.loads(response.text)
    except (ValueError, RecursionError):
        return None
    code = value.get("code") if isinstance(value, dict) else None
    return code if type(code) is int else None


def _of_answer(response: httpx.Response) -> str:
    if flower_code(response) == VERSION_INCOMPATIBLE:
        return "version"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return "withdrawn" if -_BEHIND < _ahead(response) < _AHEAD else "clock"
    if response.status_code >= 500 or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        return "gateway"
    return "foreign"


def _ahead(response: httpx.Response) -> float:
    """Return by how many seconds this machine's clock is ahead of the one that answered."""
    try:
        return time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return 0.0


def _of_transport(error: httpx.TransportError, proxied: bool) -> str:
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _of_certificate(cause.verify_code)
        if isinstance(cause, ssl.SSLError):
            return "no_tls"
    if proxied and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return "proxy_unreachable"
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    return next((code for cause in causes if (code := _of_cause(cause))), "broken")


def _of_certificate(verify_code: int) -> str:
    if verify_code in _WRONG_HOST:
        return "wrong_host"
    return "expired" if verify_code in _NOT_NOW else "untrusted"


def _of_cause(cause: BaseException) -> str:
    if isinstance(cause, socket.gaierror):
        return "unknown_host"
    if isinstance(cause, ConnectionRefusedError):
        return "refused"
    return "no_route" if isinstance(cause, OSError) and cause.errno in _NO_ROUTE else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
