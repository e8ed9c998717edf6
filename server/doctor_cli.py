"""`consilium server doctor`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from server.run_cli import as_json, server_option


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@server_option
@as_json
def doctor(path: Path, as_json: bool) -> int:
    """Look at everything that the coordinator needs, from its files to what hospitals meet, and say what to do.

    \b
    Example:
      consilium server doctor --server chest/server.toml

    One line a check: pass, warn, fail or skip. Nothing is changed, and it may be run while the coordinator is up. It
    takes some seconds. Exit code: 0 nothing failed, 1 something did, 2 wrong use.
    """  # noqa: D301
    from common.doctor import document, healthy, lines, tally
    from common.errors import UsageError
    from server.doctor import CHECKS, look_at

    if not path.exists():
        raise UsageError(f"{path}: there is no such file; name the coordinator's server.toml")
    found = []
    width = max(map(len, CHECKS))
    for result in look_at(path):
        found.append(result)
        for line in lines(result, width) if not as_json else ():
            click.echo("".join(character if character.isprintable() else "\ufffd" for character in line))
    results = tuple(found)
    if as_json:
        click.echo(json.dumps(document({"config": str(path)}, results), allow_nan=False))
    else:
        click.echo(tally(results))
    return 0 if healthy(results) else 1
