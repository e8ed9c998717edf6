"""Looks for words in bytes, whatever form they were given on the way: see tests/test_canaries.py."""

from __future__ import annotations

import base64
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence

_DEPTH = 2
"""How often something that was packed is unpacked again."""

_MOST = 2**24


def forms(word: str) -> dict[str, bytes]:
    """Return what a word looks like as bytes, by the name of the form; text is compared in small letters."""
    plain = word.encode()
    found = {"utf-8": plain.lower(), "utf-16": word.lower().encode("utf-16-le"), "hex": plain.hex().encode()}
    for shift in range(3):  # base64 looks different by where a word begins; what its neighbours decide is left out
        coded = base64.b64encode(bytes(shift) + plain).rstrip(b"=")
        shared = 1 if (len(plain) + shift) % 3 else 0
        found[f"base64+{shift}"] = coded[(0, 2, 3)[shift] : len(coded) - shared]
    return found


def sightings(content: bytes, words: Sequence[str]) -> set[tuple[str, str]]:
    """Return each word that occurs, with the form in which it does."""
    wanted = {(word, name): form for word in words for name, form in forms(word).items()}
    found = set()
    for where, layer in layers(content):
        small = layer.lower()
        for (word, name), form in wanted.items():
            if form in (layer if name.startswith("base64") else small):
                found.add((word, f"{where}{name}"))
    return found


def layers(content: bytes, depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield bytes, and whatever is packed in them."""
    yield "", content
    if depth < _DEPTH:
        for kind, inner in (*_streams(content), *_archived(content)):
            for where, layer in layers(inner, depth + 1):
                yield f"{kind}:{where}", layer


def _streams(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield what streams of zlib and gzip hold, wherever they begin."""
    for start in _places(content, b"\x78"):
        if len(content) > start + 1 and (0x7800 | content[start + 1]) % 31 == 0:
            yield from _inflated("zlib", content, start, zlib.MAX_WBITS)
    for start in _places(content, b"\x1f\x8b\x08"):
        yield from _inflated("gzip", content, start, zlib.MAX_WBITS | 16)


def _places(content: bytes, mark: bytes) -> Iterator[int]:
    place = content.find(mark)
    while place >= 0:
        yield place
        place = content.find(mark, place + 1)


def _inflated(kind: str, content: bytes, start: int, window: int) -> Iterator[tuple[str, bytes]]:
    try:
        inner = zlib.decompressobj(window).decompress(content[start : start + _MOST], _MOST)
    except zlib.error:
        return
    if len(inner) >= 8:
        yield kind, inner


def _archived(content: bytes) -> Iterator[tuple[str, bytes]]:
    if content.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name in archive.namelist():
                    yield "zip", name.encode() + b"\n" + archive.read(name)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
            return
