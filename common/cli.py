"""The `consilium` command: its groups are found through an entry point, so it knows none and loads in no time."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import click

from common.errors import ConsiliumError

GROUP = "consilium.commands"


class Group(click.Group):
    """A group that answers a misspelt command with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments begin with."""
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and self.get_command(ctx, name) is None:
            known = self.list_commands(ctx)
            close = get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Expected one of {', '.join(known)}."
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)


class Commands(Group):
    """A group whose commands are the installed entry points of `consilium.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of the installed commands."""
        return sorted(entry.name for entry in importlib.metadata.entry_points(group=GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command, or None."""
        for entry in importlib.metadata.entry_points(group=GROUP, name=cmd_name):
            command: click.Command = entry.load()
            return command
        return None


def once_up(facts: Mapping[str, Any] | None, quiet: bool) -> Callable[[str], None]:
    """Return what a supervisor reports to: lines on standard error, and facts on standard output with the first.

    Args:
        facts: printed as one JSON document once the first process is started; None: nothing is.
        quiet: whether the lines are left out.
    """
    waiting = [json.dumps(facts)] if facts is not None else []

    def report(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)
        if waiting and ": started" in line:
            click.echo(waiting.pop())

    return report


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="consilium")
def consilium() -> None:
    """Federated transfer learning across hospitals.

    \b
    Example:
      consilium simulate --dataset phantoms --sites 5 --rounds 10
    """  # noqa: D301  click wants the backspace itself


def main() -> None:
    """Run the command; a user's mistake ends in one line and an exit code, not in a traceback."""
    try:
        code = consilium.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = _fail("interrupted", 1)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ConsiliumError as error:
        code = _fail(str(error), error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    shown = "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in message)
    click.echo(f"consilium: {shown}", err=True)  # what a file's key or name holds must not steer a terminal
    return code
