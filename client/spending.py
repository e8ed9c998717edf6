"""What a ledger of privacy may say, and what its entries add up to: plans, reservations, and what has left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator

from client.chain import TORN, Entry, Facts
from common.privacy import Release
from common.strict import Section

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
_RELEASE = {"kind", "noise_multiplier", "sampling_rate", "steps"}


def _releases(value: Any) -> tuple[Release, ...]:
    """Return releases that are such already, or as JSON has them."""
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list of releases")
    return tuple(one if isinstance(one, Release) else _release(one) for one in value)


def _release(value: Any) -> Release:
    if not isinstance(value, dict) or set(value) != _RELEASE:
        raise ValueError(f"expected a release with {', '.join(sorted(_RELEASE))}")
    return Release(**value)


def _plain(releases: Iterable[Release]) -> list[dict[str, Any]]:
    return [
        {
            "kind": one.kind,
            "noise_multiplier": float(one.noise_multiplier),
            "sampling_rate": float(one.sampling_rate),
            "steps": one.steps,
        }
        for one in releases
    ]


_Releases = Annotated[tuple[Release, ...], PlainValidator(_releases), PlainSerializer(_plain)]


class Opening(Section):
    """The first entry: whose ledger it is."""

    owner: Digest  # HMAC of the cohort's site, made with its secret


class Plan(Section):
    """What a run will take at most."""

    run: Digest  # fingerprint
    cohort: Digest  # of who is in it
    patients: int = Field(ge=1)
    unit: _Word  # whom the guarantee is for
    delta: float = Field(gt=0, lt=1)
    releases: _Releases


TRAINING = "training"
LOOK = "look-"
"""How the purpose of an evaluation begins; the split follows."""


class Reservation(Section):
    """What is about to be drawn; it counts from now on, whether or not it ever leaves."""

    run: Digest
    purpose: _Word
    releases: _Releases

    @property
    def population(self) -> str:
        """Whose privacy it takes: training patients, or those of the split that a look is at.

        A patient is in one split for good, so what is taken of one is nothing to the others.
        """
        return self.purpose.removeprefix(LOOK) if self.purpose.startswith(LOOK) else TRAINING


class Departure(Section):
    """What was reserved leaves, as bytes."""

    reserved: int = Field(ge=1)  # number of the entry
    bytes_sha256: Digest


class Torn(Section):
    """A line that a crash cut short: it reserved nothing, for nothing leaves before its line is whole."""

    bytes: int = Field(ge=1)
    torn_sha256: Digest


KINDS: dict[str, type[Section]] = {
    "open": Opening,
    "plan": Plan,
    "reserve": Reservation,
    "spend": Departure,
    TORN: Torn,
}
"""What an entry can be: event -> its facts."""


def check(event: str, facts: Facts) -> None:
    """Refuse what no ledger says.

    Raises:
        ValueError: the event is not of `KINDS`, or its facts are not those of its kind.
    """
    if event not in KINDS:
        raise ValueError(f"event {event!r} is not in KINDS")
    KINDS[event].model_validate(facts)


@dataclass
class RunSpent:
    """What a run took."""

    fingerprint: str
    first: str  # time of its first entry
    last: str = ""  # and of its last
    plan: Plan | None = None
    reservations: dict[int, Reservation] = field(default_factory=dict)  # by the number of the entry
    departed: dict[int, str] = field(default_factory=dict)  # reservation -> SHA-256 of the bytes that left

    @property
    def releases(self) -> tuple[Release, ...]:
        """What counts for training patients: everything reserved."""
        return self.of(TRAINING)

    def of(self, population: str) -> tuple[Release, ...]:
        """Return everything reserved of some patients."""
        mine = (one for one in self.reservations.values() if one.population == population)
        return tuple(release for one in mine for release in one.releases)

    @property
    def populations(self) -> tuple[str, ...]:
        """Whose privacy it took, training patients apart."""
        return tuple(sorted({one.population for one in self.reservations.values()} - {TRAINING}))

    @property
    def reserved(self) -> int:
        """How many reservations there are."""
        return len(self.reservations)

    @property
    def spent(self) -> int:
        """How many of them left as bytes."""
        return len(self.departed)

    @property
    def lost(self) -> int:
        """How many of them never left; they count all the same."""
        return self.reserved - self.spent

    @property
    def rounds(self) -> int:
        """How many rounds were reserved; one that was repeated after a crash is one round."""
        return len({one.purpose for one in self.reservations.values() if one.purpose.startswith("round")})

    @property
    def planned(self) -> tuple[Release, ...]:
        """What it said it would take at most."""
        return self.plan.releases if self.plan else ()

    @property
    def delta(self) -> float | None:
        """The δ it planned with."""
        return self.plan.delta if self.plan else None


class Book:
    """Adds up the entries of a ledger, one after another."""

    def __init__(self) -> None:
        self.owner: str | None = None
        self.runs: dict[str, RunSpent] = {}
        self.deltas: set[float] = set()
        self._runs_of: dict[int, RunSpent] = {}  # by reservation

    def take(self, number: int, entry: Entry) -> None:
        """Add an entry of which `check` approves.

        Raises:
            ValueError: it contradicts those before.
        """
        value = KINDS[entry.event].model_validate(entry.facts)
        if isinstance(value, Opening):
            self._own(value.owner)
        elif isinstance(value, Plan | Reservation):
            self._note(number, value, entry.time)
        elif isinstance(value, Departure):
            self._depart(value, entry.time)

    def departed(self, reserved: int) -> str | None:
        """Return the hash of the bytes that a reservation left as, None if it has not.

        Raises:
            ValueError: there is no such reservation.
        """
        if reserved not in self._runs_of:
            raise ValueError(f"entry {reserved} is no reservation")
        return self._runs_of[reserved].departed.get(reserved)

    def _own(self, owner: str) -> None:
        if self.owner is not None:
            raise ValueError("opened twice")
        self.owner = owner

    def _note(self, number: int, value: Plan | Reservation, time: str) -> None:
        run = self.runs.setdefault(value.run, RunSpent(value.run, time))
        run.last = time
        if isinstance(value, Plan):
            run.plan = value
            self.deltas.add(value.delta)
        else:
            run.reservations[number] = value
            self._runs_of[number] = run

    def _depart(self, value: Departure, time: str) -> None:
        if self.departed(value.reserved) is not None:
            raise ValueError(f"entry {value.reserved} left twice")
        run = self._runs_of[value.reserved]
        run.last, run.departed[value.reserved] = time, value.bytes_sha256
