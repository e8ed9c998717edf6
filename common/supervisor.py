"""Keeps a few processes of this project running, and lets none of them outlive it.

One thread does everything: it waits for output, for the end of a child and for signals. That is not only simpler: the
kernel's promise to end a child with its parent (`PR_SET_PDEATHSIG`) is about the thread that started it, and running
code between fork and exec is safe only where there is no other thread.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

from common.errors import ConfigError, ConsiliumError, UsageError
from common.files import write_json
from common.locks import exclusive, holder
from common.logs import event_of
from common.rotated import Rotated

FIRST_DELAY = 1.0
"""Seconds before the first restart; doubled by each that follows."""

LAST_DELAY = 30.0
HEALTHY = 60.0
"""Seconds after which a child counts as well, and its next restart as the first."""

PATIENCE = 10.0
"""Seconds that children have to end by themselves."""

_MISCONFIGURED = UsageError.exit_code
_PR_SET_PDEATHSIG = 1
_CHUNK = 65536
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Child:
    """A process to keep running."""

    name: str  # also that of its log
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # on top of the supervisor's own


@dataclass(frozen=True)
class ChildState:
    """What is known of a child."""

    pid: int | None  # None: between two starts
    started: float | None  # seconds since 1970
    restarts: int
    last_exit: int | None  # exit code; of a signal its negative number


@dataclass(frozen=True)
class SupervisorState:
    """What a supervisor wrote of itself, and whether it is still there."""

    running: bool
    pid: int
    started: float
    children: Mapping[str, ChildState]


def supervise(
    children: Sequence[Child], logs: Path, *, patience: float = PATIENCE, report: Callable[[str], None] | None = None
) -> None:
    """Run children until SIGTERM or SIGINT; call it from the main thread of a process without others.

    Args:
        children: what to run; each writes to `logs`/NAME.log.
        logs: folder of the logs, of the lock `supervisor.lock` and of `supervisor.json`; made if absent.
        patience: seconds that the children have to end when asked, before they are killed.
        report: told of every start and end.

    Raises:
        ConfigError: a child ended with exit code 2; the message is its last line on standard error.
        ConsiliumError: another supervisor runs on the folder, or the folder cannot be made.
    """
    try:
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConsiliumError(f"{logs}: the folder of the logs cannot be made ({error.strerror})") from None
    names = " and ".join(child.name for child in children)
    with exclusive(logs / "supervisor.lock", f"a supervisor of {names}"):
        _Supervisor(children, logs, patience, report or (lambda _: None)).run()


def read_state(logs: Path) -> SupervisorState | None:
    """Return what the supervisor of a folder wrote last, or None where there never was one.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        value: Any = json.loads((logs / "supervisor.json").read_bytes())
        children = {name: ChildState(**state) for name, state in value["children"].items()}
        return SupervisorState(holder(logs / "supervisor.lock") is not None, value["pid"], value["started"], children)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OSError(f"{logs / 'supervisor.json'} is damaged") from None


