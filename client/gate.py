"""The public socket of the site's daemon: who is at the other end is asked of the kernel, before a byte is read.

gRPC tells nobody which user is at the other end of a unix socket. So the socket that others can see is this module's:
it accepts a connection, reads the peer's user from the kernel (SO_PEERCRED), closes it at once if that user is neither
the daemon's own, nor root, nor a peer that `site.toml` names, and else carries bytes to and from gRPC's own socket,
which lies in a folder that nobody else can enter.

Measured on two cores: 40 MB and their echo take 0.36 to 0.42 s through the gate and 0.30 to 0.32 s without it, so the
hop costs about 1 ms a MB; of a small message, 0.35 ms, it costs nothing that can be told from chance.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import ConfigError, UsageError

CONNECTIONS = 16
"""Connections of one user that are carried at a time; one more is closed at once, and no other user pays for it."""

_CHUNK = 2**18
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_log = logging.getLogger("consilium.site")


class Gate:
    """Carries bytes between a listening socket and another, for those who are allowed.

    Args:
        listener: a unix socket that listens; closed with the gate.
        inner: the path of the socket to carry to.
        allowed: numbers of users.
    """

    def __init__(self, listener: socket.socket, inner: Path, allowed: frozenset[int]) -> None:
        self._listener = listener
        self._inner = inner
        self._allowed = allowed
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: dict[threading.Thread, int] = {}  # and whose connection each carries
        self._closing = False
        self.turned_away = 0
        self._acceptor = threading.Thread(target=self._accept, name="gate", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Accept nobody any more, cut all connections, and return once all is closed."""
        self._closing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            for end in self._open:
                _cut(end)
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        while not self._closing:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                if not self._closing:
                    time.sleep(0.05)  # no more files can be opened at the moment
                continue
            user = user_of(caller)
            if self._admit(user):
                thread = threading.Thread(target=self._carry, args=(caller,), name="gate", daemon=True)
                with self._lock:
                    self._threads[thread] = user
                thread.start()
            else:
                caller.close()

    def _admit(self, user: int) -> bool:
        with self._lock:
            if user not in self._allowed:
                self.turned_away += 1
                _log.warning("user %d was turned away: not a peer of [site] peers", user)
                return False
            return sum(other == user for other in self._threads.values()) < CONNECTIONS

    def _carry(self, caller: socket.socket) -> None:
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        ends = {caller, inner}
        with self._lock:
            self._open |= ends
        try:
            inner.connect(os.fspath(self._inner))
            if self._closing:
                return
            back = threading.Thread(target=_pump, args=(inner, caller), name="gate", daemon=True)
            back.start()
            _pump(caller, inner)
            back.join()
        except OSError:
            _log.warning("a connection was lost inside the daemon")
        finally:
            with self._lock:
                self._open -= ends
                del self._threads[threading.current_thread()]
            caller.close()
            inner.close()


def user_of(connection: socket.socket) -> int:
    """Return the number of the user at the other end of a unix socket, as it was when they connected."""
    content = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(content)[1]
    return user


@contextmanager
def listening(path: Path, folder: Path, peers: frozenset[int]) -> Iterator[socket.socket]:
    """Listen on a path: nobody finds the socket there before it has its mode, and it is gone afterwards.

    Args:
        path: of the socket, which `check_free` has found free.
        folder: one that nobody else can enter, on the same file system.
        peers: users besides the own one and root.

    Raises:
        UsageError: the path cannot be used.
        ConfigError: the peers have no group in common that the socket can be given.
    """
    made = folder / "p"
    group = _group(peers, path) if peers else None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(os.fspath(made))
            made.chmod(0o600)
            if group is not None:
                os.chown(made, -1, group)
                made.chmod(0o660)
            listener.listen(CONNECTIONS)
            identity = made.stat().st_ino
            made.replace(path)
        except OSError as error:
            raise UsageError(f"{path}: no socket can be made there ({error.strerror}); see [site] socket") from None
        try:
            yield listener
        finally:
            with suppress(OSError):
                if path.lstat().st_ino == identity:  # else it is another's by now
                    path.unlink()


def check_free(path: Path) -> None:
    """Check that a path is free for a socket, or holds one that nobody answers on any more.

    Raises:
        UsageError: somebody answers there, or it holds something else than a socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path}: no socket can be made there ({error.strerror}); see [site] socket") from None
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path}: holds something else than a socket; take it away or name another [site] socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError:
            pass  # it is there and too busy, or not for us
    raise UsageError(f"{path}: another daemon answers there; stop that one, or name another [site] socket")


def _group(peers: frozenset[int], path: Path) -> int:
    """Return a group that all peers are in and that the socket can be given."""
    folder = stat.S_IMODE(path.parent.stat().st_mode)
    if not folder & 0o011:
        raise ConfigError(
            f"[site] peers: other users cannot enter {path.parent}, mode {folder:04o}; name a socket elsewhere, "
            'such as [site] socket = "/run/consilium/site.sock"'
        )
    common = set.intersection(*map(_groups, peers))
    if os.geteuid() != 0:
        common &= {os.getegid(), *os.getgroups()}
    if not common:
        raise ConfigError(
            "[site] peers: no group holds them all and the daemon's user; make one: groupadd consilium, then "
            "usermod -aG consilium USER for each"
        )
    primary = [_primary(user) for user in sorted(peers)]
    return next((group for group in primary if group in common), min(common))


def _groups(user: int) -> set[int]:
    try:
        return set(os.getgrouplist(pwd.getpwuid(user).pw_name, _primary(user)))
    except KeyError:  # a number without a name, as containers have them: its group has the same one
        return {user} | {entry.gr_gid for entry in grp.getgrall() if str(user) in entry.gr_mem}


def _primary(user: int) -> int:
    try:
        return pwd.getpwuid(user).pw_gid
    except KeyError:
        return user


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Carry bytes until there are no more, and say so at the other end."""
    buffer = memoryview(bytearray(_CHUNK))
    try:
        while count := source.recv_into(buffer):
            sink.sendall(buffer[:count])
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        _cut(source)
        _cut(sink)


def _cut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
