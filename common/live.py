"""A status that is looked on at: on a terminal drawn anew in its place, as JSON a document a line for each change."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

PAUSE_S = 1.0
"""Seconds between two looks."""

SHARE = 4.0
"""The same, in shares of what a look takes: whoever looks on must not keep busy who works."""

Document = Mapping[str, Any]


def follow(
    read: Callable[[], Document],
    view: Callable[[Document], RenderableType],
    console: Console,
    *,
    as_json: bool,
    moving: Collection[str] = (),
    pause_s: float | None = None,
) -> Document:
    """Show a document until Ctrl-C, and return the last one.

    Args:
        read: returns it as it is now.
        view: draws it.
        console: where to, if not as JSON on standard output.
        as_json: one line of JSON for each change, the first at once.
        moving: keys, at any depth, that change all the time: alone they are no change.
        pause_s: seconds between two looks; by default `PAUSE_S`.
    """
    pause_s, found = PAUSE_S if pause_s is None else pause_s, read()
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        live = None
        if console.is_terminal and not as_json:
            live = stack.enter_context(Live(console=console, auto_refresh=False, vertical_overflow="visible"))
        told = None
        while True:
            at_rest = _without(found, moving)
            if live is not None:
                live.update(view(found), refresh=True)
            elif at_rest != told:
                _print(found, view, console, as_json)
            told = at_rest
            begin = time.monotonic()
            found = read()
            time.sleep(max(pause_s, SHARE * (time.monotonic() - begin)))
    return found


def _print(found: Document, view: Callable[[Document], RenderableType], console: Console, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(found, allow_nan=False) + "\n")
        sys.stdout.flush()
    else:
        console.print(view(found))


def _without(value: Any, names: Collection[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(held, names) for name, held in value.items() if name not in names}
    return [_without(held, names) for held in value] if isinstance(value, list) else value


def span(seconds: float) -> str:
    """Return a time span for people.

    Examples:
        >>> [span(seconds) for seconds in (0.25, 12, 100, 7200, 200_000)]
        ['0.2 s', '12 s', '2 min', '2 h', '2 days']
    """
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds:.1f} s" if seconds < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def size(count: float) -> str:
    """Return a number of bytes for people.

    Examples:
        >>> [size(count) for count in (0, 999, 34_567, 1.2e9)]
        ['0 B', '999 B', '34.6 kB', '1.2 GB']
    """
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count:.0f} B"
