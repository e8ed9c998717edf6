"""The coordinator's certificates: an authority of its own, and what the authority signs for the server.

A hospital trusts the authority, not the certificate, so the certificate is renewed without a word to any hospital.
Keys are EC P-256; certificates follow RFC 5280 as strict readers take it (OpenSSL with X509_STRICT, nginx, httpx).
"""

from __future__ import annotations

import ipaddress
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import AfterValidator

from common.address import is_ip
from common.errors import ConfigError
from common.private_file import read_private, write_private

WARN_DAYS = 30
"""Days before the end of a certificate from which on it is said at every opportunity."""

CA_DAYS = 3652
SERVER_DAYS = 398

_SKEW = timedelta(days=1)  # the clock of a hospital may be behind
# What a certificate of somebody else's may raise as it is read, besides ValueError.
_ODD = (x509.ExtensionNotFound, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType)
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class Described:
    """What a certificate says of itself."""

    subject: str
    hosts: tuple[str, ...]  # names and IP addresses it stands for
    starts: datetime
    expires: datetime
    fingerprint: str

    def days_left(self, now: datetime | None = None) -> int:
        """Return the whole days until it expires; below zero once it has."""
        return (self.expires - (now or datetime.now(UTC))).days


def make_key(path: Path) -> None:
    """Make a key for TLS and write it, mode 0600.

    Raises:
        FileExistsError: there is a file of that name; it stays as it is.
        OSError: the folder is missing, full or not writable.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    write_private(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def make_ca(key: Path, name: str, now: datetime | None = None) -> bytes:
    """Return the certificate (PEM) of a new authority that signs with a key.

    Args:
        key: file of the authority's key.
        name: of the coordinator.
        now: the time it is made at.

    Raises:
        ConfigError: the key cannot be used.
    """
    private = _signing_key(key)
    subject = _subject(f"consilium {name}"[:61] + " CA")
    builder = _builder(subject, subject, private, now, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    return builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_server(ca: Path, ca_key: Path, key: Path, hosts: Sequence[str], now: datetime | None = None) -> bytes:
    """Return a certificate (PEM) that an authority signs for a server: a new one, or the next of the same key.

    Args:
        ca: file of the authority's certificate.
        ca_key: file of the authority's key.
        key: file of the server's key.
        hosts: names and IP addresses of the server.
        now: the time it is made at.

    Raises:
        ConfigError: a file cannot be used, or the authority has expired.
    """
    authority, signing = read_certificates(ca)[0], _signing_key(ca_key)
    if not _belong(authority, signing):
        raise ConfigError(f"{ca_key}: not the key of {ca.name}; bring both back from the same backup")
    private = _signing_key(key)
    usage, server_auth = _usage("digital_signature"), x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = _builder(
        _subject("consilium coordinator"), authority.subject, private, now, SERVER_DAYS, authority.not_valid_after_utc
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(usage, critical=True).add_extension(server_auth, critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(host) for host in hosts]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return builder.sign(signing, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, at least one.

    Raises:
        ConfigError: it cannot be read or holds none.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), expected a certificate (PEM)") from None
    except (ValueError, *_ODD):
        raise ConfigError(f"{path}: not a certificate (PEM); bring it back from your backup") from None


def describe(certificate: x509.Certificate) -> Described:
    """Return what a certificate says of itself."""
    return Described(
        subject=certificate.subject.rfc4514_string(),
        hosts=_hosts(certificate),
        starts=certificate.not_valid_before_utc,
        expires=certificate.not_valid_after_utc,
        fingerprint=fingerprint(certificate),
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate as `openssl x509 -fingerprint -sha256` prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def check(ca: Path, certificate: Path, key: Path, host: str, now: datetime | None = None) -> tuple[str, ...]:
    """Return all that keeps a hospital from trusting a server, one line each; none if all is well.

    Args:
        ca: file of the certificates that hospitals trust.
        certificate: file of the server's certificate, those between it and the authority after it.
        key: file of the server's key.
        host: what hospitals dial.
        now: the time to judge at.

    Raises:
        ConfigError: a file cannot be read.
    """
    moment = now or datetime.now(UTC)
    trusted, (leaf, *between) = read_certificates(ca), read_certificates(certificate)
    found = [*_lifetime(certificate, leaf, moment)]
    for authority in trusted:
        found += _lifetime(ca, authority, moment)
    if not _chained(leaf, between, trusted):
        found.append(f"{certificate}: not signed by the authority in {ca}, which hospitals trust")
    if not _belong(leaf, _read_key(key)):
        found.append(f"{key}: does not belong to {certificate}")
    if not covers(describe(leaf).hosts, host):
        found.append(f"{certificate}: does not stand for {host}, but for {', '.join(describe(leaf).hosts) or 'nobody'}")
    return tuple(found)


def covers(hosts: Sequence[str], host: str) -> bool:
    """Return whether a certificate for `hosts` stands for `host`.

    Examples:
        >>> covers(["*.example.org"], "fl.example.org"), covers(["*.example.org"], "a.fl.example.org")
        (True, False)
        >>> covers(["::1"], "0:0::1")
        True
    """
    if is_ip(host):
        return any(is_ip(known) and ipaddress.ip_address(known) == ipaddress.ip_address(host) for known in hosts)
    wanted = host.lower().rstrip(".")
    parent = "*." + wanted.partition(".")[2]
    return any(known.lower() in (wanted, parent) for known in hosts)


def parse_authority(text: str) -> x509.Certificate:
    """Return the one certificate of an authority that a PEM text holds.

    Raises:
        ValueError: it holds none, or another one, or several.
    """
    expected = "expected the certificate (PEM) of one authority"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the next version of the library refuses is refused now
            (certificate,) = x509.load_pem_x509_certificates(text.encode("ascii"))
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (ValueError, Warning, *_ODD):
        raise ValueError(expected) from None
    if not constraints.ca:
        raise ValueError(expected)
    return certificate


def _authority(value: str) -> str:
    parse_authority(value)
    return value


Authority = Annotated[str, AfterValidator(_authority)]


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime | None,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    ends = moment + timedelta(days=days)
    ends = min(ends, latest) if latest else ends  # nobody trusts a certificate that outlives its authority
    if ends <= moment:
        raise ConfigError(
            "the authority has expired and can sign no more; make a new coordinator and invite every site"
        )
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(moment - _SKEW).not_valid_after(ends)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in names for usage in _USAGES})


def _general(host: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host)) if is_ip(host) else x509.DNSName(host)


def _hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, *_ODD):
        return ()
    return (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))


def _lifetime(path: Path, certificate: x509.Certificate, now: datetime) -> list[str]:
    if now > certificate.not_valid_after_utc:
        return [f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}"]
    if now < certificate.not_valid_before_utc:
        return [f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is the clock right?"]
    return []


def _chained(leaf: x509.Certificate, between: list[x509.Certificate], trusted: list[x509.Certificate]) -> bool:
    """Return whether a way of signatures leads from a certificate to one that is trusted."""
    if any(_signed(leaf, authority) for authority in trusted):
        return True
    issuers = [one for one in between if _signed(leaf, one)]
    return any(_chained(one, [other for other in between if other is not one], trusted) for one in issuers)


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, TypeError, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _belong(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)


def _read_key(path: Path) -> PrivateKeyTypes:
    what = "a private key for TLS (PEM)"
    content = read_private(path, what, "bring it back from your backup")
    try:
        return serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: holds something else, or a passphrase locks it; expected {what}") from None


def _signing_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = _read_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: a key of another kind, expected an EC key")
    return key
