"""One run in a process of its own: `python -P -m server.engine SERVER.TOML FOLDER`.

The folder holds the settled run. The engine opens a Flower run, drives it over Flower's grid, and leaves the run's
files. It may be killed at any moment: started again it goes on from the state on disk and ends with the same bytes.
"""

from __future__ import annotations

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

from common.errors import CheckpointError, ConsiliumError
from common.run_config import RunConfig
from server import result
from server.board import Board
from server.control import Control, bundle, roster
from server.coordinator import Cast, Coordinator, Outcome, Start
from server.drawing import drawn_apart
from server.federation import Federation, Network, Present
from server.report import page
from server.result import Surroundings, TrunkFacts
from server.runs import RUN, ended_runs
from server.server_config import ServerConfig, read_server

PART_BYTES = 4 * 2**20
"""The trunk travels in parts of this size: each is an exchange of seconds also on a slow line."""

_log = logging.getLogger("consilium.engine")


class Stopped(ConsiliumError):
    """The coordinator ended the run."""


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
    plan = RunConfig.from_toml((folder / RUN).read_text(encoding="utf-8"), str(folder / RUN))
    with alone(folder):
        board = Board(folder, plan.sites.names, plan.training.rounds)
        begin = time.monotonic()
        cast = Cast()
        bench: Bench | None = None
        try:
            bench = prepared(config, plan, folder)
            outcome = _drive(config, bench.start, board, cast)
        except ConsiliumError as error:
            if bench is not None:
                _failed(folder, bench.around, cast, error, time.monotonic() - begin)
            board.end("stopped" if isinstance(error, Stopped) else "failed", str(error))
            raise
        status = _completed(folder, bench.around, outcome)
        board.end(status)
        return status


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other engine drive the run of this folder.

    Raises:
        ConsiliumError: one does.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
    drawing = drawn_apart(plan)
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
    )
    start = Start(
        plan,
        drawing.trunk,
        drawing.weights,
        folder,
        version=version("consilium"),
        ended=ended_runs(config, plan.fingerprint()),
        part_bytes=PART_BYTES,
    )
    return Bench(start, around)


def _drive(config: ServerConfig, start: Start, board: Board, cast: Cast) -> Outcome:
    patience = start.run.sites.patience_s
    with Control(config.endpoints) as control:
        number = control.start_run(bundle())
        with control.grid(number) as grid:
            network = Network(lambda: _present(roster(grid)), patience)
            federation = Federation(grid, start.run.sites.deadline_s, network, board.site)
            return Coordinator(federation, start, board.progress, cast).execute()


def _present(found: object) -> dict[str, Present]:
    assert isinstance(found, dict)  # noqa: S101
    return {name: Present(there.node_id, there.activated_at) for name, there in found.items()}


def _completed(folder: Path, around: Surroundings, outcome: Outcome) -> str:
    found = result.completed(outcome, replace(around, seconds={"baselines": 0.0}))
    result.write_model(folder / "model", outcome, around, found)
    result.finish(folder, found, page.write)
    return str(found["status"])


def _failed(folder: Path, around: Surroundings, cast: Cast, error: ConsiliumError, seconds: float) -> None:
    rounds = result.read_rounds(folder)
    result.finish(folder, result.failed(str(error), around, cast, rounds, seconds), page.write)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the sites are told now
    raise Stopped("stopped by the coordinator; `consilium server resume` goes on where it was")


def main(arguments: list[str]) -> int:
    """Run the engine of the run that the arguments name."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    for name in ("flwr", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _stop)
    server_toml, folder = map(Path, arguments)
    try:
        status = run(read_server(server_toml), folder)
    except ConsiliumError as error:
        _log.error("%s", error)
        return error.exit_code
    _log.info("the run is %s", status)
    return 0 if status == "completed" else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
