"""What a run tells of itself while it goes on: an engine writes it down, a simulation has nobody who looks on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.spending import Spent


class Onlooker:
    """Told of a run from inside; this one does not mind."""

    def judged(self, site: str, status: str, spent: Spent | None) -> None:
        """Hear what a site was seen to do, in the words of `server.refusals`.

        Args:
            site: its name.
            status: such as `contributed` or `lost(absent)`.
            spent: of a private run, what the site has spent by then.
        """

    def ended_round(self, entry: Mapping[str, Any]) -> None:
        """Hear that a round's updates are aggregated: its entry, without the figures."""

    def judged_round(self, entry: Mapping[str, Any], best_round: int, best_score: float | None) -> None:
        """Hear the whole entry of a round, and which round is the best so far."""

    def kept(self, number: int) -> None:
        """Hear that the state after a round is on disk."""
