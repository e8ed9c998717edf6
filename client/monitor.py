"""The site's monitor: metrics for Prometheus and health on 127.0.0.1, for a hospital's own dashboards.

A small process of its own, for the daemon has no network and the link listens nowhere: it asks the daemon over its
socket for what `consilium site status` is told as well, and reads what link and supervisor write of themselves. Nothing
of it is about patients: states and codes of closed lists, times, bytes, epsilon.

    python -P -m client.monitor SITE.TOML
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from client import audit, site_ledger
from client.link_status import LOCK, WORDS, LinkStatus
from client.refused import REFUSED
from client.site_config import SiteConfig, read_any_site
from client.status import STALE, SiteStatus, ask, status
from common.errors import ConfigError, ConsiliumError, UsageError
from common.exposition import Family, Sample, one_of, sample
from common.locks import holder
from common.logs import set_up, tell_end
from common.loopback import Latest
from common.watch import PATIENCE_S, TEXT, pages, room, serve

DAEMON = ("starting", "examining", "ready", "working", "unusable", "unavailable")
"""States of the daemon; the last where it does not answer."""

LINK = ("not_joined", "unreadable", "not_running", "stuck", *WORDS)
"""States of the link: what it says of itself, after what can be seen without it."""

PHASES = ("opening", "examining", "studies", "images", "features", "review")
"""What the daemon may be at for long."""

REFUSALS = ("unknown_run", "unknown_trunk", "not_prepared", "unknown_ticket", *REFUSED)
CERTIFICATES = ("coordinator", "authority")
CHILDREN = ("daemon", "link", "monitor")

READY = (
    *(f"daemon_{state}" for state in DAEMON if state not in ("ready", "working")),
    *(f"link_{code}" for code in LINK if code not in ("connected", "working")),
    "certificate_ended",
    "disk_full",
)
"""Codes of `/readyz`: why the site cannot take part in a run now."""

ROOM = 16 * 2**20
"""Bytes below which the disk of the state counts as full: what a site sends has to be in the audit trail first."""

TRAIL_S = 60.0
"""Seconds between two readings of the audit trail and the ledger, which may be long."""

FAMILIES = (
    Family("consilium_site_daemon_up", "Whether the daemon answers at its socket."),
    Family("consilium_site_daemon_state", "1 for the state of the daemon.", ("state",)),
    Family("consilium_site_link_up", "Whether the link runs and is not stuck."),
    Family("consilium_site_link_state", "1 for the state of the link to the coordinator.", ("state",)),
    Family("consilium_site_link_state_timestamp_seconds", "Since when the link is in that state."),
    Family("consilium_site_link_contact_timestamp_seconds", "When the coordinator answered last."),
    Family("consilium_site_messages_total", "Messages that were answered since the link started."),
    Family("consilium_site_received_bytes_total", "Bytes from the coordinator since the link started."),
    Family("consilium_site_sent_bytes_total", "Bytes to the coordinator since the link started."),
    Family("consilium_site_refusal", "1 for the code of the last refused request since the daemon started.", ("code",)),
    Family("consilium_site_refusal_timestamp_seconds", "When a request was refused last."),
    Family("consilium_site_run_active", "Whether the site is in a run."),
    Family("consilium_site_run_round", "The last round of that run that the site was asked for."),
    Family("consilium_site_run_heard_timestamp_seconds", "When that run was heard of last."),
    Family("consilium_site_phase", "1 for what the daemon is at, of what may take long.", ("phase",)),
    Family("consilium_site_phase_seconds", "How long it has been at that."),
    Family("consilium_site_phase_ratio", "Which part of it is done."),
    Family("consilium_site_turned_away_total", "Connections of users who are no peers, since the daemon started."),
    Family("consilium_site_daemon_resident_memory_bytes", "Memory of the daemon."),
    Family("consilium_site_daemon_gpu_memory_bytes", "Memory of the GPU that the daemon holds."),
    Family("consilium_site_child_up", "Whether a process under `site up` runs.", ("child",)),
    Family("consilium_site_child_restarts_total", "How often it was started again.", ("child",)),
    Family("consilium_site_certificate_end_timestamp_seconds", "When a certificate ends.", ("certificate",)),
    Family("consilium_site_state_free_bytes", "Room on the disk of the site's state."),
    Family("consilium_site_audit_ok", "Whether the audit trail holds; of the user of the state alone."),
    Family("consilium_site_ledger_ok", "Whether the ledger of privacy holds; of the user of the state alone."),
    Family("consilium_site_run_epsilon", "Epsilon that the last private run has spent here, as the trail has it."),
    Family("consilium_site_epsilon_limit", "[policy] max_epsilon, of all runs together."),
)
"""Everything that a site's monitor tells."""


