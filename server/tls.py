"""The server's certificate over the years: for whom it stands, how long it lasts, and the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from common import certificates
from common.address import Address
from common.certificates import WARN_DAYS, Described
from common.errors import ConfigError, ConsiliumError
from common.files import write_atomic
from server.server_config import ServerConfig


@dataclass(frozen=True)
class CertificateStatus:
    """How long hospitals will trust the server."""

    expires: datetime
    days_left: int
    warning: str  # one line that says what to do; empty if all is well
    trusted: bool = True  # whether hospitals can connect now


def hosts(address: Address) -> tuple[str, ...]:
    """Return for whom a coordinator's certificate stands: what hospitals dial, and this machine itself."""
    return tuple(dict.fromkeys((address.host, "localhost", "127.0.0.1")))


def renew(config: ServerConfig, now: datetime | None = None) -> Described:
    """Make the next certificate, of the same key and authority, so that no hospital notices.

    It stands for the address that `server.toml` names now.

    Raises:
        ConfigError: the certificates are the operator's own, or a file of the authority cannot be used.
        ConsiliumError: it cannot be written.
    """
    if not config.own_authority:
        raise ConfigError(
            f"{config.path.name}: [certificates] names certificates of your own authority; "
            f"renew {config.certificate} there"
        )
    names = hosts(config.address)
    content = certificates.make_server(config.ca_certificate, config.ca_key, config.key, names, now)
    try:
        write_atomic(config.certificate, content)
    except OSError as error:
        raise ConsiliumError(f"{config.certificate}: cannot be written ({error.strerror})") from None
    return certificates.describe(certificates.read_certificates(config.certificate)[0])


def status(config: ServerConfig, now: datetime | None = None) -> CertificateStatus:
    """Return how long hospitals will trust the server, and what is wrong with its certificate.

    Raises:
        ConfigError: a certificate or a key cannot be read.
    """
    moment = now or datetime.now(UTC)
    found = certificates.check(config.ca_certificate, config.certificate, config.key, config.address.host, moment)
    server = certificates.describe(certificates.read_certificates(config.certificate)[0])
    return CertificateStatus(
        server.expires, server.days_left(moment), _warning(config, server, found, moment), not found
    )


def _warning(config: ServerConfig, server: Described, found: Sequence[str], now: datetime) -> str:
    renewal = "run `consilium server renew`" if config.own_authority else f"renew {config.certificate}"
    if found:
        return f"{found[0]}; {renewal}"
    authorities = certificates.read_certificates(config.ca_certificate)
    left = min(certificates.describe(authority).days_left(now) for authority in authorities)
    if left < WARN_DAYS:  # a renewal would end with it
        return f"{config.ca_certificate}: expires in {left} days; every site has to be invited again by a new authority"
    if server.days_left(now) < WARN_DAYS:
        return f"{config.certificate}: expires in {server.days_left(now)} days; {renewal}"
    return ""
