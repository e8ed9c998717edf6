"""Decoding in processes of their own: capped in memory and time, replaced when they die, never believed.

Each process has a file in work and one waiting, so that none is idle while its answer is read. A file whose process
died is tried once more in a fresh one, for it may have been the machine's fault; then it is in quarantine as
`crashed`. A file that takes longer than its time is `timeout`. The file that waited behind it goes to the next
process: nothing is lost.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from client.image import MAX_FRAME_BYTES
from client.records import RECORD, Entry, unpack
from client.worker import LENGTH, SIZE, Task
from common.errors import ConsiliumError

DEPTH = 2
_ROOT = Path(__file__).resolve().parents[1]
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    # Else glibc gives an image's memory back, and the kernel clears it anew, several times a file.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}


@dataclass(frozen=True)
class Limits:
    """What one decoding process may take."""

    memory: int = 3 * 2**30  # bytes of address space
    start_s: float = 120.0  # seconds until it is ready
    base_s: float = 20.0  # seconds for a file,
    bytes_per_s: float = 2e6  # and one more for so many bytes that it asks for
    deaths: int = 3  # processes in a row that end before they are ready: then the machine is at fault


@dataclass(frozen=True)
class Read:
    """What became of one file."""

    number: int  # its place in the sequence asked for
    entry: Entry
    pixels: NDArray[np.uint8] | None = None  # (C, S, S)


@dataclass
class _Job:
    number: int
    path: bytes
    tries: int = 0


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    source: int  # where it answers
    sink: int  # where it reads names
    jobs: deque[_Job] = field(default_factory=deque)
    received: bytearray = field(default_factory=bytearray)
    ready: bool = False
    asked: bool = False  # it has said what the file in work asks for
    deadline: float = 0.0

    def send(self, content: bytes) -> bool:
        """Hand over a message; return whether the process still reads."""
        try:
            os.write(self.sink, LENGTH.pack(len(content)) + content)
        except OSError:
            return False
        return True


class Pool:
    """Processes that read image files.

    Args:
        task: what is done with each file.
        workers: processes; None: one a core.
        limits: of each process.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> from client.identity import Identity
        >>> from common.presets import GENERIC
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> Image.new("L", (8, 8), 7).save(path)
        >>> with Pool(Task(Identity(bytes(32)), GENERIC, 16, frozenset()), workers=1) as pool:
        ...     [(read.entry.code, read.pixels.shape) for read in pool.read([path])]
        [('', (1, 16, 16))]
    """

    def __init__(self, task: Task, workers: int | None = None, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._task = task
        self._count = workers or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._deaths = 0
        self.started = 0

    @property
    def alive(self) -> int:
        """The processes that there are now; `started` counts those that there have been."""
        return len(self._workers)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()

    def read(self, paths: Sequence[Path]) -> Iterator[Read]:
        """Yield what became of each file, in the order in which they are done; to be read to its end.

        Raises:
            ConsiliumError: decoding processes cannot be started.
        """
        waiting = deque(_Job(number, os.fsencode(path.absolute())) for number, path in enumerate(paths))
        while waiting or any(worker.jobs for worker in self._workers):
            self._fill(waiting)
            speaking: list[_Worker] = [key.data for key, _ in self._selector.select(self._patience())]
            overdue = self._overdue(speaking)  # before the caller has its turn, which may take long
            for worker in speaking:
                content = os.read(worker.source, 2**20)
                worker.received += content
                yield from self._answers(worker)
                if not content:
                    yield from self._died(worker, waiting)
            for worker in overdue:
                yield from self._late(worker, waiting)

    def _fill(self, waiting: deque[_Job]) -> None:
        while len(self._workers) < min(self._count, len(waiting) + len(self._workers)):
            self._start()
        for _ in range(DEPTH):
            for worker in self._workers:
                if waiting and len(worker.jobs) < DEPTH and worker.send(waiting[0].path):
                    if not worker.jobs and worker.ready:
                        worker.deadline = time.monotonic() + self._limits.base_s
                    worker.jobs.append(waiting.popleft())

    def _start(self) -> None:
        names, answers = os.pipe(), os.pipe()
        environment = {**os.environ, **_QUIET, "PYTHONPATH": str(_ROOT)}
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-P", "-m", "client.worker", str(names[0]), str(answers[1])],
            pass_fds=(names[0], answers[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",  # a folder named like a module beside the data must not be imported
            env=environment,
        )
        os.close(names[0])
        os.close(answers[1])
        worker = _Worker(process, answers[0], names[1], deadline=time.monotonic() + self._limits.start_s)
        worker.send(SIZE.pack(self._limits.memory))
        worker.send(self._task.text())
        self._workers.append(worker)
        self.started += 1
        self._selector.register(worker.source, selectors.EVENT_READ, worker)

    def _patience(self) -> float:
        """Return the seconds until the first deadline."""
        ends = [worker.deadline for worker in self._workers if worker.jobs or not worker.ready]
        return max(0.0, min(ends, default=0.0) - time.monotonic())

    def _answers(self, worker: _Worker) -> Iterator[Read]:
        """Yield the answers that have arrived whole; a process that talks nonsense is ended."""
        while worker.received:
            kind = worker.received[:1]
            if kind == b"H" and not worker.ready:
                del worker.received[:1]
                worker.ready, self._deaths = True, 0
                worker.deadline = time.monotonic() + self._limits.base_s
            elif kind == b"A" and worker.ready and worker.jobs and not worker.asked:
                if len(worker.received) < 1 + SIZE.size:
                    return
                asked = SIZE.unpack(worker.received[1 : 1 + SIZE.size])[0]
                del worker.received[: 1 + SIZE.size]
                if asked > 2 * MAX_FRAME_BYTES:
                    worker.process.kill()
                    return
                worker.asked = True
                worker.deadline = time.monotonic() + self._limits.base_s + asked / self._limits.bytes_per_s
            elif kind == b"R" and worker.ready and worker.jobs:
                read = self._record(worker)
                if read is None:
                    return
                yield read
            else:
                worker.process.kill()
                return

    def _record(self, worker: _Worker) -> Read | None:
        """Return one answer, None as long as it has not arrived whole."""
        end = 1 + RECORD.itemsize
        if len(worker.received) < end:
            return None
        try:
            entry = unpack(np.frombuffer(bytes(worker.received[1:end]), RECORD)[0])
        except ValueError:
            worker.process.kill()
            return None
        shape = (3 if entry.kind == "colour" else 1, self._task.size, self._task.size)
        length = 0 if entry.code else int(np.prod(shape))
        if len(worker.received) < end + length:
            return None
        pixels = np.frombuffer(bytes(worker.received[end : end + length]), np.uint8).reshape(shape) if length else None
        del worker.received[: end + length]
        worker.asked, worker.deadline = False, time.monotonic() + self._limits.base_s
        return Read(worker.jobs.popleft().number, entry, pixels)

    def _died(self, worker: _Worker, waiting: deque[_Job]) -> Iterator[Read]:
        self._end(worker)
        if not worker.ready:
            self._deaths += 1
            if self._deaths >= self._limits.deaths:
                raise ConsiliumError(
                    "the processes that decode images end before they are ready; look at free memory, at limits on "
                    f"processes, and at what `{sys.executable} -P -m client.worker 0 1` says"
                )
            waiting.extendleft(reversed(worker.jobs))
            return
        yield from self._given_up(worker, waiting, "crashed", tries=2)

    def _overdue(self, speaking: Sequence[_Worker]) -> list[_Worker]:
        """Return the processes whose time is up and that have nothing to say."""
        now = time.monotonic()
        late = [w for w in self._workers if now > w.deadline and (w.jobs or not w.ready)]
        return [worker for worker in late if worker not in speaking]

    def _late(self, worker: _Worker, waiting: deque[_Job]) -> Iterator[Read]:
        if worker.ready:
            self._end(worker)
            yield from self._given_up(worker, waiting, "timeout", tries=1)
        else:
            yield from self._died(worker, waiting)

    def _given_up(self, worker: _Worker, waiting: deque[_Job], code: str, tries: int) -> Iterator[Read]:
        """Put the files of an ended process back, but for the one that ended it, if it has had its tries."""
        if worker.jobs:
            culprit = worker.jobs[0]
            culprit.tries += 1
            if culprit.tries >= tries:
                worker.jobs.popleft()
                yield Read(culprit.number, Entry(code))
        waiting.extendleft(reversed(worker.jobs))

    def _end(self, worker: _Worker) -> None:
        self._selector.unregister(worker.source)
        self._workers.remove(worker)
        os.close(worker.sink)
        worker.process.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead file server cannot be ended
            worker.process.wait(5)
        os.close(worker.source)
