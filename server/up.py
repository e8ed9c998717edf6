"""The coordinator's processes: Flower's SuperLink under a supervisor; engines come and go with the runs.

python -P -m server.up SERVER.TOML
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import ConfigError, ConsiliumError
from common.supervisor import Child, supervise
from server import tls
from server.endpoints import LEAN, QUIET
from server.server_config import ServerConfig, read_server


def logs(config: ServerConfig) -> Path:
    """Return the folder of the supervisor: its state, its lock, and what its children write."""
    return config.state / "up"


def up(config: ServerConfig, report: Callable[[str], None] | None = None) -> None:
    """Run the coordinator until SIGTERM or SIGINT.

    Args:
        config: the coordinator.
        report: told of every start and end of a process, and of a certificate that ends soon.

    Raises:
        ConfigError: there is no state, or something in it cannot be used.
        ConsiliumError: the coordinator is up already, or a port is in use.
    """
    if not config.state.is_dir():
        raise ConfigError(f"{config.state}: there is no such folder; `consilium server init` makes a coordinator")
    if not config.behind_proxy:
        certificate = tls.status(config)
        if certificate.days_left < 0:
            raise ConfigError(certificate.warning)
        if certificate.warning and report is not None:
            report(f"warning: {certificate.warning}")
    argv = (sys.executable, "-P", "-m", "server.up", "superlink", str(config.path))
    superlink = Child("superlink", argv, {**QUIET, **LEAN})
    supervise((superlink,), logs(config), report=report)


def _up(config: ServerConfig) -> None:
    up(config, lambda text: print(text, file=sys.stderr))  # noqa: T201


def _superlink(config: ServerConfig) -> None:
    from server import roll, superlink  # Flower takes a second, which the supervisor has no use for

    superlink.prepare_process()
    superlink.serve(config.endpoints, lambda: roll.at_start(config))


_COMMANDS: dict[str, Callable[[ServerConfig], None]] = {"up": _up, "superlink": _superlink}


def main(arguments: list[str]) -> int:
    """Run one of the two, and return the exit code."""
    command, path = arguments
    try:
        _COMMANDS[command](read_server(Path(path)))
    except ConsiliumError as error:
        print(f"consilium: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
