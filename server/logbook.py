"""What an engine writes down for whoever looks on: where the run is (`server.board`), and `server.events`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import half_written
from common.rotated import cut
from common.run_config import RunConfig
from server.board import AWAY, Board
from server.events import Events
from server.federation import Traffic
from server.onlooker import Onlooker
from server.runs import LOG
from server.spending import Spent

_BYTES = ("bytes_down", "bytes_up", "evaluation_bytes_down", "evaluation_bytes_up")


LOOK_S = 60.0
"""Seconds between two looks at the size of the engine's log."""


class Logbook(Onlooker):
    """Keeps `progress.json` and `events.jsonl` of a run.

    Args:
        folder: of the run.
        plan: the run.
    """

    def __init__(self, folder: Path, plan: RunConfig) -> None:
        for torn in (*half_written(folder), *half_written(folder / "state")):
            torn.unlink(missing_ok=True)  # an engine before this one was killed while it wrote it
        sites = plan.sites.names
        quorum = plan.sites.quorum or len(sites)
        self._events = Events(folder)
        self._board = Board(folder, sites, plan.training.rounds, quorum)
        self._phase = ""
        self._round = 0
        self._there: set[str] = set()
        self._log, self._looked = folder / LOG, 0.0
        begun: dict[str, Any] = {"sites": list(sites), "rounds": plan.training.rounds, "quorum": quorum}
        starts = self._board.starts
        if starts > 1:
            self._events.add("run_resumed", 0, **begun, starts=starts)
        else:
            self._events.add("run_started", 0, **begun)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Hear of a phase of the run: what `server.coordinator` tells."""
        self._board.progress(phase, done, total)
        if phase != self._phase:
            self._phase = phase
            self._events.add("phase", self._round, phase=phase)
        if phase == "rounds" and done < total:
            self._round = done + 1
            self._events.add("round_started", self._round)

    def site(self, name: str, at: str, done: int, total: int) -> None:
        """Hear what a site is at: what `server.federation` tells."""
        self._board.site(name, at, done, total)
        self._bound_log()
        there = at not in AWAY
        if there == (name in self._there):
            return
        (self._there.add if there else self._there.discard)(name)
        self._events.add("site_connected" if there else "site_away", self._round, site=name)

    def moved(self, site: str, traffic: Traffic) -> None:
        """Hear what a request and its answer took: what `server.federation` tells."""
        down, up = traffic.weights_down + traffic.other_down, traffic.weights_up + traffic.other_up
        self._board.moved(site, down, up)

    def judged(self, site: str, status: str, spent: Spent | None) -> None:
        """Hear what a site was seen to do."""
        kind, _, code = status.rstrip(")").partition("(")
        privacy = (spent.epsilon, spent.planned) if spent else None
        self._board.judged(site, kind, code, privacy)
        facts: dict[str, Any] = {"code": code} if code else {}
        if spent and not code:
            facts = {"epsilon": spent.epsilon, "planned_epsilon": spent.planned}
        self._events.add(f"site_{kind}", self._round, site=site, **facts)

    def ended_round(self, entry: Mapping[str, Any]) -> None:
        """Hear that a round's updates are aggregated."""
        self._board.ended_round(entry["seconds"])
        used = sorted(name for name, facts in entry["sites"].items() if facts["status"] == "contributed")
        sums = {name: entry[name] for name in _BYTES}
        self._events.add("round_ended", entry["round"], seconds=entry["seconds"], contributed=used, **sums)

    def judged_round(self, entry: Mapping[str, Any], best_round: int, best_score: float | None) -> None:
        """Hear the figures of a round, and which is the best so far."""
        self._board.chosen(best_round, best_score)
        figures = {name: value for name, value in entry["validation"].items() if not isinstance(value, dict | list)}
        best = {"best_round": best_round, "best_score": best_score}
        self._events.add("round_judged", entry["round"], figures=figures, **best)

    def kept(self, number: int) -> None:
        """Hear that the state after a round is on disk."""
        self._events.add("checkpoint", number)

    def end(self, status: str, error: str = "", sites: Mapping[str, str] | None = None) -> None:
        """Write down how the run ended, and what each site was seen to do in it."""
        self._board.end(status, error, sites)
        self._events.add("run_ended", self._round, status=status)

    def _bound_log(self) -> None:
        """Keep small what the engine prints, which its process cannot do where a library prints it."""
        now = time.monotonic()
        if now >= self._looked + LOOK_S:
            self._looked = now
            cut(self._log)
