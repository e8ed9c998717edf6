"""The two documents by which a hospital joins: the coordinator's Invitation, and the site's Enrolment in answer to it.

Both are small JSON files that people carry from one side to the other. An invitation holds a token that is good once;
an enrolment holds the site's public key, and a signature that shows that whoever wrote it has the private one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from common import certificates, node_key
from common.address import AddressText
from common.certificates import Authority
from common.errors import ConfigError
from common.files import write_atomic
from common.names import Name
from common.node_key import PublicKey
from common.strict import Section, validated

LIMIT = 64 * 1024
"""Bytes of a document; neither is ever a tenth of that."""

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_KEY = re.compile(r"[a-z0-9_]{1,40}")
_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})(?:[.a-z+-][0-9A-Za-z.+-]{0,40})?")


def timestamp(moment: datetime) -> str:
    """Return a time as the documents write it: UTC, ISO 8601 to the second."""
    return moment.astimezone(UTC).strftime(_TIME)


def parse_timestamp(text: str) -> datetime:
    """Return the time of a text.

    Raises:
        ValueError: it is not what `timestamp` writes.
    """
    moment = datetime.strptime(text, _TIME).replace(tzinfo=UTC) if text.isascii() else None
    if moment is None or timestamp(moment) != text:
        raise ValueError("expected a time such as 2027-01-31T12:00:00Z")
    return moment


def _time(value: str) -> str:
    try:
        parse_timestamp(value)
    except ValueError:
        raise ValueError("expected a time such as 2027-01-31T12:00:00Z") from None
    return value


def _version(value: str) -> str:
    if not _VERSION.fullmatch(value):
        raise ValueError("expected a version such as 1.2.3")
    return value


Time = Annotated[str, AfterValidator(_time)]
Token = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # 32 random bytes
Signature = Annotated[str, Field(pattern="^[A-Za-z0-9+/]{80,160}={0,2}$")]


class Invitation(Section):
    """What a coordinator gives to a hospital: where it is, by what to know it, and a token that is good once."""

    kind: Literal["consilium-invitation-1"] = Field(default="consilium-invitation-1", alias="schema")
    name: Name  # the site's in the federation
    address: AddressText  # of the coordinator
    ca_certificate: Authority  # PEM; what the hospital trusts from now on
    token: Token
    expires: Time
    version: Annotated[str, AfterValidator(_version)]  # of consilium at the coordinator

    @property
    def authority_fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, to be compared by telephone."""
        return certificates.fingerprint(certificates.parse_authority(self.ca_certificate))

    def expired(self, now: datetime | None = None) -> bool:
        """Return whether it is too late to answer."""
        return (now or datetime.now(UTC)) >= parse_timestamp(self.expires)


class Enrolment(Section):
    """A site's answer: its public key, bound to its name and the invitation's token by a signature."""

    kind: Literal["consilium-enrolment-1"] = Field(default="consilium-enrolment-1", alias="schema")
    name: Name
    token: Token
    public_key: PublicKey  # one line of OpenSSH
    signature: Signature  # ECDSA, SHA-256, over `signed_bytes`, in base64

    def is_signed(self) -> bool:
        """Return whether whoever wrote it has the private key."""
        return node_key.is_signed(self.public_key, self.signature, signed_bytes(self.name, self.token, self.public_key))


Document = TypeVar("Document", Invitation, Enrolment)


def enrolment(invitation: Invitation, key: node_key.PrivateKey) -> Enrolment:
    """Return the answer of a site that holds a key."""
    public = node_key.public_text(key)
    signature = node_key.sign(key, signed_bytes(invitation.name, invitation.token, public))
    return Enrolment(name=invitation.name, token=invitation.token, public_key=public, signature=signature)


def signed_bytes(name: str, token: str, public_key: str) -> bytes:
    """Return what a site signs: canonical JSON after a line that no other protocol signs."""
    body = {"name": name, "public_key": public_key, "token": token}
    return b"consilium enrolment 1\n" + json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")


def read_invitation(path: Path) -> Invitation:
    """Return the invitation of a file.

    Raises:
        ConfigError: it cannot be read, is no invitation, or comes from another series of versions.
    """
    values = read_json(path)
    _check_series(path, values.get("version"))
    return _document(path, values, Invitation)


def read_enrolment(path: Path) -> Enrolment:
    """Return the enrolment of a file, its signature checked.

    Raises:
        ConfigError: it cannot be read, is no enrolment, or was changed since it was signed.
    """
    found = _document(path, read_json(path), Enrolment)
    if not found.is_signed():
        raise ConfigError(f"{path}: the signature is not that of its key; ask the site for the file again, unchanged")
    return found


def write_document(path: Path, document: Invitation | Enrolment) -> None:
    """Write a document, for its owner only: the token in it is a secret until it is used.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    text = json.dumps(document.model_dump(by_alias=True), indent=1, ensure_ascii=True)
    write_atomic(path, (text + "\n").encode(), mode=0o600)


def read_json(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """Return the JSON object of a file that somebody else may have written.

    Args:
        path: of the file.
        limit: bytes that it has at most.

    Raises:
        ConfigError: it cannot be read, is too large or no JSON object with plain keys.
    """
    try:
        content = _content(path, limit)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file has that name"
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    if len(content) > limit:
        raise ConfigError(f"{path}: larger than {limit // 1024} KiB, which no such document is")
    return _parse(content, path)


def _content(path: Path, limit: int) -> bytes:
    """Return the first bytes of a file, one more than it may have; a pipe or a device is not waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ConfigError(f"{path}: not a regular file, expected a JSON document")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(handle)


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0][:120]
        raise ConfigError(f"{path}: not JSON ({reason})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys are plain and occur once: readers that differ on it would believe two things."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    if not all(_KEY.fullmatch(key) for key in values):
        raise ValueError("a key of other characters than a-z, 0-9 and _")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _document(path: Path, values: dict[str, Any], kind: type[Document]) -> Document:
    expected = kind.model_fields["kind"].default
    got = values.get("schema")
    if got != expected:
        raise ConfigError(f"{path}: [schema] {_wrong_kind(got, expected)}")
    return validated(kind, values, str(path))


def _wrong_kind(got: Any, expected: str) -> str:
    stem = expected.rpartition("-")[0]
    if isinstance(got, str) and re.fullmatch(re.escape(stem) + r"-[1-9][0-9]{0,5}", got):
        return f"got {got!r}, expected {expected!r}: written by a newer consilium, update this one"
    shown = repr(got) if isinstance(got, str) and len(got) < 60 else "none" if got is None else "something else"
    return f"got {shown}, expected {expected!r}: this is another document"


def _check_series(path: Path, theirs: Any) -> None:
    """Refuse a coordinator of another series before its document is read: its form may be another."""
    ours = importlib.metadata.version("consilium")
    there, here = (_VERSION.fullmatch(version) if isinstance(version, str) else None for version in (theirs, ours))
    if there is None or here is None or there.groups() == here.groups():
        return  # what is no version at all is told by the document's own rules
    newer = tuple(map(int, there.groups())) > tuple(map(int, here.groups()))
    remedy = "update consilium here" if newer else "the coordinator has to update and invite again"
    raise ConfigError(f"{path}: comes from consilium {theirs}, this is {ours}: {remedy}")
