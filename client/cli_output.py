"""What the commands of a site have in common: how they print, for people and for scripts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

SETTINGS = {"help_option_names": ["-h", "--help"]}

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout.")


def console() -> Console:
    """Return the terminal; a letter that it cannot show is written as a code, and stops nothing."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console()


def shown(text: str) -> str:
    """Return a text as a terminal may show it: no control characters, nothing that it cannot encode."""
    from client.report.wording import encodable, visible

    return visible(encodable(text))


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, allow_nan=False))
