"""The coordinator's monitor: metrics for Prometheus and health on 127.0.0.1, for whoever keeps the coordinator up.

It tells what `consilium server status` tells, what came in during the finished rounds, and what the kernel knows of the
processes. Nothing is counted here, and nothing is remembered but how far `rounds.jsonl` was read.

    python -P -m server.monitor SERVER.TOML
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import ConfigError, ConsiliumError, UsageError
from common.exposition import OTHER, Family, Sample, one_of, sample
from common.logs import set_up, tell_end
from common.loopback import Latest
from common.supervisor import SupervisorState, read_state
from common.watch import PATIENCE_S, TEXT, pages, room, serve
from server import up
from server.admission import REASONS
from server.enrolment import enrolled
from server.refusals import WORDS
from server.server_config import ServerConfig, read_server
from server.status import status

SITE = ("connected", "not_connected", "never_seen")
RUN = ("new", "running", "interrupted", "stopped", "failed", "completed", "completed_partial")
"""What a run can be."""

PHASES = (
    "starting",
    "trunk",
    "statistics",
    "freeze",
    "prepare",
    "closed form",
    "rounds",
    "validation",
    "test",
    "ended",
)
_LOST = ("absent", "deadline", "unreachable")
_UNBELIEVED = (*REASONS, "identity")
ANSWERS: Mapping[str, tuple[str, ...]] = {
    "contributed": ("",),
    "refused": (*(code for code in WORDS if code not in (*_LOST, *_UNBELIEVED)), OTHER),
    "lost": (*_LOST, OTHER),
    "quarantined": (*_UNBELIEVED, OTHER),
}
"""What a site's part in a round can be: status -> codes."""

CHILDREN = ("superlink", "keeper", "monitor")
PROCESSES = ("superlink", "engine")

READY = ("superlink_unavailable", "certificate_unusable", "certificate_ended", "sites_unreadable", "disk_full")
"""Codes of `/readyz`: why no run can be driven here now."""

ROOM = 64 * 2**20
"""Bytes below which a disk counts as full: each round of a run is written before the next begins."""

_PAGE = os.sysconf("SC_PAGE_SIZE")

FAMILIES = (
    Family("consilium_coordinator_up", "Whether the SuperLink answers."),
    Family("consilium_coordinator_sites_enrolled", "Sites that are enrolled."),
    Family("consilium_coordinator_sites_connected", "Sites that are connected."),
    Family("consilium_coordinator_site_state", "1 for the state of a site.", ("site", "state")),
    Family("consilium_coordinator_site_session_timestamp_seconds", "When a site connected last.", ("site",)),
    Family("consilium_coordinator_site_seen_timestamp_seconds", "When a site was heard of last.", ("site",)),
    Family("consilium_coordinator_certificate_end_timestamp_seconds", "When the server's certificate ends."),
    Family("consilium_coordinator_free_bytes", "Room on the disks of state and runs.", ("folder",)),
    Family("consilium_coordinator_child_up", "Whether a process under `server up` runs.", ("child",)),
    Family("consilium_coordinator_child_restarts_total", "How often it was started again.", ("child",)),
    Family("consilium_coordinator_process_resident_memory_bytes", "Memory of a process.", ("process",)),
    Family("consilium_coordinator_process_open_fds", "Files and connections that a process holds.", ("process",)),
    Family("consilium_coordinator_runs", "Runs by status.", ("status",)),
    Family("consilium_run_status", "1 for the status of the run that goes on, else of the latest.", ("run", "status")),
    Family("consilium_run_phase", "1 for the phase of the run.", ("run", "phase")),
    Family("consilium_run_phase_timestamp_seconds", "Since when the run is in that phase.", ("run",)),
    Family("consilium_run_updated_timestamp_seconds", "When the engine last told of anything.", ("run",)),
    Family("consilium_run_round", "The round that is going on, else the last.", ("run",)),
    Family("consilium_run_rounds", "Rounds that the run will have.", ("run",)),
    Family("consilium_run_round_seconds", "What the last finished rounds took, on average.", ("run",)),
    Family("consilium_run_remaining_seconds", "Until the last round ends, if all take as long as these.", ("run",)),
    Family("consilium_run_starts_total", "Engines that the run has had.", ("run",)),
    Family("consilium_run_quorum", "Usable answers that a round needs.", ("run",)),
    Family("consilium_run_sites_usable", "Sites with which nothing was wrong when last heard of.", ("run",)),
    Family("consilium_run_answers_total", "Answers of sites in finished rounds.", ("run", "status", "code")),
    Family("consilium_run_site_sent_bytes_total", "Bytes that went to a site.", ("run", "site")),
    Family("consilium_run_site_received_bytes_total", "Bytes that came from a site.", ("run", "site")),
    Family("consilium_run_site_round_seconds", "What a site's last answer in a round took.", ("run", "site")),
    Family("consilium_run_site_epsilon", "Epsilon that the private run has spent at a site.", ("run", "site")),
    Family("consilium_run_site_epsilon_left", "Epsilon that the private run may still take there.", ("run", "site")),
)
"""Everything that a coordinator's monitor tells."""


