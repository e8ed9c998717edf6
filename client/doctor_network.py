"""One question to the coordinator, as the site's link would ask it, and what it tells of every step on the way there.

It goes through the link's own client: the same proxy, the same trust, the same signature. Its body is none that Flower
reads, so it changes nothing at the coordinator, and neither a running link nor its `status.json` notices it.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Any, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from client.authority import read_authority
from client.link_session import Client
from client.link_status import GOOD, WORDS, StatusFile, read_status
from client.link_trouble import code_of, flower_code
from client.site_config import SiteConfig
from common.access import closed
from common.certificates import WARN_DAYS
from common.doctor import Found, failed, passed, skipped, warned
from common.node_key import PrivateKey, read_key

STEPS = ("proxy", "connection", "certificate", "coordinator", "clock", "enrolment")
"""The way to the coordinator; where one step fails, those after it cannot be looked at."""

AHEAD, BEHIND = 5.0, 300.0
"""Seconds of clock that the coordinator forgives."""

NOTICED = 2.0
"""Seconds that cannot be told from none: an answer's date has no fractions, and some servers make it once a second."""

_TIMEOUT = 10.0
_PATH = "/v1/fleet/get-run"  # one that hospitals may ask for; nothing is changed by it
_STEP_OF = {
    "proxy_unreachable": "proxy",
    "proxy_refuses": "proxy",
    "no_tls": "certificate",
    "expired": "certificate",
    "untrusted": "certificate",
    "wrong_host": "certificate",
    "foreign": "coordinator",
    "gateway": "coordinator",
    "version": "coordinator",
    "clock": "clock",
    "withdrawn": "enrolment",
}
"""Code of `client.link_status.WORDS` -> where it went wrong; any other: in the connection."""


@dataclass(frozen=True)
class Exchange:
    """What one question told."""

    code: str  # of client.link_status.WORDS; `connected` where the key was taken
    ahead: float | None = None  # seconds by which this clock is ahead, to about one
    ends: float | None = None  # when the certificate ends, seconds since 1970
    own_key: bool = True  # whether it was signed with the site's key

    @property
    def broken(self) -> str:
        """The step that failed; empty: none."""
        return "" if self.code == "connected" else _STEP_OF.get(self.code, "connection")


class _Silent(StatusFile):
    """Keeps what a client sees to itself: `status.json` is the link's."""

    def _write(self) -> None:
        pass


class _Watch:
    """Sees the coordinator's certificate as TLS begins: after an answer, the connection may be closed."""

    def __init__(self) -> None:
        self.ends: float | None = None

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith("start_tls.complete"):
            shown = info["return_value"].get_extra_info("ssl_object").getpeercert() or {}
            self.ends = float(ssl.cert_time_to_seconds(shown["notAfter"])) if "notAfter" in shown else None


def ask(config: SiteConfig) -> Exchange:
    """Ask the coordinator something that it will not answer, and return what came of it.

    Raises:
        ConfigError: the site has joined none, or the authority or the key cannot be used.
    """
    coordinator = config.coordinator()
    tls = read_authority(coordinator.ca_certificate)
    own = not closed(coordinator.private_key)
    key: PrivateKey = read_key(coordinator.private_key) if own else ec.generate_private_key(ec.SECP384R1())
    silent, watch = _Silent(config.link_folder, config.name, str(coordinator.address)), _Watch()
    with Client(coordinator, key, tls, silent) as client:
        request = client._client.build_request(
            "POST", f"https://{coordinator.address}{_PATH}", content=b"", timeout=_TIMEOUT
        )
        request.extensions["trace"] = watch
        try:
            response = client._send(cast(Any, SimpleNamespace(request=request)))
        except Exception as error:  # noqa: BLE001  whatever a network does; the code says which it was
            return Exchange(code_of(error, proxied=coordinator.proxy is not None), None, watch.ends, own)
    return Exchange(_code(response, proxied=coordinator.proxy is not None), _ahead(response), watch.ends, own)


