"""`consilium server up, run, status, stop, resume, report`: what a coordinator does with its federation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.cli import once_up

if TYPE_CHECKING:
    from common.run_config import RunConfig, Task
    from server.server_config import ServerConfig

_SETTINGS = {"help_option_names": ["-h", "--help"]}
_FILE = click.Path(path_type=Path)
_PARTIAL = 3  # exit code: completed in part
_CODES = {"completed": 0, "completed_partial": _PARTIAL}

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout.")
watched = click.option("--watch", "-w", "watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
quiet = click.option("--quiet", is_flag=True, help="No progress.")
server_option = click.option(
    "--server", "path", type=_FILE, default="server.toml", metavar="FILE", help="The server.toml [./server.toml]."
)


@click.command(context_settings=_SETTINGS)
@server_option
@as_json
@quiet
def up(path: Path, as_json: bool, quiet: bool) -> int:
    """Run the coordinator: hospitals can connect, and runs can be started, until Ctrl-C or SIGTERM.

    \b
    Example:
      consilium server up --server chest/server.toml

    With --json, who and where it is once it runs. Exit code: 0 ended, 1 failed (a port is in use, or it is up already),
    2 wrong configuration.
    """  # noqa: D301
    from server import up as process
    from server.server_config import read_server

    config = read_server(path)
    facts = {
        "name": config.name,
        "address": str(config.address),
        "listen": str(config.listen),
        "operator_port": config.operator_port,
        "pid": os.getpid(),
    }
    process.up(config, once_up(facts if as_json else None, quiet))
    return 0


@click.command(context_settings=_SETTINGS)
@click.argument("plan", metavar="RUN.toml", type=_FILE)
@server_option
@click.option("--output", type=_FILE, metavar="DIR", help="The run's folder [runs/<task>-<strategy>-<k>].")
@click.option("--detach", is_flag=True, help="Start the run and return; see it with `consilium server status`.")
@as_json
@quiet
def run(plan: Path, path: Path, output: Path | None, detach: bool, as_json: bool, quiet: bool) -> int:
    """Run what RUN.toml asks for over the enrolled hospitals, and show where it is.

    \b
    Example:
      consilium server run chest.toml --server chest/server.toml

    RUN.toml needs [task] labels, the same as at the sites; what it leaves out has the defaults of `consilium simulate`.
    Ctrl-C, or closing the terminal, stops looking on; the run goes on (`consilium server stop` ends it).
    Exit code: 0 done, 1 failed, 2 wrong use, 3 completed in part.
    """  # noqa: D301
    from server import runs
    from server.server_config import read_server

    config = read_server(path)
    asked, task = runs.plan_of(plan, config)
    _require_up(config)
    runs.check_idle(config)
    settled = _settled(asked, task, plan)
    with _going_on():
        folder = runs.begin(config, settled, output)
    return _looked_on(config, folder, detach, as_json, quiet)


@click.command(context_settings=_SETTINGS)
@click.argument("folder", metavar="[DIR]", type=_FILE, required=False)
@server_option
@click.option("--detach", is_flag=True, help="Start the engine and return.")
@as_json
@quiet
def resume(folder: Path | None, path: Path, detach: bool, as_json: bool, quiet: bool) -> int:
    """Go on with a run that was stopped or failed: the latest one, or that of a folder.

    \b
    Example:
      consilium server resume --server chest/server.toml

    It ends with the same bytes as if nothing had happened, if the same sites contribute. A run that is going on is
    looked on at; one whose engine was killed goes on by itself as long as the coordinator is up.
    Exit code: 0 done, 1 failed, 2 there is nothing to resume, 3 completed in part.
    """  # noqa: D301
    from server import runs
    from server.server_config import read_server

    config = read_server(path)
    known = runs.named(config, folder, resumable=True)
    if known.status != "running":
        _require_up(config)
        with _going_on():
            runs.go_on(config, known.folder)
    return _looked_on(config, known.folder, detach, as_json, quiet)


@click.command(context_settings=_SETTINGS)
@server_option
@as_json
def stop(path: Path, as_json: bool) -> int:
    """End the run that is going on; its sites are told, and `consilium server resume` can go on with it.

    \b
    Example:
      consilium server stop --server chest/server.toml

    Exit code: 0 ended, 1 failed, 2 no run is going on.
    """  # noqa: D301
    from common.errors import UsageError
    from server import runs
    from server.server_config import read_server

    found = runs.stop_latest(read_server(path))
    if found is None:
        raise UsageError("no run is going on; see `consilium server status`")
    if as_json:
        _print_json({"folder": str(found.folder), "status": "stopped"})
    else:
        click.echo(f"{found.folder}: stopped; `consilium server resume` goes on with it")
    return 0


@click.command(context_settings=_SETTINGS)
@server_option
@watched
@as_json
def status(path: Path, watch: bool, as_json: bool) -> int:
    """Show who is connected, where the run is, and what needs attention.

    \b
    Example:
      consilium server status --server chest/server.toml
      consilium server status --watch --json

    With --watch again and again until Ctrl-C; with --json as well, one document a line, a line for each change.
    Exit code: 0 all is well, 1 the coordinator is not up or something needs attention, 2 wrong configuration.
    """  # noqa: D301
    from rich.console import Console

    from common.live import follow
    from server import status as facts
    from server import status_view
    from server.server_config import read_server

    config = read_server(path)
    if watch:
        found = follow(
            lambda: facts.status(config), status_view.view, Console(), as_json=as_json, moving=status_view.MOVING
        )
        return 0 if found["up"] and not found["warnings"] else 1
    found = facts.status(config)
    if as_json:
        _print_json(found)
    else:
        status_view.show(found)
    return 0 if found["up"] and not found["warnings"] else 1


@click.command(context_settings=_SETTINGS)
@click.argument("folder", metavar="[DIR]", type=_FILE, required=False)
@server_option
@as_json
def report(folder: Path | None, path: Path, as_json: bool) -> int:
    """Write the report of a run anew from its result, and show its closing table.

    \b
    Example:
      consilium server report chest/runs/chest-fedavg-1

    Exit code: 0 done, 2 there is no result yet.
    """  # noqa: D301
    from common.errors import UsageError
    from server import runs
    from server.report import closing, page
    from server.server_config import read_server

    place = folder or runs.named(read_server(path), None, resumable=False).folder
    found = _result(place)
    if found is None:
        raise UsageError(f"{place}: holds no result.json of a run that has ended; see `consilium server status`")
    try:
        page.write(found, place / "report.html")
    except OSError as error:
        raise UsageError(f"{place / 'report.html'}: cannot be written ({error.strerror})") from None
    _show_end(place, found, as_json, closing.show)
    return 0


def _result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a run's folder, or None where none can be read."""
    try:
        found = json.loads((folder / "result.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"schema", "status", "config", "test"} <= found.keys() else None


def _settled(asked: RunConfig, task: Task, path: Path) -> RunConfig:
    """Return the run of a plan, after building its model once."""
    from common.errors import ConfigError
    from server.plan import settled

    try:
        return settled(asked, task, asked.sites.names, "generic").run
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@contextmanager
def _going_on() -> Iterator[None]:
    """Let Ctrl-C end this command alone while an engine is coming up."""
    try:
        yield
    except KeyboardInterrupt:
        raise _left("a run that was begun") from None


def _left(what: str) -> click.exceptions.Exit:
    click.echo(f"\n{what}: goes on; see `consilium server status`, end it with `consilium server stop`", err=True)
    return click.exceptions.Exit(0)


def _require_up(config: ServerConfig) -> None:
    """Check that the SuperLink answers.

    Raises:
        ConsiliumError: it does not.
    """
    from common.errors import ConsiliumError
    from server.control import Control

    with Control(config.endpoints) as control:
        if not control.is_up():
            raise ConsiliumError(
                f"the coordinator is not up (nothing answers at 127.0.0.1:{config.operator_port}); "
                f"start it with `consilium server up --server {config.path}`"
            )


def _looked_on(config: ServerConfig, folder: Path, detach: bool, as_json: bool, quiet: bool) -> int:
    """Show a run until its end, and return the exit code."""
    if detach:
        if as_json:
            _print_json({"folder": str(folder), "status": "running"})
        else:
            click.echo(f"{folder}: started; see `consilium server status`")
        return 0
    from common.errors import ConsiliumError
    from common.progress import Reporter
    from server import keeper, runs, up
    from server.report import closing

    try:
        with Reporter(quiet=quiet) as reporter:
            kept = partial(keeper.is_there, up.logs(config))
            ended = runs.follow(folder, lambda facts: _show_phase(facts, reporter), kept)
    except KeyboardInterrupt:
        raise _left(str(folder)) from None
    found = _result(folder) if ended in runs.ENDED else None
    if found is None:
        raise ConsiliumError(_why(folder, ended))
    _show_end(folder, found, as_json, closing.show)
    return _CODES[ended]


def _why(folder: Path, ended: str) -> str:
    from server import board, runs

    if ended == "gone":
        return f"{folder}: the run's folder is gone, so nothing of the run can be kept; start a new one"
    error = (board.read(folder) or {}).get("error")
    if not error:
        return f"{folder}: the run is {ended}; {folder / runs.LOG} says why, `consilium server resume` goes on with it"
    return str(error) if ended == "stopped" else f"{error}; `consilium server resume` goes on with it"


def _show_phase(facts: Mapping[str, Any], reporter: Any) -> None:
    if facts.get("phase") not in (None, "starting", "ended"):
        reporter(facts["phase"], facts["done"], facts["total"])


def _show_end(folder: Path, found: dict[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        _print_json(found)
    elif found["test"] is None:
        click.echo(f"{found['status']}: {found.get('error', '')}\nreport: {folder / 'report.html'}")
    else:
        show(found, folder)


def _print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, allow_nan=False))
