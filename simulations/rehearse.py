"""`consilium rehearse`: a federation of real processes on this machine, over TLS on its loopback.

Coordinator and hospitals are set up as people set them up: founded, invited, joined, enrolled, started. Only the
examples are dealt out as a simulation deals them. So the run that is rehearsed ends with the bytes of the simulation.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from client.workshop import Workshop
from common.errors import ConsiliumError, UsageError
from common.run_config import RunConfig
from server import keeper
from server import runs as server_runs
from server import up as server_up
from server.board import read as read_board
from server.report import page
from server.result import finish
from simulations.runner import (
    Job,
    Progress,
    Scene,
    around_of,
    check_private,
    compare,
    continued,
    open_folder,
    set_scene,
    start_of,
)
from simulations.stage import Stage, check_names, open_stage

LOGS = "logs"
"""In the run's folder: what the processes said, after a failure."""

STOP_S = 30.0
"""Seconds that the engine has to tell the sites that it ends."""


def rehearse(job: Job, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run a rehearsal to its end and return its folder and its result; SIGTERM ends it as Ctrl-C does.

    Raises:
        UsageError: something that was asked for cannot be done as asked.
        ConsiliumError: the run failed; what was reached is in the folder, and what the processes said in `logs`.
        KeyboardInterrupt: it was ended; `--resume` goes on with it.
    """
    begin = time.monotonic()
    plan = continued(job)
    _check(job, plan)
    with _ended_by_signals(progress) as progress:
        scene = set_scene(plan, job.cache, progress)
        check_private(scene)
        check_names(scene.sites)
        folder = open_folder(job, scene.run)
        with open_stage(scene.sites, scene.device, progress, folder / LOGS) as stage:
            _run(stage, folder, progress)
        return folder, _completed(scene, folder, job, progress, begin)


def _check(job: Job, plan: RunConfig) -> None:
    if job.faults:
        raise UsageError("--fault: is for `consilium simulate`; in a rehearsal, end the processes themselves")
    if plan.simulation and plan.simulation.backend == "ray":
        raise UsageError("--backend ray: is for `consilium simulate`; a rehearsal has processes of its own")


@contextmanager
def _ended_by_signals(progress: Progress) -> Iterator[Progress]:
    """Let SIGTERM, and a terminal that is closed, end the block as Ctrl-C does; use what it yields for progress.

    Python raises out of a signal's handler wherever it happens to be, and drops what is raised inside a finaliser. So
    the next sign of progress looks whether there was a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield progress
        return
    asked: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        asked.append(number)
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # once is enough: everything is being taken away now
        raise KeyboardInterrupt

    def watched(phase: str, done: int, total: int) -> None:
        if asked:
            raise KeyboardInterrupt
        progress(phase, done, total)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield watched
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(stage: Stage, folder: Path, progress: Progress) -> None:
    """Drive the run of a folder to its end.

    Raises:
        ConsiliumError: it failed.
    """
    server_runs.remember(stage.config, folder)
    engine = server_runs.launch(stage.config, folder, bound=True)
    try:
        kept = partial(keeper.is_there, server_up.logs(stage.config))
        status = server_runs.follow(folder, lambda facts: _show(facts, progress), kept)
    finally:
        _end(engine)
        server_runs.stop_latest(stage.config)  # one that the keeper started
    if status not in server_runs.ENDED:
        facts = read_board(folder) or {}
        raise ConsiliumError(str(facts.get("error") or f"the run was {status}; see {folder / LOGS}"))


def _show(facts: Mapping[str, Any], progress: Progress) -> None:
    if facts.get("phase") not in (None, "starting", "ended"):
        progress(facts["phase"], facts["done"], facts["total"])


def _end(engine: subprocess.Popen[bytes]) -> None:
    """Wait for an engine that has said how its run ended; end one that has not."""
    engine.terminate()
    try:
        engine.wait(STOP_S)
    except subprocess.TimeoutExpired:
        engine.kill()
        engine.wait()


def _completed(scene: Scene, folder: Path, job: Job, progress: Progress, begin: float) -> dict[str, Any]:
    """Add to the engine's result what a simulation knows besides: baselines, and what became of the data."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
    workshop = Workshop(job.cache, scene.device)
    workshop.lend(scene.run.fingerprint(), scene.built)
    start = start_of(scene, folder)
    compared, seconds = compare(scene, start, workshop, folder, progress)
    known = around_of(scene)(compared, {})
    found["warnings"] = [*known.warnings, *(w for w in found["warnings"] if w["code"] != "random_weights")]
    found.update(baselines=compared, quarantine=dict(known.quarantine), dropped=dict(known.dropped))
    found["seconds"].update(baselines=seconds, total=time.monotonic() - begin)
    finish(folder, found, page.write)
    return found
