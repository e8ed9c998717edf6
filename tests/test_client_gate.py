"""The public socket: only named users get through, and every byte does."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from client import gate
from client.gate import Gate, check_free, listening
from common.errors import ConfigError, UsageError

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


class Echo:
    """A server behind the gate that returns what it is told."""

    def __init__(self, path: Path) -> None:
        self.served = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            self.served += 1
            self._threads.append(threading.Thread(target=self._echo, args=(caller,)))
            self._threads[-1].start()

    def _echo(self, caller: socket.socket) -> None:
        with caller, suppress(OSError):
            while content := caller.recv(65536):
                caller.sendall(content)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._socket.close()


class Front:
    def __init__(self, folder: Path, allowed: frozenset[int], peers: frozenset[int] = frozenset()) -> None:
        self.path, inner = folder / "public", folder / "inner"
        inner.mkdir(mode=0o700)
        self._held = ExitStack()
        self.echo = Echo(inner / "s")
        self._held.callback(self.echo.close)
        self.gate = Gate(self._held.enter_context(listening(self.path, inner, peers)), inner / "s", allowed)
        self._held.callback(self.gate.close)

    def call(self) -> socket.socket:
        caller = socket.socket(socket.AF_UNIX)
        caller.settimeout(20)
        caller.connect(str(self.path))
        return caller

    def close(self) -> None:
        self._held.close()


@pytest.fixture
def fronts(tmp_path: Path) -> Iterator[Any]:
    made: list[Front] = []

    def make(**options: Any) -> Front:
        options.setdefault("allowed", frozenset({os.geteuid()}))
        made.append(Front(tmp_path, **options))
        return made[-1]

    threads = threading.active_count()
    yield make
    for front in made:
        front.close()
        assert not front.path.exists()
    assert threading.active_count() == threads


def received(caller: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count and (part := caller.recv(2**20)):
        content += part
    return content


def test_every_byte_gets_through_both_ways(fronts: Any) -> None:
    front, content = fronts(), os.urandom(5_000_000)
    with front.call() as one, front.call() as other:
        sender = threading.Thread(target=one.sendall, args=(content,))
        sender.start()
        other.sendall(b"between")
        assert received(other, 7) == b"between"
        assert received(one, len(content)) == content
        sender.join()
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""  # the end gets through as well


def test_the_socket_is_its_owners(fronts: Any) -> None:
    assert stat.S_IMODE(fronts().path.stat().st_mode) == 0o600


def test_a_user_who_is_not_named_is_turned_away_unread(fronts: Any) -> None:
    front = fronts(allowed=frozenset({os.geteuid() + 1}))
    for number in range(3):
        with front.call() as caller, suppress(OSError):
            assert caller.recv(1) == b""
        assert front.gate.turned_away == number + 1
    assert front.echo.served == 0


SPEAK = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
caller = socket.socket(socket.AF_UNIX)
caller.settimeout(20)
try:
    caller.connect(sys.argv[1])
    caller.sendall(b"hello")
    print(caller.recv(5).decode())
except OSError as error:
    print(type(error).__name__)
"""


def speak_as(user: int, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-c", SPEAK, str(path), str(user)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@as_root
def test_the_kernel_says_who_is_there(fronts: Any, tmp_path: Path) -> None:
    """Root, in truth another user: neither an open mode nor anything that is said helps."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)
    front = fronts()
    assert speak_as(NOBODY, front.path) == "PermissionError"
    front.path.chmod(0o666)
    assert speak_as(NOBODY, front.path) in ("", "ConnectionResetError", "BrokenPipeError")
    assert front.gate.turned_away == 1
    assert front.echo.served == 0
    assert speak_as(0, front.path) == "hello"


@as_root
def test_a_peer_gets_through_by_its_group(fronts: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)
    user = 54321  # a number without a name
    front = fronts(allowed=frozenset({0, user}), peers=frozenset({user}))
    found = front.path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, user)
    assert speak_as(user, front.path) == "hello"
    assert speak_as(NOBODY, front.path) == "PermissionError"


def test_peers_must_be_able_to_enter_the_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with (
        pytest.raises(ConfigError, match=r"\[site\] peers.*\[site\] socket"),
        listening(tmp_path / "x", tmp_path, frozenset({1})),
    ):
        pass


@as_root
def test_peers_must_have_a_group_in_common(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    with (
        pytest.raises(ConfigError, match="groupadd"),
        listening(tmp_path / "x", tmp_path, frozenset({54321, 54322})),
    ):
        pass


def test_no_more_connections_than_there_may_be(fronts: Any) -> None:
    front, callers = fronts(), ExitStack()
    with callers:
        for _ in range(gate.CONNECTIONS):
            caller = callers.enter_context(front.call())
            caller.sendall(b"x")
            assert caller.recv(1) == b"x"
        with front.call() as late, suppress(OSError):
            assert late.recv(1) == b""
    deadline = time.monotonic() + 20
    answer = b""
    while not answer and time.monotonic() < deadline:  # those that went make room
        with front.call() as again, suppress(OSError):
            again.sendall(b"x")
            answer = again.recv(1)
    assert answer == b"x"
    assert front.gate.turned_away == 0


def test_a_gate_that_closes_cuts_its_connections(tmp_path: Path) -> None:
    front = Front(tmp_path, frozenset({os.geteuid()}))
    with front.call() as caller:
        caller.sendall(b"x")
        assert caller.recv(1) == b"x"
        front.close()
        assert caller.recv(1) == b""


def test_a_socket_behind_that_is_gone_ends_the_connection(fronts: Any, tmp_path: Path) -> None:
    front = fronts()
    (tmp_path / "inner" / "s").unlink()
    with front.call() as caller:
        assert caller.recv(1) == b""


def test_a_stale_socket_is_free_and_others_are_not(tmp_path: Path) -> None:
    check_free(tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        with pytest.raises(UsageError, match="another daemon answers"):
            check_free(tmp_path / "socket")
    check_free(tmp_path / "socket")  # nobody answers any more
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="something else"):
        check_free(tmp_path / "file")


def test_a_socket_that_is_anothers_by_now_stays(tmp_path: Path) -> None:
    with listening(tmp_path / "x", tmp_path, frozenset()):
        (tmp_path / "x").unlink()
        (tmp_path / "x").write_text("another's")
    assert (tmp_path / "x").read_text() == "another's"
