"""The coordinator's processes: Flower's SuperLink under a supervisor; engines come and go with the runs.

python -P -m server.up SERVER.TOML
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import ConfigError, ConsiliumError
from common.locks import holder
from common.supervisor import Child, supervise
from server import tls
from server.endpoints import LEAN, QUIET, read_secret
from server.server_config import ServerConfig, read_server


def logs(config: ServerConfig) -> Path:
    """Return the folder of the supervisor: its state, its lock, and what its children write."""
    return config.state / "up"


def up(config: ServerConfig, report: Callable[[str], None] | None = None) -> None:
    """Run the coordinator until SIGTERM or SIGINT.

    Args:
        config: the coordinator.
        report: told once that all was found in order, of a certificate that ends soon, and of every start and end of a
            process.

    Raises:
        ConfigError: there is no state, or something in it cannot be used.
        ConsiliumError: the coordinator is up already, or a port is in use.
    """
    if not config.state.is_dir():
        raise ConfigError(f"{config.state}: there is no such folder; `consilium server init` makes a coordinator")
    _check_alone(config)
    warning = _check(config)
    report = report or (lambda _text: None)
    report(f"coordinator {config.name}: hospitals reach it at {config.address}; Ctrl-C ends it")
    if warning:
        report(f"warning: {warning}")
    argv = (sys.executable, "-P", "-m", "server.up", "superlink", str(config.path))
    superlink = Child("superlink", argv, {**QUIET, **LEAN})
    supervise((superlink,), logs(config), report=report)


def _check_alone(config: ServerConfig) -> None:
    """Say first that the coordinator is up already: its ports are in use then, which would be the next thing found."""
    try:
        other = holder(logs(config) / "supervisor.lock")
    except OSError:
        return  # the supervisor says what is wrong with it
    if other is not None:
        raise ConsiliumError(f"the coordinator is up already, as process {other}; end that one first: kill {other}")


def _check(config: ServerConfig) -> str:
    """Check what the SuperLink needs before it is started, and return what has to be seen to soon.

    A process under a supervisor would be started again and again, and say why in its log alone.
    """
    from server.superlink import check_free

    for secret in (config.operator_secret, config.superexec_secret):
        read_secret(secret)
    warning = ""
    if not config.behind_proxy:
        certificate = tls.status(config)
        if not certificate.trusted:
            raise ConfigError(f"no hospital could connect: {certificate.warning}")
        warning = certificate.warning
    check_free(config.endpoints)
    return warning


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
