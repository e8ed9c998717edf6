"""The ledger of spent privacy: what a site has shown of its patients through noise, over all runs and restarts.

An append-only chain of lines (`client.chain`), one file for a site. A run says what it will take at most (`plan`),
takes it before noise is drawn (`reserve`), and notes what leaves (`spend`). What is reserved counts, whether or not it
left: a crash in between can lose a round, never an epsilon.

The chain shows every change but one: that its end was cut off, or an older copy put back. Against that there are
witnesses, entries known by number and hash: the file `<ledger>.head` beside it, written after each entry, and those
that the caller noted elsewhere, such as in the audit trail.

No text gets in: digests, counts, figures of noise, and words of a closed form.
"""

from __future__ import annotations

import math
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from client import chain
from client.chain import TORN
from client.spending import TRAINING, Book, Departure, Digest, Opening, Plan, Reservation, RunSpent, check
from common import privacy
from common.errors import ConsiliumError
from common.files import write_atomic
from common.privacy import Release
from common.strict import Section

__all__ = [
    "BudgetExceeded",
    "CohortChanged",
    "Entry",
    "Ledger",
    "LedgerError",
    "Plan",
    "RunSpent",
    "Witness",
    "check_budget",
    "statement",
]

Witness = tuple[int, str]
"""Number and SHA-256 of an entry that is known to have been there."""

_LIMIT = 4096  # bytes; no head is that long


class LedgerError(ConsiliumError):
    """The ledger is damaged, foreign, rolled back, or cannot be written; nothing private may leave without it."""

    code: ClassVar[str] = "ledger"


class CohortChanged(LedgerError):
    """A run that is planned for a cohort comes back with another."""

    code: ClassVar[str] = "cohort_changed"


class BudgetExceeded(LedgerError):
    """A run would take more than the hospital allows for its cohort."""

    code: ClassVar[str] = "budget"


@dataclass(frozen=True)
class Entry:
    """One entry."""

    number: int  # from 1
    time: str  # UTC, ISO 8601 to the second
    kind: str  # a key of `client.spending.KINDS`
    facts: chain.Facts
    previous: str
    sha256: str


class _Head(Section):
    """The last entry, as the file beside the ledger knows it."""

    number: int = Field(ge=0)
    sha256: Digest


