"""The site's secret: 32 random bytes that every digest of a patient, a study or a file is made with.

Whoever holds it can search the site's index for a patient whose number is known, so it is for the
eyes of one user only. It cannot be made again: with another secret, the list of patients who opted out
would name nobody.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from common.errors import ConfigError

BYTES = 32


def make_secret(path: Path) -> None:
    """Write a new secret, mode 0600.

    Raises:
        FileExistsError: there is a file of that name; it stays as it is.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(os.urandom(BYTES))
        file.flush()
        os.fsync(file.fileno())


def read_secret(path: Path) -> bytes:
    """Return the secret.

    Raises:
        ConfigError: it is missing, no regular file, open to others than its owner, or of another length.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: missing; `consilium site init` makes it for a new site, that of an old one is in your backup"
        ) from None
    except OSError as error:
        reason = "a symbolic link" if path.is_symlink() else error.strerror
        raise ConfigError(f"{path}: cannot be read ({reason}), expected a file of {BYTES} bytes") from None
    try:
        _check(path, os.fstat(handle))
        return os.read(handle, BYTES)
    finally:
        os.close(handle)


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: not a regular file, expected a file of {BYTES} bytes")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} opens the site's secret to others; run: chmod 600 {path}")
    if found.st_size != BYTES:
        raise ConfigError(f"{path}: {found.st_size} bytes, expected {BYTES}; bring it back from your backup")
