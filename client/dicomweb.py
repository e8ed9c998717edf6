"""A DICOMweb server as this project talks to it: searches and single instances, politely, and into no log.

The only module that knows requests and dicomweb-client, which come with the extra `pacs`. Searches (QIDO-RS) go through
dicomweb-client. Instances (WADO-RS, Part 18, 10.4) go through the same session and are streamed: dicomweb-client holds
several copies of one in memory. Addresses hold UIDs, so no exception of these libraries leaves this module.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Any, NoReturn, TypeVar

import requests
import urllib3
from dicomweb_client.web import DICOMwebClient
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from client.identity import tidy
from client.multipart import Malformed, Truncated, boundary_of, only_part
from client.pacing import Pace, backoff, retry_after
from client.pacs_answers import Failed, Gone, Missing, Rejected, TryAgain
from client.pacs_config import Credentials, DicomWeb
from common.errors import ConfigError, ConsiliumError

GONE_AFTER = 3
"""Requests in a row that stay without an answer after all retries: then the server is taken for gone."""

_ANY_SYNTAX = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # as it is stored, Part 18, 8.7.3
_STUDY, _SERIES, _INSTANCE, _ACCESSION = "0020000D", "0020000E", "00080018", "00080050"
_PAGE = 200  # results asked for at once
_MOST_RESULTS = 100_000  # of one search
_SEARCH_BYTES = 64 << 20  # of one page
_CHUNK = 256 * 1024
_LEAST_BYTES = 16 * 1024  # that must come in every timeout_s, or the server only pretends to send
_CHATTY = ("dicomweb_client", "urllib3", "requests", "retrying", "charset_normalizer")
_UNAVAILABLE = frozenset({429, 502, 503, 504})
_AGAIN = _UNAVAILABLE | {500}

Result = TypeVar("Result")


class Server:
    """One DICOMweb service.

    Args:
        config: how to reach it and how politely.
        credentials: what it asks for.
        ca_certificate: a PEM file of the authority that signed its certificate.
        clock: seconds, never going back.
        sleep: waits for seconds.

    Raises:
        ConfigError: the certificate file cannot be used.
    """

    def __init__(
        self,
        config: DicomWeb,
        credentials: Credentials | None = None,
        ca_certificate: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._sleep = config, sleep
        self._session = _Session(config, Pace(config.requests_per_second, clock, sleep))
        self._session.use(credentials or Credentials())
        self._session.trust(ca_certificate)
        self._client = DICOMwebClient(config.url, session=self._session, timeout=config.timeout_s)
        self._client.set_http_retry_params(retry=False)  # it knows nothing of Retry-After, and tries again after a 401
        self._silent = 0

    def studies(self, accession: str) -> list[str]:
        """Return the StudyInstanceUIDs of an order, whose AccessionNumber is tidy.

        Servers that ignore a search key they do not know answer with all they have; only what shows the very
        AccessionNumber is believed.
        """

        def page(offset: int) -> Any:
            return self._client.search_for_studies(
                limit=_PAGE, offset=offset, fields=["AccessionNumber"], search_filters={"AccessionNumber": accession}
            )

        return self._all(page, _STUDY, lambda found: tidy(_value(found, _ACCESSION)) == accession)

    def series(self, study: str) -> list[str]:
        """Return the SeriesInstanceUIDs of a study."""

        def page(offset: int) -> Any:
            return self._client.search_for_series(study, limit=_PAGE, offset=offset)

        return self._all(page, _SERIES, lambda found: _value(found, _STUDY) in ("", study))

    def instances(self, study: str, series: str) -> list[str]:
        """Return the SOPInstanceUIDs of a series."""

        def page(offset: int) -> Any:
            return self._client.search_for_instances(study, series, limit=_PAGE, offset=offset)

        return self._all(page, _INSTANCE, lambda found: _value(found, _SERIES) in ("", series))

    def retrieve(self, study: str, series: str, instance: str, save: Callable[[Iterator[bytes]], Result]) -> Result:
        """Return what `save` makes of the file's bytes, in the transfer syntax in which the server stores it.

        `save` is called again after a transfer that broke off, and must then begin anew.

        Raises:
            Missing: the server has it no more.
            Failed: no usable answer came.
            Rejected: what came is no DICOM file, or too large.
            Gone: the server does not answer any more.
        """
        address = f"{self._config.url}/studies/{study}/series/{series}/instances/{instance}"

        def attempt() -> Result:
            with self._session.get(
                address, headers={"Accept": _ANY_SYNTAX}, stream=True, timeout=self._config.timeout_s
            ) as response:
                return save(_file(response, self._session.chunks(response, self._config.max_file_mb << 20)))

        return self._patiently(attempt)

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def _all(self, page: Callable[[int], Any], tag: str, wanted: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        """Return one UID of every result, asking for pages until nothing new comes."""
        uids: dict[str, None] = {}
        offset = 0
        while offset < _MOST_RESULTS:
            results = self._patiently(partial(_results, page, offset))
            new = {_value(found, tag): None for found in results if wanted(found)}
            if not new.keys() - uids.keys():  # the end, or a server that knows no offset
                return [uid for uid in uids if uid]
            uids |= new
            offset += len(results)
        raise Failed

    def _patiently(self, attempt: Callable[[], Result]) -> Result:
        """Return what an attempt returns, repeated while the server is merely busy or away."""
        for tries in range(1, self._config.retries + 2):
            try:
                result = attempt()
            except TryAgain as trouble:
                last = trouble
            except (Missing, Failed, Rejected):
                self._silent = 0
                raise
            else:
                self._silent = 0
                return result
            if tries <= self._config.retries:
                self._sleep(max(last.wait, backoff(tries)))
        self._silent = self._silent + 1 if last.silent else 0
        raise (Gone if self._silent >= GONE_AFTER else Failed) from None


class _Session(requests.Session):
    """A session that keeps the pace, follows no redirect, and judges every answer before its body is read."""

    def __init__(self, config: DicomWeb, pace: Pace) -> None:
        super().__init__()
        self._config, self._pace = config, pace
        self.trust_env = False  # no proxies, .netrc or certificates of the environment
        self.headers["Accept-Encoding"] = "identity"  # images do not shrink, and nothing can swell
        self.proxies = {"http": config.proxy, "https": config.proxy} if config.proxy else {}
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def use(self, credentials: Credentials) -> None:
        """Show these credentials with every request."""
        if credentials.token:
            self.headers["Authorization"] = f"Bearer {credentials.token}"
        elif credentials.user:
            self.auth = requests.auth.HTTPBasicAuth(credentials.user.encode(), credentials.password.encode())

    def trust(self, ca_certificate: Path | None) -> None:
        """Accept servers with a certificate of this authority, and no other."""
        if ca_certificate is None:
            return
        try:
            ssl.create_default_context(cafile=ca_certificate)
        except OSError as error:  # ssl.SSLError is one
            reason = "not a PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"ca_certificate {ca_certificate}: cannot be used ({reason})") from None
        self.verify = str(ca_certificate)

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None, so that no redirect is followed: it is an answer, not an order."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send one request; only an answer that can be used comes back, read to its end unless it is to be streamed."""
        self._pace.wait()
        request.headers.pop("Host", None)  # dicomweb-client leaves the port out
        stream = options.get("stream")
        with _translated(self._config.url):
            response = super().send(request, **{**options, "stream": True})
        try:
            self._judge(response)
            if not stream:
                response._content = b"".join(self.chunks(response, _SEARCH_BYTES))
                response._content_consumed = True
        except BaseException:
            response.close()
            raise
        return response

    def chunks(self, response: requests.Response, most: int) -> Iterator[bytes]:
        """Yield a body as it comes.

        Raises:
            Rejected: it is longer than `most` bytes.
        """
        declared = response.headers.get("Content-Length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise Rejected
        total, then, since = 0, time.monotonic(), 0
        while True:
            with _translated(self._config.url):
                data = response.raw.read1(_CHUNK, decode_content=False)
            if not data:
                return
            total, since = total + len(data), since + len(data)
            if total > most:
                raise Rejected
            now = time.monotonic()
            if now - then > self._config.timeout_s:
                if since < _LEAST_BYTES:
                    raise TryAgain(silent=True)
                then, since = now, 0
            yield data

    def _judge(self, response: requests.Response) -> None:
        status = response.status_code
        if status in (401, 403, 407) or 300 <= status < 400:
            raise ConsiliumError(f"{self._config.url}: {_refusal(status)}")
        if status in (404, 410):
            raise Missing
        if status in _AGAIN:
            raise TryAgain(silent=status in _UNAVAILABLE, wait=retry_after(response.headers.get("Retry-After")))
        if status not in (200, 204) or response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Failed


def _refusal(status: int) -> str:
    if status == 401:
        return "the server does not accept the credentials (401) - check [data.dicomweb] credentials"
    if status == 403:
        return "the server forbids this to the account (403) - let it search (QIDO-RS) and retrieve (WADO-RS)"
    if status == 407:
        return "the proxy wants credentials (407) - let this machine pass without"
    return f"the server points to another address ({status}) - put the final address into [data.dicomweb] url"


def _results(page: Callable[[int], Any], offset: int) -> list[Mapping[str, Any]]:
    """Return one page of a search."""
    try:
        results = page(offset)
    except (Rejected, ValueError, TypeError, AttributeError, RecursionError):  # too long, no JSON, or another's
        raise Failed from None
    if not isinstance(results, list) or not all(isinstance(found, Mapping) for found in results):
        raise Failed
    return results


def _value(found: Mapping[str, Any], tag: str) -> str:
    """Return the value of an attribute in DICOM JSON (Part 18, F.2), blank if it has none."""
    element = found.get(tag)
    values = element.get("Value") if isinstance(element, Mapping) else None
    first = values[0] if isinstance(values, list) and values else None
    return first.strip(" \0") if isinstance(first, str) else ""


def _file(response: requests.Response, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes of the DICOM file in an answer."""
    try:
        boundary = boundary_of(response.headers.get("Content-Type", ""))
        if boundary is not None:
            yield from _dicom(only_part(chunks, boundary))
        elif "Content-Length" in response.headers or "Transfer-Encoding" in response.headers:
            yield from _dicom(chunks)
        else:  # whether all of it came nobody could tell
            raise Rejected
    except Malformed:
        raise Rejected from None
    except Truncated:
        raise TryAgain(silent=True) from None


def _dicom(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what is given if it begins as a DICOM file does: 128 bytes, then DICM (Part 10, 7.1)."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 132:
            break
    if head[128:132] != b"DICM":
        raise Rejected
    yield head
    yield from chunks


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what the libraries raise into what this module raises."""
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        _raise_for(error, url)


def _raise_for(error: BaseException, url: str) -> NoReturn:
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        raise ConsiliumError(
            f"{url}: the server's certificate is not trusted here"
            " - set [data.dicomweb] ca_certificate to the PEM file of the authority that signed it"
        ) from None
    broken = [cause for cause in causes if isinstance(cause, ssl.SSLError)]
    if broken and not any(isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) for cause in broken):
        raise ConsiliumError(
            f"{url}: no TLS connection comes about - check scheme and port of [data.dicomweb] url"
        ) from None
    raise TryAgain(silent=True) from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those behind it, wherever requests and urllib3 put them."""
    pending, seen = [error], set[int]()
    while pending:
        cause = pending.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        behind = (*cause.args, getattr(cause, "reason", None), cause.__cause__, cause.__context__)
        pending += [other for other in behind if isinstance(other, BaseException)]


class _Watched(HTTPConnection):
    """A connection whose status line and headers must be here within the timeout, however slowly they trickle."""

    def getresponse(self) -> Any:  # urllib3's response, which http.client knows nothing of
        watchdog = threading.Timer(self.timeout or 0.0, _hang_up, [self.sock])
        watchdog.daemon = True
        watchdog.start()
        try:
            return super().getresponse()
        finally:
            watchdog.cancel()


class _WatchedTls(_Watched, HTTPSConnection):
    """The same over TLS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTls


class _Adapter(HTTPAdapter):
    """Makes connections that are watched, with and without a proxy."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        _watch(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        _watch(manager)
        return manager


def _watch(manager: Any) -> None:
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}


def _hang_up(connected: socket) -> None:
    with suppress(OSError):  # closed meanwhile
        socket.shutdown(connected, SHUT_RDWR)  # the socket's own: the one of TLS would wait for the reader


@contextmanager
def discreet() -> Iterator[None]:
    """Keep the libraries' loggers silent: what they log are addresses, and those hold UIDs."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _CHATTY]
    loggers = [logging.getLogger(name) for name in {*names, *_CHATTY}]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
