"""One record a file: what a decoding process says of it to the process that asked, and what the catalogue keeps.

Fixed bytes, no pickle: the writer may be a process that a hostile file has taken over, so the reader takes closed words
and lengths and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.duplicates import SIDE
from client.image import CODES, IGNORED, KEY_KINDS, Header, Kind
from client.vocabulary import MODALITIES, OTHER, PICTURE_FORMATS, SYNTAXES, VENDORS, VIEWS

_WORDS: dict[str, frozenset[str]] = {
    "code": frozenset(("", *CODES, *IGNORED)),
    "kind": frozenset(("", "grey", "colour")),
    "syntax": frozenset(("", OTHER, *PICTURE_FORMATS, *SYNTAXES.values())),
    "modality": frozenset(("", OTHER, *MODALITIES)),
    "view": frozenset(("", OTHER, *VIEWS)),
    "vendor": frozenset(("", OTHER, *VENDORS.values())),
    "burned_in": frozenset(("", "yes", "no")),
    "intent": frozenset(("", "presentation", "processing")),
}
_DIGESTS = {"patient": 32, "person": 16, "device": 16, "loose_accession": 16, **dict.fromkeys(KEY_KINDS, 16)}
_NUMBERS = ("month", "rows", "columns", "frames")

RECORD = np.dtype(
    [
        *((name, f"S{max(map(len, words))}") for name, words in _WORDS.items()),
        *((name, f"V{size}") for name, size in _DIGESTS.items()),
        *((name, "<u4") for name in _NUMBERS),
        ("digest", "V32"),
        ("pixel_sha256", "V32"),
        ("dhash", "<u8"),
        ("thumb", f"V{SIDE * SIDE}"),
        ("seconds", "<f4"),
    ]
)


@dataclass(frozen=True)
class Entry:
    """What is known of one file."""

    code: str  # why it gives no image; empty: it gives one
    header: Header = field(default_factory=Header)
    kind: Kind = "grey"
    digest: bytes = bytes(32)  # names the image
    pixel_sha256: bytes = bytes(32)  # of the stored values of frame 0; zeros where it was not decoded
    dhash: int = 0
    thumb: bytes = bytes(SIDE * SIDE)
    seconds: float = 0.0  # spent on it


def pack(entry: Entry) -> NDArray[Any]:
    """Return an entry as one record, shape ()."""
    row = np.zeros((), RECORD)
    header = entry.header
    for name in ("syntax", "modality", "view", "vendor", "burned_in", "intent", *_NUMBERS):
        row[name] = getattr(header, name)
    for name in ("patient", "person", "device", "loose_accession"):
        row[name] = getattr(header, name) or bytes(_DIGESTS[name])
    for kind in KEY_KINDS:
        row[kind] = header.keys.get(kind, bytes(16))
    for name in ("code", "kind", "digest", "pixel_sha256", "dhash", "thumb", "seconds"):
        row[name] = getattr(entry, name)
    return row


def unpack(row: NDArray[Any]) -> Entry:
    """Return the entry of a record.

    Raises:
        ValueError: a word that is not of its closed list, or a number that cannot be.
    """
    words = {name: _word(row, name) for name in _WORDS}
    if not (np.isfinite(row["seconds"]) and row["seconds"] >= 0):
        raise ValueError("seconds: not a time")
    month = int(row["month"])
    if month and not (189501 <= month <= 210012 and 1 <= month % 100 <= 12):
        raise ValueError("month: not a month")
    code, kind = words.pop("code"), words.pop("kind")
    digests = {name: _digest(row, name) for name in _DIGESTS}
    keys = {kind: digests.pop(kind) for kind in KEY_KINDS}
    header = Header(
        **words,  # type: ignore[arg-type]  # closed words, checked above
        **digests,  # type: ignore[arg-type]
        **{name: int(row[name]) for name in _NUMBERS},  # type: ignore[arg-type]
        keys={kind: key for kind, key in keys.items() if key},
    )
    return Entry(
        code=code,
        header=header,
        kind="colour" if kind == "colour" else "grey",
        digest=row["digest"].tobytes(),
        pixel_sha256=row["pixel_sha256"].tobytes(),
        dhash=int(row["dhash"]),
        thumb=row["thumb"].tobytes(),
        seconds=float(row["seconds"]),
    )


def _word(row: NDArray[Any], name: str) -> str:
    word = bytes(row[name]).decode("ascii", "replace")
    if word not in _WORDS[name]:
        raise ValueError(f"{name}: a word that is not of its list")
    return word


def _digest(row: NDArray[Any], name: str) -> bytes:
    content = row[name].tobytes()
    return content if any(content) else b""
