"""A coordinator and its hospitals as real processes on this machine: set up as people set them up, gone afterwards.

The processes end with the one that set the stage, whatever becomes of it: each supervisor is bound to it, and each
child to its supervisor. What a killed process leaves in the folder of temporary files, the next stage takes away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from client import founding as site_founding
from client import joining
from client import up as site_up
from client.cohort import Cohort
from client.site_config import read_site
from common.errors import ConfigError, ConsiliumError
from common.invitation import write_document
from common.names import plain
from common.supervisor import bound_to, read_state
from server import enrolment
from server import founding as server_founding
from server import up as server_up
from server.control import Control
from server.endpoints import QUIET
from server.server_config import ServerConfig, read_server
from simulations import rehearsed

COORDINATOR = "the coordinator"
"""Stands for it among the names of the sites; none of them can be called so."""

PATIENCE_S = 90.0
"""Seconds that each of the processes has to come up: they import torch one beside the other, and cores are few."""

STOP_S = 20.0
"""Seconds that all processes have to end by themselves."""

PROGRAM = ("-m", "simulations.rehearsed")
"""What a hospital runs."""

AT_ONCE = 8
"""Hospitals that come up at a time: each needs a core for seconds."""

_PREFIX = "consilium-stage-"
_SAID = "said.log"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Places:
    """Where the processes are: all of them on this machine and its loopback, unless something else is said."""

    coordinator: str = "127.0.0.1"  # the address that sites dial, of the host that the stage itself is on
    prefixes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of sites' command lines, by name


HERE = Places()


class Stage:
    """A coordinator and its hospitals, founded and enrolled; `open_stage` makes one.

    Args:
        config: the coordinator's.
        sites: `site.toml` of each hospital, by name.
        places: where their processes are.
    """

    def __init__(self, config: ServerConfig, sites: Mapping[str, Path], places: Places = HERE) -> None:
        self.config = config
        self.sites = dict(sites)
        self._places = places
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, program: Sequence[str] = PROGRAM, environment: Mapping[str, str] | None = None) -> None:
        """Start the supervisor of a hospital, or of the coordinator.

        Args:
            name: of the hospital, or `COORDINATOR`.
            program: what Python is to run for a hospital, in place of an honest one.
            environment: of its processes, besides.
        """
        if name == COORDINATOR:
            command, place = ["-m", "server.up", "up", str(self.config.path)], self.config.path.parent
        else:
            command, place = [*program, "up", str(self.sites[name])], self.sites[name].parent
        with (place / _SAID).open("ab") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603
                [*self._places.prefixes.get(name, ()), sys.executable, "-P", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C comes from here, in order
                env={**os.environ, **QUIET, **(environment or {})},
                preexec_fn=bound_to(os.getpid()),
            )

    def end(self, *names: str) -> None:
        """End supervisors, and with them what they run; without names all of them."""
        ending = [self._processes.pop(name) for name in names or [*self._processes] if name in self._processes]
        for process in ending:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + STOP_S
        for process in ending:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        for process in ending:
            process.kill()
            process.wait()

    def pids(self, name: str) -> dict[str, int]:
        """Return the processes of a hospital (supervisor, daemon, link) or of the coordinator (supervisor, superlink).

        One that is between two starts is left out.
        """
        logs = server_up.logs(self.config) if name == COORDINATOR else site_up.logs(read_site(self.sites[name]))
        state = read_state(logs)
        if state is None or not state.running:
            return {}
        children = {child: facts.pid for child, facts in state.children.items() if facts.pid is not None}
        return {"supervisor": state.pid, **children}

    def connected(self) -> frozenset[str]:
        """Return the hospitals that are connected; none while the coordinator does not answer."""
        with Control(self.config.endpoints) as control:
            if not control.is_up():
                return frozenset()
            return frozenset(node.name for node in control.nodes() if node.status == "online")

    def await_connected(self, names: Sequence[str], progress: Progress | None = None) -> None:
        """Wait until hospitals are connected.

        Raises:
            ConsiliumError: a supervisor has ended, or one is not connected in time.
        """
        end = time.monotonic() + PATIENCE_S * (1 + len(names))
        while missing := sorted(set(names) - self.connected()):
            self._check_running()
            if time.monotonic() >= end:
                raise ConsiliumError(f"{', '.join(missing)}: not connected in time; what was said is in the logs")
            if progress is not None:
                progress("connected", len(names) - len(missing), len(names))
            time.sleep(0.2)

    def keep_logs(self, target: Path) -> None:
        """Copy what the processes said into a folder: a folder each."""
        places = {"coordinator": self.config.path.parent, **{f"site {n}": p.parent for n, p in self.sites.items()}}
        for name, place in places.items():
            for path in place.rglob("*.log"):
                copy = target / name / path.relative_to(place)
                copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copyfile(path, copy)

    def _check_running(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                place = self.config.path if name == COORDINATOR else self.sites[name]
                raise ConsiliumError(f"{name}: {_last_line(place.parent / _SAID)}")


@contextmanager
def open_stage(
    cohorts: Mapping[str, Cohort],
    device: str,
    progress: Progress | None = None,
    logs: Path | None = None,
    places: Places = HERE,
) -> Iterator[Stage]:
    """Set up a coordinator and its hospitals, all of them connected, and take everything away at the end.

    Args:
        cohorts: the examples of each hospital, by name.
        device: what the hospitals compute on.
        progress: told how far it is.
        logs: folder that what the processes said is copied to if the block, or setting up, fails.
        places: where the processes are.

    Raises:
        ConfigError: a hospital cannot have its name.
        ConsiliumError: a process does not come up.
    """
    check_names(cohorts)
    tell = progress or (lambda _phase, _done, _total: None)
    with _root() as root, ExitStack() as stack:
        found = Stage(coordinator(root, places.coordinator), {}, places)
        stack.callback(found.end)
        try:
            found.start(COORDINATOR)
            for done, (name, cohort) in enumerate(cohorts.items()):
                tell("hospitals", done, len(cohorts))
                # Short, whatever the name: the path of a socket has 107 bytes.
                found.sites[name] = hospital(root / "sites" / str(done), found.config, name, cohort, device)
                found.start(name)
                if done >= AT_ONCE:
                    found.await_connected([*cohorts][: done + 1 - AT_ONCE])
            found.await_connected([*cohorts], tell)
            yield found
        except BaseException:
            if logs is not None:
                found.keep_logs(logs)
            raise


def check_names(names: Iterable[str]) -> None:
    """Check that sites can have their names also as processes of their own.

    Raises:
        ConfigError: one cannot.
    """
    for name in names:
        try:
            plain(name)
        except ValueError as error:
            raise ConfigError(f"site {name!r}: {error}; in a rehearsal sites are called as hospitals can be") from None


@contextmanager
def _root() -> Iterator[Path]:
    """Make a folder of temporary files that is held, and take away those that nobody holds any more."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            _sweep(left)
    root = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with (root / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _sweep(left: Path) -> None:
    """Take away what a killed process left.

    Raises:
        OSError: it is held, or none of this user's.
    """
    if left.lstat().st_uid != os.geteuid():
        return
    with (left / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left)


def coordinator(root: Path, host: str = HERE.coordinator) -> ServerConfig:
    """Found a coordinator on ports that nobody uses, at an address of this machine."""
    public, operator = free_ports(2)
    where = f"{host}:{public}"
    return read_server(server_founding.found(root / "coordinator", where, "rehearsal", where, operator).config)


def hospital(place: Path, config: ServerConfig, name: str, cohort: Cohort, device: str) -> Path:
    """Found a hospital, deal it its examples, and enrol it."""
    place.mkdir(parents=True)
    made = site_founding.found(place, name, place, None)
    with made.config.open("a", encoding="utf-8") as file:
        file.write(f'\n[compute]\ndevice = "{device}"\n')
    rehearsed.write(place, cohort)
    invitation, answer = place / "invitation.json", place / "enrolment.json"
    write_document(invitation, enrolment.invite(config, name))
    joining.join(made.config, invitation, answer)
    enrolment.enrol(config, answer)
    return made.config


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return lines[-1].removeprefix("consilium: ") if lines else "ended without a word"


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]
