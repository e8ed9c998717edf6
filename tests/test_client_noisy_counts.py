"""Counts under Laplace noise: they are counts still, their noise is what the look paid for, and no patient moves more.

Statistical bounds are set where correct noise fails less than once in 10⁹ runs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.cohort import Cohort
from client.noise import Noise
from client.noisy_counts import noisy, one_of_each, rescaled
from common import metrics, multilabel
from common.metrics import Evaluation
from common.multilabel import LabelwiseEvaluation

BINS = 6
COUNTS = ("confusion", "positives", "negatives")
law = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
epsilons = st.floats(1e-3, 1e6)
Found = Evaluation | LabelwiseEvaluation


@pytest.fixture(scope="module")
def noise() -> Noise:
    return Noise()


def single(count: int, labels: int, seed: int) -> Evaluation:
    random = np.random.default_rng(seed)
    logits, given_labels = random.normal(size=(count, labels)), random.integers(0, labels, count)
    return metrics.evaluate(logits, given_labels, metrics.coarse_edges(labels, BINS))


def several(count: int, labels: int, seed: int) -> LabelwiseEvaluation:
    random = np.random.default_rng(seed)
    targets = random.choice(np.float32([0, 1, 0.5, np.nan]), (count, labels))
    return multilabel.evaluate(random.normal(size=(count, labels)), targets, multilabel.coarse_edges(labels, BINS))


def read(found: Found) -> Found:
    """The same, as a coordinator reads it, which checks everything that a sender could get wrong."""
    arrays: dict[str, Any] = found.arrays()
    if isinstance(found, Evaluation):
        return Evaluation.from_arrays(arrays)
    return LabelwiseEvaluation.from_arrays(arrays, len(found.labels), found.examples)


# They are counts


@pytest.mark.parametrize("make", [single, several])
@law
@given(count=st.integers(0, 40), labels=st.integers(2, 4), epsilon=epsilons, seed=seeds)
def test_noisy_counts_are_counts_whose_totals_agree(
    make: Any, noise: Noise, count: int, labels: int, epsilon: float, seed: int
) -> None:
    found = noisy(make(count, labels, seed), epsilon, noise)
    assert read(found) == found
    for name in COUNTS:
        counts = found.arrays()[name]
        assert counts.dtype == np.int64
        assert (counts >= 0).all()
    for name in ("calibration", "brier", "log_loss"):
        assert not found.arrays()[name].any()


@pytest.mark.parametrize("make", [single, several])
def test_with_next_to_no_noise_they_are_the_exact_ones(make: Any, noise: Noise) -> None:
    exact = make(200, 3, 0)
    found = noisy(exact, 1e9, noise)
    assert all(np.array_equal(found.arrays()[name], exact.arrays()[name]) for name in COUNTS)


def test_two_looks_have_noise_of_their_own(noise: Noise) -> None:
    exact = single(500, 3, 0)
    assert not np.array_equal(noisy(exact, 0.1, noise).confusion, noisy(exact, 0.1, noise).confusion)


# Their noise


@pytest.mark.parametrize(("labels", "histograms"), [(2, 1), (3, 3), (5, 5)])
def test_the_noise_of_a_cell_is_the_sensitivity_over_epsilon(noise: Noise, labels: int, histograms: int) -> None:
    """E|x| of Laplace noise is its scale, and its deviation as well; counts are far from 0, so that none is cut off."""
    high = np.full((labels, labels), 10**9)
    carriers = high.sum(axis=1)[list(metrics.targets(labels))]
    exact = Evaluation(
        high,
        np.stack([rescaled(np.ones(BINS, np.int64), total) for total in carriers]),
        np.stack([rescaled(np.ones(BINS, np.int64), high.sum() - total) for total in carriers]),
        np.zeros((15, 3)),
        0.0,
        0.0,
    )
    epsilon, looks = 0.0007, 400
    drawn = np.stack([noisy(exact, epsilon, noise).confusion - high for _ in range(looks)])
    scale = (1 + histograms) / epsilon
    assert abs(np.abs(drawn).mean() / scale - 1) < 6.5 / math.sqrt(drawn.size)


def moved(before: Found, after: Found) -> int:
    """How much the counts differ in all."""
    return sum(int(np.abs(after.arrays()[name] - before.arrays()[name]).sum()) for name in COUNTS)


@law
@given(labels=st.integers(2, 5), seed=seeds)
def test_no_image_moves_the_counts_by_more_than_that(labels: int, seed: int) -> None:
    before, image = single(20, labels, seed), single(1, labels, seed + 1)
    assert moved(before, before + image) == 1 + len(before.positives)
    whole, one = several(20, labels, seed), several(1, labels, seed + 1)
    assert moved(whole, whole + one) <= 2 * labels


@law
@given(patients=st.lists(st.integers(0, 5), min_size=1, max_size=20), seed=seeds)
def test_one_image_of_each_patient_is_looked_at_whoever_else_is_there(patients: list[int], seed: int) -> None:
    cohort = of_patients(np.array(patients), seed)
    everybody = np.arange(len(patients))
    chosen = one_of_each(cohort, everybody)
    assert sorted(cohort.patients[chosen]) == sorted(set(patients))
    without = everybody[cohort.patients != patients[0]]
    left = [index for index in chosen if cohort.patients[index] != patients[0]]
    assert one_of_each(cohort, without).tolist() == left


def of_patients(patients: np.ndarray, seed: int) -> Cohort:
    count = len(patients)
    return Cohort(
        source=lambda rows: np.zeros((len(rows), 1, 1, 1), np.uint8),
        rows=np.arange(count),
        digests=np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8),
        labels=np.zeros(count, np.int64),
        splits=np.ones(count, np.int8),
        patients=patients,
        label_names=("no", "yes"),
        preprocessing="none",
    )


# Totals


@law
@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=20), total=st.integers(0, 10**7))
def test_rescaled_counts_have_the_total_and_the_proportions(counts: list[int], total: int) -> None:
    found = rescaled(np.array(counts), total)
    assert found.dtype == np.int64
    assert found.sum() == total
    assert (found >= 0).all()
    if any(counts):
        shares = np.array(counts) * total / sum(counts)
        assert (np.abs(found - shares) < 1 + 1e-6).all()
    else:
        assert found[len(counts) // 2] == total
