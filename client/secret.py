"""The site's secret: 32 random bytes that every digest of a patient, a study or a file is made with.

Whoever holds it can search the site's index for a patient whose number is known, so it is for the
eyes of one user only. It cannot be made again: with another secret, the list of patients who opted out
would name nobody.
"""

from __future__ import annotations

import os
from pathlib import Path

from common import private_file
from common.private_file import SECRET_BYTES, write_private

BYTES = SECRET_BYTES


def make_secret(path: Path) -> None:
    """Write a new secret, mode 0600.

    Raises:
        FileExistsError: there is a file of that name; it stays as it is.
    """
    write_private(path, os.urandom(BYTES))


def read_secret(path: Path) -> bytes:
    """Return the secret.

    Raises:
        ConfigError: it is missing, no regular file, open to others than its owner, or of another length.
    """
    return private_file.read_secret(
        path,
        "the site's secret",
        "`consilium site init` makes it for a new site, that of an old one is in your backup",
    )