class _Process:
    """A child: its process while there is one, its log, and when to start it again."""

    def __init__(self, child: Child, logs: Path) -> None:
        self.child = child
        self.log = Rotated(logs / f"{child.name}.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.due = 0.0  # monotonic time of the next start
        self.last_line = ""
        self._open: dict[int, bytes] = {}  # by pipe, what has no end of line yet
        self._tail = b""
        self._delay = FIRST_DELAY
        self._began = 0.0
        self._started: float | None = None
        self._restarts = -1
        self._last_exit: int | None = None

    def start(self) -> None:
        """Start the process; one that cannot be started counts as one that ended at once."""
        self._began, self._started = time.monotonic(), time.time()
        self._restarts += 1
        self._tail, self.last_line = b"", ""
        try:
            self.process = subprocess.Popen(  # noqa: S603  argv is ours
                self.child.argv,
                env={**os.environ, **self.child.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a group of its own: a terminal's Ctrl-C comes from here, in order
                preexec_fn=bound_to(os.getpid()),  # safe: there is no other thread, see above
            )
        except OSError as error:
            raise ConsiliumError(f"{self.child.argv[0]}: cannot be started ({error.strerror})") from None
        for pipe in self.pipes():
            os.set_blocking(pipe.fileno(), False)

    def pipes(self) -> tuple[IO[bytes], ...]:
        """Return standard output and standard error."""
        if self.process is None or self.process.stdout is None or self.process.stderr is None:
            return ()
        return self.process.stdout, self.process.stderr

    def read(self, pipe: IO[bytes]) -> bool:
        """Take in what a pipe holds; False at its end."""
        try:
            content = os.read(pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return True
        self._log(pipe.fileno(), content)
        if self.process is not None and pipe is self.process.stderr:
            self._tail = (self._tail + content)[-_CHUNK:]
        return bool(content)

    def _log(self, pipe: int, content: bytes) -> None:
        """Write whole lines alone, so that none is cut in two where the log is put aside."""
        whole, end, rest = (self._open.pop(pipe, b"") + content).rpartition(b"\n")
        if content and len(rest) < _CHUNK:
            self._open[pipe] = rest
            rest = b""
        self.log.write(whole + end + rest)

    def ended(self) -> bool:
        """Return whether the process has ended, without taking its number away from its group."""
        if self.process is None:
            return False
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None

    def bury(self) -> int:
        """Take in the rest of its output, end what it left behind, and return its exit code."""
        process = self.process
        assert process is not None  # noqa: S101  only called of one that ended
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the number is still ours: it was not waited for yet
        code = process.wait()
        for pipe in self.pipes():
            while _readable(pipe) and self.read(pipe):
                pass
            self._log(pipe.fileno(), b"")
            pipe.close()
        lines = self._tail.decode("utf-8", "replace").strip().splitlines()
        self.last_line = lines[-1].strip() if lines else ""
        self._plan(code)
        return code

    def state(self) -> ChildState:
        """Return what is known of it."""
        pid = self.process.pid if self.process else None
        return ChildState(pid, self._started, max(self._restarts, 0), self._last_exit)

    def _plan(self, code: int) -> None:
        now = time.monotonic()
        if now - self._began >= HEALTHY:
            self._delay = FIRST_DELAY
        self.process, self._last_exit, self.due = None, code, now + self._delay
        self._delay = min(2 * self._delay, LAST_DELAY)


class _Supervisor:
    def __init__(self, children: Sequence[Child], logs: Path, patience: float, report: Callable[[str], None]) -> None:
        self._processes = [_Process(child, logs) for child in children]
        self._path = logs / "supervisor.json"
        self._patience = patience
        self._report = report
        self._started = time.time()
        self._stopping = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        with self._signals(), self._selector:
            try:
                while not self._stopping:
                    self._start_due()
                    self._wait()
                    self._bury()
            finally:
                self._stop()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let signals wake the loop, and put everything back afterwards."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(reader, selectors.EVENT_READ)
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
            signal.SIGTERM: self._end,
            signal.SIGINT: self._end,
            signal.SIGCHLD: lambda _number, _frame: None,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _start_due(self) -> None:
        for entry in self._processes:
            if entry.process is None and time.monotonic() >= entry.due:
                entry.start()
                for pipe in entry.pipes():
                    self._selector.register(pipe, selectors.EVENT_READ, partial(entry.read, pipe))
                self._report(f"{entry.child.name}: started as process {entry.state().pid}")
                self._write()

    def _wait(self, limit: float = 30.0) -> None:
        """Wait for output, a signal, or the next start."""
        waiting = [entry.due - time.monotonic() for entry in self._processes if entry.process is None]
        for key, _ in self._selector.select(max(0.0, min([limit, *waiting]))):
            if key.data is None:
                with suppress(BlockingIOError):
                    os.read(key.fd, _CHUNK)
            elif not key.data():
                self._selector.unregister(key.fileobj)

    def _bury(self) -> None:
        """See to children that have ended.

        Raises:
            ConfigError: one says that it is configured wrongly: a restart would not help.
        """
        for entry in self._processes:
            if not entry.ended():
                continue
            for pipe in entry.pipes():
                with suppress(KeyError):
                    self._selector.unregister(pipe)
            code = entry.bury()
            self._write()
            if code == _MISCONFIGURED and not self._stopping:
                said = event_of(entry.last_line) or "no word on standard error"
                raise ConfigError(f"{entry.child.name} cannot run as configured: {said}")
            if not self._stopping:
                delay = max(0.0, entry.due - time.monotonic())
                self._report(f"{entry.child.name}: ended with exit code {code}; starts again in {delay:.0f} s")

    def _stop(self) -> None:
        """Ask all children to end, and kill those that do not."""
        self._stopping = True
        running = [entry.process for entry in self._processes if entry.process]
        for process in running:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._patience
        while self._alive() and time.monotonic() < until:
            for entry in self._processes:
                entry.due = until  # what has ended is not waited for
            self._wait(max(0.0, until - time.monotonic()))
            self._bury()
        for process in self._alive():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        while self._alive():
            self._wait(0.1)
            self._bury()
        for entry in self._processes:
            entry.log.close()

    def _alive(self) -> list[subprocess.Popen[bytes]]:
        return [entry.process for entry in self._processes if entry.process]

    def _write(self) -> None:
        children = {entry.child.name: asdict(entry.state()) for entry in self._processes}
        with suppress(OSError):  # a full disk must stop no work
            write_json(self._path, {"pid": os.getpid(), "started": self._started, "children": children})


def bound_to(parent: int) -> Callable[[], None]:
    """Return what makes the kernel kill a new process when its parent ends, even if that happened already."""

    def bind() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return bind


def _readable(pipe: IO[bytes]) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(0))
