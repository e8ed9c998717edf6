"""Who is enrolled and whom the SuperLink lets in: made one, when it starts and whenever somebody comes or goes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from common.errors import ConsiliumError
from server.control import Control
from server.control_http import NoAnswer
from server.enrolment import enrolled
from server.server_config import ServerConfig

START_S = 30.0

_log = logging.getLogger("consilium.roll")


def call(config: ServerConfig, patience_s: float = 0.0) -> bool:
    """Register every enrolled site, let in nobody else, and return whether the SuperLink was there to be told.

    Args:
        config: the coordinator.
        patience_s: how long a SuperLink that is starting is waited for.

    Raises:
        ConsiliumError: a site cannot be registered, or the list of sites cannot be read.
    """
    sites = {site.name: site.public_key for site in enrolled(config)}
    with Control(config.endpoints) as control:
        end = time.monotonic() + patience_s
        while not control.is_up():
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
        for node in control.nodes():
            if node.name not in sites:
                control.unregister(node.name)
        _register(control, sites)
    return True


def _register(control: Control, sites: Mapping[str, str]) -> None:
    """Register every site, also after one that cannot be, then say which those were."""
    failed = []
    for name, key in sites.items():
        try:
            control.register(name, key)
        except NoAnswer:
            raise
        except ConsiliumError as error:
            failed.append(str(error))
    if failed:
        raise ConsiliumError("; ".join(failed))


def at_start(config: ServerConfig) -> None:
    """Do the same for a SuperLink that is just starting; what fails is in its log, and stops no other site."""
    try:
        if not call(config, START_S):
            _log.error("the SuperLink does not answer, so no site was registered")
    except ConsiliumError as error:
        _log.error("not every site is let in: %s", error)
