"""What is to leave the site, on disk before any of it does: made once, looked at, let go, and sent.

A request that is asked again, after a crash too, gets the very bytes of the first answer: two answers with noise of
their own to one question would cost the patients' privacy twice. A reply is one file,

    NUMBER-DIGEST.reply     a line of JSON (ticket, kind, run, time, bytes, sha256, facts), then the bytes

where DIGEST is of the ticket; empty files beside it say that a person has let it go (`.released`) and that the
coordinator has it (`.sent`). All of it is for the eyes of its owner. The newest few replies of a run are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import codec
from common.errors import CheckpointError, UsageError
from common.files import write_atomic

FOLDER = "outbox"
"""What it is called in a site's state."""

KEPT = 4
"""Replies of a run that are kept."""

Shapes = Mapping[str, tuple[int, ...]]
"""Names of trained tensors and their shapes, in the order in which they travel in one vector."""

_NAME = re.compile(r"([0-9]{8})-([0-9a-f]{32})\.reply")
_HEADER = 2**22  # bytes of the line before the content, at most
_WEIGHTS = "weights"
_RAW = "consilium.raw"
_DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "float16", "float32", "float64", "int64")
}
_LONGEST = 120  # characters of a text that is shown


@dataclass(frozen=True)
class Letter:
    """One reply that was made."""

    path: Path
    ticket: str
    kind: str
    run: str  # fingerprint of the run that it is for; empty: of none
    time: str  # when it was made: UTC, ISO 8601 to the second
    nbytes: int
    sha256: str
    facts: Mapping[str, Any]
    released: bool  # a person has let it go
    sent: bool  # the coordinator has it


