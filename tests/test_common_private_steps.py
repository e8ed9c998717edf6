"""Length and cut of private steps follow from public numbers, as the noise in a logit wants them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.private_form import RECORD_NORM
from common.private_steps import DEEP_CLIP, LONGEST_WAY, NOISE_IN_LOGITS, clip, clip_of, learning_rate
from common.run_config import RunConfig, TaskKind

noises = st.lists(st.tuples(st.floats(0.5, 500), st.floats(0.01, 1), st.just(30)), min_size=1, max_size=5)


def softmax_gradient(labels: int) -> np.ndarray:
    """The gradient of one patient's loss at a head of zeros: (p - e) rᵀ, with r of norm ρ."""
    record = np.zeros(4)
    record[1] = RECORD_NORM
    return np.outer(np.full(labels, 1 / labels) - np.eye(labels)[0], record)


@pytest.mark.parametrize("labels", [2, 3, 9])
def test_the_cut_is_half_the_norm_of_the_first_gradient(labels: int) -> None:
    assert clip(labels, "single-label") == pytest.approx(np.linalg.norm(softmax_gradient(labels)) / 2)
    # the mean over labels of -ln sigmoid(z): each has gradient 1/2 of the record over K
    each = np.full((labels, 1), 0.5 / labels) * RECORD_NORM
    assert clip(labels, "multi-label") == pytest.approx(np.linalg.norm(each) / 2)


def run(**sections: Any) -> RunConfig:
    task = {"labels": ("a", "b")}
    return RunConfig.model_validate({"task": task, "privacy": {"epsilon": 3.0}, **sections})


def test_the_cut_of_a_run_is_its_own_or_suits_what_it_trains() -> None:
    assert clip_of(run()) == clip(2, "single-label")
    assert clip_of(run(task={"labels": ("a", "b"), "kind": "multi-label"})) == clip(2, "multi-label")
    assert clip_of(run(model={"trainable": "stages:1"})) == DEEP_CLIP
    assert clip_of(run(privacy={"epsilon": 3.0, "clip": 0.25})) == 0.25


@pytest.mark.parametrize(("kind", "apart"), [("single-label", math.sqrt(2)), ("multi-label", 1.0)])
@given(found=noises, patients=st.integers(10, 10_000), cut=st.floats(0.1, 10))
def test_the_noise_at_the_end_is_what_was_wanted_or_the_way_is_as_long_as_it_may_be(
    kind: TaskKind, apart: float, found: list[tuple[float, float, int]], patients: int, cut: float
) -> None:
    rate = learning_rate(found, patients, cut, kind)
    variance = sum(steps * (noise / sampled * cut) ** 2 for noise, sampled, steps in found)
    in_logits = apart * rate * RECORD_NORM * math.sqrt(variance) / patients
    way = 30 * rate * RECORD_NORM**2
    assert in_logits <= NOISE_IN_LOGITS * (1 + 1e-9)
    assert way <= LONGEST_WAY * (1 + 1e-9)
    assert in_logits == pytest.approx(NOISE_IN_LOGITS) or way == pytest.approx(LONGEST_WAY)


@given(found=noises, patients=st.integers(10, 10_000), factor=st.floats(1, 10))
def test_more_noise_makes_shorter_steps_and_more_patients_longer_ones(
    found: list[tuple[float, float, int]], patients: int, factor: float
) -> None:
    rate = learning_rate(found, patients, 2.0, "single-label")
    louder = [(noise * factor, sampled, steps) for noise, sampled, steps in found]
    assert learning_rate(louder, patients, 2.0, "single-label") <= rate * (1 + 1e-9)
    assert learning_rate(found, 2 * patients, 2.0, "single-label") >= rate * (1 - 1e-9)
    assert learning_rate(found[::-1], patients, 2.0, "single-label") == pytest.approx(rate)
