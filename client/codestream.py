"""What a compressed frame announces of itself, read before any decoder allocates for it.

A decoder takes the size in the codestream at its word: eight kilobytes can ask for gigabytes. So the announced size is
compared with Rows and Columns of the header, which the policy has judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from client.image import Unreadable

Coding = Literal["jpeg", "jpeg-lossless", "jpeg-ls", "jpeg-2000"]

_JP2 = b"\x00\x00\x00\x0cjP  "  # how a JPEG 2000 stream begins that is wrapped as a file
_SOF = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7))
_CODINGS: dict[int, Coding] = {0xC3: "jpeg-lossless", 0xF7: "jpeg-ls"}
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a segment


@dataclass(frozen=True)
class Announced:
    """The size of one frame as its codestream says."""

    rows: int
    columns: int
    components: int
    bits: int
    coding: Coding
    transformed: bool = False  # JPEG 2000: a multiple component transform makes RGB of the components


def announced(frame: bytes) -> Announced | None:
    """Return what a JPEG, JPEG-LS or JPEG 2000 frame announces; None for another content.

    Raises:
        Unreadable: `damaged`: the frame's own structure is broken before its size.

    Examples:
        >>> announced(bytes.fromhex("ffd8ffc0000b080002000301011100")).rows
        2
        >>> announced(b"RLE") is None
        True
    """
    try:
        if frame.startswith(b"\xff\xd8"):
            return _jpeg(frame)
        start = _codestream(frame)
        return None if start is None else _jpeg2000(frame, start)
    except IndexError:
        raise Unreadable("damaged") from None


def _jpeg(frame: bytes) -> Announced:
    """Walk the segments to the frame header (ISO 10918-1, B.2.2; ISO 14495-1, C.2.2 is alike)."""
    offset = 2
    while True:
        while frame[offset] == 0xFF and frame[offset + 1] == 0xFF:  # fill bytes
            offset += 1
        marker = frame[offset + 1]
        if frame[offset] != 0xFF:
            raise Unreadable("damaged")
        if marker in _SOF:
            size = (_u16(frame, offset + 5), _u16(frame, offset + 7), frame[offset + 9], frame[offset + 4])
            return Announced(*size, _CODINGS.get(marker, "jpeg"))
        if marker == 0xDA:  # image data before any frame header
            raise Unreadable("damaged")
        offset += 2 if marker in _ALONE else 2 + max(2, _u16(frame, offset + 2))


def _codestream(frame: bytes) -> int | None:
    """Return where a JPEG 2000 codestream begins, or None (ISO 15444-1, A.4.1 and I.4)."""
    if frame.startswith(b"\xff\x4f\xff\x51"):
        return 0
    if not frame.startswith(_JP2):
        return None
    offset = 12
    while offset + 8 <= len(frame):
        length = int.from_bytes(frame[offset : offset + 4], "big")
        wide = length == 1  # its length follows, in eight bytes
        if frame[offset + 4 : offset + 8] == b"jp2c":
            return offset + (16 if wide else 8)
        if wide:
            length = int.from_bytes(frame[offset + 8 : offset + 16], "big")
        if length < 8:  # a box of no length would be walked for ever
            raise Unreadable("damaged")
        offset += length
    raise Unreadable("damaged")


def _jpeg2000(frame: bytes, start: int) -> Announced:
    """Read SIZ and the component transform of COD (ISO 15444-1, A.5.1 and A.6.1)."""
    x1, y1, x0, y0 = (int.from_bytes(frame[at : at + 4], "big") for at in range(start + 8, start + 24, 4))
    components, bits = _u16(frame, start + 40), (frame[start + 42] & 0x7F) + 1
    offset, transformed = start + 4 + _u16(frame, start + 4), False
    while frame[offset] == 0xFF and frame[offset + 1] != 0x90:  # up to the first tile part
        if frame[offset + 1] == 0x52:
            transformed = frame[offset + 8] == 1
            break
        offset += 2 + max(2, _u16(frame, offset + 2))
    return Announced(y1 - y0, x1 - x0, components, bits, "jpeg-2000", transformed)


def _u16(content: bytes, at: int) -> int:
    return content[at] << 8 | content[at + 1]
