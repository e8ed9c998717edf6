"""A log file that cannot fill a disk: at its limit it becomes `.1`, the one before `.2`, and the oldest goes."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

LIMIT = 5_000_000
"""Bytes of one file."""

KEPT = 3
"""Files besides the one that is written."""


class Rotated:
    """An open log of bounded size; what cannot be written is lost, for a full disk must stop no work.

    Args:
        path: the file that is written.
        limit: bytes at which it is put aside.
        kept: how many are kept aside.
        mode: of a new file.
    """

    def __init__(self, path: Path, limit: int = LIMIT, kept: int = KEPT, *, mode: int = 0o600) -> None:
        self._path = path
        self._mode = mode
        self._limit = limit
        self._kept = kept
        self._handle: int | None = None

    def write(self, content: bytes) -> None:
        """Add to the log, whole or not at all if it fits into one file."""
        with suppress(OSError):
            for start in range(0, len(content), self._limit):
                self._add(content[start : start + self._limit])

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _add(self, content: bytes) -> None:
        size = self._opened().st_size
        if size + len(content) > self._limit:
            self.close()
            turn(self._path, self._kept)
            size = self._opened().st_size
        if self._handle is not None and os.write(self._handle, content) < len(content):
            os.ftruncate(self._handle, size)  # the disk is full: no half of a line stays

    def _opened(self) -> os.stat_result:
        if self._handle is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, self._mode)
        return os.fstat(self._handle)


def turn(path: Path, kept: int = KEPT) -> None:
    """Put a file aside as `.1`, the one before as `.2`; the oldest goes.

    Raises:
        OSError: the folder cannot be written.
    """
    for number in range(kept, 0, -1):
        with suppress(FileNotFoundError):
            _aside(path, number - 1).replace(_aside(path, number))
    if not kept:
        path.unlink(missing_ok=True)


def cut(path: Path, limit: int = LIMIT) -> None:
    """Put what a log holds aside as `.1` once it is at its limit, and empty it: for one that a process prints to.

    Whoever has it open must have opened it to append. What is printed in that moment is lost.
    """
    with suppress(OSError):
        if path.stat().st_size >= limit:
            shutil.copyfile(path, _aside(path, 1))
            os.truncate(path, 0)


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path
