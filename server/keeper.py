"""Starts the engine of an interrupted run anew: a crash of the coordinator costs a run some seconds, no more.

An engine leaves a run `interrupted` when it is killed, or when what it rests on was away: the SuperLink, space on the
disk. It is started again as soon as the SuperLink answers, then more and more rarely as long as no further round comes
of it. What was stopped or has failed is left to the operator; so is a run that was interrupted long ago, for nobody may
want it any more.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConsiliumError
from common.files import write_atomic
from common.supervisor import read_state
from server import board, runs
from server.server_config import ServerConfig

NAME = "keeper"
"""Of its process under the supervisor."""

LOOK_S = 0.5
LONGEST_PAUSE_S = 60.0
LONG_AGO_S = 7 * 86400.0
"""Seconds after which a run that was interrupted is nobody's business but the operator's."""

MOST_DEATHS = 5
"""Engines in a row that may die without a word and without a further round: the next would die as well."""

MOST_TROUBLES = 1440
"""Engines in a row that may say what is in their way: about a day, in which somebody makes room on a disk."""

ROOM_BYTES = 2**16
ROOM_PAUSE_S = 5.0
"""Seconds between two looks whether there is room on the disk."""

_log = logging.getLogger("consilium.keeper")


class Keeper:
    """Looks after the interrupted runs of one coordinator.

    Args:
        config: the coordinator.
        is_up: whether its SuperLink answers.
        launch: starts the engine of a run.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        config: ServerConfig,
        is_up: Callable[[], bool],
        launch: Callable[[Path], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._is_up = is_up
        self._launch = launch
        self._clock = clock
        self._failures: dict[Path, int] = {}  # starts of an engine that did not get as far as its board
        self._due: dict[Path, float] = {}

    def look(self) -> None:
        """Start the engine of the oldest run that waits for one, if it is time and none is at work.

        Raises:
            ConsiliumError: the list of runs is damaged.
            OSError: a run that is given up cannot be told so.
        """
        now = self._clock()
        waiting = {
            folder: facts
            for folder, facts in runs.interrupted(self._config).items()
            if facts["updated"] > now - LONG_AGO_S
        }
        self._due = {folder: self._due.get(folder, _due(facts, now)) for folder, facts in waiting.items()}
        for folder, facts in waiting.items():
            tried = board.count(facts, "fruitless") + self._failures.get(folder, 0)
            if tried >= (MOST_TROUBLES if facts.get("error") else MOST_DEATHS):
                self._give_up(folder, tried, str(facts.get("error") or ""))
            elif now >= self._due[folder] and runs.active(self._config) is None and self._is_up():
                self._start(folder)
                return

    def _has_room(self, folder: Path) -> bool:
        """Return whether an engine could write at all; that it cannot is no fault of the engine's."""
        probe = folder / ".room"
        try:
            write_atomic(probe, bytes(ROOM_BYTES))
            probe.unlink()
        except OSError as error:
            _log.warning("%s: cannot go on: %s", folder, error.strerror)
            return False
        return True

    def _start(self, folder: Path) -> None:
        if not self._has_room(folder):
            self._due[folder] = self._clock() + ROOM_PAUSE_S
            return
        _log.info("%s: was interrupted, and goes on", folder)
        try:
            self._launch(folder)
        except ConsiliumError as error:
            self._failures[folder] = self._failures.get(folder, 0) + 1
            self._due[folder] = self._clock() + _pause(self._failures[folder])
            _log.warning("%s: cannot go on yet: %s", folder, error)
        else:
            self._failures.pop(folder, None)
            self._due.pop(folder, None)

    def _give_up(self, folder: Path, tried: int, error: str) -> None:
        reason = error or f"its engine ended without a word {tried} times in a row; see {folder / runs.LOG}"
        _log.error("%s: is given up: %s", folder, reason)
        runs.settle(folder, "failed", reason)


def _due(facts: Mapping[str, Any], now: float) -> float:
    """Return when a run's next engine is to be started."""
    return now + _pause(board.count(facts, "fruitless"))


def _pause(tried: int) -> float:
    """Return how long to wait before the next start, in seconds."""
    return min(LONGEST_PAUSE_S, 2.0 ** min(tried, 10)) if tried else 0.0


def keep(config: ServerConfig) -> None:
    """Look after the runs of a coordinator for ever; for the main thread of a process of its own."""
    keeper = Keeper(config, lambda: _listens(config.operator_port), lambda folder: runs.launch(config, folder))
    while True:
        try:
            keeper.look()
        except (ConsiliumError, OSError) as error:  # somebody has to mend it; `server status` says so too
            _log.warning("the runs cannot be looked after: %s", error)
            time.sleep(LONGEST_PAUSE_S)
        time.sleep(LOOK_S)


def _listens(port: int) -> bool:
    """Return whether the SuperLink listens; that it is the right one is the engine's question."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def is_there(logs: Path) -> bool:
    """Return whether the supervisor of a folder has a keeper, so that an interrupted run goes on by itself."""
    try:
        state = read_state(logs)
    except OSError:
        return False
    return state is not None and state.running and NAME in state.children
