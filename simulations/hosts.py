"""Several hosts on one machine: a network namespace each, joined by shaped lines and by nothing else.

The namespaces have no names: they live as long as this process, or what it started, holds them, and nothing of them
can be left behind. No host has a route to anything but the coordinator's network, so what runs there has no internet.
Needs root, and /dev/net/tun.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TypeVar

from common.errors import ConsiliumError
from simulations.shaper import End, Line, Shaper, shaped

NETWORK = IPv4Network("10.77.0.0/24")
"""The first address is the coordinator's."""

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_DEVICE = "line"
_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Host:
    """A network namespace with one device."""

    namespace: int  # a file that holds it
    end: End

    @property
    def prefix(self) -> tuple[str, ...]:
        """What stands before a command line that is to run there."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}", "--")

    def run(self, work: Callable[[], _T]) -> _T:
        """Do something there, in a thread of its own."""

        def there() -> _T:
            _enter(self.namespace)
            return work()

        return _in_thread(there)


@dataclass(frozen=True)
class Hosts:
    """A coordinator's host, those of the sites by name, and what joins them."""

    coordinator: Host
    sites: dict[str, Host]
    shaper: Shaper

    @property
    def address(self) -> str:
        """What sites dial."""
        return str(self.coordinator.end.address)

    @property
    def prefixes(self) -> dict[str, tuple[str, ...]]:
        """What stands before the command lines of sites."""
        return {name: host.prefix for name, host in self.sites.items()}


def missing() -> str:
    """Return what this machine lacks for hosts, an empty text where it lacks nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [command for command in ("ip", "nsenter") if shutil.which(command) is None]
    if absent:
        return f"no command {' and '.join(absent)} here"
    try:
        _in_thread(_unshare)
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"no network namespaces or TUN devices here ({error.strerror})"
    return ""


@contextmanager
def hosts(names: Sequence[str], line: Line, seed: int = 0) -> Iterator[Hosts]:
    """Make hosts, and take them away again.

    Args:
        names: of the sites.
        line: between each site and the coordinator.
        seed: decides which packets are lost.

    Raises:
        ConsiliumError: this machine, or this user, cannot have them.
    """
    lack = missing()
    if lack:
        raise ConsiliumError(f"several hosts on one machine: {lack}")
    addresses = NETWORK.hosts()
    with ExitStack() as stack:
        coordinator, *others = [stack.enter_context(_host(next(addresses))) for _ in range(1 + len(names))]
        sites = dict(zip(names, others, strict=True))
        ends = {name: host.end for name, host in sites.items()}
        yield Hosts(coordinator, sites, stack.enter_context(shaped(coordinator.end, ends, line, seed)))


@contextmanager
def entered(host: Host) -> Iterator[None]:
    """Be on a host, with this thread and what it starts."""
    before = _held()
    try:
        _enter(host.namespace)
        yield
    finally:
        _enter(before)
        os.close(before)


@contextmanager
def _host(address: IPv4Address) -> Iterator[Host]:
    namespace, device = _in_thread(lambda: _made(address))
    try:
        yield Host(namespace, End(device, address))
    finally:
        os.close(device)
        os.close(namespace)


def _made(address: IPv4Address) -> tuple[int, int]:
    """Put this thread into a namespace of its own, with a device; return the files of both."""
    _unshare()
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        "link set lo up",
        f"address add {address}/{NETWORK.prefixlen} dev {_DEVICE}",
        f"link set {_DEVICE} up",
    ):
        subprocess.run(["ip", *command.split()], check=True)  # noqa: S603, S607
    return _held(), device


def _held() -> int:
    """Return a file that holds this thread's namespace."""
    return os.open(Path("/proc/thread-self/ns/net"), os.O_RDONLY | os.O_CLOEXEC)


def _unshare() -> None:
    _checked(_libc.unshare(_CLONE_NEWNET))


def _enter(namespace: int) -> None:
    _checked(_libc.setns(namespace, _CLONE_NEWNET))


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _in_thread(work: Callable[[], _T]) -> _T:
    """Do something in a thread that ends with it: a namespace is a thread's, not a process's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
