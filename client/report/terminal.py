"""The findings as tables on a terminal. Every text is shown as it is: no markup, no control characters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.findings import Findings
from client.report import tables
from client.report.tables import Left
from client.report.wording import THIN, grouped, plural, visible

MOST = 40
"""Rows of a table on the terminal; the page has them all."""


def show(found: Findings, page: str, console: Console, *, files: bool = False) -> None:
    """Print the findings.

    Args:
        found: what to print.
        page: where the HTML page lies.
        console: where to print.
        files: list the files that are not accepted, by name.
    """
    _cohort(console, found)
    _left(console, "In quarantine", tables.quarantine(found))
    _left(console, "Passed over", tables.ignored(found))
    if files:
        _rows(console, "Files not in use", ("file", "status", "code"), tables.files(found), most=None)
    _images(console, found)
    _rows(console, "Labels and files", ("", ""), tables.matching(found))
    told = tables.confounding(found)
    if told:
        columns = ("label", "told by", "strength", "images")
        _rows(console, "A label that something else tells", columns, told, "llrr")
    _warnings(console, found)
    for name, value in tables.identity(found):
        _line(console, f"{name}: {value}")
    _line(console, f"report, for the eyes of this site only: {page}")


def pairs(title: str, values: Mapping[str, str], console: Console) -> None:
    """Print names and values."""
    _rows(console, title, ("", ""), list(values.items()), "lr")


def _cohort(console: Console, found: Findings) -> None:
    counts, total = tables.totals(found)
    title = f"{found.site}: {plural(total, 'image')} of {plural(found.patients, 'patient')}"
    rows = [(name, *map(grouped, by_split), grouped(n)) for name, by_split, n in tables.labels(found)]
    shown, more = rows[:MOST], rows[MOST:]
    names = tables.splits(found)
    table = _table(title, ("label", *names, "all"), "l" + "r" * (len(names) + 1))
    for row in shown:
        table.add_row(*map(_text, row))
    if more:
        table.add_row(_text(f"and {plural(len(more), 'more label')}"))
    table.add_section()
    table.add_row(*map(_text, ("images", *map(grouped, counts), grouped(total))))
    console.print(table)


def _left(console: Console, title: str, rows: Sequence[Left]) -> None:
    if rows:
        texts = [(row.code, grouped(row.n), row.meaning, row.remedy) for row in rows]
        total = sum(row.n for row in rows)
        _rows(console, f"{title}: {plural(total, 'file')}", ("code", "files", "meaning", "what to do"), texts, "lrll")


def _images(console: Console, found: Findings) -> None:
    rows = [(title if not k else "", *row) for title, group in tables.kinds(found) for k, row in enumerate(group)]
    if rows:
        _rows(console, "What the images are", ("", "", "images"), rows, "llr")
    _rows(console, "How they are stored", ("transfer syntax", "images", "decoded"), tables.syntaxes(found), "lrr")
    _rows(console, "In figures", ("", ""), tables.facts(found))


def _warnings(console: Console, found: Findings) -> None:
    for code, message in tables.warnings(found):
        _line(console, f"warning: {code}: {message}")


def _rows(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Iterable[str]],
    sides: str = "",
    most: int | None = MOST,
) -> None:
    if not rows:
        return
    table = _table(title, columns, sides or "l" * len(columns))
    for row in rows[:most]:
        table.add_row(*map(_text, row))
    if most is not None and len(rows) > most:
        table.add_row(_text(f"and {grouped(len(rows) - most)} more"))
    console.print(table)


def _table(title: str, columns: Sequence[str], sides: str) -> Table:
    table = Table(
        title=_text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(columns),
        padding=(0, 1, 0, 0),
    )
    for name, side in zip(columns, sides, strict=True):
        table.add_column(_text(name), justify="right" if side == "r" else "left", overflow="fold", no_wrap=side == "r")
    return table


def _text(text: str) -> Text:
    return Text(_plain(text))


def _plain(text: str) -> str:
    return visible(text).replace(THIN, " ")  # not every terminal has the narrow blank


def _line(console: Console, text: str) -> None:
    console.print(_plain(text), soft_wrap=True, markup=False, highlight=False, emoji=False)
