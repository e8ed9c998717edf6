"""The key pair of a site: EC P-384, the private half in OpenSSH's format, the public half as OpenSSH's one line.

The private half is made at the hospital and never leaves it; the coordinator knows a site by the public half.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator

from common.errors import ConfigError
from common.private_file import read_private, write_private

PrivateKey = ec.EllipticCurvePrivateKey
WHAT = "the site's private key (EC P-384, OpenSSH format)"

_TYPE = "ecdsa-sha2-nistp384"


def make_key(path: Path) -> PrivateKey:
    """Make a key and write its private half, mode 0600.

    Raises:
        FileExistsError: there is a file of that name; it stays as it is.
        OSError: the folder is missing, full or not writable.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    write_private(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return key


def read_key(path: Path) -> PrivateKey:
    """Return the private key of a file.

    Raises:
        ConfigError: it is missing, open to others than its owner, or no EC P-384 key in OpenSSH's format.
    """
    content = read_private(path, WHAT, "`consilium site join` makes it")
    try:
        key = serialization.load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path}: holds something else, or a passphrase locks it; expected {WHAT}")
    return key


def public_text(key: PrivateKey) -> str:
    """Return the public half as OpenSSH writes it: type and key, without a comment."""
    form = serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, form).decode("ascii")


def parse_public(text: str) -> ec.EllipticCurvePublicKey:
    """Return the public key of its one line.

    Raises:
        ValueError: it is none of EC P-384, or not exactly as `public_text` writes it: one key, one text.
    """
    expected = f"expected one line of OpenSSH: {_TYPE}, a blank and the key, without a comment"
    try:
        key = serialization.load_ssh_public_key(text.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(expected) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(expected)
    form = serialization.PublicFormat.OpenSSH
    if key.public_bytes(serialization.Encoding.OpenSSH, form).decode("ascii") != text:
        raise ValueError(expected)
    return key


def fingerprint(public: str) -> str:
    """Return the fingerprint of a public key as `ssh-keygen -l` prints it, short enough to be read out.

    Examples:
        >>> fingerprint("ecdsa-sha2-nistp384 AAAA")
        'SHA256:cJ6AyISHokEeHuTfufIqhhSS0gxHZRUMDHlKvXD4FHw'
    """
    blob = base64.b64decode(public.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")


def sign(key: PrivateKey, data: bytes) -> str:
    """Return the signature (ECDSA, SHA-256) of some bytes, in base64."""
    return base64.b64encode(key.sign(data, ec.ECDSA(hashes.SHA256()))).decode("ascii")


def is_signed(public: str, signature: str, data: bytes) -> bool:
    """Return whether the holder of a public key's other half signed these bytes."""
    try:
        raw = base64.b64decode(signature, validate=True)
        parse_public(public).verify(raw, data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _checked(value: str) -> str:
    parse_public(value)
    return value


PublicKey = Annotated[str, AfterValidator(_checked)]
