"""`consilium site approve`, `audit`, `ledger`, `outbox` and `selftest`: for those who watch over a site.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from client.cli_output import SETTINGS, as_json, console, print_json, shown
from common.cli import Group

if TYPE_CHECKING:
    from client.oversight import Format
    from client.site_config import SiteConfig

_SITE_TOML = click.Path(path_type=Path)
_DEFAULT = Path("site.toml")
_LATEST = 10  # events that `site audit` shows

_site = click.option("--site", "path", type=_SITE_TOML, metavar="FILE", help="The site's site.toml [./site.toml].")
_place = click.argument("place", metavar="[SITE.TOML]", type=_SITE_TOML, required=False)


class _Trail(Group):
    """The group of the trail: a file in place of a command is the site's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return what is left of the arguments."""
        if args and args[0].endswith(".toml") and self.get_command(ctx, args[0]) is None:
            args = ["--site", *args]
        return super().parse_args(ctx, args)


@click.command(context_settings=SETTINGS)
@click.argument("fingerprint", metavar="[FINGERPRINT]", default="")
@_site
@click.option("--reject", is_flag=True, help="Refuse the run, for good.")
@as_json
def approve(fingerprint: str, path: Path | None, reject: bool, as_json: bool) -> int:
    """Approve a run that waits for a person, or refuse it; without a fingerprint, list what waits.

    \b
    Example:
      consilium site approve --site radiology/site.toml
      consilium site approve 3f9ac02b --site radiology/site.toml
      consilium site approve 3f9ac02b --reject --site radiology/site.toml

    The first digits of the fingerprint do. The coordinator asks again by itself, or resumes the run, after that.
    Exit code: 0 done, 1 failed, 2 wrong use: no run, or several, begin like that.
    """  # noqa: D301
    from client import approval
    from common.errors import UsageError

    config = _config(path, None)
    if not fingerprint:
        if reject:
            raise UsageError("--reject: name the run by its fingerprint; without --reject, all that wait are listed")
        _list_waiting(config, as_json)
        return 0
    said = (approval.reject if reject else approval.approve)(config, fingerprint, _user())
    if as_json:
        print_json({"fingerprint": said.fingerprint, "approved": said.approved, "time": said.time, "who": said.who})
    else:
        click.echo(f"run {said.fingerprint}: {'approved' if said.approved else 'rejected'} by {shown(said.who)}")
    return 0


@click.command(context_settings=SETTINGS)
@_site
@click.option("--next", "upcoming", is_flag=True, help="Show all of what would leave next, tensor by tensor.")
@click.option(
    "--release",
    is_flag=False,
    flag_value="",
    metavar="[SHA256]",
    help="Let the reply go that is held; with several, the one whose SHA-256 begins so.",
)
@as_json
def outbox(path: Path | None, upcoming: bool, release: str | None, as_json: bool) -> int:
    """See what is to leave the site before it does, and let it go where [policy] review = true.

    \b
    Example:
      consilium site outbox --site radiology/site.toml
      consilium site outbox --next --site radiology/site.toml
      consilium site outbox --release --site radiology/site.toml

    The SHA-256 is that of the audit trail. Exit code: 0 done, 1 failed, 2 wrong use: nothing to release.
    """  # noqa: D301
    from client import oversight
    from common.errors import UsageError

    config = _config(path, None)
    if upcoming and release is not None:
        raise UsageError("--next and --release exclude each other: look first, then release")
    if release is not None:
        _show_released(oversight.release(config, release), as_json)
    elif upcoming:
        _show_upcoming(oversight.upcoming(config), as_json)
    else:
        _show_letters(oversight.letters(config), as_json)
    return 0


@click.command(context_settings=SETTINGS)
@_place
@_site
@as_json
def ledger(place: Path | None, path: Path | None, as_json: bool) -> int:
    """Say what of its patients' privacy the site has spent, over all runs, and what is left.

    \b
    Example:
      consilium site ledger radiology/site.toml

    Exit code: 0 done, 1 the ledger cannot be used, 2 wrong configuration.
    """  # noqa: D301
    from client import oversight

    statement = oversight.statement(_config(path, place))
    if as_json:
        print_json(statement)
    else:
        _show_ledger(statement)
    return 0


@click.command(context_settings=SETTINGS)
@_place
@_site
@as_json
def selftest(place: Path | None, path: Path | None, as_json: bool) -> int:
    """Test on this machine that what privacy rests on works: gradients, clipping, noise, the ledger.

    \b
    Example:
      consilium site selftest radiology/site.toml

    Needs no data of the hospital, and no site.toml either: without one, it takes the device that it finds.
    Exit code: 0 all pass, 1 a check fails, 2 wrong configuration.
    """  # noqa: D301
    from client import selftest as tests

    named = path or place
    device = _config(path, place).toml.compute.device if named or _DEFAULT.exists() else "auto"
    checks = tests.run(device)
    passed = all(check.passed for check in checks)
    if as_json:
        found = [{"name": check.name, "passed": bool(check.passed), "said": check.said} for check in checks]
        print_json({"passed": passed, "checks": found})
    else:
        for check in checks:
            click.echo(f"{'pass' if check.passed else 'FAIL'}  {shown(check.name)}: {shown(check.said)}")
    return 0 if passed else 1


