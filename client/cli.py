"""`consilium site`: one hospital. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from client.cli_output import SETTINGS, as_json, console, print_json, shown
from client.doctor_cli import doctor
from client.oversight_cli import COMMANDS
from common.cli import Group, once_up

if TYPE_CHECKING:
    from client.findings import Findings

_INCOMPLETE = 3  # exit code: completed in part
_SITE_TOML = click.Path(path_type=Path)

quiet = click.option("--quiet", is_flag=True, help="No progress.")
site_option = click.option(
    "--site", "path", type=_SITE_TOML, default="site.toml", metavar="FILE", help="The site's site.toml [./site.toml]."
)


@click.group(cls=Group, context_settings=SETTINGS)
def site() -> None:
    """Look after one hospital: its data, which stay on this machine, and its part in a federation.

    \b
    Example:
      consilium site init radiology --name st-anna --images /data/chest --labels /data/chest.csv
      consilium site check radiology/site.toml
      consilium site join st-anna.invitation.json --site radiology/site.toml
      consilium site up radiology/site.toml
    """  # noqa: D301  click wants the backspace itself


@site.command(context_settings=SETTINGS)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="The site's name in the federation [the folder's].")
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the images.")
@click.option("--labels", type=click.Path(path_type=Path), metavar="FILE", help="CSV file of the labels.")
@click.option("--invitation", type=click.Path(path_type=Path), metavar="FILE", help="Join this coordinator as well.")
@as_json
def init(
    folder: Path, name: str | None, images: Path | None, labels: Path | None, invitation: Path | None, as_json: bool
) -> int:
    """Make the folder of a new site: site.toml, and state/ with the site's secret.

    \b
    Example:
      consilium site init radiology --name st-anna --images /data/chest --labels /data/chest.csv
      consilium site init radiology --invitation st-anna.invitation.json --images /data/chest

    With an invitation, the site has its name from there, and joins as `consilium site join` does.
    Overwrites nothing. Exit code: 0 done, 2 wrong use, or a site is there already.
    """  # noqa: D301
    from client import founding

    if invitation is not None:
        name = _invited(invitation, name)
    made = founding.found(folder, name, images, labels)
    values = {"site": made.site, "config": str(made.config), "state": str(made.state)}
    if invitation is not None:
        values |= _join(made.config, invitation, None, again=False)
    if as_json:
        print_json(values)
        return 0
    config = _path(made.config)
    click.echo(f"site {made.site}: {config}")
    first = "" if images else f"name the folder of the images in {config}, then "
    click.echo(f"Next: {first}consilium site check {config}")
    click.echo(f"Keep a backup of {_path(made.state / 'secret')}, readable by nobody else: it cannot be made again.")
    if invitation is not None:
        _show_joined(values)
    return 0


@site.command(context_settings=SETTINGS)
@click.argument("invitation", metavar="INVITATION.json", type=click.Path(path_type=Path))
@site_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the enrolment goes [./NAME.enrolment.json].",
)
@click.option("--again", is_flag=True, help="Keep the key that is there, and do all the rest again.")
@as_json
def join(invitation: Path, path: Path, output: Path | None, again: bool, as_json: bool) -> int:
    """Answer a coordinator's invitation: make the site's key and the enrolment to send back.

    \b
    Example:
      consilium site join st-anna.invitation.json --site radiology/site.toml

    Fills in [coordinator] of site.toml and leaves every other line as it is. The private key never leaves the site.
    Exit code: 0 done, 1 failed, 2 wrong use, or the invitation is not for this site.
    """  # noqa: D301
    values = _join(path, invitation, output, again=again)
    if as_json:
        print_json(values)
    else:
        _show_joined(values)
    return 0


@site.command(context_settings=SETTINGS)
@click.argument("path", metavar="SITE.TOML", type=_SITE_TOML)
@click.option("--files", is_flag=True, help="Name every file that is not in use (with --json: every file).")
@click.option("--offline", is_flag=True, help="Do not ask the PACS; take what was pulled before.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Another copy of the HTML page.")
@as_json
@quiet
def check(path: Path, files: bool, offline: bool, output: Path | None, as_json: bool, quiet: bool) -> int:
    """Examine the site's data: what can be used, what not and why, and what to do about it.

    \b
    Example:
      consilium site check radiology/site.toml
      consilium site check radiology/site.toml --files --json > check.json

    Writes check.json and check.html (with images of patients: for the eyes of this site only) into the site's state,
    which is made if there is none yet.
    Exit code: 0 done, 1 failed, 2 wrong configuration, or the data may not be used as they are.
    """  # noqa: D301
    from client import examination
    from client.site_config import read_site
    from common.errors import DataError
    from common.progress import Reporter

    config = read_site(path)
    if examination.found(config):
        where = _path(config.state)
        click.echo(f"new site: made {where}; keep a backup of the secret in it, readable by nobody else", err=True)
    examination.ready(config, output)
    with Reporter(quiet=quiet) as reporter:
        if config.toml.data.dicomweb is not None and not offline:
            pulled = examination.pull(config, reporter)
            if getattr(pulled, "failed", 0):
                reporter.note("warning: some images did not come from the PACS; `consilium site pull` tries them again")
        with examination.alone(config):
            found = examination.examine(config, reporter)
            page = examination.write(config, found, output)
    if as_json:
        from client.report.document import document

        print_json(document(found, files=files))
    else:
        _show(found, page, files)
    if found.stop:
        raise DataError(found.stop)
    return 0


@site.command(context_settings=SETTINGS)
@click.argument("path", metavar="SITE.TOML", type=_SITE_TOML)
@as_json
@quiet
def pull(path: Path, as_json: bool, quiet: bool) -> int:
    """Pull from the PACS what [data.dicomweb] asks for and is not here yet.

    \b
    Example:
      consilium site pull radiology/site.toml

    Exit code: 0 done, 1 failed, 2 wrong configuration, 3 some images did not come: run it again.
    """  # noqa: D301
    import dataclasses

    from client import examination
    from client.site_config import read_site
    from common.errors import ConfigError
    from common.progress import Reporter

    config = read_site(path)
    if config.toml.data.dicomweb is None:
        raise ConfigError(f"{path}: no [data.dicomweb], so there is nothing to pull from")
    examination.ready(config, None)
    with Reporter(quiet=quiet) as reporter:
        pulled = dataclasses.asdict(examination.pull(config, reporter))
    if as_json:
        print_json(pulled)
    else:
        _table("Pulled from the PACS", pulled)
    return _INCOMPLETE if pulled.get("failed") else 0


@site.command(context_settings=SETTINGS)
@click.argument("patients", metavar="PATIENTS.csv", type=click.Path(path_type=Path))
@site_option
@click.option("--column", metavar="NAME", help="Column of the PatientIDs [PatientID, patient, or the only one].")
@as_json
def forget(patients: Path, path: Path, column: str | None, as_json: bool) -> int:
    """Take patients out: they are never used again, and what was kept of their images is deleted.

    \b
    Example:
      consilium site forget withdrawn.csv --site radiology/site.toml

    The hospital's own files stay. PATIENTS.csv may be deleted afterwards: the site keeps keyed digests only. If it is
    interrupted, run it again. Exit code: 0 done, 1 failed, 2 wrong use.
    """  # noqa: D301
    from client import examination
    from client.site_config import read_site

    forgotten = examination.forget(read_site(path), patients, column)
    if as_json:
        print_json(forgotten)
    else:
        _table("Taken out", forgotten)
        if not forgotten["images"]:
            click.echo(
                "Nothing was kept of their images. If some should have been, compare how the PatientIDs are written."
            )
        click.echo("Copies of check.html made with --output may still show their images: delete those.")
    return 0


@site.command(context_settings=SETTINGS)
@click.argument("path", metavar="[SITE.TOML]", type=_SITE_TOML, default="site.toml")
@as_json
@quiet
def up(path: Path, as_json: bool, quiet: bool) -> int:
    """Run the site: its daemon and its link to the coordinator, until Ctrl-C or SIGTERM.

    \b
    Example:
      consilium site up radiology/site.toml

    The site has been checked and has joined before. What ends is started again; what the two write is in up/ of the
    site's state. With --json, who and where it is once it runs. Exit code: 0 stopped, 1 the site is up already, 2 wrong
    configuration.
    """  # noqa: D301
    from client import up as running
    from client.site_config import read_site

    config = read_site(path)
    facts = {"site": config.name, "address": config.toml.coordinator.address, "pid": os.getpid()}
    running.up(config, once_up(facts if as_json else None, quiet))
    return 0


@site.command(context_settings=SETTINGS)
@click.argument("path", metavar="[SITE.TOML]", type=_SITE_TOML, default="site.toml")
@click.option("--watch", "-w", is_flag=True, help="Go on showing it, until Ctrl-C.")
@as_json
def status(path: Path, watch: bool, as_json: bool) -> int:
    """Say how the site stands: what is wrong, and what to do about it; then what it is at.

    \b
    Example:
      consilium site status radiology/site.toml
      consilium site status radiology/site.toml --watch

    With --watch again and again until Ctrl-C; with --json as well, one document a line, a line for each change.
    Exit code: 0 nothing is wrong, 1 something is, 2 wrong configuration.
    """  # noqa: D301
    from client import balance, status_view
    from client import status as standing
    from client.site_config import read_any_site

    config = read_any_site(path)
    spent = balance.watched(config)

    def read() -> dict[str, Any]:
        return {**standing.status(config, standing.ask(config)).document(), "privacy": spent()}

    if watch:
        from common.live import follow

        return (
            0 if follow(read, status_view.view, console(), as_json=as_json, moving=status_view.MOVING)["healthy"] else 1
        )
    found = read()
    if as_json:
        print_json(found)
    else:
        for line in status_view.lines(found):
            click.echo(shown(line))
    return 0 if found["healthy"] else 1


for _command in (*COMMANDS, doctor):
    site.add_command(_command)


def _invited(invitation: Path, name: str | None) -> str:
    """Return the name of an invitation that can be answered, before a site is made for it."""
    from common.errors import ConfigError
    from common.invitation import read_invitation

    offered = read_invitation(invitation)
    if name is not None and name != offered.name:
        raise ConfigError(f"--name: got {name!r}, but {_path(invitation)} invites {offered.name!r}")
    if offered.expired():
        raise ConfigError(f"{_path(invitation)}: expired on {offered.expires}; ask the coordinator for a new one")
    return offered.name


def _join(path: Path, invitation: Path, output: Path | None, *, again: bool) -> dict[str, str]:
    from client import joining
    from client.site_config import read_any_site
    from common import node_key
    from common.invitation import read_invitation

    name = read_any_site(path).name
    target = output or Path(f"{name}.enrolment.json")
    answer = joining.join(path, invitation, target, again)
    return {
        "enrolment": str(target),
        "name": name,
        "key": node_key.fingerprint(answer.public_key),
        "authority": read_invitation(invitation).authority_fingerprint,
    }


def _show_joined(values: dict[str, str]) -> None:
    click.echo(f"Send {_path(Path(values['enrolment']))} to the coordinator. Compare with it, by telephone say:")
    click.echo(f"  this site's key              {values['key']}")
    click.echo(f"  the coordinator's authority  {values['authority']}")


def _show(found: Findings, page: Path, files: bool) -> None:
    from client.report import terminal

    terminal.show(found, _path(page), console(), files=files)


def _table(title: str, values: dict[str, Any]) -> None:
    from client.report import terminal

    terminal.pairs(title, {name: str(value) for name, value in values.items()}, console())


def _path(path: Path) -> str:
    return shown(str(path))
