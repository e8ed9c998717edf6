"""How the coordinator is: who is connected, where the run is, and what somebody has to see to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import ConsiliumError
from server import runs, tls
from server.control import Control, NodeFacts
from server.enrolment import enrolled
from server.server_config import ServerConfig


def status(config: ServerConfig) -> dict[str, Any]:
    """Return what is known, as one JSON document."""
    warnings: list[str] = []
    nodes = _nodes(config, warnings)
    known = runs.runs(config)
    run = next((run for run in reversed(known) if run.status == "running"), known[-1] if known else None)
    at_work = dict(run.facts.get("sites", {})) if run and run.status == "running" else {}
    if run is not None and run.status == "interrupted":
        warnings.append(f"{run.folder}: its engine is gone; go on with `consilium server resume`")
    return {
        "name": config.name,
        "address": str(config.address),
        "up": nodes is not None,
        "certificate": _certificate(config, warnings),
        "sites": {site.name: _site(site.name, nodes or {}, at_work) for site in enrolled(config)},
        "run": None if run is None else _run(run),
        "runs": [{"folder": str(one.folder), "status": one.status} for one in known],
        "warnings": warnings,
    }


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


def _site(name: str, nodes: Mapping[str, NodeFacts], at_work: Mapping[str, Any]) -> dict[str, Any]:
    node = nodes.get(name)
    online = node is not None and node.status == "online" and node.online_until > time.time()
    state = "never seen" if node is None or not node.last_activated_at else "not connected"
    return {
        "connected": online,
        "state": "connected" if online else state,
        "since": node.last_activated_at if node is not None else "",
        "at": at_work.get(name),
    }


def _run(run: runs.RunFacts) -> dict[str, Any]:
    keys = ("pid", "phase", "done", "total", "round", "rounds", "since", "updated", "error")
    shown = {key: run.facts[key] for key in keys if key in run.facts}
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
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("site", "", "at", "since"):
        table.add_column(column)
    for name, site in found["sites"].items():
        at = site["at"] or {}
        share = f" {at['done']}/{at['total']}" if at.get("total") else ""
        table.add_row(name, site["state"], f"{at.get('at', '')}{share}", site["since"][:19])
    if found["sites"]:
        console.print(table)
    else:
        say("no site is enrolled; invite one with `consilium server invite NAME`")
    for warning in found["warnings"]:
        say(f"warning: {warning}")


def _sayer(console: Console) -> Any:
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