class Rounds:
    """The answers in the finished rounds of a run, counted; only what was added to the file is read."""

    def __init__(self) -> None:
        self._path = Path()
        self._stamp = (0, 0)  # the file, and how much of it was read
        self._found: Counter[tuple[str, str]] = Counter()

    def answers(self, folder: Path) -> Mapping[tuple[str, str], int]:
        """Return how often there was which status and code."""
        path = folder / "rounds.jsonl"
        with suppress(OSError), path.open("rb") as file:
            facts = os.fstat(file.fileno())
            inode, read = self._stamp
            if path != self._path or inode != facts.st_ino or facts.st_size < read:  # another, or cut back on resume
                read, self._found = 0, Counter()
            file.seek(read)
            whole = file.read(facts.st_size - read).rpartition(b"\n")[0]
            for line in whole.split(b"\n"):
                self._found.update(_answers(line))
            self._path, self._stamp = path, (facts.st_ino, read + len(whole) + (1 if whole else 0))
            return self._found
        return {}


def _answers(line: bytes) -> list[tuple[str, str]]:
    """Return status and code of every site in a finished round; a line that is damaged has none."""
    try:
        entry = json.loads(line)
        sites = entry["sites"].values() if entry["round"] else ()  # before round 1 nothing is trained
        told = [(str(facts["status"]), str(facts.get("reason", ""))) for facts in sites]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [(state, code if code in ANSWERS.get(state, ()) else OTHER) for state, code in told]


@dataclass(frozen=True)
class _Looked:
    """What was found at one look."""

    status: Mapping[str, Any]
    samples: tuple[Sample, ...]


