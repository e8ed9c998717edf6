"""The runs of a coordinator: a folder each, made whole, driven by an engine of its own, found again after anything.

run.toml        the settled run            rounds.jsonl   one line a round        model/       what was learnt
progress.json   where it is (server.board) result.json    written at the end      report.html  for the eyes
state/          what a resumed run goes on from; removed when it is complete
engine.log      what the engine said
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, ConsiliumError, UsageError
from common.files import write_atomic, write_json
from common.run_config import RunConfig, Task, build
from common.strict import read_toml
from server import board
from server.endpoints import LEAN, QUIET
from server.enrolment import enrolled
from server.server_config import ServerConfig

RUN = "run.toml"
LOG = "engine.log"
ENDED = frozenset({"completed", "completed_partial"})
"""States of a run that nothing can go on from."""

START_S = 120.0
"""Seconds that an engine has to show itself: it imports torch on a machine that may be busy."""


@dataclass(frozen=True)
class RunFacts:
    """One run as it lies on disk."""

    folder: Path
    fingerprint: str
    facts: Mapping[str, Any]  # what its board says

    @property
    def status(self) -> str:
        """One of new, running, interrupted, stopped, failed, completed, completed_partial."""
        return str(self.facts.get("status", "new"))


def plan_of(path: Path, config: ServerConfig) -> tuple[RunConfig, Task]:
    """Return what a `run.toml` asks for, with its sites named, and the task.

    Raises:
        ConfigError: it cannot be read, lacks what a run over real sites needs, or names a site that is not enrolled.
    """
    values = read_toml(path)
    values.pop("simulation", None)  # a run that was simulated first is a good draft
    plan = build(values, str(path))
    if len(plan.task.labels) < (1 if plan.task.kind == "multi-label" else 2):
        raise ConfigError(f'{path}: [task] labels: expected the labels that all sites use, such as ["normal", "sick"]')
    known = {site.name for site in enrolled(config)}
    names = plan.sites.names or tuple(sorted(known))
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ConfigError(
            f"{path}: [sites] names: {', '.join(strangers)} not enrolled; "
            "see `consilium server sites`, or invite with `consilium server invite NAME`"
        )
    if not names:
        raise ConfigError(f"{path}: no site is enrolled yet; invite one with `consilium server invite NAME`")
    sites = plan.sites.model_copy(update={"names": names})
    return plan.model_copy(update={"sites": sites}), plan.task


def make_folder(config: ServerConfig, run: RunConfig, folder: Path | None) -> Path:
    """Make a run's folder, whole or not at all.

    Raises:
        UsageError: the folder is in use, or cannot be written.
    """
    place = folder or next_folder(config.runs, run)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and any(place.iterdir()):
            raise UsageError(f"{place}: the folder is in use; name another, or go on with `consilium server resume`")
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        scratch.chmod(0o755)
        write_atomic(scratch / RUN, run.to_toml().encode())
        scratch.rename(place)
    except OSError as error:
        raise UsageError(f"{place}: cannot be written ({error.strerror})") from None
    remember(config, place)
    return place


def next_folder(root: Path, run: RunConfig) -> Path:
    """Return the first of `<task>-<strategy>-1`, `-2`, … that is not there."""
    stem = f"{run.task.name or 'run'}-{run.training.rule.kind}"
    number = 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return root / f"{stem}-{number}"


# The list of runs: also of those whose folders are elsewhere


def remember(config: ServerConfig, folder: Path) -> None:
    """Keep a run on the coordinator's list."""
    known = [*_listed(config), str(folder.resolve())]
    write_json(config.state / "runs.json", list(dict.fromkeys(known)))


