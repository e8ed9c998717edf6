"""The coordinator's processes under a supervisor: Flower's SuperLink, and the keeper of the runs, which have engines.

python -P -m server.up SERVER.TOML
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import ConfigError, ConsiliumError
from common.locks import holder
from common.logs import Supervising, set_up, tell_end
from common.supervisor import Child, supervise
from server import keeper, tls
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
    said = Supervising(config.toml.logs.format, report)
    with said.ending():
        if not config.state.is_dir():
            raise ConfigError(f"{config.state}: there is no such folder; `consilium server init` makes a coordinator")
        _check_alone(config)
        warning = _check(config)
        said.tell(f"coordinator {config.name}: hospitals reach it at {config.address}; Ctrl-C ends it")
        if warning:
            said.tell(f"warning: {warning}", "WARNING")
        supervise(tuple(_children(config)), logs(config), report=said.tell)


def _children(config: ServerConfig) -> Iterator[Child]:
    own = {name: ("server.up", name) for name in ("superlink", keeper.NAME)}
    watched = {"monitor": ("server.monitor",)} if config.toml.monitor.port else {}
    for name, (module, *command) in {**own, **watched}.items():
        argv = (sys.executable, "-P", "-m", module, *command, str(config.path))
        yield Child(name, argv, {**QUIET, **LEAN})


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

    superlink.prepare_process(config.toml.logs.format)
    superlink.serve(config.endpoints, lambda: roll.at_start(config))


def _keeper(config: ServerConfig) -> None:
    set_up(config.toml.logs.format, keeper.NAME, "%(asctime)s %(levelname)s %(name)s %(message)s")
    keeper.keep(config)


_COMMANDS: dict[str, Callable[[ServerConfig], None]] = {"up": _up, "superlink": _superlink, keeper.NAME: _keeper}


def main(arguments: list[str]) -> int:
    """Run one of them, and return the exit code."""
    command, path = arguments
    form = "text"
    try:
        config = read_server(Path(path))
        form = config.toml.logs.format
        _COMMANDS[command](config)
    except ConsiliumError as error:
        return tell_end(form, command, error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
