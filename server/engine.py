"""One run in a process of its own: `python -P -m server.engine SERVER.TOML FOLDER`.

The folder holds the settled run. The engine opens a Flower run, drives it over Flower's grid, and leaves the run's
files. It may be killed at any moment: started again it goes on from the state on disk and ends with the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

from common import parameters
from common.errors import CheckpointError, ConsiliumError, Interrupted
from common.locks import exclusive
from common.logs import set_up
from common.run_config import RunConfig
from server import result
from server.board import INTERRUPTED, count
from server.board import read as read_board
from server.company import Cast, Start
from server.control import Control, bundle, roster
from server.coordinator import Coordinator, Outcome
from server.drawing import drawn_once
from server.federation import Federation, Network
from server.logbook import Logbook
from server.report import page
from server.result import Surroundings, TrunkFacts
from server.runs import STOPPED, ended_runs, read_plan
from server.server_config import ServerConfig, read_server
from server.settling import HEAD_WEIGHT

PART_BYTES = 4 * 2**20
"""The trunk travels in parts of this size: each is an exchange of seconds also on a slow line."""

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM})
"""What a disk says that may be well again when somebody has seen to it."""

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_log = logging.getLogger("consilium.engine")


class Stopped(BaseException):
    """The coordinator ended the run; nothing on the way takes it for a failure that it can get over."""


@dataclass(frozen=True)
class Bench:
    """What a run is started with, and what its result says of it."""

    start: Start
    around: Surroundings


def run(config: ServerConfig, folder: Path) -> str:
    """Drive the run of a folder to its end and return its status.

    Raises:
        ConsiliumError: the run failed; what was reached is in the folder.
    """
    plan = read_plan(folder)
    with exclusive(config.state / "engine.lock", "the engine of a run"), alone(folder):
        return _Drive(config, plan, folder).status()


class _Drive:
    """One attempt at a run."""

    def __init__(self, config: ServerConfig, plan: RunConfig, folder: Path) -> None:
        self._config = config
        self._plan = plan
        self._folder = folder
        self._begin = time.monotonic()
        self._logbook = Logbook(folder, plan)
        self._cast = Cast(onlooker=self._logbook)
        self._bench: Bench | None = None

    def status(self) -> str:
        """Drive the run and return how it ended."""
        try:
            return self._completed()
        except Stopped:
            raise self._ended("stopped", STOPPED) from None
        except Interrupted as error:
            raise self._ended(INTERRUPTED, str(error)) from None
        except ConsiliumError as error:
            raise self._ended("failed", str(error)) from None
        except OSError as error:  # the disk is full, or the folder was taken away
            status = INTERRUPTED if error.errno in PASSING else "failed"
            place = error.filename or self._folder
            raise self._ended(status, f"{place}: cannot be used ({error.strerror or error})") from None

    def _completed(self) -> str:
        self._bench = prepared(self._config, self._plan, self._folder)
        outcome = _drive(self._config, self._bench.start, self._logbook, self._cast)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left takes a moment, and must not be left half done
        status = _completed(self._folder, self._bench.around, outcome)
        self._logbook.end(status, sites=self._cast.status)
        return status

    def _ended(self, status: str, text: str) -> ConsiliumError:
        """Leave what was reached, and return what to say."""
        try:
            if self._bench is not None and status != INTERRUPTED:
                seconds = time.monotonic() - self._begin
                rounds = result.read_rounds(self._folder)
                found = result.failed(text, self._bench.around, self._cast, rounds, seconds)
                result.finish(self._folder, found, page.write)
            self._logbook.end(status, text, self._cast.status)
        except (OSError, ConsiliumError) as error:
            _log.warning("what was reached cannot be kept: %s", error)
        return ConsiliumError(text)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other engine drive the run of this folder.

    Raises:
        ConsiliumError: one does.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConsiliumError(f"{folder}: cannot be used ({error.strerror}), expected a run's folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConsiliumError(f"{folder}: an engine is at work on this run; see `consilium server status`") from None
    finally:
        os.close(handle)


def prepared(config: ServerConfig, plan: RunConfig, folder: Path) -> Bench:
    """Return what the run starts with: the model, built again from the run alone.

    Raises:
        CheckpointError: the weights are not those that the run was settled with.
    """
    drawing = drawn_once(plan, folder / "state")
    if drawing.fingerprint != plan.fingerprint():
        raise CheckpointError(f"{folder}: the backbone's weights have changed since the run was made; start a new run")
    trunk = TrunkFacts(plan.model.trunk_sha256, drawing.frozen, len(drawing.trunk))
    random = {"code": "random_weights", "message": "the backbone has random weights: --weights none was asked for"}
    around = Surroundings(
        run=plan,
        trunk=trunk,
        upper_parameters=sum(value.size for value in drawing.weights.values()),
        weights={"source": drawing.source, "backbone": plan.model.backbone},
        warnings=(random,) if drawing.source == "none" else (),
        stages=drawing.stages,
    )
    start = Start(
        plan,
        drawing.trunk,
        drawing.weights,
        folder,
        version=version("consilium"),
        ended=ended_runs(config, plan.fingerprint()),
        stages=drawing.stages,
        part_bytes=PART_BYTES,
    )
    return Bench(start, around)


def _drive(config: ServerConfig, start: Start, book: Logbook, cast: Cast) -> Outcome:
    patience = start.run.sites.patience_s
    with Control(config.endpoints) as control:
        number = control.start_run(bundle())
        with control.grid(number, largest_reply(start)) as grid:
            network = Network(lambda: roster(grid), patience)
            federation = Federation(grid, start.run.sites.deadline_s, network, book.site, book.moved)
            return Coordinator(federation, start, book.progress, cast).execute()


def largest_reply(start: Start) -> int:
    """Return how many bytes no honest reply goes beyond: an update, or the sums of a closed form, and a margin."""
    update = 4 * parameters.count(start.weights)
    labels, width = start.weights[HEAD_WEIGHT].shape
    return 2 * update + 8 * int(width + 1) * int(width + 1 + labels) + 2**24


def _completed(folder: Path, around: Surroundings, outcome: Outcome) -> str:
    found = result.completed(outcome, replace(around, seconds={"baselines": 0.0}))
    result.write_model(folder / "model", outcome, around, found)
    result.finish(folder, found, page.write)
    return str(found["status"])


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the sites are told now
    raise Stopped


def _known(folder: Path) -> dict[str, object]:
    """Return what each line of the log is about: the run and, once there is one, its round."""
    return {"run": folder.name, "round": count(read_board(folder) or {}, "round") or None}


def main(arguments: list[str]) -> int:
    """Run the engine of the run that the arguments name."""
    server_toml, folder = map(Path, arguments)
    try:
        config = read_server(server_toml)
    except ConsiliumError as error:
        set_up("text", "engine", _TEXT)
        _log.error("%s", error)
        return error.exit_code
    set_up(config.toml.logs.format, "engine", _TEXT, known=lambda: _known(folder))
    for name in ("flwr", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _stop)
    try:
        status = run(config, folder)
    except ConsiliumError as error:
        _log.error("%s", error)
        return error.exit_code
    except Stopped:  # before there was anything to end
        return 1
    except OSError as error:  # there is no room even to say where the run is
        _log.error("%s: cannot be used (%s)", error.filename or folder, error.strerror or error)
        return 1
    _log.info("the run is %s", status)
    return 0 if status == "completed" else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
