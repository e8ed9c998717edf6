"""`consilium site doctor`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path

import click

from client.cli_output import SETTINGS, as_json, print_json, shown


@click.command(context_settings=SETTINGS)
@click.argument("path", metavar="[SITE.TOML]", type=click.Path(path_type=Path), default="site.toml")
@click.option("--offline", is_flag=True, help="Leave out what needs the network.")
@as_json
def doctor(path: Path, offline: bool, as_json: bool) -> int:
    """Look at everything that the site needs, from its files to the coordinator, and say what to do.

    \b
    Example:
      consilium site doctor radiology/site.toml
      consilium site doctor radiology/site.toml --offline --json

    One line a check: pass, warn, fail or skip. Nothing is changed, and it may be run while the site is up. It takes
    some seconds, for it trains on drawn data. Exit code: 0 nothing failed, 1 something did, 2 wrong use.
    """  # noqa: D301
    from client.doctor import CHECKS, look_at
    from common.doctor import document, healthy, lines, tally
    from common.errors import UsageError

    if not path.exists():
        raise UsageError(f"{path}: there is no such file; name the site's site.toml")
    found = []
    width = max(map(len, CHECKS))
    for result in look_at(path, offline=offline):
        found.append(result)
        for line in lines(result, width) if not as_json else ():
            click.echo(shown(line))
    results = tuple(found)
    if as_json:
        print_json(document({"config": str(path)}, results))
    else:
        click.echo(tally(results))
    return 0 if healthy(results) else 1
