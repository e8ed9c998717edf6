"""A hospital's limits refuse a run as a whole; only the hospital learns which limit it was."""

from __future__ import annotations

from typing import Any

import pytest

from client.policy import PolicyRefusal, check
from client.site_config import PolicySection
from common.errors import SiteRefusal
from common.run_config import RunConfig


def run(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "task": {"name": "chest"},
        "model": {"backbone": "resnet18"},
        "training": {"strategy": "fedprox:0.1", "rounds": 20},
    }
    return RunConfig.model_validate({**values, **sections})


@pytest.mark.parametrize(
    "policy",
    [
        PolicySection(),
        PolicySection(
            tasks=("chest", "skin"), backbones=("resnet18",), strategies=("fedavg", "fedprox"), max_rounds=20
        ),
    ],
)
def test_a_run_within_the_limits_passes(policy: PolicySection) -> None:
    assert check(policy, run()) is None  # type: ignore[func-returns-value]  # nothing is clamped, so nothing comes back


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (PolicySection(tasks=("skin",)), "[policy] tasks: the run's task is 'chest', allowed skin"),
        (PolicySection(backbones=("vit",)), "[policy] backbones: the run's backbone is 'resnet18', allowed vit"),
        (PolicySection(strategies=("fedavg",)), "[policy] strategies: the run's strategy is 'fedprox', allowed fedavg"),
        (PolicySection(max_rounds=19), "[policy] max_rounds: the run has 20, allowed 19"),
    ],
)
def test_a_run_outside_of_a_limit_is_refused(policy: PolicySection, reason: str) -> None:
    with pytest.raises(PolicyRefusal) as raised:
        check(policy, run())
    assert raised.value.reason == reason
    assert isinstance(raised.value, SiteRefusal)
    assert str(raised.value) == raised.value.code == "policy"


def test_what_a_coordinator_writes_breaks_no_line_of_the_log() -> None:
    with pytest.raises(PolicyRefusal) as raised:
        check(PolicySection(tasks=("skin",)), run(task={"name": "a\n\x1b[31m" + "x" * 9000}))
    assert raised.value.reason.isprintable()
    assert len(raised.value.reason) < 400