@dataclass(frozen=True)
class Trail:
    """What the trail and the ledger say; None where this user may not read them."""

    audit: bool | None
    ledger: bool | None
    epsilon: float | None  # of the last private run


class Watch:
    """Looks at one site.

    Args:
        config: the site.
    """

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self._found = Latest(self._look, PATIENCE_S)
        self._trail = Latest(lambda: read_trail(config), 1.0, fresh=TRAIL_S)

    def samples(self) -> Iterator[Sample]:
        """Yield what is known now, in bounded time."""
        found = self._found.get()
        yield from _of_daemon(found.daemon if found else {"state": "unavailable"})
        yield from self._of_link(found.link if found else None)
        for certificate, end in _ends(self.config, found.link if found else None):
            yield from sample("consilium_site_certificate_end_timestamp_seconds", end, certificate)
        yield from _of_supervisor(found)
        yield from sample("consilium_site_state_free_bytes", room(self.config.state))
        yield from _of_trail(self._trail.get())
        yield from sample("consilium_site_epsilon_limit", self.config.toml.policy.max_epsilon)

    def missing(self) -> Iterator[str]:
        """Yield why the site cannot take part in a run now: codes of `READY`."""
        found = self._found.get()
        state = _state(found.daemon if found else {})
        if state not in ("ready", "working"):
            yield f"daemon_{state}"
        code = link_state(self.config, found.link if found else None)
        if code not in ("connected", "working"):
            yield f"link_{code}"
        if any(end < time.time() for _, end in _ends(self.config, found.link if found else None)):
            yield "certificate_ended"
        free = room(self.config.state)
        if free is not None and free < ROOM:
            yield "disk_full"

    def _look(self) -> SiteStatus:
        return status(self.config, ask(self.config))

    def _of_link(self, link: LinkStatus | None) -> Iterator[Sample]:
        state = link_state(self.config, link)
        yield from sample("consilium_site_link_up", state in WORDS)
        yield from one_of("consilium_site_link_state", LINK, state)
        if link is not None:
            yield from sample("consilium_site_link_state_timestamp_seconds", link.since)
            yield from sample("consilium_site_link_contact_timestamp_seconds", link.last_contact)
            yield from sample("consilium_site_messages_total", link.messages)
            yield from sample("consilium_site_received_bytes_total", link.bytes_in)
            yield from sample("consilium_site_sent_bytes_total", link.bytes_out)


def link_state(config: SiteConfig, link: LinkStatus | None) -> str:
    """Return how the link is: a code of `LINK`, or one of a newer version.

    Args:
        config: the site.
        link: what it wrote last.
    """
    if not config.toml.coordinator.address:
        return "not_joined"
    try:
        running = holder(config.link_folder / LOCK) is not None
    except OSError:
        return "unreadable"
    if link is None or not running:
        return "not_running"
    return "stuck" if time.time() - link.written > STALE else link.code


def read_trail(config: SiteConfig) -> Trail:
    """Return what the audit trail and the ledger say."""
    if not os.access(config.audit, os.R_OK):
        return Trail(None, None, None)
    try:
        spent = [entry.facts["epsilon"] for entry in audit.read(config.audit) if "epsilon" in entry.facts]
        held = True
    except ConsiliumError:
        spent, held = [], False
    return Trail(held, _ledger_holds(config), float(str(spent[-1])) if spent else None)


