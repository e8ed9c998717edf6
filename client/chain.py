"""An append-only file whose lines are bound to each other by hashes, so that no line changes unseen.

A line is the canonical JSON (sorted keys, no blanks, ASCII) of

    {"event", "facts", "previous", "sha256", "time"}

where `sha256` is that of the same object without `sha256`, and `previous` the `sha256` of the line before, of the first
line 64 zeros. So no line can be changed, taken out or moved without the lines after it saying so. What a chain cannot
show is that its end was cut off, or that all of it was written anew: that takes a witness, who noted a hash elsewhere.

A crash can leave the last line torn. It stays as it is; the next entry is preceded by `torn_line` with its hash.
What else can happen, and with which facts, is for the keeper of a file to say.
Source of the construction: Schneier and Kelsey, "Secure audit logs to support computer forensics", 1999, section 3.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

START = "0" * 64
"""`previous` of the first line."""

TORN = "torn_line"
"""The event that explains a line which a crash cut short."""

Facts = Mapping[str, Any]
"""What is said of an event, in JSON."""

Check = Callable[[str, Facts], None]
"""Raises ValueError where an event, or a fact of it, is not of the closed kinds that a file may hold."""

_KEYS = {"time", "event", "facts", "previous", "sha256"}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_BLOCK = 64 * 1024  # bytes of a file's end that are read first


@dataclass(frozen=True)
class Entry:
    """One line."""

    time: str  # UTC, ISO 8601 to the second
    event: str
    facts: Facts
    previous: str
    sha256: str


@dataclass(frozen=True)
class End:
    """What has to be known of a file to carry it on."""

    head: str = START  # hash of the last line that is an entry
    torn: bytes = b""  # what a crash left after it, without an end of line
    open: bool = False  # whether the last line has no end yet


@dataclass(frozen=True)
class Chain:
    """What a file holds."""

    entries: tuple[Entry, ...]  # up to the first line that does not hold
    wrong: int | None  # number of the first line that does not hold, from 1
    end: End  # of one that holds


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file that is no symbolic link, under a lock: shared for reading, else for one process alone.

    Raises:
        OSError: it cannot be opened.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if flags & (os.O_RDWR | os.O_WRONLY) else fcntl.LOCK_SH)
        yield handle
    finally:
        os.close(handle)


def read(handle: int, start: int = 0) -> bytes:
    """Return the bytes of a file from `start` to its end."""
    parts: list[bytes] = []
    while part := os.pread(handle, 1 << 24, start):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def parse(content: bytes, check: Check, head: str | None = START) -> Chain:
    """Return what a file holds, whose first line follows from `head`; None: from whatever it says itself.

    Lines that are no entries may only be there if the entry after them says that they were torn, and names their hash.
    An entry that does not follow from those before breaks the chain for good: no later line can explain it.
    """
    *lines, tail = content.split(b"\n")
    entries: list[Entry] = []
    odd: list[bytes] = []  # since the last entry that holds
    first: int | None = None
    broken = False
    for number, line in enumerate([*lines, tail] if tail else lines, 1):
        entry = _entry(line, check)
        head = entry.previous if entry and head is None else head
        if entry and not broken and _follows(entry, head, odd):
            entries.append(entry)
            head = entry.sha256
            odd.clear()
            continue
        broken = broken or entry is not None
        first = first if odd else number
        odd.append(line)
    torn = b"\n".join(odd) if tail and not broken else b""
    return Chain(tuple(entries), first if odd and not torn else None, End(head or START, torn, bool(tail)))


def find_end(handle: int, check: Check, head: str = START) -> End:
    """Return what has to be known of a file to carry it on, from as much of its end as that takes.

    Args:
        handle: the file.
        check: of its entries.
        head: what its first line follows from.
    """
    size, block = os.fstat(handle).st_size, _BLOCK
    while True:
        start = max(0, size - block)
        lines = read(handle, start).split(b"\n")[1 if start else 0 :]  # the first may have begun before
        after: list[bytes] = []
        while lines:
            if entry := _entry(lines[-1], check):
                return _end(entry.sha256, after[::-1])
            after.append(lines.pop())
        if start == 0:
            return _end(head, after[::-1])
        block *= 4


def continuation(at: End, event: str, facts: Facts, time: datetime | None = None) -> tuple[bytes, tuple[Entry, ...]]:
    """Return the bytes that carry a file on, in one piece, whatever its end looks like, and the entries in them."""
    when = (time or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    entries: list[Entry] = []
    if at.torn:
        torn = {"bytes": len(at.torn), "torn_sha256": hashlib.sha256(at.torn).hexdigest()}
        entries.append(_linked(when, TORN, torn, at.head))
    entries.append(_linked(when, event, facts, entries[-1].sha256 if entries else at.head))
    lines = b"".join(_canonical(vars(entry)) + b"\n" for entry in entries)
    return (b"\n" if at.open else b"") + lines, tuple(entries)


def write(handle: int, content: bytes) -> None:
    """Add bytes to the end of a file; on disk when this returns.

    Raises:
        OSError: they cannot be written; none of them is there then.
    """
    size = os.fstat(handle).st_size
    try:
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)  # the disk is full: no half of a line stays
        raise


def sync(folder: Path) -> None:
    """Put the name of a new file on disk as well."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _end(head: str, after: list[bytes]) -> End:
    """Return the end of a file from the lines after its last entry: none at all where that has no end yet."""
    if not after:
        return End(head, open=head != START)
    return End(head, b"\n".join(after) if after[-1] else b"", bool(after[-1]))


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _linked(time: str, event: str, facts: Facts, previous: str) -> Entry:
    body = {"time": time, "event": event, "facts": facts, "previous": previous}
    return Entry(time, event, facts, previous, hashlib.sha256(_canonical(body)).hexdigest())


def _entry(line: bytes, check: Check) -> Entry | None:
    """Return the entry of a line, if the line is the canonical form of one and its hash is right."""
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(line)
    if not isinstance(value, dict) or set(value) != _KEYS:
        return None
    with suppress(ValueError, TypeError):
        texts = all(isinstance(part, dict if key == "facts" else str) for key, part in value.items())
        if texts and line == _canonical(value) and _linked(*_parts(value)).sha256 == value["sha256"]:
            check(value["event"], value["facts"])
            _check_time(value["time"])
            return Entry(**value)
    return None


def _parts(value: Mapping[str, Any]) -> tuple[str, str, Facts, str]:
    return value["time"], value["event"], value["facts"], value["previous"]


def _check_time(text: str) -> None:
    if not _TIME.fullmatch(text):
        raise ValueError("not a time")
    datetime.fromisoformat(text)


def _follows(entry: Entry, head: str | None, odd: list[bytes]) -> bool:
    if entry.previous != head:
        return False
    if not odd:
        return entry.event != TORN
    return entry.event == TORN and entry.facts.get("torn_sha256") == hashlib.sha256(b"\n".join(odd)).hexdigest()
