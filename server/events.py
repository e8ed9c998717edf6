"""`events.jsonl` of a run: what happened, one line of JSON an event, for a dashboard that follows it with `tail -F`.

    {"schema": 1, "time": "2026-01-02T03:04:05.678Z", "event": "site_lost", "round": 3, "site": "a", "code": "absent"}

Every line has these first four keys; `site` and what else an event has are in `EVENTS`. A line is written in one piece.
What a crash leaves of the last one is cut off when the next engine begins, so that no half line is ever inside. The
file is bounded: at its limit it becomes `.1`. Nothing in it is a site's own text, or an exception's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.rotated import KEPT, LIMIT, Rotated

NAME = "events.jsonl"
SCHEMA = 1

EVENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "run_started": ("the run's first engine is at work", ("sites", "rounds", "quorum")),
    "run_resumed": ("another engine goes on with it", ("sites", "rounds", "quorum", "starts")),
    "phase": ("a part of the run began", ("phase",)),
    "site_connected": ("a site is there, for the first time or again", ("site",)),
    "site_away": ("a site is not connected; it is waited for", ("site",)),
    "site_registered": ("a site told what it brings, and is in the run", ("site",)),
    "site_contributed": ("what a site sent is used; in a private run with the epsilon it has spent", ("site",)),
    "site_lost": ("a site's answer did not come, or not whole", ("site", "code")),
    "site_refused": ("a site declined", ("site", "code")),
    "site_quarantined": ("what a site sent is not believed, and not used", ("site", "code")),
    "round_started": ("the weights of a round are on their way to the sites", ()),
    "round_ended": ("a round's updates are aggregated", ("seconds", "contributed", "bytes_down", "bytes_up")),
    "round_judged": (
        "the exchange after it judged a round's weights on the validation split",
        ("figures", "best_round", "best_score"),
    ),
    "checkpoint": ("the state after a round is on disk: the run can go on from here", ()),
    "run_ended": ("the engine ends", ("status",)),
}
"""Everything that can happen: event -> meaning, and which keys it has besides the four."""

_BLOCK = 1 << 16


class Events:
    """The events of one run; what cannot be written is lost, for a full disk must end no run.

    Args:
        folder: the run's.
        limit: bytes of one file.
        kept: how many files are kept aside.
    """

    def __init__(self, folder: Path, limit: int = LIMIT, kept: int = KEPT) -> None:
        path = folder / NAME
        with suppress(OSError):
            mend(path)
        self._file = Rotated(path, limit, kept, mode=0o644)

    def add(self, event: str, server_round: int, **facts: Any) -> None:
        """Add an event.

        Raises:
            KeyError: it is none of `EVENTS`.
        """
        _, keys = EVENTS[event]
        if missing := set(keys) - set(facts):
            raise KeyError(f"{event}: lacks {', '.join(sorted(missing))}")
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"schema": SCHEMA, "time": time, "event": event, "round": server_round, **facts}
        self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")


def mend(path: Path) -> None:
    """Cut off what follows a file's last end of line; nothing happens where there is no file.

    Raises:
        OSError: the file cannot be read or written.
    """
    with suppress(FileNotFoundError), path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
