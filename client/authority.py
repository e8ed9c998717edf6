"""Whom a site trusts: the coordinator's own authority, and none of those that machines come with."""

from __future__ import annotations

import ssl
from pathlib import Path

from common.errors import ConfigError


def read_authority(path: Path) -> ssl.SSLContext:
    """Return what trusts the coordinator's authority and no other.

    Raises:
        ConfigError: the certificate is missing or is none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=path.read_text("ascii"))
    except (ssl.SSLError, ValueError):  # ValueError: not ASCII, or empty
        raise ConfigError(f"{path}: not a certificate, expected the PEM file of the coordinator's authority") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: the coordinator's certificate cannot be read ({error.strerror}); "
            "`consilium site join` takes it from the invitation"
        ) from None
    return context
