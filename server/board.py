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
INTERRUPTED = "interrupted"
"""Status of a run whose engine is gone without a word, or left because what it rests on was away."""

AWAY = frozenset({"", "awaited", "not connected", "unreachable"})
"""What a site is at while nothing is heard of it."""

ANSWERED, ASKED = "answered", "asked"
"""What a site is at that has answered, as `server.federation` tells it, and in the next round until it is heard of."""

LEAST_S = 0.25
"""Seconds between two writes of what changes often."""

LATEST = 10
"""Rounds whose seconds are kept, to tell how long those that are left will take."""


class Board:
    """Keeps `progress.json` of a run.

    `starts` counts the engines that the run has had, `fruitless` those before this one that ended, one after the other,
    without a further round.

    Args:
        folder: of the run.
        sites: their names.
        rounds: how many there will be.
        quorum: usable answers that a round needs; None: all.
    """

    def __init__(self, folder: Path, sites: tuple[str, ...], rounds: int, quorum: int | None = None) -> None:
        self._path = folder / NAME
        now = time.time()
        before = read(folder) or {}
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
            "starts": count(before, "starts") + 1,
            "fruitless": count(before, "fruitless") + 1 if before.get("status") == INTERRUPTED else 0,
            "reached": count(before, "reached"),
            "quorum": quorum or len(sites),
            "begun": figure(before, "begun") or now,
            "phase_since": now,
            "round_since": None,
            "round_seconds": figures(before, "round_seconds"),
            "best": best(before),
            "sites": {site: _site(_held(before, site), now) for site in sites},
        }
        self._written = 0.0
        self._write()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show a phase of the run: what `server.coordinator` tells."""
        changed = phase != self._facts["phase"]
        self._facts.update(phase=phase, done=done, total=total)
        if changed:
            self._facts["phase_since"] = time.time()
        if phase == "rounds":
            self._at_round(done + 1, total)
            if done > self._facts["reached"]:
                self._facts.update(reached=done, fruitless=0)
        self._write_if_due(urgent=changed or phase == "rounds")

    def site(self, name: str, at: str, done: int, total: int) -> None:
        """Show a site: what `server.federation` tells."""
        held = self._facts["sites"].get(name)
        if held is None:
            return
        changed = held["at"] != at
        now = time.time()
        held.update(at=at, done=done, total=total, since=now if changed else held["since"])
        if at not in AWAY:
            held["seen"] = now
        self._write_if_due(urgent=False)

    def moved(self, name: str, down: int, up: int) -> None:
        """Count bytes that went to a site and came from it."""
        held = self._facts["sites"].get(name)
        if held is None:
            return
        for kind, passed in (("bytes_down", down), ("bytes_up", up)):
            held[kind] += passed
            held[f"round_{kind}"] += passed
        self._write_if_due(urgent=False)

    def judged(self, name: str, status: str, code: str, privacy: tuple[float, float] | None) -> None:
        """Show what a site was seen to do, and of a private run the epsilon that it spent and that it planned."""
        held = self._facts["sites"].get(name)
        if held is None:
            return
        held.update(status=status, code=code)
        if status == "contributed" and self._facts["round_since"]:
            held["seconds"] = time.time() - self._facts["round_since"]
        if privacy:
            spent, planned = privacy
            held.update(epsilon=spent, epsilon_left=max(0.0, planned - spent))
        self._write_if_due(urgent=bool(code))

    def ended_round(self, seconds: float) -> None:
        """Note what a round took."""
        self._facts["round_seconds"] = [*self._facts["round_seconds"], seconds][-LATEST:]

    def chosen(self, best_round: int, best_score: float | None) -> None:
        """Show the best round so far, and what rounds compete by."""
        self._facts["best"] = {"round": best_round, "score": best_score}

    def _at_round(self, number: int, total: int) -> None:
        if number > total:
            self._facts.update(round=total, round_since=None)
        elif self._facts["round_since"] is None or self._facts["round"] != number:
            now = time.time()
            self._facts.update(round=number, round_since=now)
            for held in self._facts["sites"].values():
                held.update(round_bytes_down=0, round_bytes_up=0)
                if held["at"] == ANSWERED:  # whoever is quick is never seen at anything else
                    held.update(at=ASKED, since=now)

    @property
    def starts(self) -> int:
        """How many engines the run has had, this one included."""
        return count(self._facts, "starts")

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
        facts["status"] = INTERRUPTED
    return facts


def count(facts: Mapping[str, Any], name: str) -> int:
    """Return one of a board's counts, 0 where it has none: an earlier version wrote it."""
    held = facts.get(name)
    return held if isinstance(held, int) else 0


def settle(folder: Path, status: str, error: str) -> None:
    """Say how a run ended that no engine drives any more.

    Raises:
        OSError: it cannot be written.
    """
    facts = dict(read(folder) or {})
    write_atomic(folder / NAME, json.dumps({**facts, "status": status, "error": error, "phase": "ended"}).encode())


def figure(facts: Mapping[str, Any], name: str) -> float | None:
    """Return one of a board's numbers, or None where it has none."""
    held = facts.get(name)
    return held if isinstance(held, int | float) else None


def figures(facts: Mapping[str, Any], name: str) -> list[float]:
    """Return a list of a board's numbers, an empty one where it has none."""
    held = facts.get(name)
    return [value for value in held if isinstance(value, int | float)] if isinstance(held, list) else []


def best(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return which round a board has as the best, and what it scored, or None where it has none."""
    held = facts.get("best")
    if not isinstance(held, dict) or not isinstance(held.get("round"), int):
        return None
    return {"round": held["round"], "score": figure(held, "score")}


def _held(before: Mapping[str, Any], site: str) -> Mapping[str, Any]:
    held: Mapping[str, Any] = before.get("sites", {}).get(site, {})
    return held


def _site(before: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return a site's facts as an engine begins: what earlier engines counted stands."""
    return {
        "at": "",
        "done": 0,
        "total": 0,
        "since": now,
        "seen": figure(before, "seen"),
        "status": "",
        "code": "",
        "bytes_down": count(before, "bytes_down"),
        "bytes_up": count(before, "bytes_up"),
        "round_bytes_down": 0,
        "round_bytes_up": 0,
        "seconds": figure(before, "seconds"),
        "epsilon": figure(before, "epsilon"),
        "epsilon_left": figure(before, "epsilon_left"),
    }


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
