"""Files for the eyes of one user: keys and tokens, mode 0600, checked each time they are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from common.errors import ConfigError

SECRET_BYTES = 32

_LIMIT = 64 * 1024  # bytes; no key is that long


def write_private(path: Path, content: bytes) -> None:
    """Write a new file, mode 0600, on disk when this returns.

    Raises:
        FileExistsError: there is a file of that name; it stays as it is.
        OSError: the folder is missing, full or not writable.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_private(path: Path, what: str, remedy: str) -> bytes:
    """Return the content of a file that nobody else can read.

    Args:
        path: of the file.
        what: it holds, for the message.
        remedy: what to do if there is none.

    Raises:
        ConfigError: it is missing, no regular file, open to others than its owner, or longer than any key.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing, expected {what}; {remedy}") from None
    except OSError as error:
        reason = "a symbolic link" if path.is_symlink() else error.strerror
        raise ConfigError(f"{path}: cannot be read ({reason}), expected {what}") from None
    try:
        _check(path, what, os.fstat(handle))
        return os.read(handle, _LIMIT)
    finally:
        os.close(handle)


def read_secret(path: Path, what: str, remedy: str) -> bytes:
    """Return the bytes of a secret.

    Raises:
        ConfigError: as `read_private`, or another length than `SECRET_BYTES`.
    """
    content = read_private(path, what, remedy)
    if len(content) != SECRET_BYTES:
        raise ConfigError(f"{path}: {len(content)} bytes, expected {SECRET_BYTES}; bring it back from your backup")
    return content


def _check(path: Path, what: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: not a regular file, expected {what}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} opens {what} to others; run: chmod 600 {path}")
    if found.st_size > _LIMIT:
        raise ConfigError(f"{path}: {found.st_size} bytes, too long for {what}")
