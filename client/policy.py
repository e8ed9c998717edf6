"""What a hospital lets a coordinator ask: a run outside of its limits is refused as a whole, never made smaller.

The coordinator learns that the policy said no, and nothing else; the site's own log says which limit it was.
"""

from __future__ import annotations

from client.site_config import PolicySection
from common.errors import SiteRefusal
from common.run_config import RunConfig


class PolicyRefusal(SiteRefusal):
    """A run is outside of a site's limits.

    Args:
        reason: one line for the site's own log; it never leaves the site.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("policy")
        self.reason = reason


def check(policy: PolicySection, run: RunConfig) -> None:
    """Refuse a run that the policy does not allow.

    Raises:
        PolicyRefusal: the first limit that it is outside of.
    """
    _among("tasks", policy.tasks, "task", run.task.name)
    _among("backbones", policy.backbones, "backbone", run.model.backbone)
    _among("strategies", policy.strategies, "strategy", run.training.rule.kind)
    if policy.max_rounds is not None and run.training.rounds > policy.max_rounds:
        raise PolicyRefusal(f"[policy] max_rounds: the run has {run.training.rounds}, allowed {policy.max_rounds}")


def _among(key: str, allowed: tuple[str, ...], what: str, got: str) -> None:
    if allowed and got not in allowed:
        raise PolicyRefusal(f"[policy] {key}: the run's {what} is {got[:200]!r}, allowed {', '.join(allowed)}")
