"""Who may take part: invitations, and the sites that answered one.

`sites.json` holds each site's name and public key, `invitations.json` the hash of each token that is still good, so
that whoever reads the coordinator's files cannot answer in a hospital's place. Both change under one lock, each
atomically, the sites first: a crash between the two leaves a token that only the operator's own `--replace` could make
use of.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import importlib.metadata
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography.hazmat.primitives import serialization
from pydantic import Field, model_validator

from common import certificates, node_key
from common.errors import ConfigError, ConsiliumError
from common.files import write_atomic
from common.invitation import (
    Enrolment,
    Invitation,
    Time,
    Token,
    parse_timestamp,
    read_enrolment,
    read_json,
    timestamp,
)
from common.names import Name, plain
from common.node_key import PublicKey
from common.strict import Section, validated
from server.server_config import ServerConfig

DAYS = 14
"""Days for which an invitation is good."""

_LIMIT = 16 * 1024 * 1024  # bytes


class Enrolled(Section):
    """A site of the federation."""

    name: Name
    public_key: PublicKey  # one line of OpenSSH
    enrolled_at: Time

    @property
    def fingerprint(self) -> str:
        """The public key's fingerprint, as `ssh-keygen -l` prints it."""
        return node_key.fingerprint(self.public_key)


class _Invited(Section):
    name: Name
    token_sha256: Token
    expires: Time