@click.group(cls=_Trail, context_settings=SETTINGS, invoke_without_command=True)
@_site
@as_json
@click.pass_context
def audit(ctx: click.Context, path: Path | None, as_json: bool) -> int:
    """Look at the trail of what was done with the site's data; without a command, at its last events.

    \b
    Example:
      consilium site audit --site radiology/site.toml
      consilium site audit verify --site radiology/site.toml
      consilium site audit export --site radiology/site.toml --output trail

    Exit code: 0 the trail holds, 1 it does not, 2 wrong use.
    """  # noqa: D301
    ctx.obj = path
    if ctx.invoked_subcommand is None:
        return _show_trail(_config(path, None), as_json)
    return 0


@audit.command(context_settings=SETTINGS)
@_place
@_site
@as_json
@click.pass_obj
def verify(outer: Path | None, place: Path | None, path: Path | None, as_json: bool) -> int:
    """Check that no line of the audit trail was changed, moved or taken out.

    \b
    Example:
      consilium site audit verify --site radiology/site.toml

    Prints the hash of the last line: noted elsewhere, it shows later that the end was not cut off either.
    Exit code: 0 it holds, 1 it does not, 2 wrong use.
    """  # noqa: D301
    from client import audit as trail
    from client.chain import START, TORN

    entries = trail.read(_config(path or outer, place).audit)
    torn = sum(entry.event == TORN for entry in entries)
    last = entries[-1].sha256 if entries else START
    if as_json:
        print_json({"entries": len(entries), "torn_lines": torn, "sha256": last})
    else:
        click.echo(f"holds: {len(entries)} entries, of which {torn} record a line torn by a crash; last {last}")
    return 0


@audit.command(context_settings=SETTINGS)
@_place
@_site
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, metavar="DIR_OR_FILE", help="Where the export goes."
)
@click.option("--format", "wanted", type=click.Choice(["csv", "html", "both"]), help="[both, or as the file says]")
@as_json
@click.pass_obj
def export(
    outer: Path | None, place: Path | None, path: Path | None, output: Path, wanted: Format | None, as_json: bool
) -> int:
    """Write the audit trail for a data protection officer: a table (CSV), and a page (HTML) that opens offline.

    \b
    Example:
      consilium site audit export --site radiology/site.toml --output trail
      consilium site audit export --site radiology/site.toml --output trail.csv

    What was asked, what was decided, what left and how large it was, privacy spent, and whether the chain holds.
    Exit code: 0 done, 1 the trail does not hold: what does is written, and says so; 2 wrong use.
    """  # noqa: D301
    from client import oversight

    config = _config(path or outer, place)
    done = oversight.export(config, output, wanted)
    if as_json:
        print_json(
            {
                "files": [str(file) for file in done.files],
                "entries": len(done.trail.entries),
                "holds": not done.trail.wrong,
                "wrong": done.trail.wrong or None,
                "sha256": done.trail.last,
            }
        )
    else:
        for file in done.files:
            click.echo(f"{shown(str(file))}: {len(done.trail.entries)} events")
    return _ended(done.trail.wrong)


COMMANDS: tuple[click.Command, ...] = (approve, audit, ledger, outbox, selftest)
"""What the group `site` gets from here."""


def _show_trail(config: SiteConfig, as_json: bool) -> int:
    from client import oversight

    found = oversight.trail(config.audit)
    latest = [oversight.event(number, entry) for number, entry in list(enumerate(found.entries, 1))[-_LATEST:]]
    if as_json:
        counts = {"entries": len(found.entries), "holds": not found.wrong, "wrong": found.wrong or None}
        print_json({**counts, "sha256": found.last, "latest": latest})
        return _ended(found.wrong)
    rows = [(str(one["number"]), one["time"], one["event"], one["meaning"], one["in_words"]) for one in latest]
    _rows("The last events", ("no.", "time (UTC)", "event", "meaning", "facts"), rows)
    click.echo(f"{len(found.entries)} events; last {found.last}")
    return _ended(found.wrong)


def _ended(wrong: str) -> int:
    """Return the exit code of what looked at a trail, and say what is wrong with it."""
    if wrong:
        click.echo(f"consilium: {shown(wrong)}", err=True)
    return 1 if wrong else 0


def _list_waiting(config: SiteConfig, as_json: bool) -> None:
    from client import approval, oversight

    found = approval.pending(config)
    if as_json:
        said = [
            {name: value for name, value in vars(one).items() if name != "asked"} for one in approval.decisions(config)
        ]
        print_json({"waiting": list(found), "decided": said})
        return
    if not found:
        click.echo("No run waits for approval.")
    for asked in found:
        for name, value in oversight.asked_in_words(asked):
            click.echo(f"{name:<20} {shown(value)}")
        command = f"consilium site approve {asked['fingerprint'][:12]}"
        click.echo(f"{'to let it':<20} {command} --site {shown(str(config.path))}")
        click.echo(f"{'to refuse it':<20} {command} --reject --site {shown(str(config.path))}\n")


