"""Where a run is, for whoever looks on: one small file, replaced as things change."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from common.files import write_atomic

NAME = "progress.json"
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "status": str,
    "pid": int,
    "process": str,
    "phase": str,
    "done": int,
    "total": int,
    "round": int,
    "rounds": int,
    "sites": dict,
    "since": (int, float),
    "updated": (int, float),
}
LEAST_S = 0.25
"""Seconds between two writes of what changes often."""


class Board:
    """Keeps `progress.json` of a run.

    Args:
        folder: of the run.
        sites: their names.
        rounds: how many there will be.
    """

    def __init__(self, folder: Path, sites: tuple[str, ...], rounds: int) -> None:
        self._path = folder / NAME
        now = time.time()
        self._facts: dict[str, Any] = {
            "status": "running",
            "pid": os.getpid(),
            "process": process_start(os.getpid()),
            "since": now,
            "phase": "starting",
            "done": 0,
            "total": 0,
            "round": 0,
            "rounds": rounds,
            "sites": {site: {"at": "", "done": 0, "total": 0, "since": now} for site in sites},
        }
        self._written = 0.0
        self._write()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show a phase of the run: what `server.coordinator` tells."""
        changed = phase != self._facts["phase"]
        self._facts.update(phase=phase, done=done, total=total)
        if phase == "rounds":
            self._facts["round"] = min(done + 1, total)
        self._write_if_due(urgent=changed or phase == "rounds")

    def site(self, name: str, at: str, done: int, total: int) -> None:
        """Show a site: what `server.federation` tells."""
        held = self._facts["sites"].get(name)
        if held is None:
            return
        changed = held["at"] != at
        held.update(at=at, done=done, total=total, since=time.time() if changed else held["since"])
        self._write_if_due(urgent=False)

    def end(self, status: str, error: str = "", sites: Mapping[str, str] | None = None) -> None:
        """Show how the run ended, and what each site was seen to do in it."""
        for name, ended in (sites or {}).items():
            self._facts["sites"][name]["ended"] = ended
        self._facts.update(status=status, error=error, phase="ended")
        self._write()

    def _write_if_due(self, *, urgent: bool) -> None:
        if urgent or time.monotonic() >= self._written + LEAST_S:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self._facts["updated"] = time.time()
        write_atomic(self._path, json.dumps(self._facts).encode())


def read(folder: Path) -> Mapping[str, Any] | None:
    """Return what a run's board says, None where there is none that can be read.

    Its `status` is `interrupted` where the engine is gone without a word.
    """
    try:
        facts = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    if not _whole(facts):
        return None
    if facts["status"] == "running" and process_start(facts["pid"]) != facts["process"]:
        facts["status"] = "interrupted"
    return facts


def _whole(facts: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether this is what a board writes: a file that somebody edited must not end who looks on."""
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in _KINDS.items()):
        return False
    return all(isinstance(site, dict) for site in facts["sites"].values())


def process_start(pid: int) -> str:
    """Return when a process started, in ticks since the boot, or an empty text: numbers of processes come again."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