class _Sites(Section):
    version: Literal[1] = 1
    sites: Annotated[tuple[Enrolled, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _different(self) -> _Sites:
        for values in ([site.name for site in self.sites], [site.public_key for site in self.sites]):
            if len(set(values)) < len(values):
                raise ValueError("expected every name and every key once")
        return self


class _Invitations(Section):
    version: Literal[1] = 1
    invitations: Annotated[tuple[_Invited, ...], Field(strict=False)] = ()


def invite(config: ServerConfig, name: str, now: datetime | None = None) -> Invitation:
    """Return a new invitation; one to the same site that nobody has answered is void from now on.

    Raises:
        ConfigError: the name is none that a site can have, or a file of the state cannot be used.
        ConsiliumError: the state cannot be written.
    """
    try:
        plain(name)
    except ValueError as error:
        raise ConfigError(f"NAME: got {name!r}, {error}") from None
    token = secrets.token_hex(32)
    made = Invitation(
        name=name,
        address=str(config.address),
        ca_certificate=_authority(config),
        token=token,
        expires=timestamp((now or datetime.now(UTC)) + timedelta(days=DAYS)),
        version=importlib.metadata.version("consilium"),
    )
    with locked(config):
        others = _without(_read(config.invitations, _Invitations).invitations, name)
        invited = _Invited(name=name, token_sha256=_digest(token), expires=made.expires)
        _write(config.invitations, _Invitations(invitations=(*others, invited)))
    return made


def enrol(config: ServerConfig, path: Path, replace: bool = False, now: datetime | None = None) -> Enrolled:
    """Record the site whose enrolment a file holds.

    Args:
        config: the coordinator's.
        path: of the enrolment.
        replace: let the site's new key take the place of another one.
        now: the time to judge at.

    Raises:
        ConfigError: the file is no enrolment, or changed since it was signed.
        ConsiliumError: its token is not good, the site is enrolled, or its key is another site's.
    """
    moment = now or datetime.now(UTC)
    answer = read_enrolment(path)
    with locked(config):
        sites, invitations = _read(config.sites, _Sites).sites, _read(config.invitations, _Invitations).invitations
        _check_new(sites, answer)
        _check_token(invitations, answer, moment)
        _check_replace(sites, answer, replace)
        new = Enrolled(name=answer.name, public_key=answer.public_key, enrolled_at=timestamp(moment))
        _write(config.sites, _Sites(sites=_sorted((*_without(sites, new.name), new))))
        _write(config.invitations, _Invitations(invitations=_without(invitations, new.name)))
    return new


def enrolled(config: ServerConfig) -> tuple[Enrolled, ...]:
    """Return the sites of the federation, by name.

    Raises:
        ConsiliumError: the file of the sites is damaged.
    """
    return _read(config.sites, _Sites).sites


def remove(config: ServerConfig, name: str) -> Enrolled:
    """Take a site out of the federation, and any invitation to it, and return what was recorded of it.

    Raises:
        ConsiliumError: there is no such site, or the state cannot be written.
    """
    with locked(config):
        sites = _read(config.sites, _Sites).sites
        gone = next((site for site in sites if site.name == name), None)
        if gone is None:
            names = ", ".join(site.name for site in sites) or "none"
            raise ConsiliumError(f"{name!r} is not enrolled; enrolled: {names}")
        invitations = _read(config.invitations, _Invitations).invitations
        _write(config.invitations, _Invitations(invitations=_without(invitations, name)))
        _write(config.sites, _Sites(sites=_without(sites, name)))
    return gone


def _check_new(sites: Sequence[Enrolled], answer: Enrolment) -> None:
    """Refuse a key that is known: there is nothing to do, or two sites would share one identity."""
    holder = next((site for site in sites if site.public_key == answer.public_key), None)
    if holder is None:
        return
    if holder.name == answer.name:
        raise ConsiliumError(f"{holder.name}: already enrolled with this key, since {holder.enrolled_at}")
    raise ConsiliumError(
        f"{answer.name}: its key is that of {holder.name}; every site makes its own with `consilium site join`"
    )


def _check_token(invitations: Sequence[_Invited], answer: Enrolment, now: datetime) -> None:
    invited = next((one for one in invitations if one.name == answer.name), None)
    if invited is None or not hmac.compare_digest(invited.token_sha256, _digest(answer.token)):
        raise ConsiliumError(
            f"{answer.name}: no open invitation has this token; it was used, or a later invitation took its place: "
            f"run `consilium server invite {answer.name}` and let the site join again"
        )
    if now >= parse_timestamp(invited.expires):
        raise ConsiliumError(
            f"{answer.name}: its invitation expired on {invited.expires}; run `consilium server invite {answer.name}`"
        )


def _check_replace(sites: Sequence[Enrolled], answer: Enrolment, replace: bool) -> None:
    known = next((site for site in sites if site.name == answer.name), None)
    if known is not None and not replace:
        raise ConsiliumError(
            f"{answer.name}: already enrolled with another key, {known.fingerprint}; if the site says that its new one "
            f"is {node_key.fingerprint(answer.public_key)}, enrol it with --replace"
        )


def _authority(config: ServerConfig) -> str:
    found = certificates.read_certificates(config.ca_certificate)
    text = "".join(one.public_bytes(serialization.Encoding.PEM).decode("ascii") for one in found)
    try:
        certificates.parse_authority(text)
    except ValueError as error:
        raise ConfigError(f"{config.ca_certificate}: {error}") from None
    return text


@contextmanager
def locked(config: ServerConfig) -> Iterator[None]:
    """Let one process at a time change who may take part, or start an engine; the later one waits.

    Raises:
        ConfigError: there is no state.
    """
    try:
        handle = os.open(config.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"{config.state}: cannot be used ({error.strerror}), expected the coordinator's state; "
            "`consilium server init` makes a new one"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(path: Path, kind: type[File]) -> File:
    """Return what a file of the state holds; nothing if there is none yet."""
    if not os.path.lexists(path):
        return kind()
    try:
        return validated(kind, read_json(path, _LIMIT), str(path))
    except ConfigError as error:
        raise ConsiliumError(f"{error}; bring it back from your backup") from None


def _write(path: Path, value: Section) -> None:
    content = json.dumps(value.model_dump(), indent=1).encode("ascii") + b"\n"
    try:
        write_atomic(path, content, mode=0o600)
    except OSError as error:
        raise ConsiliumError(f"{path}: cannot be written ({error.strerror})") from None


def _without(entries: Sequence[Entry], name: str) -> tuple[Entry, ...]:
    return tuple(entry for entry in entries if entry.name != name)


def _sorted(sites: Sequence[Enrolled]) -> tuple[Enrolled, ...]:
    return tuple(sorted(sites, key=lambda site: site.name))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("ascii")).hexdigest()


Entry = TypeVar("Entry", Enrolled, _Invited)
File = TypeVar("File", _Sites, _Invitations)