def _ledger_holds(config: SiteConfig) -> bool:
    try:
        site_ledger.open_ledger(config, write=False)
    except ConsiliumError:
        return False
    return True


def _state(said: Mapping[str, Any]) -> str:
    state = str(said.get("state"))
    return state if state in DAEMON else "unavailable"


def _of_daemon(said: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield what the daemon says of itself."""
    state = _state(said)
    yield from sample("consilium_site_daemon_up", state != "unavailable")
    yield from one_of("consilium_site_daemon_state", DAEMON, state)
    if state == "unavailable":
        return
    refused, run, memory = (said.get(key) or {} for key in ("refused", "run", "memory"))
    yield from one_of("consilium_site_refusal", REFUSALS, refused.get("code"))
    yield from sample("consilium_site_refusal_timestamp_seconds", refused.get("at"))
    yield from sample("consilium_site_run_active", bool(run))
    yield from sample("consilium_site_run_round", run.get("round"))
    yield from sample("consilium_site_run_heard_timestamp_seconds", run.get("heard"))
    yield from _phase(said)
    yield from sample("consilium_site_turned_away_total", said.get("turned_away"))
    yield from sample("consilium_site_daemon_resident_memory_bytes", memory.get("resident"))
    yield from sample("consilium_site_daemon_gpu_memory_bytes", memory.get("gpu"))


def _phase(said: Mapping[str, Any]) -> Iterator[Sample]:
    phase, since, total = said.get("phase"), said.get("since"), said.get("total")
    yield from one_of("consilium_site_phase", PHASES, phase)
    if phase and since:
        yield from sample("consilium_site_phase_seconds", max(0.0, time.time() - since))
    if phase and total:
        yield from sample("consilium_site_phase_ratio", said.get("done", 0) / total)


def _of_supervisor(found: SiteStatus | None) -> Iterator[Sample]:
    """Yield what `site up` says of its processes; under systemd there is none."""
    supervisor = found.supervisor if found else None
    if supervisor is None or not supervisor.running:
        return
    for name in CHILDREN:
        if child := supervisor.children.get(name):
            yield from sample("consilium_site_child_up", child.pid is not None, name)
            yield from sample("consilium_site_child_restarts_total", child.restarts, name)


def _of_trail(trail: Trail | None) -> Iterator[Sample]:
    if trail is not None:
        yield from sample("consilium_site_audit_ok", trail.audit)
        yield from sample("consilium_site_ledger_ok", trail.ledger)
        yield from sample("consilium_site_run_epsilon", trail.epsilon)


def _ends(config: SiteConfig, link: LinkStatus | None) -> Iterator[tuple[str, float]]:
    """Yield when certificates end: that of the coordinator as the link saw it last, and of its authority."""
    coordinator, authority = CERTIFICATES
    if link is not None and link.certificate_ends is not None:
        yield coordinator, link.certificate_ends
    with suppress(OSError, ValueError):
        held = x509.load_pem_x509_certificate(config.ca_certificate.read_bytes())
        yield authority, held.not_valid_after_utc.timestamp()


def main(arguments: list[str]) -> int:
    """Run the monitor of a `site.toml`, and return the exit code."""
    form = "text"
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -P -m client.monitor SITE.TOML")
        config = read_any_site(Path(arguments[0]))
        form = config.toml.logs.format
        if not config.toml.monitor.port:
            raise ConfigError(f"{config.path.name}: [monitor] port: missing or 0, expected a port such as 9464")
        set_up(form, "monitor", TEXT, known=lambda: {"site": config.name})
        watch = Watch(config)
        serve(config.toml.monitor.port, pages(FAMILIES, watch.samples, watch.missing))
    except ConsiliumError as error:
        return tell_end(form, "monitor", error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
