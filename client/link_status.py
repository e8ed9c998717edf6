"""What a link says of itself in `status.json`: how it stands with the coordinator, in words of a closed list.

No text of an exception gets in: what is not on the list is `failed`, and the link's own log says more.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_json

FILE = "status.json"
LOCK = "link.lock"

INTERVAL = 5.0
"""Seconds between two writings when nothing but counts has changed."""


@dataclass(frozen=True)
class Words:
    """A state, and what a person makes of it."""

    state: str
    sentence: str
    remedy: str = ""  # empty: nothing to do


WORDS = {
    "connecting": Words("connecting", "The link is connecting to the coordinator."),
    "connected": Words("connected", "The link is connected and waits for work."),
    "working": Words("working", "The site is answering a request of the coordinator."),
    "stopped": Words("stopped", "The link was stopped.", "Start it: consilium site up SITE.TOML"),
    "unknown_host": Words(
        "unreachable",
        "The name of the coordinator is not known to this network.",
        "Check [coordinator] address in site.toml, and this machine's name server.",
    ),
    "refused": Words(
        "unreachable",
        "Nothing listens at the coordinator's address.",
        "Ask the coordinator whether it is up; check the port in [coordinator] address.",
    ),
    "timeout": Words(
        "unreachable",
        "The coordinator does not answer.",
        "Check that the firewall lets this machine out to [coordinator] address, or name a proxy there.",
    ),
    "no_route": Words(
        "unreachable", "There is no way to the coordinator from here.", "Check this machine's network and its firewall."
    ),
    "broken": Words(
        "unreachable",
        "The connection to the coordinator broke off.",
        "Nothing, if it comes back by itself; else check what is between here and the coordinator.",
    ),
    "gateway": Words(
        "unreachable",
        "The coordinator's front answers, the coordinator behind it does not.",
        "Ask the coordinator whether its server is up.",
    ),
    "no_tls": Words(
        "unreachable",
        "What answers at the coordinator's address does not speak TLS as expected.",
        "Check the port in [coordinator] address.",
    ),
    "foreign": Words(
        "unreachable",
        "What answers at the coordinator's address is no coordinator.",
        "Check [coordinator] address; a proxy that answers in its place must let it through.",
    ),
    "expired": Words(
        "certificate",
        "The coordinator's certificate has ended, or does not hold yet.",
        "Check this machine's clock; else the coordinator must renew its certificate.",
    ),
    "untrusted": Words(
        "certificate",
        "The coordinator's certificate is not of the authority that this site trusts.",
        "Check [coordinator] ca_certificate; something between here and the coordinator may be opening TLS.",
    ),
    "wrong_host": Words(
        "certificate",
        "The coordinator's certificate is for another name than [coordinator] address.",
        "Write the address as the coordinator's invitation has it.",
    ),
    "not_enrolled": Words(
        "not_enrolled",
        "The coordinator does not know this site's key, or sees it in use elsewhere.",
        "Send the site's enrolment file to the coordinator. In use elsewhere: stop that link, and wait a minute.",
    ),
    "withdrawn": Words(
        "not_enrolled",
        "The coordinator does not take this site's key any more.",
        "Ask the coordinator whether it took the site out; to come back, move [coordinator] private_key away and run "
        "consilium site join with a new invitation.",
    ),
    "proxy_unreachable": Words(
        "proxy",
        "The proxy cannot be reached.",
        "Check [coordinator] proxy in site.toml.",
    ),
    "proxy_refuses": Words(
        "proxy",
        "The proxy does not connect this site to the coordinator.",
        "Ask your network's administrators to let the proxy connect to [coordinator] address.",
    ),
    "clock": Words(
        "clock",
        "This machine's clock is more than 5 seconds ahead of the coordinator's, or more than 5 minutes behind it.",
        "Set this machine's clock (timedatectl); if it is right, ask the coordinator.",
    ),
    "version": Words(
        "version",
        "The coordinator runs another version.",
        "Install the version that the coordinator names, or ask it to.",
    ),
    "failed": Words(
        "failed",
        "The link met something that it does not know; it goes on trying.",
        "Look at the end of its log, and report it.",
    ),
}
"""Everything that a link can say: code -> words."""

GOOD = frozenset({"connecting", "connected", "working"})


@dataclass(frozen=True)
class LinkStatus:
    """The content of `status.json`."""

    site: str
    address: str
    pid: int
    code: str
    state: str
    sentence: str
    remedy: str
    since: float  # seconds since 1970, of the code
    written: float
    last_contact: float | None  # of the last answer of the coordinator
    messages: int  # answered since the start
    bytes_in: int  # content of answers and requests, without headers and TLS
    bytes_out: int
    certificate_ends: float | None  # of the coordinator's certificate, as seen at the last connection


class StatusFile:
    """Keeps `status.json` up to date; may be told things by several threads.

    Args:
        folder: where it lies.
        site: the site's name.
        address: the coordinator's.
    """

    def __init__(self, folder: Path, site: str, address: str) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._fixed = {"site": site, "address": address, "pid": os.getpid()}
        self._code = ""
        self._since = self._written = 0.0
        self._contact: float | None = None
        self._ends: float | None = None
        self._messages = self._in = self._out = 0

    def say(self, code: str) -> None:
        """Set the state to one of `WORDS`."""
        with self._lock:
            if code == self._code:
                if time.time() - self._written >= INTERVAL:  # a trouble that lasts is no sign that the link is stuck
                    self._write()
                return
            brief = {code, self._code} == {"connected", "working"}  # a message takes a moment, a disk's sync longer
            self._code, self._since = code, time.time()
            if not brief or self._since - self._written > 1.0:
                self._write()

    def count(self, bytes_out: int, bytes_in: int) -> None:
        """Note an exchange with the coordinator."""
        with self._lock:
            self._out += bytes_out
            self._in += bytes_in
            self._contact = time.time()
            if not 0 <= self._contact - self._written < INTERVAL:
                self._write()

    def answered(self) -> None:
        """Note that a message was answered."""
        with self._lock:
            self._messages += 1

    def certificate(self, ends: float | None) -> None:
        """Note when the coordinator's certificate ends."""
        with self._lock:
            self._ends = ends

    def _write(self) -> None:
        words = WORDS[self._code or "connecting"]
        self._written = time.time()
        value = {
            **self._fixed,
            "code": self._code or "connecting",
            **asdict(words),
            "since": self._since,
            "written": self._written,
            "last_contact": self._contact,
            "messages": self._messages,
            "bytes_in": self._in,
            "bytes_out": self._out,
            "certificate_ends": self._ends,
        }
        with suppress(OSError):  # a full disk must stop no work
            write_json(self._path, value)


def read_status(folder: Path) -> LinkStatus | None:
    """Return what a link wrote last, or None where there never was one.

    Raises:
        OSError: the file cannot be read, or is damaged.
    """
    path = folder / FILE
    try:
        value: Any = json.loads(path.read_bytes())
        return LinkStatus(**value)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise OSError(f"{path} is damaged") from None
