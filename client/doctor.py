"""`consilium site doctor`: everything that a site needs, a line a check, each with what to do where it fails.

What is looked at is a closed list, `CHECKS`, which docs/doctor.md shows. Nothing is changed, neither at the
site nor at the coordinator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from client import doctor_checks as checks
from client.site_config import SiteConfig, read_any_site
from client.status import SiteStatus, ask, status
from common import machine
from common.doctor import Check, Found, Result, examine, passed, skipped
from common.errors import ConfigError

if TYPE_CHECKING:
    from client.doctor_network import Exchange  # imports Flower

LEAST_MEMORY, GOOD_MEMORY = 2 * machine.GB, 6 * machine.GB
"""Bytes: of torch with a small model, and with the processes that decode images besides."""


@dataclass
class Case:
    """A site that is looked at; what several checks need is asked for once."""

    path: Path  # of its site.toml
    offline: bool = False

    @cached_property
    def config(self) -> SiteConfig | None:
        """The site's configuration, None where it cannot be read."""
        try:
            return read_any_site(self.path)
        except ConfigError:
            return None

    @cached_property
    def standing(self) -> SiteStatus:
        """What supervisor, daemon and link say."""
        config = self.read()
        return status(config, ask(config))

    @cached_property
    def exchange(self) -> Exchange:
        """What the coordinator says to one question."""
        from client.doctor_network import ask

        return ask(self.read())

    def read(self) -> SiteConfig:
        """Return the site's configuration.

        Raises:
            ConfigError: it cannot be read.
        """
        return self.config or read_any_site(self.path)


def look_at(path: Path, *, offline: bool = False) -> Iterator[Result]:
    """Try everything; each result comes as soon as it is known.

    Args:
        path: the site's site.toml.
        offline: leave out what needs the network.
    """
    return examine(CHECKS, Case(path, offline))


def _configuration(case: Case) -> Found:
    config = case.read()
    return passed(f"{config.path}, of {config.name}")


def _of_site(look: Callable[[SiteConfig], Found]) -> Callable[[Case], Found]:
    """Return a check of a site's configuration: without one, there is nothing to look at."""

    def found(case: Case) -> Found:
        return skipped("not reached, see configuration") if case.config is None else look(case.config)

    return found


def _of_state(look: Callable[[SiteConfig], Found]) -> Callable[[Case], Found]:
    """Return a check of what lies in the state: a user who cannot enter that sees nothing of it."""

    def found(config: SiteConfig) -> Found:
        shut = config.state.exists() and not os.access(config.state, os.R_OK | os.X_OK, effective_ids=True)
        return skipped("not reached, see state") if shut else look(config)

    return _of_site(found)


def _of_process(about: str) -> Callable[[Case], Found]:
    def found(case: Case) -> Found:
        if case.config is None:
            return skipped("not reached, see configuration")
        unseen = checks.out_of_sight(case.config, about)
        return skipped(unseen) if unseen else checks.process(case.config, case.standing, about)

    return found


def _on_the_way(step: str) -> Callable[[Case], Found]:
    def found(case: Case) -> Found:
        if case.config is None:
            return skipped("not reached, see configuration")
        if case.offline:
            return skipped("--offline")
        if not case.config.toml.coordinator.address:
            return skipped("the site has joined no coordinator")
        try:
            exchange = case.exchange
        except ConfigError:
            return skipped("not reached, see authority and key")
        from client.doctor_network import look

        return look(step, case.config, exchange)

    return found


def _training(config: SiteConfig) -> Found:
    from client.doctor_training import look

    return look(config)


def _of_machine(look: Callable[[], Found]) -> Callable[[Case], Found]:
    return lambda _case: look()


_READABLE = "Give the user that the daemon runs as the right to read it."
_INSTALL = "Install consilium anew, with its constraints.txt."
_UPLINK = "Look at `consilium site status`, and at the logs in up/ of the site's state."

