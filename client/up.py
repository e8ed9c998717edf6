"""A site's processes under one supervisor: the daemon, which owns the data, the link, which owns the key, a monitor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from client.authority import read_authority
from client.site_config import SiteConfig
from common.errors import ConfigError
from common.logs import Supervising
from common.node_key import read_key
from common.supervisor import Child, supervise

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""What keeps a dependency from calling home."""


def logs(config: SiteConfig) -> Path:
    """Return the folder of the supervisor: its state, its lock, and what its children write."""
    return config.state / "up"


def children(config: SiteConfig) -> tuple[Child, ...]:
    """Return the processes of a site; a monitor only where it is to be watched."""
    names = ("daemon", "link", *(("monitor",) if config.toml.monitor.port else ()))
    return tuple(Child(name, (sys.executable, "-P", "-m", f"client.{name}", str(config.path)), QUIET) for name in names)


def up(config: SiteConfig, report: Callable[[str], None] | None = None) -> None:
    """Run a site until SIGTERM or SIGINT.

    Args:
        config: the site.
        report: told of every start and end of a process.

    Raises:
        ConfigError: the site has no state yet, or a process cannot run as it is configured.
        ConsiliumError: the site is up already.
    """
    said = Supervising(config.toml.logs.format, report, config.name)
    with said.ending():
        check(config)
        supervise(children(config), logs(config), report=said.tell)


def check(config: SiteConfig) -> None:
    """Look at what both processes need, before either is started: the first thing that is wrong is the only one said.

    Raises:
        ConfigError: something is not as it must be.
    """
    coordinator = config.coordinator()
    try:
        there = config.secret.exists()
    except OSError as error:
        raise ConfigError(f"{config.state}: the site's state cannot be read ({error.strerror})") from None
    if not there:
        raise ConfigError(f"{config.state}: no state of a site yet; run first: consilium site check {config.path}")
    read_key(coordinator.private_key)
    read_authority(coordinator.ca_certificate)
    _ = config.socket, config.peers  # refuse what they cannot be
