"""Whatever is wrong with a site, `consilium site up` ends with one line that says what to do, and its exit code."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from client.secret import make_secret
from common import certificates, node_key
from common.supervisor import read_state

ROOT = Path(__file__).parent.parent
PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def consilium(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", "from common.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*arguments: object) -> tuple[int, str]:
    process = consilium(*arguments)
    out, err = process.communicate(timeout=60)
    assert not out
    return process.returncode, err


class Place:
    """A site on disk that lacks nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.toml = folder / "site.toml"
        (folder / "images").mkdir()
        (folder / "link").mkdir(mode=0o700)
        (folder / "state").mkdir(mode=0o700)
        make_secret(folder / "state" / "secret")
        self.key = folder / "link" / "node.key"
        node_key.make_key(self.key)
        self.authority = folder / "link" / "ca.pem"
        certificates.make_key(folder / "ca.key")
        self.authority.write_bytes(certificates.make_ca(folder / "ca.key", "test"))
        self.write()

    def write(self, coordinator: Mapping[str, object] | None = None, **site: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        named = {"address": address} if coordinator is None else coordinator
        whole = {"site": {"name": "st-anna", **site}, "data": {"images": "images"}, "coordinator": named}
        self.toml.write_text(tomli_w.dumps(whole))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def key_of(kind: Any, form: serialization.PrivateFormat, password: bytes | None = None) -> bytes:
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    content: bytes = kind.private_bytes(serialization.Encoding.PEM, form, locked)
    return content


def _key(content: bytes) -> Callable[[Place], object]:
    return lambda place: place.key.write_bytes(content)


def _coordinator(**values: object) -> Callable[[Place], object]:
    return lambda place: place.write(values)


OPENSSH, PKCS8 = serialization.PrivateFormat.OpenSSH, serialization.PrivateFormat.PKCS8
P384, P256 = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
ADDRESS = r"site\.toml: \[coordinator\] address: got .*, expected host:port"
PROXY = r"site\.toml: \[coordinator\] proxy: got .*, expected (http://)?host:port"
WRONG: dict[str, tuple[Callable[[Place], object], str]] = {
    "no toml": (lambda place: place.toml.unlink(), r"site\.toml"),
    "no coordinator": (_coordinator(), r"\[coordinator\] address: missing - run `consilium site join`"),
    "no name": (lambda place: place.write(name=""), r"site\.toml: \[site\] name"),
    "address without port": (_coordinator(address="host"), ADDRESS),
    "address with scheme": (_coordinator(address="https://host:1"), ADDRESS),
    "address with port 0": (_coordinator(address="host:0"), ADDRESS),
    "address of a number": (_coordinator(address=1), r"\[coordinator\] address"),
    "proxy without scheme": (_coordinator(address="h:1", proxy="proxy:3128"), PROXY),
    "proxy over tls": (_coordinator(address="h:1", proxy="https://proxy:3128"), PROXY),
    "proxy without port": (_coordinator(address="h:1", proxy="http://proxy"), PROXY),
    "unknown key": (_coordinator(address="h:1", adress="h:1"), r"\[coordinator\] adress"),
    "no key": (lambda place: place.key.unlink(), r"node\.key: missing.*`consilium site join` makes it"),
    "key of a folder": (lambda place: (place.key.unlink(), place.key.mkdir()), r"node\.key: not a regular file"),
    "key open to the group": (lambda place: place.key.chmod(0o640), r"node\.key: mode 0640.*chmod 600"),
    "key open to all": (lambda place: place.key.chmod(0o604), r"node\.key: mode 0604.*chmod 600"),
    "key that is empty": (_key(b""), r"node\.key: holds something else"),
    "key that is none": (_key(b"\xff\x00"), r"node\.key: holds something else"),
    "key in another form": (_key(key_of(P384, PKCS8)), r"node\.key: holds something else"),
    "key on another curve": (_key(key_of(P256, OPENSSH)), r"node\.key: holds something else"),
    "key of another kind": (_key(key_of(ed25519.Ed25519PrivateKey.generate(), OPENSSH)), r"node\.key: holds something"),
    "no certificate": (lambda place: place.authority.unlink(), r"ca\.pem: .*cannot be read.*`consilium site join`"),
    "certificate that is empty": (lambda place: place.authority.write_bytes(b""), r"ca\.pem: not a certificate"),
    "certificate that is none": (lambda place: place.authority.write_bytes(b"\xff"), r"ca\.pem: not a certificate"),
    "certificate of rubbish": (lambda place: place.authority.write_bytes(PEM), r"ca\.pem: not a certificate"),
    "no state": (lambda place: place.write(state="elsewhere"), r"elsewhere: no state.*consilium site check"),
    "state of a file": (lambda place: place.write(state="site.toml"), r"site\.toml: no state|cannot be read"),
    "long socket": (lambda place: place.write(socket="s" * 200), r"\[site\] socket"),
    "unknown peer": (lambda place: place.write(peers=["nobody-of-that-name"]), r"\[site\] peers"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_started(place: Place, what: str) -> None:
    spoil, words = WRONG[what]
    spoil(place)
    code, said = ended("site", "up", place.toml)
    assert code == 2
    assert re.fullmatch(r"consilium: [^\n]+\n", said), said
    assert re.search(words, said), said
    assert not (place.folder / "state" / "up").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["no coordinator", "no key", "key open to all", "certificate that is none"])
def test_a_link_alone_says_the_same(place: Place, what: str) -> None:
    spoil, words = WRONG[what]
    spoil(place)
    command = [sys.executable, "-P", "-m", "client.link", str(place.toml)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"consilium: [^\n]+\n", done.stderr), done.stderr
    assert re.search(words, done.stderr), done.stderr


@pytest.fixture
def running(place: Place) -> Iterator[subprocess.Popen[str]]:
    process = consilium("site", "up", place.toml, "--quiet")
    yield process
    with suppress(ProcessLookupError):
        process.terminate()
    process.communicate(timeout=30)


def until(truth: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(str(path)) == 0


@pytest.mark.slow
def test_a_second_one_is_told_of_the_first(place: Place, running: subprocess.Popen[str]) -> None:
    lock = place.folder / "state" / "up" / "supervisor.lock"
    until(lambda: lock.exists() and lock.read_text().strip() == str(running.pid))
    code, said = ended("site", "up", place.toml)
    assert code == 1
    assert re.fullmatch(rf"consilium: [^\n]+ runs already, as process {running.pid}; [^\n]+\n", said), said
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 0


@pytest.mark.slow
def test_a_killed_site_comes_up_again(place: Place, running: subprocess.Popen[str]) -> None:
    path = place.folder / "state" / "daemon.sock"
    until(lambda: path.exists() and answers(path))
    state = read_state(place.folder / "state" / "up")
    assert state is not None
    running.kill()
    running.wait()
    for child in state.children.values():
        until(lambda child=child: not Path(f"/proc/{child.pid}").exists())  # type: ignore[misc]
    assert path.exists()
    assert not answers(path)
    again = consilium("site", "up", place.toml, "--quiet")
    try:
        until(lambda: answers(path))
    finally:
        again.terminate()
        said = again.communicate(timeout=30)[1]
    assert (again.returncode, said) == (0, "")
