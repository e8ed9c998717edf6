"""The authority and its certificates: what OpenSSL and Python's TLS make of them, and everything that can be wrong."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from common import certificates
from common.certificates import CA_DAYS, SERVER_DAYS, check, covers, describe, read_certificates
from common.errors import ConfigError
from common.private_file import write_private

HOSTS = ("localhost", "127.0.0.1", "::1")
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
NOW = datetime.now(UTC).replace(microsecond=0)


def _der() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        certificates.make_key(Path(folder, "key"))
        text = certificates.make_ca(Path(folder, "key"), "chest")
    return base64.b64decode(b"".join(text.splitlines()[1:-1]))


class Pki:
    """An authority and a server's key and certificate in a folder."""

    def __init__(self, folder: Path, now: datetime = NOW) -> None:
        folder.mkdir()
        self.ca, self.ca_key = folder / "ca.pem", folder / "ca.key"
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        certificates.make_key(self.ca_key)
        self.ca.write_bytes(certificates.make_ca(self.ca_key, "chest", now))
        certificates.make_key(self.key)
        self.issue(now)

    def issue(self, now: datetime = NOW, hosts: tuple[str, ...] = HOSTS) -> None:
        self.certificate.write_bytes(certificates.make_server(self.ca, self.ca_key, self.key, hosts, now))

    def check(self, host: str = "localhost", now: datetime = NOW) -> tuple[str, ...]:
        return check(self.ca, self.certificate, self.key, host, now)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> str:
    """Return what a client reads of a server over TLS."""

    def serve() -> None:
        with listener, listener.accept()[0] as raw:
            try:
                with server.wrap_socket(raw, server_side=True) as wrapped:
                    wrapped.sendall(b"hello")
            except (ssl.SSLError, ConnectionError):
                return  # the client tells why

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with (
            socket.create_connection(listener.getsockname(), timeout=5) as raw,
            client.wrap_socket(raw, server_hostname=host) as wrapped,
        ):
            return wrapped.recv(5).decode()
    finally:
        thread.join(5)


def server_side(pki: Pki) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.certificate, pki.key)
    return context


def client_side(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_hospital_trusts_the_server_before_and_after_renewal(host: str, pki: Pki) -> None:
    trusted = client_side(pki.ca)
    before = read_certificates(pki.certificate)[0]
    assert shake_hands(server_side(pki), trusted, host) == "hello"
    pki.issue(NOW + timedelta(hours=1))
    after = read_certificates(pki.certificate)[0]
    assert before.serial_number != after.serial_number
    assert before.public_key() == after.public_key()
    assert shake_hands(server_side(pki), trusted, host) == "hello"
    assert pki.check(host) == ()


def test_a_hospital_trusts_no_other_authority_and_no_other_host(pki: Pki, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed|unable to get local issuer"):
        shake_hands(server_side(pki), client_side(Pki(tmp_path / "other").ca), "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(server_side(pki), client_side(pki.ca), "coordinator.example.org")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no OpenSSL here")
def test_openssl_takes_the_certificate_at_its_strictest(pki: Pki) -> None:
    strict = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "localhost"]
    told = subprocess.run([*strict, "-CAfile", pki.ca, pki.certificate], capture_output=True, text=True, check=True)
    assert told.stdout.endswith(": OK\n")
    printed = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", pki.ca]
    told = subprocess.run(printed, capture_output=True, text=True, check=True)
    assert told.stdout.partition("=")[2].strip() == describe(read_certificates(pki.ca)[0]).fingerprint


@pytest.mark.skipif(NGINX is None, reason="no nginx here")
def test_nginx_takes_certificate_and_key(pki: Pki, tmp_path: Path) -> None:
    listen = f"listen unix:{tmp_path}/s ssl; ssl_certificate {pki.certificate}; ssl_certificate_key {pki.key};"
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; server {{ {listen} }} }}"
    )
    told = subprocess.run([str(NGINX), "-t", "-p", tmp_path, "-c", config], capture_output=True, text=True, check=False)
    assert "test is successful" in told.stderr, told.stderr
    pki.key.write_bytes(pki.ca_key.read_bytes())
    told = subprocess.run([str(NGINX), "-t", "-p", tmp_path, "-c", config], capture_output=True, text=True, check=False)
    assert "key values mismatch" in told.stderr


def test_httpx_takes_the_certificate(pki: Pki) -> None:
    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Hello) as served:
        served.socket = server_side(pki).wrap_socket(served.socket, server_side=True)
        thread = threading.Thread(target=served.handle_request)
        thread.start()
        try:
            with httpx.Client(verify=client_side(pki.ca), trust_env=False) as client:
                assert client.get(f"https://localhost:{served.server_port}").status_code == 204
        finally:
            thread.join(5)