def _listed(config: ServerConfig) -> list[str]:
    try:
        return [str(path) for path in json.loads((config.state / "runs.json").read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        raise ConsiliumError(f"{config.state / 'runs.json'}: damaged; remove it, runs stay in their folders") from None


def runs(config: ServerConfig) -> list[RunFacts]:
    """Return the runs whose folders are still there, the oldest first."""
    found = []
    for folder in map(Path, _listed(config)):
        try:
            run = RunConfig.from_toml((folder / RUN).read_text(encoding="utf-8"), RUN)
        except (OSError, ConsiliumError):
            continue
        found.append(RunFacts(folder, run.fingerprint(), board.read(folder) or {}))
    return found


def ended_runs(config: ServerConfig, but: str) -> tuple[str, ...]:
    """Return the fingerprints of the latest runs that no engine drives, but for one."""
    idle = [run.fingerprint for run in runs(config)[-20:] if run.status != "running"]
    return tuple(dict.fromkeys(fingerprint for fingerprint in idle if fingerprint != but))


def active(config: ServerConfig) -> RunFacts | None:
    """Return the run that is being driven, if there is one."""
    return next((run for run in reversed(runs(config)) if run.status == "running"), None)


def named(config: ServerConfig, folder: Path | None, *, resumable: bool) -> RunFacts:
    """Return the run of a folder, or the latest one.

    Raises:
        UsageError: there is none, or nothing is left to resume.
    """
    known = runs(config)
    if folder is not None:
        known = [run for run in known if run.folder == folder.resolve()]
    if not known:
        raise UsageError(f"{folder or config.runs}: holds no run of this coordinator; see `consilium server status`")
    if resumable:
        open_ones = [run for run in known if run.status not in ENDED]
        if not open_ones:
            raise UsageError(f"{known[-1].folder}: the run is {known[-1].status.replace('_', ' ')}: nothing to resume")
        known = open_ones
    return known[-1]


# Engines


@contextmanager
def _starting(config: ServerConfig) -> Iterator[None]:
    """Let no two engines be started at a time: each would find that there is none."""
    handle = os.open(config.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def launch(config: ServerConfig, folder: Path) -> None:
    """Start the engine of a run in a session of its own: it goes on when the terminal is closed.

    Raises:
        ConsiliumError: another run is being driven, or the engine does not come up.
    """
    with _starting(config):
        other = active(config)
        if other is not None:
            raise ConsiliumError(
                f"{other.folder}: this run is being driven; wait for its end, or end it with `consilium server stop`"
            )
        before = board.read(folder)
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "server.engine", str(config.path), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **QUIET, **LEAN},
            )
        _await(process, folder, None if before is None else before.get("pid"))


def _await(process: subprocess.Popen[bytes], folder: Path, old: object) -> None:
    """Wait until the engine shows where it is, or has ended."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        facts = board.read(folder)
        if facts is not None and facts.get("pid") != old:
            return
        if process.poll() is not None:
            raise ConsiliumError(_last_words(folder))
        time.sleep(0.05)
    raise ConsiliumError(f"{folder}: the engine does not start; see {folder / LOG}")


def _last_words(folder: Path) -> str:
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    line = next((line for line in reversed(lines) if " ERROR " in line), lines[-1] if lines else "it said nothing")
    return line.partition(" ERROR ")[2].partition(" ")[2] or line


def stop(run: RunFacts, patience_s: float = 30.0) -> None:
    """End a run that is being driven: its sites are told, its state stays.

    Raises:
        ConsiliumError: the engine does not end.
    """
    pid, started = int(run.facts["pid"]), run.facts["process"]
    if board.process_start(pid) == started:
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + patience_s
    while board.process_start(pid) == started:
        if time.monotonic() >= end:
            raise ConsiliumError(f"{run.folder}: the engine (process {pid}) does not end; see {run.folder / LOG}")
        time.sleep(0.05)


def follow(folder: Path, show: Callable[[Mapping[str, Any]], None]) -> str:
    """Show where a run is until its engine has ended, and return its status."""
    while True:
        facts = board.read(folder) or {}
        show(facts)
        if facts.get("status") != "running":
            return str(facts.get("status", "interrupted"))
        time.sleep(0.2)
