"""The audit trail: what was done with a site's data, one line of JSON an event, each bound to the line before it.

The form of a line, and what the chain of them shows, are those of `client.chain`. What it cannot show is that its end
was cut off, or that all of it was written anew: note the hash that `audit verify` prints.

Facts are numbers and digests under words, and of what left the names of the model's tensors: no text, so nothing of a
patient can get in.

A crash can leave the last line torn. It stays as it is; the next event is preceded by `torn_line` with its hash.

At `LIMIT` the file is sealed: it becomes `audit-000001.jsonl`, and the first line of the next `audit.jsonl` follows
from its last one. So the files are one chain, of which none can be changed, swapped or taken out unseen; nothing is
ever deleted. A crash between the two leaves no `audit.jsonl`, and the next event makes it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from client import chain
from client.chain import TORN, Entry, Facts
from common.errors import ConsiliumError

EVENTS = {
    "init": "the site was made",
    "check": "the data were examined",
    "pull": "images were pulled from the PACS",
    "forget": "patients were taken out",
    "run": "a run was given the site, or gave it free",
    "request": "a coordinator asked for something",
    "decision": "the site's policy was asked about a run; the same decision again is told once",
    "approved": "a person allowed a run",
    "rejected": "a person refused a run",
    "reply": "a reply to a coordinator was made, to be sent",
    "released": "a person let a reply go",
    "refused": "a coordinator's request was refused; the same refusal again is told once",
    TORN: "the line before was cut short by a crash",
}
"""What can happen: event -> meaning."""

LIMIT = 16_000_000
"""Bytes from which a file is sealed: some ten runs, and a second to read."""

TENSORS = "tensors"
"""The fact that tells what left: a tensor's name -> shape, L2 norm, SHA-256."""

MEASURES = frozenset({"epsilon"})
"""Facts that are no whole numbers."""

_WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,119}")
_DIGEST = re.compile(r"([0-9a-f]{16}){1,4}")


def append(path: Path, event: str, facts: Facts, limit: int = LIMIT) -> None:
    """Add an event to the trail, on disk when this returns.

    A trail that no longer holds is carried on from its last entry; `verify` goes on telling where it broke.

    Raises:
        ConsiliumError: the trail cannot be written.
        ValueError: the event or a fact is not of the closed kinds.
    """
    check(event, facts)
    try:
        while not _appended(path, event, facts, limit):
            pass  # the file was full, and is sealed now
    except OSError as error:
        raise ConsiliumError(f"{path}: the audit trail cannot be written ({error.strerror})") from None


def read(path: Path) -> tuple[Entry, ...]:
    """Return all entries of a trail that holds.

    Raises:
        ConsiliumError: there is none, or a line does not hold; the message has its file and number.
    """
    entries, wrong = held(path)
    if wrong:
        raise ConsiliumError(wrong)
    return entries


def held(path: Path) -> tuple[tuple[Entry, ...], str]:
    """Return the entries of a trail up to where it holds, and what is wrong there; an empty text: nothing.

    Raises:
        ConsiliumError: there is no trail, or it cannot be read.
    """
    entries: list[Entry] = []
    wrong, head = "", chain.START
    with _files(path) as files:
        for file in files:
            found = _parsed(file, head)
            entries.extend(found.entries)
            if wrong := _wrong(file, found, ended=file != path):
                break
            head = found.end.head
    return tuple(entries), wrong


def latest(path: Path) -> Iterator[Entry]:
    """Yield the entries of a trail from the last one back; files that are not reached are not read.

    Raises:
        ConsiliumError: there is none, or a line of what was read does not hold.
    """
    expected = None
    with _files(path) as files:
        for file in reversed(files):
            found = _parsed(file, None)
            wrong = _wrong(file, found, ended=file != path)
            if wrong or expected not in (None, found.end.head):
                raise ConsiliumError(wrong or _broken(file, len(found.entries) + 1))
            yield from reversed(found.entries)
            expected = found.entries[0].previous if found.entries else expected
        if expected not in (None, chain.START):
            raise ConsiliumError(_broken(files[0], 1))


def verify(path: Path) -> int:
    """Return the number of entries of a trail that holds.

    Raises:
        ConsiliumError: there is none, or a line does not hold; the message has its file and number.
    """
    return len(read(path))


def sealed(path: Path) -> list[Path]:
    """Return the sealed files of a trail, the oldest first."""
    return sorted(path.parent.glob(f"{path.stem}-{'[0-9]' * 6}{path.suffix}"))


