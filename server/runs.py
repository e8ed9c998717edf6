"""The runs of a coordinator: a folder each, made whole, driven by an engine of its own, found again after anything.

run.toml        the settled run            rounds.jsonl   one line a round        model/       what was learnt
progress.json   where it is (server.board) result.json    written at the end      report.html  for the eyes
state/          what a resumed run goes on from; removed when it is complete
engine.log      what the engine said
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, ConsiliumError, UsageError
from common.files import write_atomic, write_json
from common.logs import event_of
from common.run_config import RunConfig, Task, build
from common.strict import read_toml
from common.supervisor import bound_to
from server import board, private_defaults
from server.endpoints import LEAN, QUIET
from server.enrolment import enrolled, locked
from server.events import Events
from server.server_config import ServerConfig

RUN = "run.toml"
LOG = "engine.log"
LIST = "runs.json"
ENDED = frozenset({"completed", "completed_partial"})
"""States of a run that nothing can go on from."""

STOPPED = "stopped by the coordinator; `consilium server resume` goes on where it was"

START_S = 120.0
"""Seconds that an engine has to show itself: on a machine that may be busy."""

STOP_S = 90.0
"""Seconds that an engine has to end: it tells its sites, and may be waiting for a SuperLink that does not answer."""


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

    A run over real sites needs `[task] labels`: all those that sites use, and for several labels an image
    `kind = "multi-label"`. `[data] preset` and `image_size` have to be those of the sites' own `site.toml`,
    else they refuse; left out, they are the preset `generic` and its size, as they are at a site. `[sites] names` may
    be left out: then every enrolled site takes part, and all have to answer unless `quorum` is lower.

    Raises:
        ConfigError: it cannot be read, lacks what a run over real sites needs, or names a site that is not enrolled.
    """
    values = read_toml(path)
    values.pop("simulation", None)  # a run that was simulated first is a good draft
    plan = build(values, str(path))
    _check_task(plan.task, path)
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
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: [sites] names: got {', '.join(names)}, expected every name once")
    if plan.sites.quorum and plan.sites.quorum > len(names):
        raise ConfigError(f"{path}: [sites] quorum: got {plan.sites.quorum}, expected at most {len(names)}, all sites")
    private_defaults.check(plan)
    sites = plan.sites.model_copy(update={"names": names})
    return plan.model_copy(update={"sites": sites}), plan.task


def _check_task(task: Task, path: Path) -> None:
    least = 1 if task.kind == "multi-label" else 2
    if len(task.labels) < least or len(set(task.labels)) < len(task.labels) or not all(task.labels):
        raise ConfigError(
            f"{path}: [task] labels: got {list(task.labels)}, expected the labels that all sites use, at least {least} "
            'and each once, such as ["normal", "sick"]'
        )
    if task.name and not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,62}", task.name):
        raise ConfigError(
            f"{path}: [task] name: got {task.name!r}, expected up to 63 letters, digits, '.', '_' and '-', for the "
            "run's folder is called after it"
        )


def make_folder(config: ServerConfig, run: RunConfig, folder: Path | None) -> Path:
    """Make a run's folder, whole or not at all.

    Raises:
        UsageError: the folder is in use, or cannot be written.
    """
    known = _listed(config)  # before anything is made: a list that is damaged is told first
    place = folder or next_folder(config.runs, run)
    try:
        if place.is_symlink() or (place.exists() and any(place.iterdir())):
            raise UsageError(f"{place}: the folder is in use; name another, or go on with `consilium server resume`")
        place.parent.mkdir(parents=True, exist_ok=True)
        _move_in(place, run.to_toml().encode())
    except OSError as error:
        raise UsageError(f"{place}: no run can be made there ({error.strerror})") from None
    except UnicodeEncodeError:
        raise UsageError(f"{place!a}: no run can be made there (its name is no UTF-8); name another folder") from None
    _remember(config, [*known, str(place.resolve())])
    return place.resolve()