def _show_letters(letters: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"replies": list(letters)})
        return
    if not letters:
        click.echo("Nothing is in the outbox.")
        return
    rows = [
        (one["time"], one["kind"], one["run"][:12], _count(one["bytes"]), one["sha256"], _standing(one))
        for one in letters
    ]
    _rows("In the outbox", ("made (UTC)", "in answer to", "run", "bytes", "SHA-256", ""), rows, "lllrll")


def _standing(letter: Mapping[str, Any]) -> str:
    return "sent" if letter["sent"] else "released" if letter["released"] else "here"


def _show_released(released: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(released)
    else:
        click.echo(
            f"released: the answer to {released['kind']}, {released['bytes']} bytes, SHA-256 {released['sha256']}"
        )


def _show_upcoming(letter: Mapping[str, Any] | None, as_json: bool) -> None:
    if as_json:
        print_json({"next": letter})
        return
    if letter is None:
        click.echo("Nothing is about to leave.")
        return
    click.echo(f"The answer to {shown(letter['kind'])} of run {letter['run'][:12] or 'none'}, made {letter['time']}:")
    click.echo(f"  {_count(letter['bytes'])} bytes, SHA-256 {letter['sha256']}")
    if not letter["readable"]:
        click.echo(f"  {shown(letter['reason'])}")
        return
    rows = [_tensor(one) for array in letter["arrays"] for one in (array, *array.get("parts", ()))]
    _rows("Arrays", ("name", "type", "shape", "L2 norm", "bytes", "SHA-256"), rows, "lllrrl")
    facts = [(one["name"], str(one["value"])) for one in letter["facts"]]
    _rows("Facts", ("name", "value"), facts)


def _tensor(one: Mapping[str, Any]) -> tuple[str, ...]:
    name = one["name"] if "dtype" in one else f"  of it {one['name']}"
    norm = "none" if one["norm"] is None else f"{one['norm']:.6g}"
    shape = " x ".join(map(str, one["shape"])) or "one value"
    return name, one.get("dtype", ""), shape, norm, _count(one["bytes"]), one["sha256"][:16]


def _show_ledger(statement: Mapping[str, Any]) -> None:
    if not statement["runs"]:
        click.echo("No run with differential privacy has drawn on these patients.")
    numbers = ("rounds", "lost", "steps", "epsilon", "epsilon_prv", "delta")
    rows = [
        (one["run"][:12], one["last"], *(_figure(one[name]) for name in numbers), _planned(one["planned"]))
        for one in statement["runs"]
    ]
    columns = ("run", "last", "rounds", "lost", "steps", "epsilon", "PRV", "delta", "planned")
    _rows("Privacy spent, run by run", columns, rows, "llrrrrrrl")
    total, budget = statement["total"], statement["budget"]
    if statement["runs"]:
        click.echo(f"All runs together: epsilon {_figure(total['epsilon'])} at delta {_figure(total['delta'])}.")
    if budget["max_epsilon"] is None:
        click.echo("This hospital sets no limit: [policy] max_epsilon would be one.")
    else:
        left = _figure(statement["left"])
        click.echo(f"This hospital allows epsilon {_figure(budget['max_epsilon'])}; left {left}.")
    for split, cost in statement["evaluation"].items():
        click.echo(f"Noisy looks at {split} patients, who are others: epsilon {_figure(cost)}.")
    number, head = statement["entries"], statement["sha256"]
    click.echo(f"Entry {number}, the last: {head} - noted elsewhere, it shows later that none was taken away.")
    click.echo("The smaller epsilon, the less anybody can learn of one patient from all that left.")


def _planned(plan: Mapping[str, Any] | None) -> str:
    """Return what a run takes at most, and with which noise."""
    if plan is None:
        return "not said"
    noise = ", ".join(f"{one['noise_multiplier']:.3g} x {one['steps']}" for one in plan["releases"])
    return f"{_figure(plan['epsilon'])} (noise {noise})"


def _figure(value: Any) -> str:
    if value is None:
        return "not known"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(number: int) -> str:
    from client.report.wording import THIN, grouped

    return grouped(number).replace(THIN, " ")


def _rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], sides: str = "") -> None:
    """Print a table; every text of it is shown as it is: no markup, no control characters."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, side in zip(columns, sides or "l" * len(columns), strict=True):
        table.add_column(name, justify="right" if side == "r" else "left", overflow="fold", no_wrap=side == "r")
    for row in rows:
        table.add_row(*(Text(shown(text)) for text in row))
    console().print(table)


def _config(path: Path | None, place: Path | None) -> SiteConfig:
    from client.site_config import read_any_site
    from common.errors import UsageError

    if path is not None and place is not None and path != place:
        raise UsageError(f"got {place} and --site {path}: name one site")
    return read_any_site(path or place or _DEFAULT)


def _user() -> str:
    """Return who decides: the user of this machine, and of `sudo` the one who called it."""
    try:
        who = getpass.getuser()
    except (OSError, KeyError):
        who = str(os.getuid())
    behind = os.environ.get("SUDO_USER")
    return f"{behind} as {who}" if behind and behind != who else who
