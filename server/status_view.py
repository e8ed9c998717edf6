"""How the coordinator's status looks on a terminal: once, or again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.live import size, span

MOVING = frozenset({"updated", "last_seen", "eta_s", "seen"})
"""Keys of a status that change all the time."""


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a status."""
    console = console or Console()
    for part in _parts(found):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


def view(found: Mapping[str, Any]) -> RenderableType:
    """Return a status as one thing to draw."""
    return Group(*(Text(part) if isinstance(part, str) else part for part in _parts(found)))


def _parts(found: Mapping[str, Any]) -> Iterator[str | Table]:
    certificate = found["certificate"]
    days = f"; certificate good for {certificate['days_left']} days" if certificate else ""
    yield f"coordinator {found['name']} at {found['address']}: {'up' if found['up'] else 'not up'}{days}"
    yield from _run(found["run"]) if found["run"] else ("no run yet",)
    if found["sites"]:
        yield _table(found["sites"])
    else:
        yield "no site is enrolled; invite one with `consilium server invite NAME`"
    for name, site in found["sites"].items():
        if site["trouble"]:
            yield f"{name} {site['trouble']}"
    for warning in found["warnings"]:
        yield f"warning: {warning}"


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    where = f", round {run['round']} of {run['rounds']} ({run['phase']})" if run["status"] == "running" else ""
    yield f"run {run['folder']}: {run['status'].replace('_', ' ')}{where}"
    if run["error"]:
        yield f"  {run['error']}"
    facts = [*(_pace(run) if run["status"] == "running" else ()), *_reached(run)]
    if facts:
        yield f"  {'; '.join(facts)}"


def _pace(run: Mapping[str, Any]) -> Iterator[str]:
    now = time.time()
    if run["phase_since"]:
        yield f"{run['phase']} since {span(now - run['phase_since'])}"
    if run["round_since"]:
        yield f"this round since {span(now - run['round_since'])}"
    if run["round_seconds"] is not None:
        yield f"{span(run['round_seconds'])} a round"
    if run["eta_s"] is not None:
        yield f"rounds end in about {span(run['eta_s'])}"
    quorum = run["quorum"]
    if quorum:
        yield f"{quorum['usable']} of {quorum['sites']} sites usable, quorum {quorum['needed']}"


def _reached(run: Mapping[str, Any]) -> Iterator[str]:
    best = run["best"]
    if best:
        yield f"best round {best['round']}" + (f" ({best['score']:.4f})" if best["score"] is not None else "")
    if run["starts"] > 1:
        yield f"engine {run['starts']} of this run"


_COLUMNS: Mapping[str, Any] = {
    "round down/up": lambda site: f"{size(site['round_bytes_down'])} / {size(site['round_bytes_up'])}",
    "all down/up": lambda site: f"{size(site['bytes_down'])} / {size(site['bytes_up'])}",
    "last round": lambda site: "" if site["seconds"] is None else span(site["seconds"]),
    "epsilon spent/left": lambda site: (
        "" if site["epsilon"] is None else f"{site['epsilon']:.3f} / {site['epsilon_left']:.3f}"
    ),
    "seen": lambda site: "" if not site["last_seen"] else f"{span(max(0.0, time.time() - site['last_seen']))} ago",
}
"""What a table has besides, once there was traffic."""


def _table(sites: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    moved = any(site["bytes_down"] for site in sites.values())
    private = any(site["epsilon"] is not None for site in sites.values())
    more = {name: cell for name, cell in _COLUMNS.items() if moved and (private or "epsilon" not in name)}
    for column in ("site", "", "since", "at", *more):
        table.add_column(column, no_wrap=column in ("site", "since"))
    for name, site in sites.items():
        at = site["at"] or {}
        share = f" {at['done']}/{at['total']}" if at.get("total") else ""
        lasting = f" ({span(max(0.0, time.time() - at['since']))})" if at.get("at") else ""
        since = f"{site['since'][:19].replace('T', ' ')} UTC" if site["since"] else ""
        cells = (cell(site) for cell in more.values())
        table.add_row(name, site["state"], since, f"{at.get('at', '')}{share}{lasting}", *cells)
    return table