def _move_in(place: Path, content: bytes) -> None:
    """Make a folder with one file out of sight, and give it its name; an empty one of that name is replaced."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        scratch.chmod(0o755)
        write_atomic(scratch / RUN, content)
        scratch.rename(place)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


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
    _remember(config, [*_listed(config), str(folder.resolve())])


def _remember(config: ServerConfig, folders: list[str]) -> None:
    try:
        write_json(config.state / LIST, list(dict.fromkeys(folders)))
    except OSError as error:
        raise ConsiliumError(f"{config.state / LIST}: cannot be written ({error.strerror})") from None


def _listed(config: ServerConfig) -> list[str]:
    path = config.state / LIST
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        found = None
    if not isinstance(found, list) or not all(isinstance(folder, str) for folder in found):
        raise ConsiliumError(
            f"{path}: damaged, expected a list of folders; remove it: the runs in {config.runs} are found without it"
        )
    return found


def _in_place(root: Path) -> list[str]:
    """Return the folders of runs below the folder of the runs, by age."""
    try:
        found = [path.parent for path in root.glob(f"[!.]*/{RUN}")]  # one with a dot is still being made
        return [str(folder) for folder in sorted(found, key=lambda folder: (folder / RUN).stat().st_mtime)]
    except OSError:  # a run that is being deleted, or none yet
        return []


def runs(config: ServerConfig) -> list[RunFacts]:
    """Return the runs whose folders are still there, the oldest first.

    Raises:
        ConsiliumError: the list of runs is damaged.
    """
    found = map(_facts, map(Path, _folders(config)))
    return [run for run in found if run is not None]


def _folders(config: ServerConfig) -> list[str]:
    """Return the folders of all runs: those that nobody listed, for they were brought from elsewhere, first."""
    listed = _listed(config)
    return [*(folder for folder in _in_place(config.runs) if folder not in listed), *listed]


def _facts(folder: Path) -> RunFacts | None:
    """Return the run of a folder; of one whose plan is damaged, or of another version, all but its fingerprint."""
    try:
        fingerprint = read_plan(folder).fingerprint()
    except ConsiliumError:
        fingerprint = ""
    return RunFacts(folder, fingerprint, board.read(folder) or {}) if (folder / RUN).is_file() else None


def read_plan(folder: Path) -> RunConfig:
    """Return the settled run of a folder.

    Raises:
        ConfigError: it is gone or damaged, or another version wrote it.
    """
    return build(read_toml(folder / RUN), str(folder / RUN))


def ended_runs(config: ServerConfig, but: str) -> tuple[str, ...]:
    """Return the fingerprints of the latest runs that no engine drives, but for one."""
    idle = [run.fingerprint for run in runs(config)[-20:] if run.status != "running" and run.fingerprint]
    return tuple(dict.fromkeys(fingerprint for fingerprint in idle if fingerprint != but))


def active(config: ServerConfig) -> RunFacts | None:
    """Return the run that is being driven, if there is one."""
    return next((run for run in reversed(runs(config)) if run.status == "running"), None)


def interrupted(config: ServerConfig) -> dict[Path, Mapping[str, Any]]:
    """Return the runs whose engine is gone, with what their boards say, the oldest first.

    Raises:
        ConsiliumError: the list of runs is damaged.
    """
    boards = {folder: board.read(folder) or {} for folder in map(Path, _folders(config))}
    return {folder: facts for folder, facts in boards.items() if facts.get("status") == board.INTERRUPTED}


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


def check_idle(config: ServerConfig) -> None:
    """Check that no run is being driven.

    Raises:
        ConsiliumError: one is.
    """
    other = active(config)
    if other is not None:
        raise ConsiliumError(
            f"{other.folder}: this run is being driven; wait for its end, or end it with `consilium server stop`"
        )


def begin(config: ServerConfig, run: RunConfig, folder: Path | None) -> Path:
    """Make the folder of a settled run and start its engine, unless another run is being driven.

    Raises:
        UsageError: the folder is in use, or cannot be written.
        ConsiliumError: another run is being driven, or the engine does not come up.
    """
    with locked(config):  # two that start at a time would each find that there is none
        check_idle(config)
        place = make_folder(config, run, folder)
        _launch(config, place, bound=False)
    return place


def launch(config: ServerConfig, folder: Path, *, bound: bool = False) -> subprocess.Popen[bytes]:
    """Start the engine of a run that has its folder, and return it once it shows where it is.

    Args:
        config: the coordinator.
        folder: the run's.
        bound: whether the engine ends with the process, and the thread, that calls this; else it goes on.

    Raises:
        ConsiliumError: another run is being driven, or the engine does not come up.
    """
    with locked(config):  # two that start at a time would each find that there is none
        check_idle(config)
        return _launch(config, folder, bound=bound)


def go_on(config: ServerConfig, folder: Path) -> None:
    """Start the engine of a run, unless somebody has done so in the meantime.

    Raises:
        ConsiliumError: another run is being driven, or the engine does not come up.
    """
    with locked(config):
        other = active(config)
        if other is None or other.folder != folder:
            check_idle(config)
            _launch(config, folder, bound=False)


def _launch(config: ServerConfig, folder: Path, *, bound: bool) -> subprocess.Popen[bytes]:
    """Start an engine in a session of its own, so that it goes on when the terminal is closed."""
    before = _identity(folder)
    try:
        with (folder / LOG).open("ab") as log:
            said = log.tell()
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "server.engine", str(config.path), str(folder.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **QUIET, **LEAN},
                preexec_fn=bound_to(os.getpid()) if bound else None,
            )
    except OSError as error:
        raise ConsiliumError(f"{folder}: the engine cannot be started ({error.strerror})") from None
    try:
        _await(process, folder, before, said)
    except BaseException:
        if bound:
            process.kill()
            process.wait()
        raise
    return process


def _identity(folder: Path) -> object:
    """Return what tells one engine of a run from the next."""
    facts = board.read(folder) or {}
    return facts.get("pid"), facts.get("process")


def _await(process: subprocess.Popen[bytes], folder: Path, before: object, said: int) -> None:
    """Wait until the engine shows where it is, or has ended."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if _identity(folder) != before:
            return
        if process.poll() is not None:
            raise ConsiliumError(_last_words(folder, said))
        time.sleep(0.05)
    raise ConsiliumError(f"{folder}: the engine does not start; see {folder / LOG}")


