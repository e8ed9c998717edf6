"""One process at a time: a lock on a file that names its holder, and that no crash leaves behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConsiliumError


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock; the system lets go of it when the process ends, however it ends.

    Args:
        path: the file of the lock; made if absent, never removed.
        what: what runs, for the message.

    Raises:
        ConsiliumError: another process holds it, or the file cannot be made.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConsiliumError(f"{path}: cannot be opened ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConsiliumError(
                f"{what} runs already, as process {_pid(handle)}; stop that one first: kill {_pid(handle)}"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def holder(path: Path) -> str | None:
    """Return the process that holds a lock, or None where nobody does.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(handle)
    finally:
        os.close(handle)
    return None


def _pid(handle: int) -> str:
    text = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
    return text if text.isdigit() else "unknown"
