"""How the coordinator is: who is connected, where the run is, and what somebody has to see to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from common.errors import ConsiliumError
from server import runs, tls
from server.control import Control, NodeFacts
from server.enrolment import enrolled
from server.refusals import explain
from server.server_config import ServerConfig

SCHEMA = 1
Found = TypeVar("Found")


def status(config: ServerConfig) -> dict[str, Any]:
    """Return what is known, as one JSON document; what cannot be read is among its warnings.

    schema, name, address   of the document, of the coordinator
    up                      whether its SuperLink answers
    certificate             expires, days_left; null where it cannot be read
    sites                   by name: connected, state, since, at (what it does in the run that is going on, or null),
                            trouble (what was wrong with it in the latest run, and what to do; or empty)
    run                     the run that is going on, else the latest: folder, fingerprint, status, pid, phase, done,
                            total, round, rounds, since, updated, error; null where there is none
    runs                    folder and status of all, the oldest first
    warnings                what somebody has to see to
    """
    warnings: list[str] = []
    nodes = _nodes(config, warnings)
    known = _readable(lambda: tuple(runs.runs(config)), warnings)
    sites = _readable(lambda: enrolled(config), warnings)
    run = next((run for run in reversed(known) if run.status == "running"), known[-1] if known else None)
    if run is not None and run.status == "interrupted":
        warnings.append(f"{run.folder}: its engine is gone; go on with `consilium server resume`")
    return {
        "schema": SCHEMA,
        "name": config.name,
        "address": str(config.address),
        "up": nodes is not None,
        "certificate": _certificate(config, warnings),
        "sites": {site.name: _site(site.name, nodes or {}, run) for site in sites},
        "run": None if run is None else _run(run),
        "runs": [{"folder": str(one.folder), "status": one.status} for one in known],
        "warnings": warnings,
    }


def _readable(read: Callable[[], tuple[Found, ...]], warnings: list[str]) -> tuple[Found, ...]:
    """Return what can be read; a file that is damaged must not hide everything else."""
    try:
        return read()
    except ConsiliumError as error:
        warnings.append(str(error))
        return ()


def _nodes(config: ServerConfig, warnings: list[str]) -> dict[str, NodeFacts] | None:
    try:
        with Control(config.endpoints) as control:
            if control.is_up():
                return {node.name: node for node in control.nodes()}
    except ConsiliumError as error:
        warnings.append(str(error))
        return None
    warnings.append(f"the coordinator is not up; start it with `consilium server up --server {config.path}`")
    return None


def _certificate(config: ServerConfig, warnings: list[str]) -> dict[str, Any] | None:
    try:
        found = tls.status(config)
    except ConsiliumError as error:
        warnings.append(str(error))
        return None
    if found.warning:
        warnings.append(found.warning)
    return {"expires": found.expires.strftime("%Y-%m-%dT%H:%M:%SZ"), "days_left": found.days_left}


def _site(name: str, nodes: Mapping[str, NodeFacts], run: runs.RunFacts | None) -> dict[str, Any]:
    node = nodes.get(name)
    online = node is not None and node.status == "online" and node.online_until > time.time()
    state = "never seen" if node is None or not node.last_activated_at else "not connected"
    held = dict(run.facts.get("sites", {})).get(name) if run else None
    at_work = run is not None and run.status == "running" and held is not None
    return {
        "connected": online,
        "state": "connected" if online else state,
        "since": node.last_activated_at if node is not None else "",
        "at": held if at_work else None,
        "trouble": "" if at_work or not held else explain(str(held.get("ended", ""))),
    }


_NOWHERE = {
    "pid": None,
    "phase": "",
    "done": 0,
    "total": 0,
    "round": 0,
    "rounds": 0,
    "since": None,
    "updated": None,
    "error": "",
}
"""Of a run whose engine was never seen."""


def _run(run: runs.RunFacts) -> dict[str, Any]:
    shown = {key: run.facts.get(key, value) for key, value in _NOWHERE.items()}
    return {"folder": str(run.folder), "fingerprint": run.fingerprint, "status": run.status, **shown}


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a status for people."""
    console = console or Console()
    say = _sayer(console)
    certificate = found["certificate"]
    days = f"; certificate good for {certificate['days_left']} days" if certificate else ""
    say(f"coordinator {found['name']} at {found['address']}: {'up' if found['up'] else 'not up'}{days}")
    run = found["run"]
    if run is None:
        say("no run yet")
    else:
        where = f", round {run['round']} of {run['rounds']} ({run['phase']})" if run["status"] == "running" else ""
        say(f"run {run['folder']}: {run['status'].replace('_', ' ')}{where}")
        if run.get("error"):
            say(f"  {run['error']}")
    if found["sites"]:
        console.print(_table(found["sites"]))
    else:
        say("no site is enrolled; invite one with `consilium server invite NAME`")
    for name, site in found["sites"].items():
        if site["trouble"]:
            say(f"{name} {site['trouble']}")
    for warning in found["warnings"]:
        say(f"warning: {warning}")


def _table(sites: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("site", "", "since", "at"):
        table.add_column(column)
    for name, site in sites.items():
        at = site["at"] or {}
        share = f" {at['done']}/{at['total']}" if at.get("total") else ""
        since = f"{site['since'][:19].replace('T', ' ')} UTC" if site["since"] else ""
        table.add_row(name, site["state"], since, f"{at.get('at', '')}{share}")
    return table


def _sayer(console: Console) -> Any:
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
