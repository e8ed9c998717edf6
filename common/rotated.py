"""A log file that cannot fill a disk: at its limit it becomes `.1`, the one before `.2`, and the oldest goes."""

from __future__ import annotations

import os
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
    """

    def __init__(self, path: Path, limit: int = LIMIT, kept: int = KEPT) -> None:
        self._path = path
        self._limit = limit
        self._kept = kept
        self._handle: int | None = None

    def write(self, content: bytes) -> None:
        """Add to the log."""
        with suppress(OSError):
            for start in range(0, len(content), self._limit):
                self._add(content[start : start + self._limit])

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _add(self, content: bytes) -> None:
        if self._opened().st_size + len(content) > self._limit:
            self.close()
            self._turn()
            self._opened()
        if self._handle is not None:
            os.write(self._handle, content)

    def _opened(self) -> os.stat_result:
        if self._handle is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, 0o600)
        return os.fstat(self._handle)

    def _turn(self) -> None:
        for number in range(self._kept, 0, -1):
            with suppress(FileNotFoundError):
                self._aside(number - 1).replace(self._aside(number))
        if not self._kept:
            self._path.unlink(missing_ok=True)

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path