def _code(response: httpx.Response, *, proxied: bool) -> str:
    """Return what an answer means: a key that is known meets Flower behind the gate, any other the gate's 401."""
    if response.status_code == httpx.codes.UNSUPPORTED_MEDIA_TYPE and flower_code(response) is not None:
        return "connected"
    if response.status_code == httpx.codes.UNAUTHORIZED and (
        response.content or "www-authenticate" in response.headers
    ):
        return "foreign"  # of the gate, it has neither
    return code_of(httpx.HTTPStatusError("", request=response.request, response=response), proxied=proxied)


def _ahead(response: httpx.Response) -> float | None:
    try:
        told = parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None
    return time.time() - told - 1.0  # a date is half a second old at best, and up to two


def look(step: str, config: SiteConfig, exchange: Exchange) -> Found:
    """Return what an exchange tells of one step.

    Args:
        step: one of `STEPS`.
        config: the site.
        exchange: what was asked.
    """
    broken = exchange.broken
    if step == "clock":
        return _clock(exchange)
    if step == "enrolment":
        return _enrolment(config, exchange)
    if broken and STEPS.index(step) > STEPS.index(broken):
        return skipped(f"not reached, see {broken}")
    if step == broken:
        words = WORDS[exchange.code]
        return failed(words.sentence, words.remedy)
    if step == "certificate":
        return _certificate(config, exchange)
    said = {
        "proxy": f"{config.toml.coordinator.proxy} lets this site through",
        "connection": f"{config.toml.coordinator.address} can be reached",
        "coordinator": "a coordinator answers",
    }
    no_proxy = step == "proxy" and not config.toml.coordinator.proxy
    return skipped("no proxy is named") if no_proxy else passed(said[step])


def _certificate(config: SiteConfig, exchange: Exchange) -> Found:
    said = f"of the site's authority, for {config.coordinator().address.host}"
    if exchange.ends is None:
        return passed(said)
    left = exchange.ends - time.time()
    day = datetime.fromtimestamp(exchange.ends, UTC).strftime("%Y-%m-%d")
    if left < WARN_DAYS * 86400:
        return warned(f"{said}, but it ends on {day}", "Tell the coordinator, who renews it.")
    return passed(f"{said}, until {day}")


def _clock(exchange: Exchange) -> Found:
    ahead = exchange.ahead
    if ahead is None:
        why = f"not reached, see {exchange.broken}" if exchange.broken else "the coordinator's answer has no date"
        return skipped(why)
    if abs(ahead) <= NOTICED:
        return passed("within 2 seconds of the coordinator's")
    said = f"{abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if exchange.code == "clock" or not -BEHIND < ahead < AHEAD:
        return failed(said, WORDS["clock"].remedy)
    return passed(said) if -BEHIND / 2 < ahead <= 0 else warned(said, WORDS["clock"].remedy)


def _enrolment(config: SiteConfig, exchange: Exchange) -> Found:
    """Tell whether the key is taken; without the key, what the link wrote of it last."""
    if not exchange.own_key:
        return _as_the_link_says(config)
    if exchange.code == "connected":
        return passed("the coordinator takes this site's key")
    if exchange.code != "withdrawn":
        return skipped(f"not reached, see {exchange.broken}")
    if (config.link_folder / "node_id").exists():  # of an earlier connection
        return failed(WORDS["withdrawn"].sentence, WORDS["withdrawn"].remedy)
    return failed("The coordinator does not know this site's key.")


def _as_the_link_says(config: SiteConfig) -> Found:
    try:
        found = read_status(config.link_folder)
    except OSError:
        found = None
    if found is None:
        return skipped(f"{config.private_key} is closed to this user; ask as root, or as the user of the link")
    said = f"as the link last wrote: {found.sentence}"
    return passed(said) if found.code in GOOD else skipped(said)
