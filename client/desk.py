"""Where work waits its turn: one thread does it all, one piece after the other, and nobody waits longer than they want.

Work is named by a key and must be such that doing it twice in a row is doing it once. So whoever asks again for the
key that is at work, or was finished last, gets that work's outcome, and a lost answer is asked for again without harm.

The thread lives as long as the desk: decoding processes die with the thread that starts them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from common.errors import SiteRefusal

QUEUE = 4
"""Pieces of work that may wait behind the one at work."""

KEPT = 2
"""Outcomes that are kept."""

KEEP_S = 900.0
"""Seconds for which an outcome is kept at most."""

Progress = Callable[[str, int, int], None]
"""Told the phase of the work, and how many of how many parts of it are done; 0 of 0: not known."""

Work = Callable[[Progress], bytes]

_log = logging.getLogger("consilium.site")


class Abandoned(BaseException):
    """The desk closes: raised out of a progress, so that long work ends between two parts of it.

    Not an `Exception`, so that nothing on the way takes it for a failure of the work.
    """


@dataclass(frozen=True)
class Finished:
    """The outcome."""

    content: bytes


@dataclass(frozen=True)
class Underway:
    """There is none yet."""

    ticket: str  # the key
    phase: str
    done: int
    total: int


@dataclass(eq=False)
class _Job:
    key: str
    work: Work | None  # None once it is done: it may hold a large request
    content: bytes = b""
    refused: str = ""
    ended: float | None = None


class Desk:
    """Takes work, and hands out what came of it.

    Args:
        queue: pieces of work that may wait.
        keep_s: seconds for which an outcome is kept at most.
    """

    def __init__(self, queue: int = QUEUE, keep_s: float = KEEP_S) -> None:
        self._queue = queue
        self._keep_s = keep_s
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._current: _Job | None = None
        self._finished: deque[_Job] = deque(maxlen=KEPT)
        self._stage = ("", 0, 0)
        self._since = time.time()
        self._last: tuple[str, float] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="desk", daemon=True)
        self._thread.start()

    def ask(self, key: str, work: Work, patience_s: float) -> Finished | Underway:
        """Have work done, or attach to it if it is there already, and wait a while for its outcome.

        Args:
            key: what the work is called; equal keys are the same work.
            work: done by the desk's thread; what it raises becomes a refusal.
            patience_s: seconds to wait.

        Raises:
            SiteRefusal: `busy` if too much is waiting already, `unavailable` if the desk closes, else the code that the
                work was refused with, or `internal`.
        """
        with self._changed:
            job = self._same(key)
            if job is None:
                if len(self._waiting) >= self._queue or self._closing:
                    raise SiteRefusal("unavailable" if self._closing else "busy")
                job = _Job(key, work)
                self._waiting.append(job)
                self._changed.notify_all()
            return self._outcome(job, patience_s)

    def collect(self, key: str, patience_s: float) -> Finished | Underway:
        """Return the outcome of work that was asked for before, or wait a while for it.

        Raises:
            SiteRefusal: `unknown_ticket` if there is no such work or its outcome is no longer kept; else as `ask`.
        """
        with self._changed:
            self._drop_old()
            known = [*self._at_hand(), *self._finished]
            job = next((job for job in known if job.key == key), None)
            if job is None:
                raise SiteRefusal("unknown_ticket")
            return self._outcome(job, patience_s)

    def forget(self) -> None:
        """Drop the outcomes that are kept."""
        with self._changed:
            self._finished.clear()

    def status(self) -> tuple[bool, str, int, int, float]:
        """Return whether there is work, its phase, what of how much is done, and since when (seconds since 1970)."""
        with self._changed:
            return self._current is not None, *self._stage, self._since

    @property
    def last(self) -> tuple[str, float] | None:
        """The phase that the last piece of work ended in, and the seconds that it took; None before the first."""
        return self._last

    def close(self, patience_s: float) -> bool:
        """Take no more work, end what is at work at its next progress, and return whether it ended in time."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def _at_hand(self) -> list[_Job]:
        return [*([self._current] if self._current else ()), *self._waiting]

    def _same(self, key: str) -> _Job | None:
        """Return the work of this name that is to be done, or else that was done last and not refused."""
        self._drop_old()
        job = next((job for job in self._at_hand() if job.key == key), None)
        if job is None and not self._at_hand() and self._finished:
            last = self._finished[-1]
            return last if last.key == key and not last.refused else None
        return job

    def _outcome(self, job: _Job, patience_s: float) -> Finished | Underway:
        self._changed.wait_for(lambda: job.ended is not None or self._closing, patience_s)
        if job.refused:
            raise SiteRefusal(job.refused)
        return Finished(job.content) if job.ended is not None else Underway(job.key, *self._stage)

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._finished and now - (self._finished[0].ended or now) >= self._keep_s:
            self._finished.popleft()

    def _serve(self) -> None:
        while job := self._next():
            try:
                self._do(job)
            except Abandoned:
                return

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._drop_old()  # also when nobody asks
                self._changed.wait(self._keep_s if self._finished else None)
            if self._closing:
                return None
            self._current = self._waiting.popleft()
            self._stage, self._since = ("", 0, 0), time.time()
            return self._current

    def _do(self, job: _Job) -> None:
        content, refused = b"", "internal"
        try:
            assert job.work is not None  # noqa: S101  it was not done yet
            content, refused = job.work(self._progress), ""
        except SiteRefusal as error:
            refused = error.code
        except Abandoned:
            refused = "unavailable"
            raise
        except Exception:  # noqa: BLE001  its text may name a patient: it stays in the site's own log
            with suppress(Exception):  # what cannot be logged must not end the thread
                _log.exception("work failed")
        finally:
            with self._changed:
                job.work, job.content, job.refused, job.ended = None, content, refused, time.monotonic()
                self._last = self._stage[0], time.time() - self._since
                self._current, self._since = None, time.time()
                self._stage = ("", 0, 0)
                self._finished.append(job)
                self._changed.notify_all()

    def _progress(self, phase: str, done: int, total: int) -> None:
        with self._changed:
            if self._closing:
                raise Abandoned
            self._stage = (phase, done, total)
