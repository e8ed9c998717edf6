"""`host:port`, as both sides write where the coordinator is: a name, an IPv4 address, or an IPv6 one in brackets."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

_FORM = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[A-Za-z0-9.-]{1,253})):(?P<port>[0-9]{1,5})")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_EXPECTED = "expected host:port with a port from 1 to 65535, an IPv6 address in brackets"


@dataclass(frozen=True)
class Address:
    """A host, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return `host:port`, as URLs have it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether nobody else's machine can reach it."""
        return self.host == "localhost" or (is_ip(self.host) and ipaddress.ip_address(self.host).is_loopback)


def parse_address(text: str) -> Address:
    """Return the address of a text.

    Raises:
        ValueError: it is none.

    Examples:
        >>> parse_address("[::1]:9443")
        Address(host='::1', port=9443)
        >>> str(parse_address("coordinator.example:443"))
        'coordinator.example:443'
    """
    found = _FORM.fullmatch(text)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise ValueError(f"got {text!r}, {_EXPECTED}")
    host = found["six"] or found["host"]
    if not (_is_ipv6(host) if found["six"] else is_ip(host) or _is_name(host)):
        raise ValueError(f"got {text!r}, {_EXPECTED}")
    return Address(host, int(found["port"]))


def is_ip(host: str) -> bool:
    """Return whether a host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_ipv6(host: str) -> bool:
    return is_ip(host) and ":" in host


def _is_name(host: str) -> bool:
    """Return whether a host can be a name; one that ends in a number is an IPv4 address that is none."""
    labels = host.split(".")
    return all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()


def _checked(value: str) -> str:
    parse_address(value)
    return value


AddressText = Annotated[str, AfterValidator(_checked)]
