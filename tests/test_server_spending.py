"""What sites say of their privacy: what cannot be is not believed, nothing is taken back, and all of it is told."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import privacy
from common.messages import Description, PrivateSums, Trained
from common.privacy import Release
from server.spending import Spent, document, plausible

NOTHING = np.zeros((3, 2), np.int64)
FLOAT = st.floats(allow_nan=True, allow_infinity=True)
ODD = (float("nan"), float("inf"), -float("inf"))


def said(**changes: Any) -> Description:
    values: dict[str, Any] = {
        "examples": 100,
        "unit": "patient",
        "delta": 1e-3,
        "epsilon": 2.9,
        "spent": 0.5,
        "noise_multiplier": 4.0,
        "sampling_rate": 0.25,
        "steps": 31,
        "steps_done": 1,
    }
    return Description("north", NOTHING, "", **{**values, **changes})


def trained(epsilon: float, steps: int) -> Trained:
    count, real = np.zeros((2, 2), np.int64), np.zeros(1)
    return Trained(np.zeros(0, np.float32), 100, 0.0, count, count, count, real, real, real, epsilon, steps)


def sums(epsilon: float, steps: int) -> PrivateSums:
    return PrivateSums(np.zeros(4), np.zeros(0), np.zeros((0, 0)), 4.0, epsilon, steps)


# Believed


def test_a_plan_within_the_target_is_believed() -> None:
    assert plausible(said(), 3.0)
    assert plausible(said(epsilon=3.0), 3.0)
    assert plausible(said(epsilon=1e6), None)  # the run gave the noise, not the epsilon
    assert plausible(said(spent=0.0, steps_done=0, sampling_rate=1.0, unit="image"), 3.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 3.001},
        {"unit": ""},
        {"unit": "<b>"},
        {"steps": 0},
        {"steps_done": -1},
        {"steps": 2**62},
        {"steps_done": 2**62},
        {"noise_multiplier": 1e200},
        {"sampling_rate": 1e-200},
        {"spent": -0.1},
        *({name: 0.0} for name in ("delta", "epsilon", "noise_multiplier", "sampling_rate")),
        *({name: -1.0} for name in ("delta", "epsilon", "noise_multiplier", "sampling_rate")),
        *({"delta": 1.0}, {"sampling_rate": 1.01}),
        *({name: odd} for name in ("delta", "epsilon", "spent", "noise_multiplier", "sampling_rate") for odd in ODD),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_not_believed(changes: dict[str, Any]) -> None:
    assert not plausible(said(**changes), 3.0)


# Counted


def test_a_plan_is_taken_over_field_by_field() -> None:
    assert Spent.of(said()) == Spent("patient", 1e-3, 2.9, 0.5, 4.0, 0.25, 31, 1)


@given(replies=st.lists(st.tuples(st.booleans(), st.floats(-10, 10), st.integers(-(2**63), 2**63 - 1)), max_size=6))
def test_no_site_takes_anything_back(replies: list[tuple[bool, float, int]]) -> None:
    now = Spent.of(said())
    for closed_form, epsilon, steps in replies:
        after = now.after(sums(epsilon, steps) if closed_form else trained(epsilon, steps))
        assert after.epsilon == max(now.epsilon, epsilon)
        assert now.steps <= after.steps <= 10**12
        assert (after.planned, after.delta, after.planned_steps) == (now.planned, now.delta, now.planned_steps)
        now = after


# Told


def test_a_run_without_privacy_has_no_document() -> None:
    assert document({}, None) is None


def test_the_worst_site_counts_and_sites_are_not_added_up() -> None:
    spent = {"b": Spent.of(said(spent=0.5, delta=1e-4)), "a": Spent.of(said(spent=1.5, unit="image"))}
    found = document(spent, None)
    assert found is not None
    assert (found["epsilon"], found["delta"], found["unit"], found["histogram_epsilon"]) == (1.5, 1e-3, "patient", None)
    assert list(found["sites"]) == ["a", "b"]
    assert found["sites"]["b"] == {
        "delta": 1e-4,
        "epsilon": 0.5,
        "noise_multiplier": found["sites"]["b"]["noise_multiplier"],
        "sampling_rate": 0.25,
        "steps": 1,
        "planned_epsilon": 2.9,
        "planned_steps": 31,
        "round_noise_multiplier": 4.0,
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    images = document({"a": spent["a"]}, None)
    assert images is not None
    assert images["unit"] == "image"


@given(
    spent=st.floats(0.5, 20), delta=st.floats(1e-6, 1e-2), rate=st.sampled_from([0.1, 1.0]), steps=st.integers(1, 60)
)
@settings(deadline=None, max_examples=15)
def test_an_accountant_that_is_fed_the_figures_of_a_site_comes_to_its_epsilon(
    spent: float, delta: float, rate: float, steps: int
) -> None:
    one = Spent.of(said(spent=spent, delta=delta, sampling_rate=rate, steps_done=steps))
    found = document({"a": one}, None)
    assert found is not None
    told = found["sites"]["a"]
    cost = privacy.epsilon([Release(told["noise_multiplier"], told["sampling_rate"], told["steps"])], told["delta"])
    assert cost == pytest.approx(spent, rel=0.02)
    assert cost <= told["epsilon"]


@pytest.mark.parametrize(("epsilon", "steps"), [(0.0, 0), (0.0, 30), (1e-9, 30), (1e300, 2**62), (3.0, 2**62)])
def test_figures_that_no_accountant_takes_are_told_all_the_same(epsilon: float, steps: int) -> None:
    found = document({"a": Spent.of(said()).after(sums(epsilon, steps))}, None)
    assert found is not None
    assert 0 < found["sites"]["a"]["noise_multiplier"] < 1e6


def test_what_epsilon_does_not_cover_is_said_in_full_sentences() -> None:
    exact, noisy = (document({"a": Spent.of(said())}, epsilon) for epsilon in (None, 0.5))
    assert exact is not None and noisy is not None
    assert any("outside of the guarantee" in sentence for sentence in exact["outside"])
    assert not any("outside of the guarantee" in sentence for sentence in noisy["outside"])
    assert any("epsilon 0.5" in sentence for sentence in noisy["outside"])
    assert len(exact["outside"]) == len(noisy["outside"])
    for sentence in (*exact["outside"], *noisy["outside"]):
        assert sentence.endswith(".")
        assert not set("{}") & set(sentence)
