"""Who was not there when the run was set up is taken in between two rounds, as soon as it is there.

It is set up as the others were, by itself: they wait for it as long as they did for each other. What was settled
before round 1 stays. A site that fails is asked again after 1, 2, 4, … rounds; one whose policy declines, or whose
words were not to be believed, is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from common.messages import Freeze, Prepare
from server.company import Company, Start

LONGEST_GAP = 16
"""Rounds between two attempts at most."""

HOPEFUL = (
    "lost",
    "refused(approval)",
    "refused(busy)",
    "refused(no_cohort)",
    "refused(unknown_",
    "refused(not_prepared)",
)
"""Beginnings of what a site was last seen to do that may be otherwise by now."""

FORGOTTEN = frozenset({"unknown_run", "unknown_trunk", "not_prepared"})
"""Refusals of a site that has to be set up anew: it was in another run in the meantime, or lost its state."""


class Latecomers:
    """The sites of a run that are not in.

    Args:
        company: those that are.
        start: the run.
    """

    def __init__(self, company: Company, start: Start) -> None:
        self._company = company
        self._run = start.run
        self._fingerprint = start.run.fingerprint()
        self._gap: dict[str, int] = {}
        self._due: dict[str, int] = {}

    def welcome(self, number: int, fixed: Mapping[str, NDArray[Any]]) -> None:
        """Take in, before round `number`, whoever is there now."""
        status = self._company.cast.status
        absent = [
            site
            for site in self._run.sites.names
            if site not in self._company.cast.support
            and status.get(site, "lost").startswith(HOPEFUL)
            and number >= self._due.get(site, 0)
        ]
        there = self._company.present(absent)
        for site in there:
            self._gap[site] = min(LONGEST_GAP, 2 * self._gap.get(site, 0) or 1)
            self._due[site] = number + self._gap[site]
        if there:
            self._set_up(there, fixed)

    def _set_up(self, there: list[str], fixed: Mapping[str, NDArray[Any]]) -> None:
        company = self._company
        company.introduce(there)
        company.send_trunk(company.among(there))
        company.collect("prepare", dict.fromkeys(company.among(there), Prepare(self._fingerprint)))
        company.collect("freeze", dict.fromkeys(company.among(there), Freeze(self._fingerprint, **fixed)))
        for site in company.among(there):
            self._gap.pop(site, None)
            self._due.pop(site, None)
