"""The closed form of a private run: no patient adds more than was paid for; without noise it is ridge regression."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import private_form
from common.analytic import LOGIT_SCALE, STAGE_NORM
from common.private_form import (
    RECORD_NORM,
    Noisy,
    centre,
    head,
    penalty,
    records,
    sensitivity,
    several_targets,
    single_targets,
    sums,
    totals,
)
from common.run_config import TaskKind

KINDS: tuple[TaskKind, ...] = ("single-label", "multi-label")
SLACK = 1 + 1e-9
law = settings(deadline=None, max_examples=60)

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))  # images of a patient, inputs, labels


def inputs_of(count: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Head inputs of norm at most 6, in any direction, some of them extreme."""
    directions = random.normal(size=(count, width)) * 10.0 ** random.integers(-6, 7, (count, 1))
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    return directions / norms * STAGE_NORM * random.choice([0.0, 0.3, 1.0], (count, 1))


def targets_of(kind: TaskKind, count: int, labels: int, random: np.random.Generator) -> np.ndarray:
    if kind == "single-label":
        return single_targets(random.integers(0, labels, count), labels)
    return several_targets(random.choice(np.float32([0, 1, 0.3, np.nan]), (count, labels)))


def cohort(kind: TaskKind, size: tuple[int, int, int], seed: int) -> tuple[Noisy, Noisy]:
    """The sums of some patients, of one to five images each: for the closed form, and for the centre."""
    (most, width, labels), random = size, np.random.default_rng(seed)
    images = random.integers(1, most + 1, 4)
    shares = np.repeat(1 / images, images)
    inputs = inputs_of(len(shares), width, random)
    return sums(records(inputs), targets_of(kind, len(shares), labels, random), shares), totals(inputs, shares)


def norm(one: Noisy, other: Noisy) -> float:
    """L2 norm of the difference of everything that two sums hold."""
    return math.sqrt(sum(float(((getattr(one, name) - getattr(other, name)) ** 2).sum()) for name in one.__dict__))


# Sensitivity


@pytest.mark.parametrize("kind", KINDS)
@law
@given(size=sizes, seed=seeds)
def test_one_patient_more_changes_the_sums_by_the_sensitivity_at_most(
    kind: TaskKind, size: tuple[int, int, int], seed: int
) -> None:
    (before, before_total), random = cohort(kind, size, seed), np.random.default_rng(seed + 1)
    images, width, labels = size
    shares = np.full(images, 1 / images)
    inputs = inputs_of(images, width, random)
    patient = sums(records(inputs), targets_of(kind, images, labels, random), shares)
    assert norm(before + patient, before) <= sensitivity(labels, kind) * SLACK
    assert norm(before_total + totals(inputs, shares), before_total) <= SLACK


@pytest.mark.parametrize("kind", KINDS)
def test_some_patient_changes_the_sums_by_as_much(kind: TaskKind) -> None:
    """So less noise than that would be too little."""
    inputs = np.array([[3.6, 0.0, 4.8]])
    targets = single_targets(np.array([1]), 3) if kind == "single-label" else several_targets(np.float32([[1, 0, 1]]))
    found = sums(records(inputs), targets, np.ones(1))
    nothing = Noisy(np.zeros(0), np.zeros_like(found.gram), np.zeros_like(found.cross))
    assert norm(found, nothing) == pytest.approx(sensitivity(3, kind), rel=1e-12)
    assert np.linalg.norm(totals(inputs, np.ones(1)).total) == pytest.approx(1, rel=1e-12)


@law
@given(size=sizes, seed=seeds)
def test_a_record_has_norm_one_at_most(size: tuple[int, int, int], seed: int) -> None:
    inputs = inputs_of(size[0], size[1], np.random.default_rng(seed))
    found = np.linalg.norm(records(inputs), axis=1)
    assert (found <= SLACK).all()
    assert np.allclose(found[np.linalg.norm(inputs, axis=1) > STAGE_NORM * 0.999], 1)


def test_targets_have_known_lengths() -> None:
    assert sensitivity(2, "single-label") ** 2 == pytest.approx(1 + 1 / 2)
    assert sensitivity(5, "single-label") ** 2 == pytest.approx(1 + 4 / 5)
    assert sensitivity(5, "multi-label") ** 2 == pytest.approx(2)
    assert (single_targets(np.array([0, 2]), 3) ** 2).sum(1) == pytest.approx([2 / 3, 2 / 3])
    found = several_targets(np.float32([[1, 0], [0.5, np.nan]]))
    assert found.tolist() == [[pytest.approx(0.5**0.5), pytest.approx(-(0.5**0.5))], [0, 0]]


# Packing