class Watch:
    """Looks at one coordinator.

    Args:
        config: the coordinator.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._found = Latest(self._look, PATIENCE_S)
        self._rounds = Rounds()

    def samples(self) -> Iterator[Sample]:
        """Yield what is known now, in bounded time."""
        looked = self._found.get()
        supervisor = _supervisor(self.config)
        yield from sample("consilium_coordinator_up", bool(looked and looked.status["up"]))
        for folder, path in (("state", self.config.state), ("runs", self.config.runs)):
            yield from sample("consilium_coordinator_free_bytes", room(path), folder)
        yield from _of_supervisor(supervisor)
        if looked is not None:
            yield from _of_processes(_pids(supervisor, looked.status))
            yield from looked.samples

    def missing(self) -> Iterator[str]:
        """Yield why no run can be driven here now: codes of `READY`."""
        looked = self._found.get()
        if looked is None or not looked.status["up"]:
            yield "superlink_unavailable"
        if looked is not None:
            end = _end(looked.status)
            if end is None:
                yield "certificate_unusable"
            elif end < time.time():
                yield "certificate_ended"
        if not _readable(self.config):
            yield "sites_unreadable"
        free = [room(path) for path in (self.config.state, self.config.runs)]
        if any(one is not None and one < ROOM for one in free):
            yield "disk_full"

    def _look(self) -> _Looked:
        found = status(self.config)
        return _Looked(found, tuple(_of_status(found, self._rounds)))


def _of_status(found: Mapping[str, Any], rounds: Rounds) -> Iterator[Sample]:
    sites = found["sites"]
    yield from sample("consilium_coordinator_sites_enrolled", len(sites))
    yield from sample("consilium_coordinator_sites_connected", sum(site["connected"] for site in sites.values()))
    for name, site in sites.items():
        yield from one_of("consilium_coordinator_site_state", SITE, site["state"].replace(" ", "_"), name)
        if site["since"]:
            since = datetime.fromisoformat(site["since"]).timestamp()
            yield from sample("consilium_coordinator_site_session_timestamp_seconds", since, name)
        yield from sample("consilium_coordinator_site_seen_timestamp_seconds", site["last_seen"], name)
    yield from sample("consilium_coordinator_certificate_end_timestamp_seconds", _end(found))
    states = Counter(run["status"] for run in found["runs"])
    for state in RUN:
        yield from sample("consilium_coordinator_runs", states[state], state)
    if found["run"] is not None:
        yield from _of_run(found["run"], sites, rounds)


def _readable(config: ServerConfig) -> bool:
    """Return whether the list of enrolled sites can be read; the status is empty where it cannot."""
    try:
        enrolled(config)
    except ConsiliumError:
        return False
    return True


def _end(found: Mapping[str, Any]) -> float | None:
    certificate = found["certificate"]
    return datetime.fromisoformat(certificate["expires"]).timestamp() if certificate else None


def _supervisor(config: ServerConfig) -> SupervisorState | None:
    try:
        state = read_state(up.logs(config))
    except OSError:
        return None
    return state if state is not None and state.running else None


def _of_supervisor(state: SupervisorState | None) -> Iterator[Sample]:
    for name in CHILDREN if state else ():
        if child := state.children.get(name) if state else None:
            yield from sample("consilium_coordinator_child_up", child.pid is not None, name)
            yield from sample("consilium_coordinator_child_restarts_total", child.restarts, name)


def _pids(supervisor: SupervisorState | None, found: Mapping[str, Any]) -> dict[str, int | None]:
    superlink = supervisor.children.get("superlink") if supervisor else None
    run = found["run"]
    running = run is not None and run["status"] == "running"
    return {"superlink": superlink.pid if superlink else None, "engine": run["pid"] if running else None}


def _of_processes(pids: Mapping[str, int | None]) -> Iterator[Sample]:
    for name in PROCESSES:
        place = Path(f"/proc/{pids[name]}")
        with suppress(OSError, ValueError, IndexError):  # it has just ended
            pages_held = int((place / "statm").read_text().split()[1])
            yield from sample("consilium_coordinator_process_resident_memory_bytes", pages_held * _PAGE, name)
            handles = sum(1 for _ in (place / "fd").iterdir())
            yield from sample("consilium_coordinator_process_open_fds", handles, name)


def _of_run(run: Mapping[str, Any], sites: Mapping[str, Any], rounds: Rounds) -> Iterator[Sample]:
    """Yield what is known of one run, and of the sites in it."""
    folder = Path(run["folder"])
    name, quorum = folder.name, run["quorum"] or {}
    yield from one_of("consilium_run_status", RUN, run["status"], name)
    yield from one_of("consilium_run_phase", PHASES, run["phase"], name)
    for metric, value in {
        "consilium_run_phase_timestamp_seconds": run["phase_since"],
        "consilium_run_updated_timestamp_seconds": run["updated"],
        "consilium_run_round": run["round"],
        "consilium_run_rounds": run["rounds"],
        "consilium_run_round_seconds": run["round_seconds"],
        "consilium_run_remaining_seconds": run["eta_s"],
        "consilium_run_starts_total": run["starts"],
        "consilium_run_quorum": quorum.get("needed"),
        "consilium_run_sites_usable": quorum.get("usable"),
    }.items():
        yield from sample(metric, value, name)
    answers = rounds.answers(folder)
    for state, codes in ANSWERS.items():  # also what has not happened yet, or its first time would be no increase
        for code in codes:
            yield from sample("consilium_run_answers_total", answers.get((state, code), 0), name, state, code)
    for site, held in sites.items():
        for metric, key in _OF_SITE.items():
            yield from sample(metric, held[key], name, site)


_OF_SITE = {
    "consilium_run_site_sent_bytes_total": "bytes_down",
    "consilium_run_site_received_bytes_total": "bytes_up",
    "consilium_run_site_round_seconds": "seconds",
    "consilium_run_site_epsilon": "epsilon",
    "consilium_run_site_epsilon_left": "epsilon_left",
}


def main(arguments: list[str]) -> int:
    """Run the monitor of a `server.toml`, and return the exit code."""
    form = "text"
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -P -m server.monitor SERVER.TOML")
        config = read_server(Path(arguments[0]))
        form = config.toml.logs.format
        if not config.toml.monitor.port:
            raise ConfigError(f"{config.path.name}: [monitor] port: missing or 0, expected a port such as 9465")
        set_up(form, "monitor", TEXT)
        for name in ("flwr", "httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.ERROR)
        watch = Watch(config)
        serve(config.toml.monitor.port, pages(FAMILIES, watch.samples, watch.missing))
    except ConsiliumError as error:
        return tell_end(form, "monitor", error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
