"""The one part of a multipart/related answer, as it streams in: memory holds a chunk, never the file.

RFC 2046, 5.1; DICOM Part 18, 8.6.1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from email.message import Message

_AROUND = 64 * 1024  # bytes of preamble and headers that are read before giving up
_PADDING = re.compile(rb"[ \t]*\r\n")


class Malformed(Exception):
    """The body is not one part between two boundaries."""


class Truncated(Exception):
    """The body ended before its last boundary."""


def boundary_of(content_type: str) -> bytes | None:
    """Return the boundary that a Content-Type names, None if it is not multipart/related.

    Raises:
        Malformed: multipart/related without a usable boundary.

    Examples:
        >>> boundary_of('multipart/related; type="application/dicom"; boundary="x y"')
        b'x y'
    """
    message = Message()
    message["content-type"] = content_type
    if message.get_content_type() != "multipart/related":
        return None
    boundary = message.get_boundary("")
    if not boundary or len(boundary) > 200 or not boundary.isascii():
        raise Malformed
    return boundary.encode()


def only_part(chunks: Iterable[bytes], boundary: bytes) -> Iterator[bytes]:
    """Yield the content of the only part of a body, without its headers.

    Args:
        chunks: the body, cut anywhere.
        boundary: without the dashes before it.

    Raises:
        Malformed: no part, a second part, or headers without end.
        Truncated: the body ends within the part.
    """
    source = iter(chunks)
    delimiter = b"\r\n--" + boundary
    rest = _after_headers(_after(source, b"\r\n", delimiter), source)
    while (end := rest.find(delimiter)) < 0:
        keep = len(delimiter) - 1  # a boundary may straddle two chunks
        if len(rest) > keep:
            yield bytes(rest[:-keep])
            rest = rest[-keep:]
        rest = rest + _next(source)
    if end:
        yield bytes(rest[:end])
    _check_last(rest[end + len(delimiter) :], source)


def _next(source: Iterator[bytes]) -> bytes:
    for chunk in source:
        return chunk
    raise Truncated


def _after(source: Iterator[bytes], start: bytes, mark: bytes) -> bytes:
    """Return what follows a mark that must come soon."""
    data = start
    while (place := data.find(mark)) < 0:
        if len(data) > _AROUND:
            raise Malformed
        data += _next(source)
    return data[place + len(mark) :]


def _after_headers(data: bytes, source: Iterator[bytes]) -> bytes:
    """Return what follows the headers of a part; `data` begins right behind its boundary."""
    while b"\r\n" not in data and len(data) < _AROUND:
        data += _next(source)
    padding = _PADDING.match(data)
    if padding is None:  # the last boundary already, or a longer one than was announced
        raise Malformed
    return _after(source, data[padding.end() - 2 :], b"\r\n\r\n")  # without headers both line ends touch


def _check_last(data: bytes, source: Iterator[bytes]) -> None:
    """Read to the end, so that the connection can be used again."""
    while len(data) < 2:
        data += _next(source)
    if not data.startswith(b"--"):
        raise Malformed
    for _ in source:
        pass