def _last_words(folder: Path, since: int) -> str:
    """Return what an engine that ended at once said last, in its log from a place on."""
    try:
        lines = (folder / LOG).read_bytes()[since:].decode("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    errors = [line.partition(" ERROR ")[2].partition(" ")[2] for line in lines if " ERROR " in line]
    errors += [event_of(line) for line in lines if '"level": "ERROR"' in line]
    if errors:
        return errors[-1]
    said = f" ({lines[-1].strip()})" if lines else ""
    return f"{folder}: the engine ended before the run began{said}; see {folder / LOG}"


def settle(folder: Path, status: str, error: str) -> None:
    """Say how a run ended that no engine drives any more.

    Raises:
        OSError: it cannot be written.
    """
    board.settle(folder, status, error)
    Events(folder).add("run_ended", board.count(board.read(folder) or {}, "round"), status=status)


def stop_latest(config: ServerConfig) -> RunFacts | None:
    """End the run that is being driven, or the latest of those that would go on by themselves; None: there is none.

    Raises:
        ConsiliumError: its engine does not end.
    """
    if not any(run.status in ("running", board.INTERRUPTED) for run in runs(config)):
        return None
    with locked(config):  # nobody starts an engine now
        found = active(config)
        waiting = next((run for run in reversed(runs(config)) if run.status == board.INTERRUPTED), None)
        if found is None and waiting is not None:
            settle(waiting.folder, "stopped", STOPPED)
            return waiting
    if found is not None:
        stop(found)
    return found


def stop(run: RunFacts, patience_s: float = STOP_S) -> None:
    """End a run that is being driven: its sites are told, its state stays; nothing happens where it has just ended.

    Raises:
        ConsiliumError: the engine does not end.
    """
    pid, started = int(run.facts["pid"]), run.facts["process"]
    try:
        if board.process_start(pid) == started:
            os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended by itself just now
    except PermissionError:
        raise ConsiliumError(
            f"{run.folder}: its engine (process {pid}) belongs to another user, who can end it"
        ) from None
    end = time.monotonic() + patience_s
    while board.process_start(pid) == started:
        if time.monotonic() >= end:
            raise ConsiliumError(f"{run.folder}: the engine (process {pid}) does not end; see {run.folder / LOG}")
        time.sleep(0.05)


def follow(folder: Path, show: Callable[[Mapping[str, Any]], None], kept: Callable[[], bool] = lambda: False) -> str:
    """Show where a run is until it has ended, and return its status; `gone` where its folder was deleted.

    Args:
        folder: the run's.
        show: told what its board says.
        kept: whether somebody starts the engine of an interrupted run anew, so that it has not ended.
    """
    while True:
        facts = board.read(folder)
        if facts is None:
            return board.INTERRUPTED if folder.is_dir() else "gone"
        show(facts)
        if facts["status"] != "running" and not (facts["status"] == board.INTERRUPTED and kept()):
            return str(facts["status"])
        time.sleep(0.2)