CHECKS: dict[str, Check[Case]] = {
    "configuration": Check(
        "site.toml can be read, and holds what is expected", "Correct it as the line says.", _configuration
    ),
    "versions": Check(
        "Python and every package are as consilium requires, and can be imported",
        _INSTALL,
        _of_machine(machine.versions),
    ),
    "state": Check(
        "the site's state is there, its owner's alone, with all that is in it",
        "Let all of it belong to the user that the daemon runs as, mode 0700.",
        _of_site(checks.state),
    ),
    "secret": Check(
        "the site's secret is there, mode 0600", "Bring it back from your backup.", _of_state(checks.secret)
    ),
    "key": Check(
        "the site's private key is there, mode 0600",
        "Bring it back from your backup, or join again with a new invitation.",
        _of_site(checks.key),
    ),
    "authority": Check(
        "the certificate of the coordinator's authority is there, and holds for 30 days at least",
        "Ask the coordinator for a new invitation, then: consilium site join INVITATION --again.",
        _of_site(checks.authority),
    ),
    "device": Check(
        "what [compute] device asks for is there",
        "Install NVIDIA's driver for the torch that is installed, let the user use /dev/nvidia*, or say device = "
        '"cpu".',
        _of_site(checks.device),
    ),
    "memory": Check(
        "memory is left, to the machine and in the control group",
        "End what else runs here, raise the limit of the unit or container, or lower [compute] threads.",
        _of_machine(partial(machine.memory, LEAST_MEMORY, GOOD_MEMORY)),
    ),
    "disk": Check(
        "the disk of the state has room for images and features",
        "Make room, or move the state: [site] state.",
        _of_state(checks.disk),
    ),
    "shared_memory": Check(
        "/dev/shm has 256 MB at least",  # noqa: S108
        "Start the container with --shm-size=1g (compose: shm_size).",
        _of_machine(machine.shared_memory),
    ),
    "open_files": Check(
        "a process may have 1024 files open",
        "Raise it: ulimit -n 4096, or LimitNOFILE= of the unit.",
        _of_machine(machine.open_files),
    ),
    "randomness": Check(
        "the kernel gives random numbers, which keys and noise are made of",
        "Wait a minute after the start of the machine; a virtual one needs virtio-rng.",
        _of_machine(machine.randomness),
    ),
    "proxy": Check(
        "the hospital's HTTP proxy lets the site through",
        "Check [coordinator] proxy in site.toml.",
        _on_the_way("proxy"),
    ),
    "connection": Check(
        "the coordinator's name is known, and something answers there",
        "Check [coordinator] address, name server and firewall.",
        _on_the_way("connection"),
    ),
    "certificate": Check(
        "what answers shows a certificate of the site's authority for [coordinator] address, which holds for 30 days "
        "at least",
        "Check [coordinator] ca_certificate; tell the coordinator.",
        _on_the_way("certificate"),
    ),
    "coordinator": Check(
        "what answers is a coordinator, of a version that fits",
        "Ask the coordinator whether its server is up.",
        _on_the_way("coordinator"),
    ),
    "clock": Check(
        "this machine's clock is the coordinator's, within what it forgives: 5 seconds ahead, 5 minutes behind",
        "Let this machine take its time from a server (NTP).",
        _on_the_way("clock"),
    ),
    "enrolment": Check(
        "the coordinator takes the site's key",
        "Send the site's enrolment file to the coordinator.",
        _on_the_way("enrolment"),
    ),
    "data": Check("the daemon's user can read images and labels", _READABLE, _of_site(checks.data)),
    "cohort": Check(
        "the data were checked, may be used, and do not look changed since",
        "Run: consilium site check SITE.TOML.",
        _of_state(checks.cohort),
    ),
    "separation": Check(
        "the link's user can read neither data nor state",
        "Take that right from it: mode 0700 or 0750, another group, or an access list.",
        _of_site(checks.separation),
    ),
    "socket": Check(
        "the daemon can make its socket, and the peers in site.toml can reach it",
        "Name another [site] socket, such as /run/consilium/site.sock, in a folder of mode 0750 of a common group.",
        _of_site(checks.socket),
    ),
    "supervisor": Check("what `site up` runs stays up", _UPLINK, _of_process("supervisor")),
    "daemon": Check("the daemon answers, and can use the data", _UPLINK, _of_process("daemon")),
    "link": Check("the link runs and is connected", _UPLINK, _of_process("link")),
    "trail": Check(
        "the audit trail holds",
        "Keep the file as it is, and compare it with your backup.",
        _of_state(checks.trail),
    ),
    "ledger": Check(
        "the ledger of spent privacy holds",
        "Look at `consilium site ledger`. Never delete it: what was spent would be forgotten.",
        _of_state(checks.ledger),
    ),
    "training": Check(
        "a dry round of training works, and how long a step takes",
        'Compare with the device above; install torch for this machine, or say [compute] device = "cpu".',
        _of_site(_training),
    ),
}
"""Every check of a site: in the order in which they are tried."""
