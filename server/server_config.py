"""`server.toml`: what one coordinator says of itself. Local facts, but for the address.

Paths are relative to the folder of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from common.address import Address, AddressText, parse_address
from common.errors import ConfigError
from common.names import Name
from common.sections import LogsSection, MonitorSection
from common.strict import Section, read_toml, validated
from server.endpoints import Endpoints

NAME = "server.toml"
"""What the file is called when nothing else is said."""


class ServerSection(Section):
    """Who the coordinator is, and where it keeps what it knows."""

    name: Name
    state: str = "state"  # folder of keys, certificates, enrolled sites and the superlink's database
    runs: str = "runs"  # folder of a folder a run


class NetworkSection(Section):
    """Where hospitals find the coordinator, and where it listens."""

    address: AddressText  # what hospitals dial
    listen: AddressText = "0.0.0.0:9443"
    operator_port: int = Field(default=9444, ge=1, le=65535)  # loopback only
    tls: Literal["direct", "proxy"] = "direct"  # proxy: one on this machine ends TLS and passes plain HTTP on

    @model_validator(mode="after")
    def _apart(self) -> NetworkSection:
        listen = parse_address(self.listen)
        if listen.port == self.operator_port:
            raise ValueError(f"listen and operator_port: both are {listen.port}, expected two different ports")
        if self.tls == "proxy" and not listen.loopback:
            raise ValueError(
                f"listen: got {self.listen!r}, expected a loopback address such as 127.0.0.1:9443, for with "
                'tls = "proxy" what is sent to it is not encrypted'
            )
        return self


class CertificatesSection(Section):
    """Certificates of an authority of the operator's own; all three, or none for those that `server init` makes."""

    certificate: str = ""  # PEM file of the server's, those between it and the authority after it
    key: str = ""  # PEM file, mode 0600
    ca: str = ""  # PEM file of the authority, which hospitals get with their invitation

    @model_validator(mode="after")
    def _whole(self) -> CertificatesSection:
        if len({bool(self.certificate), bool(self.key), bool(self.ca)}) > 1:
            raise ValueError("expected certificate, key and ca, or none of them")
        return self


class ServerToml(Section):
    """The whole file."""

    server: ServerSection
    network: NetworkSection
    certificates: CertificatesSection = CertificatesSection()
    logs: LogsSection = LogsSection()
    monitor: MonitorSection = MonitorSection()

    @model_validator(mode="after")
    def _monitored_apart(self) -> ServerToml:
        taken = {parse_address(self.network.listen).port: "listen", self.network.operator_port: "operator_port"}
        if self.monitor.port in taken:
            other = taken[self.monitor.port]
            raise ValueError(
                f"[monitor] port: got {self.monitor.port}, the port of [network] {other}; expected another"
            )
        return self


@dataclass(frozen=True)
class ServerConfig:
    """A coordinator's configuration with its paths resolved."""

    path: Path  # of server.toml
    toml: ServerToml

    @property
    def name(self) -> str:
        """The coordinator's name."""
        return self.toml.server.name

    @property
    def state(self) -> Path:
        """The folder of everything that is for the coordinator's eyes only."""
        return self._resolved(self.toml.server.state)

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self._resolved(self.toml.server.runs)

    @property
    def address(self) -> Address:
        """What hospitals dial."""
        return parse_address(self.toml.network.address)

    @property
    def listen(self) -> Address:
        """Where the public listener is."""
        return parse_address(self.toml.network.listen)

    @property
    def operator_port(self) -> int:
        """Where the operator's listener is, on loopback."""
        return self.toml.network.operator_port

    @property
    def behind_proxy(self) -> bool:
        """Whether TLS ends before the public listener."""
        return self.toml.network.tls == "proxy"

    @property
    def own_authority(self) -> bool:
        """Whether certificates are signed by the authority in the state, not by one of the operator's."""
        return not self.toml.certificates.ca

    @property
    def ca_key(self) -> Path:
        """The key of the coordinator's own authority."""
        return self.state / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        """The certificate that hospitals trust."""
        return self.state / "ca.pem" if self.own_authority else self._resolved(self.toml.certificates.ca)

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.state / "server.pem" if self.own_authority else self._resolved(self.toml.certificates.certificate)

    @property
    def key(self) -> Path:
        """The server's key."""
        return self.state / "server.key" if self.own_authority else self._resolved(self.toml.certificates.key)

    @property
    def superexec_secret(self) -> Path:
        """The secret that whoever takes a task of the superlink shows."""
        return self.state / "superexec.secret"

    @property
    def operator_secret(self) -> Path:
        """The secret that whoever steers the superlink shows."""
        return self.state / "operator.secret"

    @property
    def database(self) -> Path:
        """The superlink's database."""
        return self.state / "superlink.db"

    @property
    def sites(self) -> Path:
        """The enrolled sites."""
        return self.state / "sites.json"

    @property
    def invitations(self) -> Path:
        """The invitations that nobody has answered yet."""
        return self.state / "invitations.json"

    @property
    def endpoints(self) -> Endpoints:
        """What the SuperLink and whoever steers it must agree on."""
        return Endpoints(
            database=self.database,
            superexec_secret=self.superexec_secret,
            operator_secret=self.operator_secret,
            certificate=self.certificate,
            private_key=self.key,
            listen=self.toml.network.listen,
            operator_port=self.operator_port,
            tls=not self.behind_proxy,
        )

    def _resolved(self, path: str) -> Path:
        return (self.path.parent / Path(path).expanduser()).resolve()


def read_server(path: Path) -> ServerConfig:
    """Read a `server.toml`.

    Raises:
        ConfigError: it cannot be read, is no TOML, or holds a key or a value that is not expected.
    """
    toml = parse_server(read_toml(path), path.name)
    config = ServerConfig(path.resolve(), toml)
    for section, key, place in _places(toml):
        try:
            config._resolved(place)
        except (OSError, RuntimeError, ValueError):  # a home that nobody has, a loop of links, a NUL
            raise ConfigError(f"{path.name}: [{section}] {key}: got {place!r}, which leads nowhere") from None
    return config


def parse_server(values: Mapping[str, Any], where: str) -> ServerToml:
    """Return the validated content of a `server.toml`.

    Raises:
        ConfigError: a key or a value that is not expected.
    """
    return validated(ServerToml, values, where)


def _places(toml: ServerToml) -> list[tuple[str, str, str]]:
    paths = {"server": ("state", "runs"), "certificates": ("certificate", "key", "ca")}
    return [(name, key, getattr(getattr(toml, name), key)) for name, keys in paths.items() for key in keys]