class Outbox:
    """The replies of one site.

    Args:
        folder: where they lie; made, for its owner only, with the first.
        kept: how many of a run are kept.
    """

    def __init__(self, folder: Path, kept: int = KEPT) -> None:
        self._folder = folder
        self._kept = kept

    @staticmethod
    def at(state: Path) -> Outbox:
        """Return the outbox of the site whose state this is."""
        return Outbox(state / FOLDER)

    def put(self, ticket: str, kind: str, content: bytes, facts: Mapping[str, Any]) -> Path:
        """Keep a reply, on disk when this returns; the oldest ones of its run go.

        Args:
            ticket: what was asked; equal tickets are the same question.
            kind: of the request.
            content: what would leave.
            facts: what else is to be known: `run`, its fingerprint; `names`, a list of name and shape of each trained
                tensor, in order; values are what JSON has.

        Raises:
            CheckpointError: another reply to the same question is there, or it is damaged.
            OSError: it cannot be written.
        """
        there = self._find(ticket)
        if there is not None:
            if self._content(there) != content:
                raise CheckpointError(f"{there.path}: holds another reply to the same request; nothing is sent")
            return there.path
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = max((int(path.name[:8]) for path in self._paths()), default=0) + 1
        path = self._folder / f"{number:08d}-{_digest(ticket)}.reply"
        write_atomic(path, _header(ticket, kind, content, facts) + content, mode=0o600)
        self._sync()
        self._prune(str(facts.get("run", "")))
        return path

    def replace(self, ticket: str, kind: str, content: bytes, facts: Mapping[str, Any]) -> Path:
        """Keep a reply as `put` does; another one to the same question, which may have changed since, goes.

        Raises:
            CheckpointError: what is there is damaged.
            OSError: it cannot be written.
        """
        there = self._find(ticket)
        if there is not None and self._content(there) != content:
            _remove(there.path)
        return self.put(ticket, kind, content, facts)

    def get(self, ticket: str) -> bytes | None:
        """Return the reply that was made to a request; None: none was, or it is kept no more.

        Raises:
            CheckpointError: it is damaged.
        """
        there = self._find(ticket)
        return None if there is None else self._content(there)

    def find(self, ticket: str) -> Letter | None:
        """Return what is known of the reply to a request, None where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        return self._find(ticket)

    def content(self, letter: Letter) -> bytes:
        """Return the bytes of a reply.

        Raises:
            CheckpointError: they are damaged, or there no more.
        """
        return self._content(letter)

    def letters(self) -> tuple[Letter, ...]:
        """Return every reply that is kept, the oldest first.

        Raises:
            CheckpointError: one is damaged.
        """
        return tuple(letter for path in self._paths() if (letter := _letter(path)) is not None)

    def held(self) -> tuple[Letter, ...]:
        """Return the replies that nobody has let go and nobody has, the oldest first."""
        return tuple(letter for letter in self.letters() if not (letter.released or letter.sent))

    def release(self, ticket: str) -> None:
        """Let a reply go.

        Raises:
            UsageError: there is no reply to that request.
            OSError: it cannot be marked.
        """
        self._mark(ticket, ".released")

    def is_released(self, ticket: str) -> bool:
        """Return whether a person has let a reply go."""
        there = self._find(ticket)
        return there is not None and there.released

    def mark_sent(self, ticket: str) -> None:
        """Take note that the coordinator has a reply; one that is kept no more is no fault."""
        with suppress(UsageError):
            self._mark(ticket, ".sent")

    def drop(self, run: str) -> int:
        """Delete the replies of a run, and return how many there were."""
        mine = self._of(run)
        for letter in mine:
            _remove(letter.path)
        return len(mine)

    def _mark(self, ticket: str, suffix: str) -> None:
        there = self._find(ticket)
        if there is None:
            raise UsageError(f"outbox: there is no reply to {ticket[:16]!r}; `consilium site outbox` lists what is")
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(there.path.with_suffix(suffix), flags, 0o600))
        self._sync()

    def _find(self, ticket: str) -> Letter | None:
        wanted = _digest(ticket)
        path = next((path for path in self._paths() if path.name[9:41] == wanted), None)
        return None if path is None else _letter(path)

    def _paths(self) -> list[Path]:
        with suppress(FileNotFoundError):
            return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        return []

    def _content(self, letter: Letter) -> bytes:
        content = _read(letter.path)[1]
        if len(content) != letter.nbytes or hashlib.sha256(content).hexdigest() != letter.sha256:
            raise _damaged(letter.path)
        return content

    def _prune(self, run: str) -> None:
        mine = self._of(run)
        for letter in mine[: max(len(mine) - self._kept, 0)]:
            _remove(letter.path)

    def _of(self, run: str) -> list[Letter]:
        """Return the replies of a run; what is damaged stays where it is, for a person to look at."""
        found: list[Letter] = []
        for path in self._paths():
            with suppress(CheckpointError):
                letter = _letter(path)
                found += [letter] if letter is not None and letter.run == run else []
        return found

    def _sync(self) -> None:
        """Put the names of new files on disk as well."""
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def describe(content: bytes, names: Shapes | None = None) -> dict[str, Any]:
    """Return what the bytes of a reply hold, whatever they are: every array and every fact in them.

    Args:
        content: the bytes, as they would leave.
        names: of the trained tensors, if they are known: the one vector of weights is then shown in these parts.
    """
    document = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "readable": True}
    try:
        return {**document, **_opened(content, names)}
    except Exception as error:  # noqa: BLE001  bytes that are no records are shown as such, whatever reading them ends in
        reason = f"not the records of a reply ({type(error).__name__})"
        return {**document, "readable": False, "reason": reason, "arrays": [], "facts": []}


def _opened(content: bytes, names: Shapes | None) -> dict[str, Any]:
    from common.messages import from_bytes, unpacked

    record: Any = unpacked(from_bytes(content))  # of any kind, not only of those that this version sends
    arrays = [
        _array(group, name, array, names)
        for group, held in record.array_records.items()
        for name, array in held.items()
    ]
    groups = (*record.config_records.values(), *record.metric_records.values())
    facts = [{"name": _short(name), "value": _plain(value)} for held in groups for name, value in held.items()]
    return {"arrays": arrays, "facts": facts}


def _array(group: str, name: str, array: Any, names: Shapes | None) -> dict[str, Any]:
    data: bytes = array.data
    values = _values(group, array)
    wire = "bfloat16" if _is_bfloat16(group, array) else array.dtype
    shown = {
        "record": _short(group),
        "name": _short(name),
        "dtype": _short(wire),
        "shape": [int(side) for side in array.shape],
        "bytes": len(data),
        "norm": _norm(values),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    if group == _WEIGHTS and names and values is not None and values.size == sum(map(_size, names.values())):
        shown["parts"] = list(_parts(values, data, names))
    return shown


def _parts(values: NDArray[Any], data: bytes, names: Shapes) -> Iterator[dict[str, Any]]:
    """Yield the tensors that one vector is made of."""
    width = len(data) // max(values.size, 1)
    start = 0
    for name, shape in names.items():
        end = start + _size(shape)
        part = data[start * width : end * width]
        yield {
            "name": _short(name),
            "shape": list(shape),
            "bytes": len(part),
            "norm": _norm(values[start:end]),
            "sha256": hashlib.sha256(part).hexdigest(),
        }
        start = end


def _values(group: str, array: Any) -> NDArray[Any] | None:
    """Return the numbers of an array, flat; None where they are encoded in a way that is not known."""
    dtype = _DTYPES.get(array.dtype)
    if array.stype != _RAW or dtype is None or len(array.data) % dtype.itemsize:
        return None
    values = np.frombuffer(array.data, dtype)
    if values.size != _size(array.shape):
        return None
    return codec.decode(values, {"": values.shape}, "bfloat16")[""] if _is_bfloat16(group, array) else values


def _is_bfloat16(group: str, array: Any) -> bool:
    """Return whether an array is of bfloat16, which NumPy lacks: weights alone travel so."""
    return bool(group == _WEIGHTS and array.dtype == "uint16")


def _norm(values: NDArray[Any] | None) -> float | None:
    """Return the L2 norm; None where there is none that is a number."""
    if values is None:
        return None
    with np.errstate(all="ignore"):
        norm = float(np.linalg.norm(values.astype(np.float64)))
    return norm if np.isfinite(norm) else None


def _size(shape: Any) -> int:
    size = 1
    for side in shape:
        size *= int(side)
    return size


def _plain(value: Any) -> Any:
    """Return a fact as JSON has it: numbers as they are, everything else as a short text that can be shown."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, SHA-256 {hashlib.sha256(value).hexdigest()}"
    return _short(value if isinstance(value, str) else repr(list(value)[:_LONGEST]))


