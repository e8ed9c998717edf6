"""How a site stands, in words: what its supervisor, its daemon and its link say, and what to do where one is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from client import up
from client.link_status import GOOD, LOCK, LinkStatus, read_status
from client.refused import REFUSED
from client.relay import Relay
from client.site_config import SiteConfig
from common.locks import holder
from common.supervisor import HEALTHY, SupervisorState, read_state

ENDS_SOON = 30 * 86400.0
"""Seconds before its end from which a certificate is spoken of."""

STALE = 120.0
"""Seconds without a word after which a link that is there counts as stuck; the longest that it waits is 30."""

_START = "Start it: consilium site up SITE.TOML, or systemctl start consilium-site-{}."
_LOG = "Look at the end of {}."


@dataclass(frozen=True)
class Finding:
    """One thing that can be said of a site."""

    about: str  # supervisor, daemon, request, link, certificate
    level: str  # good, warning, wrong
    sentence: str
    remedy: str = ""


@dataclass(frozen=True)
class SiteStatus:
    """How a site stands."""

    site: str
    findings: tuple[Finding, ...]
    supervisor: SupervisorState | None
    daemon: Mapping[str, Any]
    link: LinkStatus | None

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.level != "wrong" for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "site": self.site,
            "healthy": self.healthy,
            "findings": [asdict(finding) for finding in self.findings],
            "supervisor": asdict(self.supervisor) if self.supervisor else None,
            "daemon": dict(self.daemon),
            "link": asdict(self.link) if self.link else None,
        }


def status(config: SiteConfig, daemon: Mapping[str, Any]) -> SiteStatus:
    """Return how a site stands.

    Args:
        config: the site.
        daemon: what the daemon says of itself, `ask(config)`.
    """
    supervisor, amiss = _supervisor(config)
    link, said = _link(config)
    findings = (*amiss, _daemon(config, daemon), *_refused(daemon), said, *_certificates(config, link))
    return SiteStatus(config.name, findings, supervisor, daemon, link)


def ask(config: SiteConfig) -> Mapping[str, Any]:
    """Return what the daemon says of itself, at once where it has no socket."""
    with suppress(PermissionError):
        if not config.socket.exists():
            return {"state": "unavailable", "code": "no socket"}
    return Relay(config.socket, config.name).status()


def _supervisor(config: SiteConfig) -> tuple[SupervisorState | None, tuple[Finding, ...]]:
    folder = up.logs(config)
    try:
        state = read_state(folder)
    except OSError as error:
        return None, (Finding("supervisor", "warning", f"Its state cannot be read ({_reason(error)})."),)
    if state is None or not state.running:
        return state, ()  # under systemd there is none, and what is not running says so below
    return state, tuple(_children(state, folder))


def _children(state: SupervisorState, folder: Path) -> Iterator[Finding]:
    for name, child in state.children.items():
        log = _LOG.format(folder / f"{name}.log")
        if child.pid is None:
            yield Finding("supervisor", "wrong", f"The {name} ended with exit code {child.last_exit}.", log)
        elif child.restarts and time.time() - (child.started or 0) < HEALTHY:
            yield Finding("supervisor", "warning", f"The {name} was started again, {child.restarts} times by now.", log)


def _daemon(config: SiteConfig, said: Mapping[str, Any]) -> Finding:
    state, code = said.get("state"), said.get("code") or "no reason given"
    if state == "unavailable":
        remedy = _START.format("daemon")
        return Finding("daemon", "wrong", f"The daemon does not answer at its socket ({code}).", remedy)
    if state == "unusable":
        remedy = f"Run consilium site check {config.path}; daemon.log in the site's state says more."
        return Finding("daemon", "wrong", f"The site's data cannot be used ({code}).", remedy)
    words = {
        "ready": "The daemon is ready.",
        "working": f"The daemon is working: {said.get('phase') or 'a request'}{_share(said)}.",
        "examining": f"The daemon is examining the site's data{_share(said)}.",
        "starting": "The daemon is starting.",
    }
    if state not in words:
        return Finding("daemon", "wrong", "The daemon says nothing that is known.", "Install one version of both.")
    return Finding("daemon", "good", words[state])


def _refused(said: Mapping[str, Any]) -> Iterator[Finding]:
    """Tell of the last refusal, if a person can do something about it; it may be of long ago."""
    found = said.get("refused") or {}
    words = REFUSED.get(str(found.get("code")))
    if words is None:
        return
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(found.get("at") or 0)))
    yield Finding("request", "warning", f"A request was refused at {when}: {words[0]} ({found['code']}).", words[1])


def _share(said: Mapping[str, Any]) -> str:
    return f" ({said['done']} of {said['total']})" if said.get("total") else ""


def _link(config: SiteConfig) -> tuple[LinkStatus | None, Finding]:
    if not config.toml.coordinator.address:
        remedy = "Run consilium site join with the coordinator's invitation."
        return None, Finding("link", "wrong", "The site has joined no coordinator yet.", remedy)
    folder = config.link_folder
    try:
        found, running = read_status(folder), holder(folder / LOCK) is not None
    except PermissionError:
        remedy = "Ask as root, or as the user that runs the link."
        return None, Finding("link", "wrong", f"{folder} is closed to this user.", remedy)
    except OSError as error:
        return None, Finding("link", "wrong", f"{folder} cannot be read ({_reason(error)}).", "Check the folder.")
    if found is None or not running:
        return found, Finding("link", "wrong", "The link is not running.", _START.format("link"))
    if time.time() - found.written > STALE:
        remedy = "Restart it: consilium site up, or systemctl restart consilium-site-link."
        return found, Finding("link", "wrong", "The link is there, and has been stuck for minutes.", remedy)
    level = "good" if found.code in GOOD else "wrong"
    return found, Finding("link", level, found.sentence, found.remedy)


def _certificates(config: SiteConfig, link: LinkStatus | None) -> Iterator[Finding]:
    if link is not None and link.certificate_ends is not None:
        remedy = "Tell the coordinator, who renews it."
        yield from _ends("the coordinator's certificate", link.certificate_ends, remedy)
    try:
        authority = x509.load_pem_x509_certificate(config.ca_certificate.read_bytes())
    except (OSError, ValueError):
        return  # the link says so, where it is not merely closed to this user
    remedy = "Ask the coordinator for a new invitation, then run consilium site join with it and --again."
    end = authority.not_valid_after_utc.timestamp()
    yield from _ends("the certificate of the coordinator's authority", end, remedy)


def _ends(what: str, end: float, remedy: str) -> Iterator[Finding]:
    left = end - time.time()
    day = time.strftime("%Y-%m-%d", time.gmtime(end))
    if left < ENDS_SOON:
        verb = "ends" if left > 0 else "ended"
        yield Finding("certificate", "warning", f"{what[0].upper()}{what[1:]} {verb} on {day}.", remedy)


def _reason(error: OSError) -> str:
    return error.strerror or "damaged"
