"""Coordinator and sites as processes of this machine, for `simulations.wire_bench`.

Before each site's link there is a tap, and each step of a run is marked in time with what had passed by then.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from client import founding as site_founding
from client import joining
from client import up as site_up
from client.site_config import read_site
from common.errors import ConsiliumError
from common.invitation import write_document
from common.run_config import RunConfig
from common.supervisor import bound_to, read_state
from server import enrolment
from server import runs as server_runs
from server import up as server_up
from server.board import read as read_board
from server.endpoints import QUIET
from server.server_config import ServerConfig
from simulations import stage as founding
from simulations.runner import Scene
from simulations.tap import Counts, Tap, tapped

START_S = 240.0
LOOK_S = 0.02
"""Seconds between two looks at where a run is."""


@dataclass(frozen=True)
class Mark:
    """The first moment at which a run was seen at a step."""

    phase: str
    done: int  # of the rounds; 0 in other phases
    at: float  # seconds, monotonic
    passed: Mapping[str, Counts]  # by site, until then


@dataclass(frozen=True)
class Journey:
    """A run from its start to its end."""

    marks: tuple[Mark, ...]
    rounds: int
    folder: Path

    def edges(self) -> list[Mark]:
        """Return the mark at which each round began, and the one at which the last ended.

        What follows the last round may be shown so soon that its end is not seen: then it ended there.
        """
        inside = [number for number, mark in enumerate(self.marks) if mark.phase == "rounds"]
        found = [self.marks[number] for number in inside]
        return found if found[-1].done == self.rounds else [*found, self.marks[inside[-1] + 1]]

    def after(self, phases: Sequence[str]) -> Mark:
        """Return the first mark that is in none of these phases."""
        return next(mark for mark in self.marks if mark.phase not in phases)

    def round_seconds(self) -> list[float]:
        """Return the seconds of each round."""
        return [after.at - before.at for before, after in pairwise(self.edges())]


@dataclass
class Stage:
    """A coordinator that is up, and what is needed to watch it."""

    root: Path
    config: ServerConfig
    taps: dict[str, Tap] = field(default_factory=dict)
    sites: dict[str, Path] = field(default_factory=dict)  # site.toml by name
    engine: int = 0  # process of the run that is followed

    def counts(self) -> dict[str, Counts]:
        """Return what has passed each site's tap."""
        return {name: tap.counts for name, tap in self.taps.items()}

    def coordinator_pids(self) -> dict[str, int]:
        """Return the processes of the coordinator by name."""
        state = read_state(server_up.logs(self.config))
        link = state.children["superlink"].pid if state else None
        found = {"superlink": link, "engine": self.engine}
        return {name: pid for name, pid in found.items() if pid}

    def site_pids(self) -> dict[str, int]:
        """Return the processes of the sites: `daemon NAME` and `link NAME`."""
        found = {}
        for name, path in self.sites.items():
            state = read_state(site_up.logs(read_site(path)))
            children = state.children if state else {}
            found.update({f"{kind} {name}": child.pid for kind, child in children.items() if child.pid})
        return found

    def drive(self, run: RunConfig, folder: Path, limit_s: float) -> Journey:
        """Drive a run to its end.

        Raises:
            ConsiliumError: it did not complete.
        """
        marks = [self._mark("starting", 0)]
        engine = server_runs.launch(self.config, server_runs.make_folder(self.config, run, folder), bound=True)
        end = time.monotonic() + limit_s
        try:
            status = self._follow(folder, marks, end)
        finally:
            engine.terminate()  # it has ended, or the run is given up
            engine.wait(founding.STOP_S)
        if status != "completed":
            raise ConsiliumError(f"the run is {status}: {(read_board(folder) or {}).get('error', '')}")
        return Journey(tuple(marks), run.training.rounds, folder)

    def _follow(self, folder: Path, marks: list[Mark], end: float) -> str:
        while True:
            facts = read_board(folder) or {}
            self.engine = int(facts.get("pid", 0))
            phase, done = str(facts.get("phase", "starting")), int(facts.get("done", 0))
            key = (phase, done if phase == "rounds" else 0)
            if key != (marks[-1].phase, marks[-1].done):
                marks.append(self._mark(*key))
            if facts.get("status") != "running":
                return str(facts.get("status"))
            if time.monotonic() >= end:
                raise ConsiliumError(f"the run was in phase {phase} when its time was over")
            time.sleep(LOOK_S)

    def _mark(self, phase: str, done: int) -> Mark:
        return Mark(phase, done, time.monotonic(), self.counts())


