"""What came in during one round, site by site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.aggregation import Contribution
from server.evaluation import Statistic
from server.federation import Answer, Traffic


@dataclass(frozen=True)
class Admitted:
    """One site's answer to a train message, after admission."""

    answer: Answer
    contribution: Contribution | None = None
    evaluation: Statistic | None = None
    train_loss: float | None = None  # None of a private round: it would be a release
    epsilon: float | None = None  # of a private run: spent by it at the site so far
    norm: float = 0.0  # L2, of the update


@dataclass
class Tally:
    """What came in during one round."""

    contributions: list[Contribution] = field(default_factory=list)
    evaluations: dict[str, Statistic] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)  # of the updates that may count
    traffic: Traffic = field(default_factory=Traffic)

    def add(self, admitted: Admitted) -> None:
        """Take note of a site's answer."""
        answer = admitted.answer
        self.traffic = self.traffic + answer.traffic
        facts: dict[str, Any] = {"status": answer.status, "examples": 0, "train_loss": admitted.train_loss}
        if admitted.epsilon is not None:
            facts["epsilon"] = admitted.epsilon
        if answer.reason:
            facts["reason"] = answer.reason
        if admitted.contribution and admitted.evaluation:
            facts["examples"] = admitted.contribution.num_examples
            self.contributions.append(admitted.contribution)
            self.evaluations[answer.site] = admitted.evaluation
            self.norms[answer.site] = admitted.norm
        self.sites[answer.site] = facts

    def reject(self, site: str, reason: str) -> None:
        """Take back what was admitted of a site."""
        self.contributions = [one for one in self.contributions if one.site != site]
        del self.evaluations[site], self.norms[site]
        self.sites[site].update(status="quarantined", examples=0, reason=reason)

    def status(self, site: str) -> str:
        """Return what became of a site, in words."""
        facts = self.sites[site]
        return str(facts["status"]) + (f"({facts['reason']})" if "reason" in facts else "")


def round_bytes(traffic: Traffic) -> dict[str, int]:
    """Return the bytes of a round as its entry has them."""
    return {
        "bytes_down": traffic.weights_down,
        "bytes_up": traffic.weights_up,
        "evaluation_bytes_down": traffic.other_down,
        "evaluation_bytes_up": traffic.other_up,
    }