def test_what_a_certificate_says_of_itself(pki: Pki) -> None:
    server, ca = (describe(read_certificates(path)[0]) for path in (pki.certificate, pki.ca))
    assert server.hosts == HOSTS
    assert server.days_left(NOW) == SERVER_DAYS
    assert ca.days_left(NOW) == CA_DAYS
    assert (ca.subject, ca.hosts) == ("CN=consilium chest CA", ())
    assert server.starts == NOW - timedelta(days=1)
    for key in (pki.key, pki.ca_key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_certificate_ends_with_its_authority(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "old", NOW - timedelta(days=CA_DAYS - 10))
    pki.issue(NOW)
    assert describe(read_certificates(pki.certificate)[0]).days_left(NOW) == 10
    with pytest.raises(ConfigError, match="authority has expired"):
        pki.issue(NOW + timedelta(days=11))


def test_all_that_can_be_wrong_is_found(pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")
    assert pki.check() == ()
    assert pki.check("::1") == ()
    assert pki.check("0:0:0::1") == ()
    late, early = NOW + timedelta(days=SERVER_DAYS, seconds=1), NOW - timedelta(days=2)
    assert [line.partition(": ")[2] for line in pki.check(now=late)] == [f"expired on {late:%Y-%m-%d}"]
    assert len(pki.check(now=early)) == 2  # the authority's as well
    assert all("not valid before" in line for line in pki.check(now=early))
    (found,) = pki.check("coordinator.example.org")
    assert "does not stand for coordinator.example.org, but for localhost, 127.0.0.1, ::1" in found
    (found,) = check(other.ca, pki.certificate, pki.key, "localhost", NOW)
    assert "not signed by the authority in" in found
    (found,) = check(pki.ca, pki.certificate, other.key, "localhost", NOW)
    assert "does not belong to" in found
    assert len(check(other.ca, pki.certificate, other.key, "nobody", late)) == 4


def test_a_forged_issuer_of_the_same_name_is_foreign(pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")  # its authority has the very same name
    assert read_certificates(other.ca)[0].subject == read_certificates(pki.ca)[0].subject
    other.ca.write_bytes(pki.ca.read_bytes())
    with pytest.raises(ConfigError, match="not the key of ca.pem"):
        other.issue()
    assert any("not signed by" in line for line in other.check())


def test_an_authority_between_is_followed(pki: Pki, tmp_path: Path) -> None:
    """A chain of the operator's own: the file holds the server's certificate, then the one that signed it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    root = pki
    inner = Pki(tmp_path / "inner")
    issuing = read_certificates(inner.ca)[0]
    root_key = serialization.load_pem_private_key(root.ca_key.read_bytes(), None)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "inner")])
    builder = x509.CertificateBuilder(read_certificates(root.ca)[0].subject, subject, issuing.public_key(), 7)
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=9))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    inner.ca.write_bytes(builder.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))  # type: ignore[arg-type]
    inner.issue()
    assert check(root.ca, inner.certificate, inner.key, "localhost", NOW) != ()
    inner.certificate.write_bytes(inner.certificate.read_bytes() + inner.ca.read_bytes())
    assert check(root.ca, inner.certificate, inner.key, "localhost", NOW) == ()


def test_an_operators_rsa_key_is_compared_too(pki: Pki) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pki.key.unlink()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(pki.key, key.private_bytes(*form))
    assert any("does not belong" in line for line in pki.check())
    with pytest.raises(ConfigError, match="expected an EC key"):
        pki.issue()


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_damaged_files_are_one_line(content: bytes, pki: Pki) -> None:
    for path in (pki.ca, pki.certificate):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a certificate"):
            pki.check()
        path.write_bytes(kept)
    pki.key.write_bytes(content)
    with pytest.raises(ConfigError, match="expected a private key for TLS"):
        pki.check()
    pki.key.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640"):
        pki.check()
    pki.ca.unlink()
    with pytest.raises(ConfigError, match=r"ca.pem: cannot be read \(No such file"):
        pki.check()


def test_an_authority_is_one_certificate_of_one(pki: Pki) -> None:
    text = pki.ca.read_text()
    assert certificates.parse_authority(text) == read_certificates(pki.ca)[0]
    for wrong in ("", text + text, pki.certificate.read_text(), text[:200], "ä" + text, pki.key.read_text()):
        with pytest.raises(ValueError, match="one authority"):
            certificates.parse_authority(wrong)


DER = _der()


@given(st.lists(st.tuples(st.integers(0, len(DER) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_other_certificate_is_read_or_an_error(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(DER)
    for place, value in changes:
        changed[place] = value
    body = base64.encodebytes(bytes(changed)).decode()
    try:
        certificate = certificates.parse_authority(f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n")
    except ValueError as error:
        assert "one authority" in str(error)
        return
    assert len(certificates.fingerprint(certificate)) == 95


@pytest.mark.parametrize(
    ("host", "covered"),
    [("A.Example.org", True), ("b.wild.org", True), ("x.b.wild.org", False), ("wild.org", False), ("10.0.0.1", True),
     ("10.0.0.2", False), ("a.example.org.", True)],
)  # fmt: skip
def test_for_whom_a_certificate_stands(host: str, covered: bool) -> None:
    assert covers(("a.example.org", "*.wild.org", "10.0.0.1"), host) is covered
