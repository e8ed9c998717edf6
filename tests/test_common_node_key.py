"""A site's key: what OpenSSH itself says of it, and what is refused."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from common import node_key
from common.errors import ConfigError
from common.private_file import write_private

KEY = ec.derive_private_key(7, ec.SECP384R1())
PUBLIC = node_key.public_text(KEY)


def openssh(key: Any) -> bytes:
    form = serialization.PrivateFormat.OpenSSH
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def test_a_key_reads_back_and_is_for_its_owner_only(tmp_path: Path) -> None:
    made = node_key.make_key(tmp_path / "node.key")
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert node_key.public_text(node_key.read_key(tmp_path / "node.key")) == node_key.public_text(made)
    assert node_key.public_text(node_key.make_key(tmp_path / "other")) != node_key.public_text(made)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no OpenSSH here")
def test_openssh_reads_the_key_and_prints_the_same_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    public = node_key.public_text(node_key.make_key(path))
    told = subprocess.run(["ssh-keygen", "-y", "-f", path], check=True, capture_output=True, text=True).stdout
    assert told.split()[:2] == public.split()
    (tmp_path / "node.pub").write_text(public)
    told = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "node.pub"], check=True, capture_output=True, text=True
    ).stdout
    assert told.split()[:2] == ["384", node_key.fingerprint(public)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 200,
        openssh(ec.derive_private_key(7, ec.SECP256R1())),
        openssh(ed25519.Ed25519PrivateKey.from_private_bytes(b"k" * 32)),
        KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        openssh(KEY)[:200] + b"\n-----END OPENSSH PRIVATE KEY-----\n",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\n!!!!\n-----END OPENSSH PRIVATE KEY-----\n",
    ],
    ids=["empty", "zeros", "P-256", "Ed25519", "PKCS8", "cut", "no base64"],
)
def test_another_key_is_one_line(content: bytes, tmp_path: Path) -> None:
    write_private(tmp_path / "node.key", content)
    with pytest.raises(ConfigError, match=r"node.key: holds something else.*expected the site's private key") as raised:
        node_key.read_key(tmp_path / "node.key")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no OpenSSH here")
def test_a_locked_key_is_one_line(tmp_path: Path) -> None:
    node_key.make_key(tmp_path / "node.key")
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", tmp_path / "node.key"], check=True)
    with pytest.raises(ConfigError, match="passphrase"):
        node_key.read_key(tmp_path / "node.key")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    node_key.make_key(tmp_path / "node.key")
    (tmp_path / "node.key").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644 opens the site's private key"):
        node_key.read_key(tmp_path / "node.key")
    with pytest.raises(ConfigError, match="missing.*site join"):
        node_key.read_key(tmp_path / "none.key")


@pytest.mark.parametrize(
    "text",
    [
        "", PUBLIC + " comment", PUBLIC + "\n", " " + PUBLIC, PUBLIC.replace(" ", "  "), PUBLIC[:-8],
        PUBLIC + "\n" + PUBLIC,
        PUBLIC.replace("nistp384", "nistp256"), "ssh-ed25519 AAAA", PUBLIC + "ä", 'command="x" ' + PUBLIC,
        node_key.public_text(ec.derive_private_key(7, ec.SECP256R1())),
    ],
)  # fmt: skip
def test_a_public_key_has_one_text(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line of OpenSSH"):
        node_key.parse_public(text)


def test_a_public_key_reads_back() -> None:
    assert node_key.parse_public(PUBLIC) == KEY.public_key()


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_signature_holds_for_what_was_signed_and_nothing_else(data: bytes, other: bytes) -> None:
    signature = node_key.sign(KEY, data)
    assert node_key.is_signed(PUBLIC, signature, data)
    assert node_key.is_signed(PUBLIC, signature, other) == (data == other)


@given(st.text(max_size=200), st.text(max_size=200))
def test_what_is_no_signature_holds_for_nothing(public: str, signature: str) -> None:
    assert not node_key.is_signed(public, signature, b"data")
    assert not node_key.is_signed(PUBLIC, signature, b"data")