def _short(text: Any) -> str:
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text)[:_LONGEST])
    return f"{shown}… ({len(text)} characters)" if len(str(text)) > _LONGEST else shown


def _header(ticket: str, kind: str, content: bytes, facts: Mapping[str, Any]) -> bytes:
    header = {
        "ticket": ticket,
        "kind": kind,
        "run": str(facts.get("run", "")),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "facts": dict(facts),
    }
    return json.dumps(header, allow_nan=False).encode("ascii") + b"\n"


def _letter(path: Path) -> Letter | None:
    """Return the reply of a file; None where it was deleted meanwhile."""
    try:
        header = json.loads(_read(path, head=True)[0])
        texts = [header[key] for key in ("ticket", "kind", "run", "time", "sha256")]
        if not (all(isinstance(text, str) for text in texts) and isinstance(header["facts"], dict)):
            raise ValueError("expected texts")
        ticket, kind, run, time, sha256 = texts
        marks = [path.with_suffix(suffix).exists() for suffix in (".released", ".sent")]
        return Letter(path, ticket, kind, run, time, int(header["bytes"]), sha256, header["facts"], *marks)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        raise _damaged(path) from None


def _read(path: Path, *, head: bool = False) -> tuple[bytes, bytes]:
    """Return the line before the content, and the content where that is wanted as well."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        line = file.readline(_HEADER)
        return line, b"" if head else file.read()


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged, so it is not sent, and no other in its place: move it elsewhere, and the run has to be anew"
    )


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)  # first, for a mark without a reply means nothing
    for suffix in (".released", ".sent"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def _digest(ticket: str) -> str:
    return hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).hexdigest()[:32]