def _appended(path: Path, event: str, facts: Facts, limit: int) -> bool:
    """Add an event, or seal the file if it is full, and return whether it was added."""
    with _current(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
        end = chain.find_end(handle, check, _sealed_head(path))
        if os.fstat(handle).st_size >= limit and not (end.torn or end.open):
            path.rename(_next_sealed(path))
            chain.sync(path.parent)
            return False
        content, _ = chain.continuation(end, event, facts)
        chain.write(handle, content)
    chain.sync(path.parent)
    return True


@contextmanager
def _current(path: Path, flags: int) -> Iterator[int]:
    """Open the file that is written now: while it was waited for, another process may have sealed it."""
    with ExitStack() as stack:
        handle = stack.enter_context(chain.opened(path, flags))
        while not _is_at(path, handle):
            stack.close()
            handle = stack.enter_context(chain.opened(path, flags))
        yield handle


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _next_sealed(path: Path) -> Path:
    older = sealed(path)
    number = int(older[-1].stem[-6:]) + 1 if older else 1  # not their count: none may be written over
    return path.with_name(f"{path.stem}-{number:06d}{path.suffix}")


def _sealed_head(path: Path) -> str:
    """Return what the first line of the file that is written now follows from."""
    older = sealed(path)
    if not older:
        return chain.START
    with chain.opened(older[-1], os.O_RDONLY) as handle:
        return chain.find_end(handle, check).head


@contextmanager
def _files(path: Path) -> Iterator[list[Path]]:
    """Yield the files of a trail, the oldest first; none is sealed as long as they are looked at."""
    try:
        with ExitStack() as stack:
            written = [path]
            try:
                stack.enter_context(_current(path, os.O_RDONLY))
            except FileNotFoundError:
                if not sealed(path):
                    raise
                written = []  # a crash came between two files
            yield [*sealed(path), *written]
    except OSError as error:
        raise ConsiliumError(f"{path}: the audit trail cannot be read ({error.strerror})") from None


def _parsed(file: Path, head: str | None) -> chain.Chain:
    with chain.opened(file, os.O_RDONLY) as handle:
        return chain.parse(chain.read(handle), check, head)


def _wrong(file: Path, found: chain.Chain, *, ended: bool) -> str:
    """Return what is wrong with a file; a crash leaves none torn that is sealed."""
    if found.wrong is not None:
        return _broken(file, found.wrong)
    if ended and (found.end.torn or found.end.open):
        return _broken(file, len(found.entries) + bool(found.end.torn))
    if found.end.torn:
        return (
            f"{file}: what follows entry {len(found.entries)} is cut short, as a crash leaves it; "
            "all before it holds, and the next event will record it"
        )
    return ""


def _broken(file: Path, line: int) -> str:
    return (
        f"{file}: line {line} does not hold: it was changed, or a line before it taken out; "
        "keep the file as it is and compare it with your backup"
    )


def check(event: str, facts: Facts) -> None:
    """Check that an event is of the closed kinds.

    Raises:
        ValueError: it is not.
    """
    if event not in EVENTS:
        raise ValueError(f"event {event!r} is not in EVENTS")
    for name, fact in facts.items():
        counts = isinstance(fact, Mapping) and all(_named(key) and _count(value) for key, value in fact.items())
        tensors = name == TENSORS and isinstance(fact, Mapping) and all(map(_tensor, fact.items()))
        measured = name in MEASURES and _measure(fact)
        if not (_named(name) and (counts or tensors or measured or _count(fact) or _digest(fact))):
            raise ValueError(f"fact {name!r}: expected a count, a hex digest, or names with counts")


def _named(name: Any) -> bool:
    return isinstance(name, str) and _WORD.fullmatch(name) is not None


def _count(fact: Any) -> bool:
    return type(fact) is int and 0 <= fact < 2**63


def _measure(fact: Any) -> bool:
    return type(fact) is float and 0 <= fact < math.inf


def _digest(fact: Any) -> bool:
    return isinstance(fact, str) and _DIGEST.fullmatch(fact) is not None


def _tensor(item: tuple[Any, Any]) -> bool:
    """Return whether this is a tensor's name with its shape, L2 norm and SHA-256."""
    name, facts = item
    if not (isinstance(name, str) and _PARAMETER.fullmatch(name) and isinstance(facts, Mapping)):
        return False
    shape = facts.get("shape")
    sides = isinstance(shape, list) and len(shape) <= 8 and all(type(side) is int and side >= 0 for side in shape)
    known = set(facts) <= {"shape", "norm", "sha256"}
    return sides and known and _measure(facts.get("norm", 0.0)) and _digest(facts.get("sha256"))
