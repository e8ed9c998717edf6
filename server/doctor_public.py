"""The coordinator as a hospital meets it: dialled at its public address, trusting its authority and nothing else.

A proxy before it is part of what is dialled. Where the address does not lead back to this machine, the listener itself
is asked. Bodies are of no kind that Flower reads, so nothing is changed even where something answers that must not.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import Encoding

from common.address import Address
from common.certificates import read_certificates
from common.doctor import Found, failed, passed, skipped, warned
from server.server_config import ServerConfig

OPEN = "/v1/fleet/pull-messages"
"""What hospitals ask for; without a signature it is refused."""

CLOSED = (
    "/",
    "/docs",
    "/openapi.json",
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
)
"""What the superlink has besides, or answers to its operator alone."""

_NOT_THERE = (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND)
_TIMEOUT = 5.0


@dataclass(frozen=True)
class Answer:
    """What was met."""

    where: str  # what was dialled
    unreachable: str = ""  # why the public address does not answer; empty: it does
    distrust: str = ""  # why a hospital would not trust what answers; empty: it would
    certificate: bytes = b""  # DER
    statuses: Mapping[str, int] = field(default_factory=dict)  # "GET /docs" -> status

    @property
    def reached(self) -> bool:
        """Whether anything that a hospital would trust was met."""
        return bool(self.statuses)


def dial(config: ServerConfig) -> Answer:
    """Ask for all routes at the public address, or where it does not lead here, at the listener itself.

    Raises:
        ConfigError: the authority's certificate cannot be read.
    """
    read_certificates(config.ca_certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(config.ca_certificate)
    address = config.address
    try:
        return _asked(context, address, address.host)
    except httpx.TransportError as error:
        why = _reason(error)
    if not config.behind_proxy:
        try:
            answer = _asked(context, _listener(config), address.host)
            return Answer(answer.where, why, answer.distrust, answer.certificate, answer.statuses)
        except httpx.TransportError:
            pass
    return Answer(str(address), why)


def _asked(context: ssl.SSLContext, place: Address, host: str) -> Answer:
    """Ask for every route; TLS is spoken as with `host`."""
    statuses: dict[str, int] = {}
    certificate = b""
    wanted = [("POST", OPEN), *((method, route) for route in CLOSED for method in ("GET", "POST"))]
    with httpx.Client(verify=context, timeout=_TIMEOUT, trust_env=False) as client:
        for method, route in wanted:
            options: Any = {"extensions": {"sni_hostname": host}, "headers": {"content-type": "text/plain"}}
            try:
                with client.stream(method, f"https://{place}{route}", **options) as response:
                    certificate = certificate or _shown(response)
                    statuses[f"{method} {route}"] = response.status_code
            except httpx.ConnectError as error:
                if distrust := _distrust(error):
                    return Answer(str(place), distrust=distrust)
                raise
    return Answer(str(place), certificate=certificate, statuses=statuses)


def _listener(config: ServerConfig) -> Address:
    """Return the listener as this machine can dial it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.listen.host, config.listen.host)  # noqa: S104
    return Address(host, config.listen.port)


def _shown(response: httpx.Response) -> bytes:
    channel = response.extensions["network_stream"].get_extra_info("ssl_object")
    return bytes(channel.getpeercert(True) or b"")


def _distrust(error: BaseException | None) -> str:
    """Return what OpenSSL says of a certificate that it does not trust, or of what does not speak TLS."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message.rstrip(".")
        if isinstance(error, ssl.SSLError):
            return f"no TLS ({error.reason})"
        error = error.__cause__ or error.__context__
    return ""


def _reason(error: BaseException | None) -> str:
    """Return what the system says of an address that does not answer."""
    kind = type(error).__name__
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    return kind


def listener(config: ServerConfig, answer: Answer, *, up: bool) -> Found:
    """Return whether a hospital would find the coordinator.

    Args:
        config: the coordinator.
        answer: what was met.
        up: whether its superlink answers to its operator.
    """
    if answer.distrust:
        return failed(f"{answer.where}: no hospital would trust what answers ({answer.distrust})")
    if not answer.reached:
        said = f"{answer.where} cannot be reached ({answer.unreachable})"
        return failed(said) if up else skipped(f"{said}, and the coordinator is not up")
    status = answer.statuses[f"POST {OPEN}"]
    if status != httpx.codes.UNAUTHORIZED:
        said = f"{answer.where} answers with status {status}"
        if status < 500:
            return failed(f"{said}, which is no coordinator's")
        return (
            failed(f"{said}, for it does not reach the superlink")
            if up
            else skipped(f"{said}: the coordinator is not up")
        )
    if answer.unreachable:
        return warned(
            f"{config.address} does not lead here from this machine ({answer.unreachable}); the listener is well",
            "Nothing, if hospitals connect; else check the name, the firewall and what forwards the port.",
        )
    own = read_certificates(config.certificate)[0] if config.certificate.exists() else None
    if own is not None and answer.certificate != own.public_bytes(Encoding.DER):
        return warned(f"{answer.where} shows another certificate than {config.certificate}")
    return passed(f"{answer.where} answers as hospitals expect")


def routes(answer: Answer) -> Found:
    """Return whether nothing answers that hospitals do not need."""
    if not answer.reached:
        return skipped("not reached, see public")
    found = [
        f"{route} (status {status})"
        for route, status in answer.statuses.items()
        if route != f"POST {OPEN}" and status not in _NOT_THERE
    ]
    if found:
        return failed(f"{answer.where} answers {', '.join(found)}")
    return passed(f"{len(CLOSED)} routes that hospitals do not need are not there")
