"""How the coordinator is: who is connected, where the run is, and what somebody has to see to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

from common.errors import ConsiliumError
from server import board, runs, tls
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
    sites                   by name: connected, state, since, last_seen (seconds since 1970, or null), and of the run
                            that is going on, else the latest: at (what it does: at, done, total, since; or null), code
                            and trouble (what was wrong with it last, and what to do; or empty), bytes_down and bytes_up
                            in all, round_bytes_down and round_bytes_up in this round, seconds of its last round,
                            epsilon and epsilon_left of a private run as the site tells it
    run                     the run that is going on, else the latest: folder, fingerprint, status, pid, phase, done,
                            total, round, rounds, since (of this engine), begun (of the first), phase_since,
                            round_since, round_seconds (mean of the last ones), eta_s (until the last round ends),
                            starts (engines that it has had), best (round, and the score that rounds compete by),
                            quorum (needed, usable, sites), updated, error; null where there is none
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
    held = dict(run.facts.get("sites", {})).get(name, {}) if run else {}
    at_work = run is not None and run.status == "running" and bool(held)
    last = _last(held, ended=not at_work)
    return {
        "connected": online,
        "state": "connected" if online else state,
        "since": node.last_activated_at if node is not None else "",
        "last_seen": _last_seen(node, board.figure(held, "seen")),
        "at": {key: held.get(key) for key in ("at", "done", "total", "since")} if at_work else None,
        "code": last.rstrip(")").partition("(")[2],
        "trouble": explain(last),
        **{key: board.count(held, key) for key in _COUNTS},
        **{key: board.figure(held, key) for key in ("seconds", "epsilon", "epsilon_left")},
    }


_COUNTS = ("bytes_down", "bytes_up", "round_bytes_down", "round_bytes_up")


def _last(held: Mapping[str, Any], *, ended: bool) -> str:
    """Return what a site was seen to do last, as `server.refusals` has it."""
    if ended:
        return str(held.get("ended", ""))
    status, code = held.get("status"), held.get("code")
    return f"{status}({code})" if code else str(status or "")


def _last_seen(node: NodeFacts | None, seen: float | None) -> float | None:
    """Return when a site was heard of last: by the SuperLink, which trusts a link for seconds, or by the engine."""
    heard = [] if node is None or not node.online_until else [min(time.time(), node.online_until)]
    return max([*heard, *([] if seen is None else [seen])], default=None)


_NOWHERE = {
    "pid": None,
    "phase": "",
    "done": 0,
    "total": 0,
    "round": 0,
    "rounds": 0,
    "since": None,
    "begun": None,
    "phase_since": None,
    "round_since": None,
    "updated": None,
    "error": "",
}
"""Of a run whose engine was never seen."""


def _run(run: runs.RunFacts) -> dict[str, Any]:
    shown = {key: run.facts.get(key, value) for key, value in _NOWHERE.items()}
    seconds = board.figures(run.facts, "round_seconds")
    return {
        "folder": str(run.folder),
        "fingerprint": run.fingerprint,
        "status": run.status,
        **shown,
        "starts": board.count(run.facts, "starts"),
        "round_seconds": fmean(seconds) if seconds else None,
        "eta_s": _eta(run, seconds),
        "best": board.best(run.facts),
        "quorum": _quorum(run),
    }


def _eta(run: runs.RunFacts, seconds: Sequence[float]) -> float | None:
    """Return in how many seconds the last round ends, if all that are left take as long as the latest ones."""
    since = board.figure(run.facts, "round_since")
    if run.status != "running" or not seconds or since is None:
        return None
    left = board.count(run.facts, "rounds") - board.count(run.facts, "round") + 1
    return max(0.0, left * fmean(seconds) - (time.time() - since))


def _quorum(run: runs.RunFacts) -> dict[str, int] | None:
    """Return how many sites the run needs, and how many nothing was wrong with when last heard of."""
    needed = board.count(run.facts, "quorum")
    if not needed:
        return None
    sites = run.facts["sites"].values()
    usable = sum(not _last(held, ended=run.status != "running").endswith(")") for held in sites)
    return {"needed": needed, "usable": usable, "sites": len(sites)}
