"""`consilium rehearse`: a federation of real processes on this machine, over TLS on its loopback.

Coordinator and hospitals are set up as people set them up: founded, invited, joined, enrolled, started. Only the
examples are dealt out as a simulation deals them. So the run that is rehearsed ends with the bytes of the simulation.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from client import founding as site_founding
from client import joining
from client.workshop import Workshop
from common import model
from common.errors import ConsiliumError, UsageError
from common.invitation import write_document
from common.supervisor import bound_to
from server import enrolment
from server import founding as server_founding
from server import runs as server_runs
from server.board import read as read_board
from server.coordinator import Start
from server.endpoints import QUIET
from server.report import page
from server.result import finish
from server.server_config import ServerConfig, read_server
from simulations import rehearsed
from simulations.runner import Job, Progress, Scene, around_of, compare, continued, open_folder, set_scene

PATIENCE_S = 180.0
"""Seconds that all processes together have to come up: each imports torch, and cores are few."""

STOP_S = 20.0


def rehearse(job: Job, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run a rehearsal to its end and return its folder and its result.

    Raises:
        UsageError: something that was asked for cannot be done as asked.
        ConsiliumError: the run failed; what was reached is in the folder, and what the processes said in `logs`.
    """
    begin = time.monotonic()
    _check(job)
    scene = set_scene(continued(job), job.cache, progress)
    folder = open_folder(job, scene.run)
    with _stage(scene, folder, progress) as config:
        server_runs.remember(config, folder)
        server_runs.launch(config, folder)
        status = _followed(config, folder, progress)
    if status not in server_runs.ENDED:
        facts = read_board(folder) or {}
        raise ConsiliumError(str(facts.get("error") or f"the run was {status}; see {folder / 'logs'}"))
    return folder, _completed(scene, folder, job, progress, begin)


def _check(job: Job) -> None:
    simulation = job.plan.simulation
    if job.faults:
        raise UsageError("--fault: is for `consilium simulate`; in a rehearsal, end the processes themselves")
    if simulation and simulation.backend == "ray":
        raise UsageError("--backend ray: is for `consilium simulate`; a rehearsal has processes of its own")


def _followed(config: ServerConfig, folder: Path, progress: Progress) -> str:
    """Follow a run to its end; whoever interrupts this ends the run."""

    def show(facts: Mapping[str, Any]) -> None:
        if facts.get("phase") not in (None, "starting", "ended"):
            progress(facts["phase"], facts["done"], facts["total"])

    try:
        return server_runs.follow(folder, show)
    except BaseException:
        running = server_runs.active(config)
        if running is not None:
            server_runs.stop(running)
        raise


def _completed(scene: Scene, folder: Path, job: Job, progress: Progress, begin: float) -> dict[str, Any]:
    """Add to the engine's result what a simulation knows besides: baselines, and what became of the data."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
    workshop = Workshop(job.cache, scene.device)
    workshop.lend(scene.run.fingerprint(), scene.built)
    start = Start(scene.run, scene.trunk, model.trainable_values(scene.built.upper), folder)
    compared, seconds = compare(scene, start, workshop, folder, progress)
    known = around_of(scene)(compared, {})
    found["warnings"] = [*known.warnings, *(w for w in found["warnings"] if w["code"] != "random_weights")]
    found.update(baselines=compared, quarantine=dict(known.quarantine), dropped=dict(known.dropped))
    found["seconds"].update(baselines=seconds, total=time.monotonic() - begin)
    finish(folder, found, page.write)
    return found


# The stage


@contextmanager
def _stage(scene: Scene, folder: Path, progress: Progress) -> Iterator[ServerConfig]:
    """Set up a coordinator and its sites, and take everything away again; after a failure what they said stays."""
    root = Path(tempfile.mkdtemp(prefix="consilium-"))
    try:
        with ExitStack() as stack:
            config = coordinator(root)
            stack.enter_context(running("coordinator", ["server.up", "up", str(config.path)], root))
            total = len(scene.sites)
            progress("hospitals", 0, total)
            for done, name in enumerate(scene.sites, start=1):
                path = hospital(root, config, scene, name)
                stack.enter_context(running(name, ["simulations.rehearsed", "up", str(path)], root))
                progress("hospitals", done, total)
            await_all(config, list(scene.sites), progress)
            yield config
    except BaseException:
        _keep_logs(root, folder / "logs")
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def coordinator(root: Path) -> ServerConfig:
    """Found a coordinator on ports that nobody uses."""
    public, operator = free_ports(2)
    where = f"127.0.0.1:{public}"
    made = server_founding.found(root / "coordinator", where, "rehearsal", where)
    text = made.config.read_text(encoding="utf-8")
    made.config.write_text(_with_port(text, operator), encoding="utf-8")
    return read_server(made.config)


def _with_port(text: str, port: int) -> str:
    lines = text.splitlines()
    kept = [line for line in lines if not line.startswith(("operator_port", "# operator_port"))]
    at = kept.index("[network]")
    return "\n".join([*kept[: at + 1], f"operator_port = {port}", *kept[at + 1 :]]) + "\n"


def hospital(root: Path, config: ServerConfig, scene: Scene, name: str) -> Path:
    """Found a hospital, deal it its examples, and enrol it."""
    place = root / "sites" / str(list(scene.sites).index(name))  # short: the path of a socket has 107 bytes
    place.mkdir(parents=True)
    made = site_founding.found(place, name, place, None)
    device = scene.run.simulation.device if scene.run.simulation else "auto"
    with made.config.open("a", encoding="utf-8") as file:
        file.write(f'\n[compute]\ndevice = "{device}"\n')
    rehearsed.write(place, scene.sites[name])
    invitation, answer = place / "invitation.json", place / "enrolment.json"
    write_document(invitation, enrolment.invite(config, name))
    joining.join(made.config, invitation, answer)
    enrolment.enrol(config, answer)
    return made.config


@contextmanager
def running(name: str, command: Sequence[str], root: Path) -> Iterator[None]:
    """Run a command until the end of the block; it ends with this process, whatever becomes of this process."""
    logs = root / "said"
    logs.mkdir(exist_ok=True)
    with (logs / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **QUIET},
            preexec_fn=bound_to(os.getpid()),
        )
        try:
            yield
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def await_all(config: ServerConfig, names: Sequence[str], progress: Progress) -> None:
    """Wait until every site is connected.

    Raises:
        ConsiliumError: one is not after `PATIENCE_S`.
    """
    from server.control import Control

    end = time.monotonic() + PATIENCE_S
    connected: set[str] = set()
    while not connected >= set(names):
        if time.monotonic() >= end:
            missing = ", ".join(sorted(set(names) - connected))
            raise ConsiliumError(f"{missing} did not connect within {PATIENCE_S:.0f} s; what was said is in `logs`")
        time.sleep(0.2)
        with Control(config.endpoints) as control:
            if control.is_up():
                connected = {node.name for node in control.nodes() if node.status == "online"}
        progress("connected", len(connected), len(names))


def _keep_logs(root: Path, target: Path) -> None:
    for path in [*root.rglob("*.log")]:
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]
