"""One part between two boundaries, however the body is cut; everything else is refused, without holding it all."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.multipart import Malformed, Truncated, boundary_of, only_part

HEADERS = b"Content-Type: application/dicom\r\nContent-Length: 5\r\n"


def body(content: bytes, boundary: bytes = b"b", headers: bytes = HEADERS, preamble: bytes = b"") -> bytes:
    return preamble + b"--" + boundary + b"\r\n" + headers + b"\r\n" + content + b"\r\n--" + boundary + b"--\r\n"


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


@given(
    st.lists(st.sampled_from([b"\r\n", b"--", b"b", b"-", b"\r", b"\n", b"\0", b"\r\n-", b"\r\n--"])).map(b"".join),
    st.lists(st.integers(0, 1000), max_size=30),
    st.sampled_from([b"", HEADERS]),
    st.sampled_from([b"", b"\r\n", b"ignore me\r\n"]),
)
def test_the_content_comes_back_however_the_body_is_cut(
    content: bytes, at: list[int], headers: bytes, preamble: bytes
) -> None:
    data = body(content, b"bound", headers, preamble)
    assert b"".join(only_part(cut(data, at), b"bound")) == content
    assert b"".join(only_part([data[i : i + 1] for i in range(len(data))], b"bound")) == content


@given(st.binary(max_size=100), st.integers(1, 200))
def test_a_body_that_breaks_off_is_noticed(content: bytes, missing: int) -> None:
    data = body(content, b"bound")
    kept = data[: max(0, len(data) - 2 - missing)]  # without the last line end it is still complete
    with pytest.raises(Truncated):
        list(only_part([kept], b"bound"))


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 100_000,
        b"--b--\r\n",
        b"--b\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"--b" + b" " * 100_000,
        b"--bc\r\n\r\nx\r\n--bc--",
        b"--b\r\n\r\none\r\n--b\r\n\r\ntwo\r\n--b--\r\n",
        b"--b\r\n\r\none\r\n--bc--",
    ],
)
def test_what_is_not_one_part_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        list(only_part(cut(data, list(range(0, len(data), 8192))), b"b"))


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/related; boundary=abc", b"abc"),
        ('Multipart/Related; type="application/dicom"; Boundary="a;b=c"; start=1', b"a;b=c"),
        ("application/dicom", None),
        ("text/html; boundary=abc", None),
        ("", None),
        ("multipart", None),
    ],
)
def test_the_boundary_of_a_header(header: str, boundary: bytes | None) -> None:
    assert boundary_of(header) == boundary


@pytest.mark.parametrize("value", ["", "; boundary=", '; boundary=""', "; boundary=" + "x" * 201, "; boundary=ä"])
def test_multipart_without_a_boundary_is_refused(value: str) -> None:
    with pytest.raises(Malformed):
        boundary_of("multipart/related" + value)


def test_memory_holds_chunks_and_not_the_file() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"--b\r\n\r\n"
        for _ in range(1000):
            yield bytes(64 * 1024)
        yield b"\r\n--b--"

    tracemalloc.start()
    assert sum(len(piece) for piece in only_part(chunks(), b"b")) == 1000 * 64 * 1024
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
