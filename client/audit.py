"""The audit trail: what was done with a site's data, one line of JSON an event, each bound to the line before it.

A line is the canonical JSON (sorted keys, no blanks, ASCII) of

    {"event", "facts", "previous", "sha256", "time"}

where `sha256` is that of the same object without `sha256`, and `previous` the `sha256` of the line before, of the first
line 64 zeros. So no line can be changed, taken out or moved without the lines after it saying so. What a chain cannot
show is that its end was cut off, or that all of it was written anew: note the hash that `audit verify` prints.

Facts are counts and digests under names of a closed list: no text, so nothing of a patient can get in.

A crash can leave the last line torn. It stays as it is; the next event is preceded by `torn_line` with its hash.
Source of the construction: Schneier and Kelsey, "Secure audit logs to support computer forensics", 1999, section 3.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import ConsiliumError

EVENTS = {
    "init": "the site was made",
    "check": "the data were examined",
    "pull": "images were pulled from the PACS",
    "forget": "patients were taken out",
    "run": "a run was given the site, or gave it free",
    "reply": "a reply to a coordinator was made, to be sent",
    "refused": "a coordinator's request was refused; the same refusal again is told once",
    "torn_line": "the line before was cut short by a crash",
}
"""What can happen: event -> meaning."""

START = "0" * 64
"""`previous` of the first line."""

Facts = Mapping[str, Any]
"""Names -> counts, hex digests, or one more level of names -> counts."""

_WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")
_DIGEST = re.compile(r"([0-9a-f]{16}){1,4}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_KEYS = {"time", "event", "facts", "previous", "sha256"}


@dataclass(frozen=True)
class Entry:
    """One line."""

    time: str  # UTC, ISO 8601 to the second
    event: str
    facts: Facts
    previous: str
    sha256: str


@dataclass(frozen=True)
class _Trail:
    """A trail as it lies on disk."""

    entries: tuple[Entry, ...]  # up to the first line that does not hold
    head: str  # hash of the last line that is an entry, whether or not it holds
    wrong: int | None  # number of the first line that does not hold, from 1
    torn: bytes  # what a crash left after the last entry, without an end of line


def append(path: Path, event: str, facts: Facts) -> None:
    """Add an event to the trail, on disk when this returns.

    A trail that no longer holds is carried on from its last entry; `verify` goes on telling where it broke.

    Raises:
        ConsiliumError: the trail cannot be written.
        ValueError: the event or a fact is not of the closed kinds.
    """
    _check(event, facts)
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConsiliumError(f"{path}: the audit trail cannot be written ({error.strerror})") from None
    with os.fdopen(handle, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            _write(file.fileno(), _continuation(file.read() or b"", event, facts))
            os.fsync(file.fileno())
        except OSError as error:
            raise ConsiliumError(f"{path}: the audit trail cannot be written ({error.strerror})") from None
    _sync(path.parent)


def read(path: Path) -> tuple[Entry, ...]:
    """Return all entries of a trail that holds.

    Raises:
        ConsiliumError: there is none, or a line does not hold; the message has its number.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            trail = _parse(file.read())
    except OSError as error:
        raise ConsiliumError(f"{path}: the audit trail cannot be read ({error.strerror})") from None
    if trail.wrong is not None:
        raise ConsiliumError(
            f"{path}: line {trail.wrong} does not hold: it was changed, or a line before it taken out; "
            "keep the file as it is and compare it with your backup"
        )
    if trail.torn:
        raise ConsiliumError(
            f"{path}: what follows entry {len(trail.entries)} is cut short, as a crash leaves it; "
            "all before it holds, and the next event will record it"
        )
    return trail.entries


def verify(path: Path) -> int:
    """Return the number of entries of a trail that holds.

    Raises:
        ConsiliumError: there is none, or a line does not hold; the message has its number.
    """
    return len(read(path))


def _check(event: str, facts: Facts) -> None:
    if event not in EVENTS:
        raise ValueError(f"event {event!r} is not in EVENTS")
    for name, fact in facts.items():
        counts = isinstance(fact, Mapping) and all(_named(key) and _count(value) for key, value in fact.items())
        if not (_named(name) and (counts or _count(fact) or _digest(fact))):
            raise ValueError(f"fact {name!r}: expected a count, a hex digest, or names with counts")


def _named(name: Any) -> bool:
    return isinstance(name, str) and _WORD.fullmatch(name) is not None


def _count(fact: Any) -> bool:
    return type(fact) is int and 0 <= fact < 2**63


def _digest(fact: Any) -> bool:
    return isinstance(fact, str) and _DIGEST.fullmatch(fact) is not None


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _line(event: str, facts: Facts, previous: str) -> tuple[bytes, str]:
    """Return a line without its end, and its hash."""
    time = datetime.now(UTC).strftime(_TIME)
    body = {"time": time, "event": event, "facts": facts, "previous": previous}
    sha256 = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "sha256": sha256}), sha256


def _continuation(content: bytes, event: str, facts: Facts) -> bytes:
    """Return the bytes that carry a trail on, in one piece, whatever its end looks like."""
    trail = _parse(content)
    head = trail.head
    parts = [b""] if content and not content.endswith(b"\n") else []  # an end for the line that has none
    if trail.torn:
        torn = {"bytes": len(trail.torn), "torn_sha256": hashlib.sha256(trail.torn).hexdigest()}
        line, head = _line("torn_line", torn, head)
        parts.append(line)
    parts.append(_line(event, facts, head)[0])
    return b"\n".join(parts) + b"\n"


def _parse(content: bytes) -> _Trail:
    """Return what a trail holds.

    Lines that are no entries may only be there if the entry after them says that they were torn, and names their hash.
    An entry that does not follow from those before breaks the trail for good: no later line can explain it.
    """
    *lines, tail = content.split(b"\n")
    entries: list[Entry] = []
    odd: list[bytes] = []  # since the last entry that holds
    first = head = None
    broken = False
    for number, line in enumerate([*lines, tail] if tail else lines, 1):
        entry = _entry(line)
        head = entry.sha256 if entry else head
        if entry and not broken and _follows(entry, entries, odd):
            entries.append(entry)
            odd.clear()
            continue
        broken = broken or entry is not None
        first = first if odd else number
        odd.append(line)
    if odd and tail and not broken:
        return _Trail(tuple(entries), head or START, None, b"\n".join(odd))
    return _Trail(tuple(entries), head or START, first if odd else None, b"")


def _entry(line: bytes) -> Entry | None:
    """Return the entry of a line, if the line is the canonical form of one and its hash is right."""
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(line)
    if not isinstance(value, dict) or set(value) != _KEYS:
        return None
    with suppress(ValueError, TypeError):
        body = {key: part for key, part in value.items() if key != "sha256"}
        texts = all(isinstance(part, dict if key == "facts" else str) for key, part in value.items())
        if texts and line == _canonical(value) and hashlib.sha256(_canonical(body)).hexdigest() == value["sha256"]:
            _check(value["event"], value["facts"])
            datetime.strptime(value["time"], _TIME)  # only its form counts
            return Entry(**value)
    return None


def _follows(entry: Entry, entries: list[Entry], odd: list[bytes]) -> bool:
    if entry.previous != (entries[-1].sha256 if entries else START):
        return False
    if not odd:
        return entry.event != "torn_line"
    return entry.event == "torn_line" and entry.facts.get("torn_sha256") == hashlib.sha256(b"\n".join(odd)).hexdigest()


def _write(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _sync(folder: Path) -> None:
    """Put the name of a new file on disk as well."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
