"""What processes hold, read from /proc while they run: memory, open files, threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment."""

    rss: int  # resident bytes
    pss: int  # the same, pages that others use too in equal shares
    files: int
    threads: int

    def __add__(self, other: Held) -> Held:
        """Return the sum."""
        return Held(self.rss + other.rss, self.pss + other.pss, self.files + other.files, self.threads + other.threads)


@dataclass(frozen=True)
class Sample:
    """What each of some processes held at one time."""

    at: float  # seconds, monotonic
    held: Mapping[str, Held]

    @property
    def total(self) -> Held:
        """All of them together."""
        return sum(self.held.values(), Held(0, 0, 0, 0))


def held(pid: int) -> Held | None:
    """Return what a process holds, None where it is gone."""
    place = _PROC / str(pid)
    try:
        status = _fields(place / "status")
        rolled = _fields(place / "smaps_rollup")
        files = len(list((place / "fd").iterdir()))
    except (OSError, ValueError):
        return None
    if "VmRSS" not in status:  # it has ended and waits for its parent
        return None
    return Held(status["VmRSS"] * 1024, rolled["Pss"] * 1024, files, status["Threads"])


def _fields(path: Path) -> dict[str, int]:
    """Return the lines of a file that name a number."""
    pairs = (line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {words[0][:-1]: int(words[1]) for words in pairs if len(words) > 1 and words[1].isdecimal()}


@contextmanager
def watched(pids: Callable[[], Mapping[str, int]], every_s: float) -> Iterator[list[Sample]]:
    """Sample processes until the end of the block; the list grows meanwhile.

    Args:
        pids: the processes by name, asked anew for each sample.
        every_s: seconds between two samples.
    """
    samples: list[Sample] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(every_s):
            found = {name: held(pid) for name, pid in pids().items()}
            samples.append(Sample(time.monotonic(), {name: one for name, one in found.items() if one is not None}))

    thread = threading.Thread(target=look, name="watch")
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
