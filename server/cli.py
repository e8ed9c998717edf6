"""`consilium server`: the coordinator. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.cli import Group
from server import run_cli
from server.doctor_cli import doctor
from server.run_cli import as_json, server_option

if TYPE_CHECKING:
    from server.enrolment import Enrolled
    from server.server_config import ServerConfig

_SETTINGS = {"help_option_names": ["-h", "--help"]}
_FILE = click.Path(path_type=Path)


@click.group(cls=Group, context_settings=_SETTINGS)
def server() -> None:
    """Coordinate a federation of hospitals.

    \b
    Example:
      consilium server init chest --address coordinator.example.org:9443
      consilium server invite st-anna --server chest/server.toml
      consilium server enrol st-anna.enrolment.json --server chest/server.toml
      consilium server up --server chest/server.toml
      consilium server run chest.toml --server chest/server.toml
    """  # noqa: D301  click wants the backspace itself


@server.command(context_settings=_SETTINGS)
@click.argument("folder", metavar="DIR", type=_FILE)
@click.option("--address", metavar="HOST:PORT", required=True, help="What hospitals dial.")
@click.option("--name", metavar="NAME", help="The coordinator's name [the folder's].")
@click.option("--listen", metavar="HOST:PORT", help="Where to listen [every address, at the port of --address].")
@as_json
def init(folder: Path, address: str, name: str | None, listen: str | None, as_json: bool) -> int:
    """Make the folder of a new coordinator: server.toml, runs/, and state/ with its keys and certificates.

    \b
    Example:
      consilium server init chest --address coordinator.example.org:9443

    Overwrites nothing. Exit code: 0 done, 2 wrong use, or a coordinator is there already.
    """  # noqa: D301
    from server import founding

    made = founding.found(folder, address, name, listen)
    if as_json:
        _print_json({"name": made.name, "config": str(made.config), "state": str(made.state)})
        return 0
    click.echo(f"coordinator {made.name}: {_shown(made.config)}")
    click.echo(f"Next: consilium server invite NAME --server {_shown(made.config)}")
    click.echo(
        f"Keep a backup of {_shown(made.state)}, readable by nobody else: with another authority, "
        "every hospital has to be invited again."
    )
    return 0


@server.command(context_settings=_SETTINGS)
@click.argument("name", metavar="NAME")
@server_option
@click.option("--output", type=_FILE, metavar="FILE", help="Where the invitation goes [./NAME.invitation.json].")
@as_json
def invite(name: str, path: Path, output: Path | None, as_json: bool) -> int:
    """Write an invitation for a hospital to take part under a name; an earlier one to the same name becomes void.

    \b
    Example:
      consilium server invite st-anna --server chest/server.toml

    It holds a token that is good once, for 14 days: give the file to nobody else. Tell the hospital the fingerprint of
    the authority in another way, by telephone say, so that it can compare. Exit code: 0 done, 1 failed, 2 wrong use.
    """  # noqa: D301
    from common.errors import ConsiliumError
    from common.invitation import write_document
    from server import enrolment
    from server.server_config import read_server

    config = read_server(path)
    made = enrolment.invite(config, name)
    target = output or Path(f"{name}.invitation.json")
    try:
        write_document(target, made)
    except OSError as error:
        raise ConsiliumError(f"{target}: cannot be written ({error.strerror})") from None
    authority = made.authority_fingerprint
    if as_json:
        _print_json({"invitation": str(target), "name": name, "expires": made.expires, "authority": authority})
        return 0
    click.echo(f"{_shown(target)}: for {name}, good once, until {made.expires}")
    click.echo(f"Authority: {authority}")
    click.echo(f"Next: at the hospital, consilium site join {_shown(Path(target.name))}")
    return 0


@server.command(context_settings=_SETTINGS)
@click.argument("document", metavar="FILE", type=_FILE)
@server_option
@click.option("--replace", is_flag=True, help="Let the site's new key take the place of the one that is enrolled.")
@as_json
def enrol(document: Path, path: Path, replace: bool, as_json: bool) -> int:
    """Record a hospital that answered its invitation.

    \b
    Example:
      consilium server enrol st-anna.enrolment.json --server chest/server.toml

    A server that is up lets it in at once. Compare the fingerprint that is printed with what the hospital reads out.
    Exit code: 0 done, 1 its token is not good, or its name or key is taken, 2 wrong use, or the file is none.
    """  # noqa: D301
    from server import enrolment
    from server.server_config import read_server

    config = read_server(path)
    site = enrolment.enrol(config, document, replace)
    _call_roll(config)
    if as_json:
        _print_json(_values(site))
    else:
        click.echo(f"enrolled {site.name}: {site.fingerprint}")
        click.echo("The hospital sees the same fingerprint in what `consilium site join` printed.")
    return 0


@server.command(context_settings=_SETTINGS)
@server_option
@as_json
def sites(path: Path, as_json: bool) -> int:
    """Show the enrolled hospitals, and for how long they will trust this coordinator.

    \b
    Example:
      consilium server sites --server chest/server.toml

    Exit code: 0 done, 1 failed, 2 wrong configuration.
    """  # noqa: D301
    from server import enrolment
    from server.server_config import read_server

    config = read_server(path)
    found = enrolment.enrolled(config)
    certificate = _certificate(config)
    if as_json:
        _print_json({"sites": [_values(site) for site in found], "certificate": certificate})
        return 0
    width = max((len(site.name) for site in found), default=0)
    for site in found:
        click.echo(f"{site.name:<{width}}  {site.enrolled_at}  {site.fingerprint}")
    click.echo(f"{len(found)} sites; certificate until {certificate['expires']}, {certificate['days_left']} days")
    if certificate["warning"]:
        click.echo(f"warning: {certificate['warning']}", err=True)
    return 0


@server.command(context_settings=_SETTINGS)
@click.argument("name", metavar="NAME")
@server_option
@as_json
def remove(name: str, path: Path, as_json: bool) -> int:
    """Take a hospital out: its key and any open invitation to it are good no more.

    \b
    Example:
      consilium server remove st-anna --server chest/server.toml

    The key is never taken again. Exit code: 0 done, 1 there is no such site, 2 wrong use.
    """  # noqa: D301
    from server import enrolment
    from server.server_config import read_server

    config = read_server(path)
    site = enrolment.remove(config, name)
    _call_roll(config)
    if as_json:
        _print_json(_values(site))
    else:
        click.echo(f"removed {site.name}: {site.fingerprint}")
    return 0


@server.command(context_settings=_SETTINGS)
@server_option
@as_json
def renew(path: Path, as_json: bool) -> int:
    """Make the next certificate of the coordinator, for the address that server.toml names now.

    \b
    Example:
      consilium server renew --server chest/server.toml

    Key and authority stay, so no hospital has to do anything. Exit code: 0 done, 1 failed, 2 wrong configuration.
    """  # noqa: D301
    from server import tls
    from server.server_config import read_server

    config = read_server(path)
    tls.renew(config)
    certificate = _certificate(config)
    if as_json:
        _print_json(certificate)
        return 0
    click.echo(f"{_shown(config.certificate)}: until {certificate['expires']}, {certificate['days_left']} days")
    click.echo("A server that is running takes it up within seconds; a proxy before it has to be given it.")
    return 0


for command in (run_cli.up, run_cli.run, run_cli.status, run_cli.stop, run_cli.resume, run_cli.report, doctor):
    server.add_command(command)


def _call_roll(config: ServerConfig) -> None:
    """Tell a SuperLink that is up whom to let in; what was recorded stands in any case."""
    from common.errors import ConsiliumError
    from server import roll

    try:
        roll.call(config)
    except ConsiliumError as error:
        click.echo(f"warning: recorded, but the SuperLink does not follow: {error}", err=True)


def _certificate(config: ServerConfig) -> dict[str, Any]:
    from common.invitation import timestamp
    from server import tls

    found = tls.status(config)
    return {"expires": timestamp(found.expires), "days_left": found.days_left, "warning": found.warning}


def _values(site: Enrolled) -> dict[str, Any]:
    return {**site.model_dump(), "fingerprint": site.fingerprint}


def _shown(path: Path) -> str:
    """Return a path as a terminal can show it."""
    text = str(path).encode("utf-8", "replace").decode()
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, allow_nan=False))