@law
@given(size=st.integers(1, 7), seed=seeds)
def test_packing_keeps_norms_and_can_be_undone(size: int, seed: int) -> None:
    half = np.random.default_rng(seed).normal(size=(size, size))
    gram = half + half.T
    packed = private_form._packed(gram)
    assert packed.shape == (size * (size + 1) // 2,)
    assert np.linalg.norm(packed) == pytest.approx(np.linalg.norm(gram), rel=1e-12)
    np.testing.assert_allclose(private_form._unpacked(packed, size), gram, rtol=1e-12, atol=1e-12)


# The head


def regression(kind: TaskKind, seed: int = 0, labels: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and the shares of patients with one to three images."""
    random = np.random.default_rng(seed)
    images = random.integers(1, 4, 20)
    shares = np.repeat(1 / images, images)
    return inputs_of(len(shares), 4, random), targets_of(kind, len(shares), labels, random), shares


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
def test_without_noise_the_head_is_ridge_regression(kind: TaskKind, ridge: float) -> None:
    inputs, targets, shares = regression(kind)
    weight, bias = head(sums(records(inputs), targets, shares), ridge, kind)
    assert (weight.dtype, bias.dtype, weight.shape, bias.shape) == (np.float32, np.float32, (3, 4), (3,))
    rows, wanted = records(inputs) * np.sqrt(shares)[:, None], targets * np.sqrt(shares)[:, None]
    stacked = np.vstack([rows, math.sqrt(ridge) * np.eye(5)])
    solution, *_ = np.linalg.lstsq(stacked, np.vstack([wanted, np.zeros((5, 3))]), rcond=None)
    scale = LOGIT_SCALE * (math.sqrt(3) if kind == "multi-label" else 1)
    np.testing.assert_allclose(inputs @ weight.T + bias, scale * records(inputs) @ solution, rtol=1e-4, atol=1e-5)


def test_what_sites_have_adds_up_to_what_all_have_together() -> None:
    inputs, targets, shares = regression("single-label")
    whole = sums(records(inputs), targets, shares)
    parts = [slice(0, 11), slice(11, None)]
    first, second = (sums(records(inputs[part]), targets[part], shares[part]) for part in parts)
    assert norm(first + second, whole) < 1e-12
    first, second = (totals(inputs[part], shares[part]) for part in parts)
    np.testing.assert_allclose((first + second).total, totals(inputs, shares).total)


def test_directions_that_noise_made_negative_count_as_none() -> None:
    gram = private_form._packed(np.diag([2.0, -3.0]))
    weight, bias = head(Noisy(np.zeros(0), gram, np.array([[1.0], [1.0]])), 0.5, "multi-label")
    assert weight.tolist() == [[pytest.approx(LOGIT_SCALE / RECORD_NORM / 2.5)]]
    assert bias.tolist() == [pytest.approx(LOGIT_SCALE / RECORD_NORM / 0.5)]


def test_the_penalty_grows_with_noise_and_with_patients() -> None:
    assert penalty(0.0, 9, 1000) == 1.0
    assert penalty(2.0, 8, 0) == pytest.approx(0.4 * 2 * 4)


# The centre


def centred(total: Any, noise: float, patients: int, stages: tuple[int, ...]) -> np.ndarray:
    return centre(Noisy(np.asarray(total, np.float64), np.zeros(0), np.zeros((0, 0))), noise, patients, stages)


def test_without_noise_the_centre_is_the_mean() -> None:
    inputs, _, shares = regression("single-label")
    found = centred(totals(inputs, shares).total, 0.0, 20, (1, 3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, shares @ inputs / 20, rtol=1e-6)


@law
@given(noise=st.floats(0, 50), patients=st.integers(1, 10_000), seed=seeds)
def test_each_stage_of_the_centre_is_drawn_to_zero(noise: float, patients: int, seed: int) -> None:
    stages = (2, 3)
    total = np.random.default_rng(seed).normal(size=5) * 20
    found, mean = centred(total, noise, patients, stages), total * STAGE_NORM / patients
    for part in (slice(0, 2), slice(2, 5)):
        square, expected = mean[part] @ mean[part], len(mean[part]) * (noise * STAGE_NORM / patients) ** 2
        np.testing.assert_allclose(found[part], mean[part] * max(0, 1 - expected / square), rtol=1e-5, atol=1e-7)


def test_a_stage_without_anything_stays_at_zero() -> None:
    assert centred([0, 0, 1], 0.0, 3, (2, 1)).tolist() == [0, 0, 2]
    assert centred([0, 0, 1], 1e6, 3, (2, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_an_image_that_weights_blow_up_does_not_show_in_a_sum(value: float) -> None:
    """A coordinator chooses the weights below the head: what they make of one image must not pass through the noise."""
    inputs = np.zeros((3, 4))
    inputs[:, 0] = STAGE_NORM
    hostile = inputs.copy()
    hostile[1, 2] = value
    shares, targets = np.ones(3), single_targets(np.array([0, 1, 0]), 2)
    for one in (totals(hostile, shares), sums(records(hostile), targets, shares)):
        assert all(np.isfinite(part).all() for part in one.__dict__.values())
    assert np.linalg.norm(totals(hostile, shares).total - totals(inputs[[0, 2]], shares[:2]).total) <= 1 + 1e-12
    assert (np.linalg.norm(records(hostile), axis=1) <= 1 + 1e-12).all()
