"""Where the coordinator's SuperLink listens, and the two secrets that open its inner side.

Values only: neither Flower nor a web server is imported here, so a command line may import this at its top.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import private_file
from common.errors import ConfigError
from common.files import write_atomic

OPERATOR_HEADER = "consilium-operator"
# Flower reports usage and asks for newer versions unless told otherwise: for every process that imports it.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
# Of what is freed of large buffers, glibc by itself keeps most: a heap for each of some dozen threads.
LEAN = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1048576"}
_PATHS = ("database", "superexec_secret", "operator_secret", "certificate", "private_key")


@dataclass(frozen=True)
class Endpoints:
    """What the SuperLink and whoever steers it must agree on."""

    database: Path
    superexec_secret: Path  # whoever holds it may take a run's task and so be its aggregator
    operator_secret: Path  # whoever holds it may register sites and start runs
    certificate: Path  # of the public listener, with its chain; not read where tls is off
    private_key: Path
    listen: str = "0.0.0.0:9443"  # what hospitals reach
    operator_port: int = 9444  # on 127.0.0.1
    tls: bool = True  # False: plain HTTP, for a proxy on this machine that ends TLS

    def public(self) -> tuple[str, int]:
        """Return host and port of the public listener.

        Raises:
            ConfigError: `listen` is not of the form host:port, or plain HTTP would leave this machine.

        Examples:
            >>> Endpoints(*[Path("x")] * 5, listen="[::]:9443").public()
            ('::', 9443)
        """
        host, _, port = self.listen.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"listen: got {self.listen!r}, expected host:port, such as 0.0.0.0:9443")
        if not self.tls and host not in ("127.0.0.1", "::1"):
            raise ConfigError(f"listen: got {self.listen!r} without TLS, expected 127.0.0.1:PORT behind a proxy")
        return host, int(port)

    def write(self, path: Path) -> None:
        """Write the values as a file for `python -P -m server.superlink`."""
        values = {name: str(value) if name in _PATHS else value for name, value in dataclasses.asdict(self).items()}
        write_atomic(path, json.dumps(values, indent=1).encode(), mode=0o600)

    @staticmethod
    def read(path: Path) -> Endpoints:
        """Return the values that `write` wrote.

        Raises:
            ConfigError: it is missing, or was written by something else.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            values.update({name: Path(values[name]) for name in _PATHS})
            return Endpoints(**values)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}), expected the SuperLink's endpoints"
            ) from None
        except (ValueError, TypeError, AttributeError, KeyError):
            raise ConfigError(f"{path}: holds no endpoints of a SuperLink; `consilium server up` writes it") from None


def sign(secret: bytes, seconds: int, path: str, body: bytes) -> str:
    """Return what the operator's header says of a request: the secret itself never travels.

    Whoever took the port while no SuperLink runs would be told it, were it sent.

    Examples:
        >>> sign(bytes(32), 1, "/v1/control/list-nodes", b"")[:12]
        '1.a29b57aa1d'
    """
    text = f"{seconds}\n{path}\n".encode() + hashlib.sha256(body).digest()
    return f"{seconds}.{hmac.new(secret, text, hashlib.sha256).hexdigest()}"


def read_secret(path: Path) -> bytes:
    """Return a secret of the coordinator.

    Raises:
        ConfigError: it is missing, no regular file, open to others than its owner, or of another length.
    """
    return private_file.read_secret(
        path, "a secret of the coordinator", "`consilium server init` makes it, that of an old one is in your backup"
    )