class Ledger:
    """One site's ledger; safe to call from several threads, and beside other processes. Made by `open` and `read`."""

    def __init__(self, path: Path, owner: str, now: Callable[[], float], *, writable: bool) -> None:
        Opening(owner=owner)  # ValueError where it is no digest
        self._path, self._owner, self._now, self._writable = path, owner, now, writable
        self._mutex = threading.RLock()
        self._entries: list[Entry] = []
        self._book = Book()
        self._end = chain.End()
        self._stamp: tuple[int, ...] = ()  # by which the file is known not to have changed

    @classmethod
    def open(
        cls, path: Path, owner: str, *, witnesses: Iterable[Witness] = (), now: Callable[[], float] = time.time
    ) -> Ledger:
        """Open a site's ledger to write in it; one that is not there is begun.

        Args:
            path: the file; its head lies beside it.
            owner: 64 hex digits that stand for the cohort's site.
            witnesses: entries that must be there.
            now: seconds since 1970.

        Raises:
            LedgerError: it is damaged, of another cohort, older than a witness, missing though a witness knows it, or
                cannot be written.
        """
        ledger, witnesses = cls(path, owner, now, writable=True), tuple(witnesses)
        known = any(number for number, _ in (*witnesses, *ledger._read_head()))
        with ledger._writing(create=not known) as handle:
            head = ledger._read_head()  # again: before the lock, another process may have been writing it
            ledger._trust(witnesses, head)
            if ledger._book.owner is None:
                ledger._append(handle, "open", Opening(owner=owner))
            elif [ledger.head] != head:  # a crash came between an entry and its head
                ledger._write_head()
        return ledger

    @classmethod
    def read(cls, path: Path, owner: str, *, witnesses: Iterable[Witness] = ()) -> Ledger:
        """Return a ledger to look at; nothing is written, and where there is none yet, it is empty.

        Raises:
            LedgerError: as `open`, or it cannot be read.
        """
        ledger = cls(path, owner, time.time, writable=False)
        head = ledger._read_head()
        try:
            with chain.opened(path, os.O_RDONLY) as handle:
                ledger._load(handle)
                head = ledger._read_head()  # again: before the lock, another process may have been writing it
        except FileNotFoundError:
            pass  # none yet, or a witness knows better
        except OSError as error:
            raise LedgerError(f"{path}: the ledger cannot be read ({error.strerror})") from None
        ledger._trust(witnesses, head)
        return ledger

    @property
    def head(self) -> Witness:
        """Number of entries, and hash of the last."""
        with self._mutex:
            return len(self._entries), self._end.head

    @property
    def owner(self) -> str:
        """The digest that stands for the cohort's site."""
        return self._owner

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first."""
        with self._mutex:
            return tuple(self._entries)

    def plan(
        self, run: str, *, patients: int, cohort: str, unit: str, delta: float, releases: Sequence[Release]
    ) -> None:
        """Note what a run will take at most; the same again is no new entry, other releases take the place of the old.

        Args:
            run: its fingerprint.
            patients: how many it learns from.
            cohort: 64 hex digits of who they are.
            unit: whom the guarantee is for, `patient`.
            delta: δ of its guarantee.
            releases: all of its rounds, and whatever else it shows through noise.

        Raises:
            CohortChanged: it is planned for other patients.
            LedgerError: the ledger cannot be written.
            ValueError: a value is not of its kind.
        """
        plan = Plan(run=run, cohort=cohort, patients=patients, unit=unit, delta=delta, releases=tuple(releases))
        with self._writing() as handle:
            old = self.planned(run)
            if old and (old.cohort, old.patients) != (cohort, patients):
                raise CohortChanged(
                    f"run {run[:12]} was planned for another cohort, of {old.patients} patients, and now comes with "
                    f"{patients}; a run keeps its patients: bring them back, or begin a new run"
                )
            if old != plan:
                self._append(handle, "plan", plan)

    def planned(self, run: str) -> Plan | None:
        """Return what a run said it will take."""
        with self._mutex:
            found = self._book.runs.get(run)
            return found.plan if found else None

    def reserve(self, run: str, purpose: str, releases: Sequence[Release]) -> int:
        """Take privacy for what a run is about to draw, on disk when this returns, and return the entry's number.

        Args:
            run: its fingerprint.
            purpose: a word, such as `round-3`.
            releases: what will be drawn.

        Raises:
            LedgerError: the ledger cannot be written.
            ValueError: a value is not of its kind.
        """
        value = Reservation(run=run, purpose=purpose, releases=tuple(releases))
        with self._writing() as handle:
            return self._append(handle, "reserve", value)

    def spend(self, number: int, sha256: str) -> None:
        """Note that what was reserved leaves now; the same bytes may leave again.

        Args:
            number: what `reserve` returned.
            sha256: of the bytes.

        Raises:
            LedgerError: other bytes have left for this reservation, or the ledger cannot be written.
            ValueError: there is no such reservation.
        """
        value = Departure(reserved=number, bytes_sha256=sha256)
        with self._writing() as handle:
            left = self._book.departed(number)
            if left is None:
                self._append(handle, "spend", value)
            elif left != sha256:
                raise LedgerError(
                    f"{self._path}: entry {number} left as {left[:12]}, and now would as {sha256[:12]}; "
                    "what is drawn anew needs a reservation of its own"
                )

    def releases(self, run: str | None = None, population: str = TRAINING) -> tuple[Release, ...]:
        """Return everything reserved of some patients, by one run or by all."""
        mine = (one for one in self.runs() if run in (None, one.fingerprint))
        return tuple(release for one in mine for release in one.of(population))

    def epsilon(self, delta: float, run: str | None = None) -> float:
        """Return the ε at δ of everything reserved, by one run or by all."""
        return privacy.epsilon(self.releases(run), delta)

    @property
    def delta(self) -> float | None:
        """The smallest δ of any plan, None where there is none."""
        with self._mutex:
            return min(self._book.deltas, default=None)

    def runs(self) -> tuple[RunSpent, ...]:
        """Return what each run took, in the order of their first entries."""
        with self._mutex:
            return tuple(
                replace(run, reservations=dict(run.reservations), departed=dict(run.departed))
                for run in self._book.runs.values()
            )

    @contextmanager
    def _writing(self, *, create: bool = False) -> Iterator[int]:
        """Hold the file for this process alone, with all that others wrote taken in.

        Raises:
            LedgerError: it cannot be opened or written, or no longer holds.
        """
        if not self._writable:
            raise LedgerError(f"{self._path}: the ledger was opened to be looked at, and cannot be written")
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0)
        try:
            with self._mutex, chain.opened(self._path, flags) as handle:
                if self._stamp != _stamp(handle):
                    self._load(handle)
                yield handle
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not create:
                raise LedgerError(
                    f"{self._path}: the ledger is gone, though it is known to have been there; bring it back from your "
                    "backup, with all its entries: what was spent stays spent"
                ) from None
            raise LedgerError(
                f"{self._path}: the ledger cannot be written ({error.strerror}); nothing private leaves before it can"
            ) from None

    def _load(self, handle: int) -> None:
        """Read the whole file, which must still hold what was known of it."""
        found = chain.parse(chain.read(handle), check)
        if found.wrong is not None:
            raise LedgerError(
                f"{self._path}: line {found.wrong} does not hold: it was changed, or a line before it taken out; keep "
                "the file as it is, and bring the newest whole one back from your backup"
            )
        entries: list[Entry] = []
        book = Book()
        self._take(found.entries, entries, book)
        if book.owner not in (None, self._owner):
            raise LedgerError(
                f"{self._path}: this is the ledger of another cohort; bring back the site's own, or the secret that "
                "it was begun with"
            )
        self._bear_out([self.head], entries)  # what is known stays known until a file that has it comes back
        self._entries, self._book, self._end, self._stamp = entries, book, found.end, _stamp(handle)

    def _take(self, found: Iterable[chain.Entry], entries: list[Entry], book: Book) -> None:
        """Number entries and add them up."""
        for number, entry in enumerate(found, len(entries) + 1):
            try:
                book.take(number, entry)
            except ValueError as error:
                raise LedgerError(
                    f"{self._path}: entry {number} contradicts those before it ({error}); bring the newest whole one "
                    "back from your backup"
                ) from None
            entries.append(Entry(number, entry.time, entry.event, entry.facts, entry.previous, entry.sha256))

    def _append(self, handle: int, event: str, value: Section) -> int:
        """Write an entry, then its head, and return its number."""
        facts = value.model_dump(mode="json")
        content, entries = chain.continuation(self._end, event, facts, datetime.fromtimestamp(self._now(), UTC))
        chain.write(handle, content)
        chain.sync(self._path.parent)
        self._take(entries, self._entries, self._book)
        self._end = chain.End(entries[-1].sha256)
        self._write_head()
        self._stamp = _stamp(handle)
        return len(self._entries)

    def _bear_out(self, known: Iterable[Witness], entries: Sequence[Entry]) -> None:
        """Check that all that is known of the ledger is in it.

        Raises:
            LedgerError: it is not.
        """
        for number, sha256 in known:
            if not 0 <= number <= len(entries) or (number and entries[number - 1].sha256 != sha256):
                raise LedgerError(
                    f"{self._path}: the ledger was cut short or an older one put back: it has {len(entries)} entries, "
                    f"and entry {number} ({sha256[:12]}) is known to have been there; bring the newest one back from "
                    "your backup: what was spent stays spent"
                )

    def _trust(self, witnesses: Iterable[Witness], head: Sequence[Witness]) -> None:
        """Check what was read against the witnesses and the head.

        Raises:
            LedgerError: it is not what they know, or the head is gone, which is there before a run takes anything.
        """
        self._bear_out((*witnesses, *head), self._entries)
        if not head and any(entry.kind not in ("open", TORN) for entry in self._entries):
            raise LedgerError(
                f"{self._head_path}: missing, and it says how long the ledger was; bring it back from your backup, or, "
                f"if you know that the ledger ends where it did, with entry {len(self._entries)}, write it: "
                f"echo '{_head_line(self.head)}' > {shlex.quote(str(self._head_path))}"
            )

    @property
    def _head_path(self) -> Path:
        return self._path.with_name(f"{self._path.name}.head")

    def _read_head(self) -> list[Witness]:
        """Return what the head knows, nothing where there is none."""
        try:
            with chain.opened(self._head_path, os.O_RDONLY) as handle:
                found = _Head.model_validate_json(os.read(handle, _LIMIT))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LedgerError(f"{self._head_path}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise LedgerError(
                f"{self._head_path}: damaged, expected number and hash of the ledger's last entry; "
                "bring it back from your backup, with the ledger"
            ) from None
        return [(found.number, found.sha256)]

    def _write_head(self) -> None:
        write_atomic(self._head_path, f"{_head_line(self.head)}\n".encode(), mode=0o600)


def check_budget(
    ledger: Ledger,
    releases: Sequence[Release],
    run: str,
    max_epsilon: float | None,
    max_delta: float | None,
    delta: float,
) -> None:
    """Refuse a run that would take more than the hospital allows for its cohort.

    What counts is everything that other runs reserved, and of this run what it plans or what it reserved, whichever
    costs more; all at `max_delta`, or where there is none at the smallest δ of any plan, this one's included.

    Args:
        ledger: of the cohort.
        releases: what the run takes at most.
        run: its fingerprint.
        max_epsilon: the budget, None for no limit.
        max_delta: its δ, and the largest that a run may have; None for no limit.
        delta: δ of the run.

    Raises:
        BudgetExceeded: it would.
        ValueError: a value is out of its range.
    """
    if max_delta is not None and delta > max_delta:
        raise BudgetExceeded(f"the run's delta is {delta:g}, allowed {max_delta:g}; ask for a smaller one")
    if max_epsilon is None:
        return
    at = _budget_delta(ledger, max_delta, delta)
    runs = ledger.runs()
    others = [release for one in runs if one.fingerprint != run for release in one.releases]
    taken = [release for one in runs if one.fingerprint == run for release in one.releases]
    whole = max(privacy.epsilon([*others, *releases], at), privacy.epsilon([*others, *taken], at))
    if whole > max_epsilon:
        before = privacy.epsilon(others, at)
        raise BudgetExceeded(
            f"the run would bring the cohort to epsilon {_shown(whole)} at delta {at:g}, allowed {max_epsilon:g}; "
            f"other runs took {_shown(before)} of it; ask for fewer rounds or more noise, or allow more"
        )


def statement(ledger: Ledger, max_epsilon: float | None, max_delta: float | None) -> dict[str, Any]:
    """Return the ledger as JSON: what every run took at its own δ, all of them together, and what is left.

    Where there is neither a budget nor a plan there is no δ, and so no ε: None. The same goes for `epsilon_prv` where
    it cannot be computed.
    """
    number, sha256 = ledger.head
    delta = max_delta if max_delta is not None else ledger.delta
    total = _cost(ledger.releases(), delta)
    left = None if max_epsilon is None or total["epsilon"] is None else max(0.0, max_epsilon - total["epsilon"])
    return {
        "entries": number,
        "sha256": sha256,
        "owner": ledger.owner,
        "runs": [_told(run, delta) for run in ledger.runs()],
        "total": total,
        "evaluation": _looks(ledger),
        "budget": {"max_epsilon": max_epsilon, "max_delta": max_delta},
        "left": left,
    }


def _looks(ledger: Ledger) -> dict[str, float]:
    """Return what all looks at a split came to, of those that were through noise."""
    splits = sorted({split for run in ledger.runs() for split in run.populations})
    return {split: pure_epsilon(ledger.releases(population=split)) for split in splits}


def pure_epsilon(releases: Iterable[Release]) -> float:
    """Return what Laplace noise comes to, its δ 0: the epsilons add up."""
    return sum(release.steps / release.noise_multiplier for release in releases)


def _told(run: RunSpent, delta: float | None) -> dict[str, Any]:
    return {
        "run": run.fingerprint,
        "first": run.first,
        "last": run.last,
        "rounds": run.rounds,
        "lost": run.lost,
        **_cost(run.releases, delta if run.delta is None else run.delta),
        "steps": sum(release.steps for release in run.releases),
        "planned": _plan(run.plan),
    }


def _plan(plan: Plan | None) -> dict[str, Any] | None:
    """Return what a run will take at most, which stands here before it starts."""
    if plan is None:
        return None
    releases = [asdict(release) for release in plan.releases]
    cost = privacy.epsilon(plan.releases, plan.delta)
    return {"epsilon": cost, "patients": plan.patients, "unit": plan.unit, "releases": releases}


def _cost(releases: Sequence[Release], delta: float | None) -> dict[str, float | None]:
    if delta is None:
        return {"epsilon": None, "epsilon_prv": None, "delta": None}
    return {
        "epsilon": privacy.epsilon(releases, delta),
        "epsilon_prv": privacy.tight_epsilon(releases, delta),
        "delta": delta,
    }


def _budget_delta(ledger: Ledger, max_delta: float | None, delta: float) -> float:
    """Return the δ at which a budget is added up."""
    if max_delta is not None:
        return max_delta
    return delta if ledger.delta is None else min(delta, ledger.delta)


def _shown(epsilon: float) -> str:
    """Return an ε to three decimals, rounded up: what is said is never less than what is."""
    return f"{math.ceil(epsilon * 1000) / 1000:g}"


def _head_line(witness: Witness) -> str:
    return _Head(number=witness[0], sha256=witness[1]).model_dump_json()


def _stamp(handle: int) -> tuple[int, ...]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
