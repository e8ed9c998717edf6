"""`[data.dicomweb]` of `site.toml`: which studies come from the hospital's PACS, and how politely.

Nothing is pulled without an explicit list of studies; secrets are paths to files that only their owner may read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from common.errors import ConfigError
from common.strict import Section

FileName = Annotated[str, Field(min_length=1)]
"""A path as `site.toml` gives it: absolute, or seen from the folder of `site.toml`."""

_SECRET_BYTES = 16 * 1024  # a bearer token of an OpenID provider has a few kilobytes


class DicomWeb(Section):
    """How the images of a list of studies are pulled over DICOMweb (DICOM Part 18)."""

    url: str  # of the DICOMweb service, as https://pacs.example.org/dicom-web
    studies: FileName  # the list: one StudyInstanceUID or AccessionNumber a line, or a CSV file with such a column
    credentials: FileName | None = None  # a file with `user:password` or `Bearer TOKEN`, mode 600
    ca_certificate: FileName | None = None  # PEM; without it the authorities that browsers trust
    proxy: str | None = None  # environment variables are not asked
    allow_http: bool = False  # let images and credentials cross the network in the clear
    requests_per_second: float = Field(default=5.0, gt=0, le=1000)
    timeout_s: float = Field(default=60.0, gt=0, le=3600)
    retries: int = Field(default=5, ge=0, le=20)
    max_file_mb: int = Field(default=2048, ge=1)

    @field_validator("url")
    @classmethod
    def _service(cls, value: str) -> str:
        _http_address(value)
        return value.rstrip("/")

    @field_validator("proxy")
    @classmethod
    def _a_proxy(cls, value: str | None) -> str | None:
        if value is not None and _http_address(value).path not in ("", "/"):
            raise ValueError("expected an address without a path, as http://proxy.example.org:3128")
        return value

    @model_validator(mode="after")
    def _in_the_clear(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme == "http" and not self.allow_http and not _is_loopback(parts.hostname or ""):
            raise ValueError(
                "url: plain http would send images and credentials unencrypted - use https,"
                " or set allow_http = true if the network in between is protected otherwise"
            )
        return self


@dataclass(frozen=True, repr=False)
class Credentials:
    """What the PACS asks for: a token, or a user and a password."""

    token: str | None = None
    user: str = ""
    password: str = ""


def read_credentials(path: Path) -> Credentials:
    """Return the content of a credentials file.

    Raises:
        ConfigError: the file cannot be read, is open to others than its owner, or holds something else.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_SECRET_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise ConfigError(f"credentials {path}: cannot be read ({error.strerror})") from None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ConfigError(f"credentials {path}: mode {mode:03o} lets others than the owner in - chmod 600 {path}")
    return _credentials(content, path)


def _credentials(content: bytes, path: Path) -> Credentials:
    expected = f"credentials {path}: expected one line, `user:password` or `Bearer TOKEN`"
    try:
        line = content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{expected}, found no UTF-8 text") from None
    if len(content) > _SECRET_BYTES or not line.isprintable():  # a line break more is not printable either
        raise ConfigError(f"{expected}, found more than one")
    kind, _, token = line.partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return _bearer(token.strip(), expected)
    user, colon, password = line.partition(":")
    if not (colon and user.strip()):
        raise ConfigError(f"{expected}, found neither")
    return Credentials(user=user, password=password)


def _bearer(token: str, expected: str) -> Credentials:
    if not token.isascii() or " " in token:
        raise ConfigError(f"{expected}, found a token with blanks or letters outside ASCII")
    return Credentials(token=token)


def _http_address(text: str) -> SplitResult:
    """Return the parts of an http or https address.

    Raises:
        ValueError: it is none, or carries what belongs elsewhere.
    """
    expected = "expected an address as https://pacs.example.org/dicom-web"
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        raise ValueError(expected) from None
    if not known or not text.isprintable() or not text.isascii() or " " in text:
        raise ValueError(expected)
    if "@" in parts.netloc:
        raise ValueError("no user or password in an address - put them into the file that `credentials` names")
    if "?" in text or "#" in text:
        raise ValueError(f"{expected}, without ? and #")
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