@contextmanager
def coordinator() -> Iterator[tuple[Stage, ExitStack]]:
    """Start a coordinator, and take everything away again: what the stack was given besides, then the files."""
    root = Path(tempfile.mkdtemp(prefix="consilium-"))
    try:
        with ExitStack() as stack:
            config = founding.coordinator(root)
            stack.enter_context(_running("coordinator", ["server.up", "up", str(config.path)], root))
            yield Stage(root, config), stack
    except ConsiliumError as error:
        raise ConsiliumError(f"{error}{_said(root)}") from None
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def real_sites(scene: Scene) -> Iterator[Stage]:
    """Start a coordinator and the sites of a scene, each with a daemon and a link that dials its tap."""
    with coordinator() as (stage, stack):
        for number, name in enumerate(scene.sites):
            tap = stack.enter_context(tapped(stage.config.listen.port))
            stage.taps[name] = tap
            place, dialled = stage.root / "sites" / str(number), _dialled(stage.config, tap.port)
            stage.sites[name] = path = founding.hospital(place, dialled, name, scene.sites[name], scene.device)
            stack.enter_context(_running(name, ["simulations.rehearsed", "up", str(path)], stage.root))
        _await_all(stage.config, list(scene.sites))
        yield stage


@contextmanager
def light_sites(names: Sequence[str], prepare: Callable[[Path], Any]) -> Iterator[Stage]:
    """Start a coordinator and one process of sites that compute nothing.

    Args:
        names: of the sites.
        prepare: writes what the process needs besides into the folder that it is given.
    """
    with coordinator() as (stage, stack):
        for number, name in enumerate(names):
            place = stage.root / "sites" / str(number)
            place.mkdir(parents=True)
            made = site_founding.found(place, name, place, None)
            invitation, answer = place / "invitation.json", place / "enrolment.json"
            write_document(invitation, enrolment.invite(stage.config, name))
            joining.join(made.config, invitation, answer)
            enrolment.enrol(stage.config, answer)
        prepare(stage.root)
        stack.enter_context(_running("sites", ["simulations.light_sites", str(stage.root)], stage.root))
        _await_all(stage.config, names)
        yield stage


def _dialled(config: ServerConfig, port: int) -> ServerConfig:
    """Return a configuration under whose invitations sites dial another port."""
    network = config.toml.network.model_copy(update={"address": f"127.0.0.1:{port}"})
    return replace(config, toml=config.toml.model_copy(update={"network": network}))


def _said(root: Path) -> str:
    """Return the last line of each log, for the message of a failure."""
    lines = []
    for path in sorted(root.rglob("*.log")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            lines.append(f"\n  {path.relative_to(root)}: {text.splitlines()[-1]}")
    return "".join(lines)


@contextmanager
def _running(name: str, command: Sequence[str], root: Path) -> Iterator[None]:
    """Run a command until the end of the block; it ends with this process, whatever becomes of this process."""
    with (root / f"{name}.log").open("wb") as log:
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
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(founding.STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_all(config: ServerConfig, names: Sequence[str]) -> None:
    stage, end = founding.Stage(config, {}), time.monotonic() + START_S
    while missing := sorted(set(names) - stage.connected()):
        if time.monotonic() >= end:
            raise ConsiliumError(f"{', '.join(missing)}: not connected within {START_S:.0f} s")
        time.sleep(0.2)
