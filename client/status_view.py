"""How a site's status looks on a terminal: what can be said of it, then what it is at, in figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from common.live import size, span

MOVING = frozenset({"written", "last_contact", "heard", "memory", "bytes_in", "bytes_out", "turned_away"})
"""Keys of a status that change all the time."""


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a status document."""
    for finding in found["findings"]:
        yield f"{finding['about']:<12} {finding['level']:<8} {finding['sentence']}"
        if finding["remedy"]:
            yield f"{'':<21} {finding['remedy']}"
    for about, said in _facts(found):
        yield f"{about:<21} {said}"


def view(found: Mapping[str, Any]) -> RenderableType:
    """Return a status document as one thing to draw."""
    return Group(*map(Text, (f"site {found['site']}", *lines(found))))


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    daemon, link, privacy = found["daemon"], found["link"], found["privacy"]
    run = daemon.get("run")
    if run:
        rounds = f" of {run['rounds']}" if run.get("rounds") else ""
        yield (
            "run",
            f"{run.get('name') or 'no name'}, round {run.get('round')}{rounds}, heard of {_ago(run.get('heard'))}",
        )
    if daemon.get("phase"):
        share = f" {daemon['done']} of {daemon['total']}" if daemon.get("total") else ""
        yield "at work", f"{daemon['phase']}{share}, begun {_ago(daemon.get('since'))}"
    last = daemon.get("last")
    if last:
        yield "last work", f"{last.get('phase') or 'no long phase'}, {span(float(last['seconds']))}"
    if link:
        moved = f"{size(link['bytes_in'])} in, {size(link['bytes_out'])} out, {link['messages']} messages answered"
        yield "link", f"{link['code']} since {_ago(link['since'], '')}; since its start {moved}"
        if link["certificate_ends"]:
            yield (
                "certificate",
                time.strftime("the coordinator's, until %Y-%m-%d", time.gmtime(link["certificate_ends"])),
            )
    if privacy["unknown"]:
        yield "privacy", f"not known: {privacy['unknown']}"
    elif privacy["epsilon"] is not None:
        left = "no budget" if privacy["left"] is None else f"{privacy['left']:.3f} left of {privacy['max_epsilon']:g}"
        yield "privacy", f"epsilon {privacy['epsilon']:.3f} spent at delta {privacy['delta']:g}, {left}"


def _ago(since: Any, word: str = " ago") -> str:
    return f"{span(max(0.0, time.time() - since))}{word}" if isinstance(since, int | float) else "never"
