"""What stands between a site's patients and a private run: the plan, the ledger, the limits, the source of noise.

Whatever a run takes is reserved in the ledger before it is drawn, and spent before it leaves. A plan is made once for
the patients that are there, and holds for them alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from client.cohort import Cohort
from client.ledger import Ledger, LedgerError, check_budget, pure_epsilon
from client.ledger import Plan as Planned
from client.noise import Noise
from client.outbox import Outbox
from client.spending import LOOK
from common.errors import ConfigError, SiteRefusal
from common.privacy import Release, epsilon
from common.private_plan import Plan, plan
from common.run_config import RunConfig

_SLACK = 1 + 1e-9
_log = logging.getLogger("consilium.site")


@dataclass(frozen=True)
class Limits:
    """What a hospital allows a private run, and how it tells of its sizes."""

    max_epsilon: float | None = None  # of everything that was ever taken of the cohort
    max_delta: float | None = None
    min_cell: int = 0  # a split of which a label has fewer examples is not told of; 0: all are
    digits: int | None = None  # significant digits that the number of patients leaves with; None: all


@dataclass(frozen=True)
class Guard:
    """The privacy of one site.

    Args:
        open_ledger: returns the site's ledger; called once, when it is first needed.
        outbox: where replies are kept, so that a question that comes again gets the same answer.
        limits: the hospital's.
        noise: the source of noise; of its own key, which nobody can choose.
    """

    open_ledger: Callable[[], Ledger]
    outbox: Outbox
    limits: Limits = Limits()
    noise: Noise = field(default_factory=Noise)
    _plans: dict[tuple[str, int], Plan] = field(default_factory=dict, init=False, compare=False)  # by run and size

    @cached_property
    def ledger(self) -> Ledger:
        """The site's ledger.

        Raises:
            LedgerError: it cannot be used.
        """
        try:
            return self.open_ledger()
        except ConfigError as error:  # of the secret that it is made with
            raise LedgerError(str(error)) from None

    def plan(self, run: RunConfig, cohort: Cohort) -> Plan:
        """Return what a run will take of a cohort, noted in the ledger; the same run finds its plan again.

        Raises:
            SiteRefusal: `target`, `budget`, `cohort_changed` or `ledger`; the site's own log says it in full.
        """
        fingerprint, found = run.fingerprint(), self.plan_of(run, cohort)
        try:
            check_budget(
                self.ledger,
                found.releases,
                fingerprint,
                self.limits.max_epsilon,
                self.limits.max_delta,
                found.delta,
            )
            self.ledger.plan(
                fingerprint,
                patients=_patients(cohort),
                cohort=_members(cohort),
                unit=unit(cohort),
                delta=found.delta,
                releases=found.releases,
            )
        except LedgerError as error:
            raise _refused(error.code, str(error)) from None
        _log.info("run %s takes %s of this site's patients", fingerprint[:12], described(found))
        return found

    def plan_of(self, run: RunConfig, cohort: Cohort) -> Plan:
        """Return what a run takes of a cohort, worked out once.

        Raises:
            SiteRefusal: `target`.
        """
        key = run.fingerprint(), _patients(cohort)
        if key not in self._plans:
            self._plans.clear()  # a site is in one run at a time
            self._plans[key] = _planned(run, cohort)
        return self._plans[key]

    def reserve(self, run: RunConfig, cohort: Cohort, purpose: str, release: Release) -> int:
        """Take privacy for what is about to be drawn, and return the number of the entry.

        Raises:
            SiteRefusal: `cohort_changed` if these are not the patients of the plan, `budget` if it is more than was
                planned or than the hospital allows, `ledger`.
        """
        fingerprint = run.fingerprint()
        try:
            planned = self._unchanged(run, cohort)
            taken = [*self.ledger.releases(fingerprint), release]
            if epsilon(taken, planned.delta) > epsilon(planned.releases, planned.delta) * _SLACK:
                raise _refused("budget", f"run {fingerprint[:12]} asks for more than it planned ({purpose})")
            limits = self.limits
            check_budget(self.ledger, taken, fingerprint, limits.max_epsilon, limits.max_delta, planned.delta)
            return self.ledger.reserve(fingerprint, purpose, [release])
        except LedgerError as error:
            raise _refused(error.code, str(error)) from None

    def check(self, run: RunConfig, cohort: Cohort) -> None:
        """Refuse to go on with other patients than a run was planned for.

        Raises:
            SiteRefusal: `cohort_changed`, `ledger`.
        """
        try:
            self._unchanged(run, cohort)
        except LedgerError as error:
            raise _refused(error.code, str(error)) from None

    def _unchanged(self, run: RunConfig, cohort: Cohort) -> Planned:
        planned = self.ledger.planned(run.fingerprint())
        if planned is None or (planned.cohort, planned.patients) != (_members(cohort), _patients(cohort)):
            raise _refused("cohort_changed", "patients came or went since the run's privacy was planned")
        return planned

    def reserve_look(self, run: RunConfig, split: str, release: Release) -> int:
        """Take privacy of the patients of a split that is evaluated, and return the number of the entry.

        Raises:
            SiteRefusal: `budget` if it is more than the run said, or the hospital allows; `ledger`.
        """
        fingerprint = run.fingerprint()
        try:
            of_run = pure_epsilon([*self.ledger.releases(fingerprint, split), release])
            whole = pure_epsilon([*self.ledger.releases(population=split), release])
            if of_run > (run.privacy.histogram_epsilon or 0.0) * _SLACK:
                raise _refused("budget", f"run {fingerprint[:12]} asks for more looks at {split} than it planned")
            if self.limits.max_epsilon is not None and whole > self.limits.max_epsilon * _SLACK:
                raise _refused("budget", f"this look would bring the {split} patients to epsilon {whole:.3f}")
            return self.ledger.reserve(fingerprint, f"{LOOK}{split}", [release])
        except LedgerError as error:
            raise _refused(error.code, str(error)) from None

    def spend(self, number: int, content: bytes) -> None:
        """Note that what was reserved leaves as these bytes.

        Raises:
            SiteRefusal: `ledger`.
        """
        try:
            self.ledger.spend(number, hashlib.sha256(content).hexdigest())
        except LedgerError as error:
            raise _refused(error.code, str(error)) from None

    def spent(self, run: RunConfig, delta: float) -> tuple[float, int]:
        """Return epsilon and private steps that a run has taken so far, what a crash wasted among them.

        Raises:
            SiteRefusal: `ledger`.
        """
        try:
            taken = self.ledger.releases(run.fingerprint())
        except LedgerError as error:
            raise _refused(error.code, str(error)) from None
        return epsilon(taken, delta), sum(release.steps for release in taken)

    def statement(self, fingerprint: str) -> dict[str, Any] | None:
        """Return what a run has spent and the head of the ledger, for the audit trail; None where it plans nothing."""
        try:
            planned = self.ledger.planned(fingerprint)
        except LedgerError:
            return None  # a site whose ledger cannot be used is in no private run
        if planned is None:
            return None
        number, sha256 = self.ledger.head
        cost = float(epsilon(self.ledger.releases(fingerprint), planned.delta))
        return {"epsilon": cost, "ledger_entries": number, "ledger_sha256": sha256}

    def told_size(self, cohort: Cohort) -> int:
        """Return the number of training patients as it leaves the site."""
        return rounded(_patients(cohort), self.limits.digits)

    def _told_rate(self, run: RunConfig, rate: float, cohort: Cohort) -> float:
        """Return a sampling rate as it leaves: where the size is rounded, that of the rounded size."""
        return rate if rate == 1 else min(1.0, run.training.batch_size / self.told_size(cohort))

    def offer(self, run: RunConfig, cohort: Cohort) -> dict[str, Any]:
        """Return the fields of a `Description` that tell of a private run, which is planned by that."""
        found = self.plan(run, cohort)
        epsilon_so_far, steps = self.spent(run, found.delta)
        main = found.main
        return {
            "examples": self.told_size(cohort),
            "unit": unit(cohort),
            "delta": found.delta,
            "epsilon": found.epsilon,
            "spent": epsilon_so_far,
            "noise_multiplier": main.noise_multiplier,
            "sampling_rate": self._told_rate(run, main.sampling_rate, cohort),
            "steps": sum(release.steps for release in found.releases),
            "steps_done": steps,
        }


def no_guard(folder: Path) -> Guard:
    """Return the guard of a site that takes part in no private run."""
    return Guard(_refusing, Outbox(folder / "outbox"))


def _refusing() -> Ledger:
    """Stand for the ledger of a site that has none.

    Raises:
        LedgerError: always.
    """
    raise LedgerError("this site keeps no ledger of spent privacy, so it takes part in no private run")


def rounded(number: int, digits: int | None) -> int:
    """Return a number with so many significant digits, and never 0 for what is there.

    Examples:
        >>> rounded(1234, 2), rounded(7, 2), rounded(1234, None)
        (1200, 7, 1234)
    """
    return number if digits is None else int(float(f"{number:.{digits - 1}e}"))


def unit(cohort: Cohort) -> str:
    """Return whom the guarantee is for: patients, or images where every image is a patient of its own."""
    train = cohort.indices("train")
    return "image" if len(np.unique(cohort.patients[train])) == len(train) else "patient"


def described(found: Plan) -> str:
    """Return a plan in words."""
    main = found.main
    return (
        f"epsilon {found.epsilon:.3f} at delta {found.delta:g} at most: noise multiplier {main.noise_multiplier:.3f}, "
        f"sampling rate {main.sampling_rate:.4f}, {sum(release.steps for release in found.releases)} steps"
    )


def _planned(run: RunConfig, cohort: Cohort) -> Plan:
    try:
        return plan(run, _patients(cohort))
    except ConfigError as error:
        raise _refused("target", str(error)) from None


def _patients(cohort: Cohort) -> int:
    return len(np.unique(cohort.patients[cohort.indices("train")]))


def _members(cohort: Cohort) -> str:
    """Return what stands for whom the cohort has: SHA-256 over the digests of their images by split, in order."""
    rows = (bytes([split]) + bytes(digest) for split, digest in zip(cohort.splits, cohort.digests, strict=True))
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()


def _refused(code: str, reason: str) -> SiteRefusal:
    """Return the refusal of a code; the reason stays in the site's own log."""
    _log.warning("refused (%s): %s", code, reason)
    return SiteRefusal(code)
