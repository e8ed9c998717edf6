"""The audit trail: what was done with a site's data, one line of JSON an event, each bound to the line before it.

The form of a line, and what the chain of them shows, are those of `client.chain`. What it cannot show is that its end
was cut off, or that all of it was written anew: note the hash that `audit verify` prints.

Facts are numbers and digests under words, and of what left the names of the model's tensors: no text, so nothing of a
patient can get in.

A crash can leave the last line torn. It stays as it is; the next event is preceded by `torn_line` with its hash.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
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

TENSORS = "tensors"
"""The fact that tells what left: a tensor's name -> shape, L2 norm, SHA-256."""

MEASURES = frozenset({"epsilon"})
"""Facts that are no whole numbers."""

_WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,119}")
_DIGEST = re.compile(r"([0-9a-f]{16}){1,4}")


def append(path: Path, event: str, facts: Facts) -> None:
    """Add an event to the trail, on disk when this returns.

    A trail that no longer holds is carried on from its last entry; `verify` goes on telling where it broke.

    Raises:
        ConsiliumError: the trail cannot be written.
        ValueError: the event or a fact is not of the closed kinds.
    """
    check(event, facts)
    try:
        with chain.opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
            content, _ = chain.continuation(chain.find_end(handle, check), event, facts)
            chain.write(handle, content)
    except OSError as error:
        raise ConsiliumError(f"{path}: the audit trail cannot be written ({error.strerror})") from None
    chain.sync(path.parent)


def read(path: Path) -> tuple[Entry, ...]:
    """Return all entries of a trail that holds.

    Raises:
        ConsiliumError: there is none, or a line does not hold; the message has its number.
    """
    try:
        with chain.opened(path, os.O_RDONLY) as handle:
            trail = chain.parse(chain.read(handle), check)
    except OSError as error:
        raise ConsiliumError(f"{path}: the audit trail cannot be read ({error.strerror})") from None
    if trail.wrong is not None:
        raise ConsiliumError(
            f"{path}: line {trail.wrong} does not hold: it was changed, or a line before it taken out; "
            "keep the file as it is and compare it with your backup"
        )
    if trail.end.torn:
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
