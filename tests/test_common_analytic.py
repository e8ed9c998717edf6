"""The closed form: whatever the partition, sums added up give the head of the pooled data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from common.analytic import (
    DEVIATION_FLOOR,
    LOGIT_SCALE,
    Sums,
    balanced_weights,
    labelwise_sums,
    ridge_heads,
    standardiser,
    sums,
)
from common.seeds import numpy_stream

PENALTIES = (0.01, 0.1, 1.0, 30.0)
law = settings(deadline=None, max_examples=80)


@dataclass(frozen=True)
class Pool:
    """Examples of all sites, with the site of each."""

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    sites: np.ndarray

    def part(self, rows: np.ndarray, *, gram: bool = True) -> Sums:
        return sums(self.inputs[rows], self.labels[rows], self.weights, gram=gram)

    def added(self, *, gram: bool = True) -> Sums:
        """Sum of the sites' sums, one site after another."""
        return reduce(add, [self.part(self.sites == site, gram=gram) for site in range(self.sites.max() + 1)])

    def whole(self) -> Sums:
        return self.part(np.ones(len(self.labels), bool))


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """Data of inputs at very different scales, some constant, in partitions from even to one label a site."""
    stream = numpy_stream(draw(st.integers(0, 2**32)), "analytic")
    n, width, k = draw(st.integers(4, 60)), draw(st.integers(1, 7)), draw(st.integers(2, 4))
    labels = stream.integers(0, draw(st.integers(1, k)), n)
    scale = 10.0 ** stream.uniform(-3, 3, width)
    inputs = scale * (stream.normal(size=(n, width)) + np.eye(k, width)[labels] + stream.uniform(-100, 100, width))
    # Sums lose what is 10^6 times smaller than an input's mean, as float32 inputs do: constants stay below that.
    constant = stream.random(width) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    inputs[:, constant] = np.sqrt(inputs[:, ~constant].var(0).mean() if not constant.all() else 1.0) * 123.4
    weights = draw(
        st.sampled_from([np.ones(k), balanced_weights(np.bincount(labels, minlength=k)), np.logspace(-2, 2, k)])
    )
    count = draw(st.integers(1, 6))
    sites = {
        "even": np.arange(n) % count,
        "skewed": np.minimum(stream.geometric(0.6, n) - 1, count),
        "one label a site": labels,
        "one example a site": np.arange(n),
    }[draw(st.sampled_from(["even", "skewed", "one label a site", "one example a site"]))]
    return Pool(inputs, labels, weights, sites)


def pooled_heads(pool: Pool, mean: np.ndarray, scale: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """The ridge solution on all examples at once, by scikit-learn."""
    z = (pool.inputs - mean.astype(float)) * scale.astype(float)
    w = pool.weights[pool.labels]
    oracle = Ridge(alpha=penalty * w.sum(), solver="cholesky")
    oracle.fit(z, np.eye(len(pool.weights))[pool.labels], sample_weight=w)
    return LOGIT_SCALE * oracle.coef_, LOGIT_SCALE * oracle.intercept_


# ------------------------------------------------------------------------------------------------------------- heads


@law
@given(pools())
def test_summed_statistics_give_the_pooled_ridge_solution_whatever_the_partition(pool: Pool) -> None:
    added = pool.added()
    mean, scale = standardiser(added)
    heads = ridge_heads(added, mean, scale, PENALTIES)
    assert len(heads) == len(PENALTIES)
    for penalty, (weight, bias) in zip(PENALTIES, heads, strict=True):
        expected_weight, expected_bias = pooled_heads(pool, mean, scale, penalty)
        assert (weight.shape, weight.dtype, bias.dtype) == (expected_weight.shape, np.float32, np.float32)
        size = max(np.abs(expected_weight).max(), np.abs(expected_bias).max())
        np.testing.assert_allclose(weight, expected_weight, rtol=1e-6, atol=1e-6 * size)
        np.testing.assert_allclose(bias, expected_bias, rtol=1e-6, atol=1e-6 * size)


@law
@given(pools())
def test_the_head_solves_the_weighted_normal_equations(pool: Pool) -> None:
    added = pool.added()
    mean, scale = standardiser(added)
    z = (pool.inputs - mean.astype(float)) * scale.astype(float)
    w, t = pool.weights[pool.labels], np.eye(len(pool.weights))[pool.labels]
    centred, targets = z - np.average(z, 0, w), t - np.average(t, 0, w)
    for penalty, (weight, bias) in zip(PENALTIES, ridge_heads(added, mean, scale, PENALTIES), strict=True):
        left = ((centred.T * w) @ centred + penalty * w.sum() * np.eye(z.shape[1])) @ weight.T.astype(float)
        np.testing.assert_allclose(left, LOGIT_SCALE * (centred.T * w) @ targets, rtol=0, atol=2e-6 * w.sum() * 4)
        logits = z @ weight.T.astype(float) + bias
        np.testing.assert_allclose(np.average(logits, 0, w), LOGIT_SCALE * np.average(t, 0, w), atol=1e-4)


def test_two_examples_by_hand() -> None:
    """x = -1, 1 with labels 0, 1: deviation 1, so z = ±1 / 1.01, and W = (1 / 1.01) / (2 / 1.01² + 2 λ)."""
    pooled = sums(np.array([[-1.0], [1.0]]), np.array([0, 1]), np.ones(2), gram=True)
    mean, scale = standardiser(pooled)
    assert (mean.tolist(), scale.tolist()) == ([0.0], [np.float32(1 / 1.01)])
    ((weight, bias),) = ridge_heads(pooled, mean, scale, (0.5,))
    w = (1 / 1.01) / (2 / 1.01**2 + 1)
    np.testing.assert_allclose(weight, [[-4 * w], [4 * w]], rtol=1e-6)
    np.testing.assert_allclose(bias, [2, 2], rtol=1e-6)


def test_a_label_without_examples_gets_a_score_of_zero_everywhere() -> None:
    stream = numpy_stream(0, "analytic", "absent")
    pooled = sums(stream.normal(size=(20, 3)), np.arange(20) % 2, np.ones(3), gram=True)
    ((weight, bias),) = ridge_heads(pooled, *standardiser(pooled), (0.1,))
    assert weight[2].tolist() == [0, 0, 0]
    assert bias[2] == 0


def test_an_input_that_is_constant_gets_no_weight() -> None:
    stream = numpy_stream(0, "analytic", "constant")
    inputs = stream.normal(size=(50, 3))
    inputs[:, 1] = 1000.1
    pooled = sums(inputs, np.arange(50) % 2, np.ones(2), gram=True)
    ((weight, _),) = ridge_heads(pooled, *standardiser(pooled), (0.1,))
    np.testing.assert_allclose(weight[:, 1], 0, atol=1e-6)
    assert np.abs(weight[:, [0, 2]]).min() > 1e-3


def test_inputs_that_tell_the_labels_apart_are_used_so() -> None:
    stream = numpy_stream(0, "analytic", "blobs")
    labels = np.arange(300) % 3
    inputs = stream.normal(size=(300, 5)) + 6 * np.eye(3, 5)[labels]
    pooled = sums(inputs, labels, np.ones(3), gram=True)
    mean, scale = standardiser(pooled)
    for weight, bias in ridge_heads(pooled, mean, scale, (0.1, 1.0)):
        assert (((inputs - mean) * scale @ weight.T + bias).argmax(1) == labels).mean() > 0.98


# -------------------------------------------------------------------------------------------------------------- sums


@law
@given(pools())
def test_sums_of_whole_numbers_add_exactly(pool: Pool) -> None:
    whole = Pool(np.rint(pool.inputs), pool.labels, np.rint(pool.weights) + 1, pool.sites)
    added, direct = whole.added(), whole.whole()
    for field in fields(Sums):
        one, other = getattr(added, field.name), getattr(direct, field.name)
        if np.abs(other).max(initial=0) < 2**53:
            np.testing.assert_array_equal(one, other)


@law
@given(pools())
def test_sums_are_what_their_formulas_say(pool: Pool) -> None:
    found, x, k = pool.whole(), pool.inputs, len(pool.weights)
    w, t = pool.weights[pool.labels], np.eye(k)[pool.labels]
    gram = np.einsum("n,ni,nj->ij", w, x, x)
    for one, other in [
        (found.count, [len(x)]), (found.total, x.sum(0)), (found.squares, (x**2).sum(0)), (found.weight, [w.sum()]),
        (found.weighted, w @ x), (found.targets, w @ t), (found.cross, np.einsum("n,ni,nk->ik", w, x, t)),
        (found.gram, np.concatenate([gram[row, row:] for row in range(len(gram))])),
    ]:  # fmt: skip
        size = np.abs(other).max(initial=0)
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12 * size)
        assert one.dtype == np.float64


@pytest.mark.parametrize("gram", [True, False])
def test_a_site_without_examples_adds_nothing(gram: bool) -> None:
    pool = Pool(np.arange(12.0).reshape(4, 3), np.array([0, 1, 1, 0]), np.array([1.0, 2.0]), np.zeros(4, int))
    some, none = pool.added(gram=gram), pool.part(np.zeros(4, bool), gram=gram)
    for field in fields(Sums):
        np.testing.assert_array_equal(getattr(some + none, field.name), getattr(some, field.name))


def test_without_the_closed_form_no_products_are_sent() -> None:
    pool = Pool(np.arange(12.0).reshape(4, 3), np.array([0, 1, 1, 0]), np.ones(2), np.array([0, 0, 1, 1]))
    lean, full = pool.added(gram=False), pool.added()
    assert (lean.gram.shape, lean.cross.shape) == ((0,), (0, 0))
    assert (full.gram.shape, full.cross.shape) == ((6,), (3, 2))
    for one, other in zip(standardiser(lean), standardiser(full), strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------------------ standardiser


@law
@given(pools())
def test_mean_and_scale_are_those_of_the_pooled_inputs(pool: Pool) -> None:
    mean, scale = standardiser(pool.added(gram=False))
    deviation = pool.inputs.std(0)
    deviation[np.ptp(pool.inputs, axis=0) == 0] = 0.0
    floor = DEVIATION_FLOOR * np.sqrt(np.mean(deviation**2)) or 1.0
    np.testing.assert_allclose(mean, pool.inputs.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scale, 1 / (deviation + floor), rtol=1e-6)
    assert mean.dtype == scale.dtype == np.float32


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e-6, 12345.678])
def test_inputs_that_are_all_constant_are_left_as_they_are(value: float) -> None:
    rows = np.full((7, 4), value)
    pooled = reduce(add, [sums(rows, np.arange(7) % 2, np.ones(2), gram=False) for _ in range(5)])
    mean, scale = standardiser(pooled)
    assert mean.tolist() == pytest.approx([value] * 4, rel=1e-6)
    assert scale.tolist() == [1.0] * 4


# ----------------------------------------------------------------------------------------------------------- weights


@law
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_balanced_weights_make_every_label_present_weigh_the_same(counts: list[int]) -> None:
    support = np.array(counts)
    weights = balanced_weights(support)
    present = support > 0
    np.testing.assert_allclose((weights * support)[present], support.sum() / len(support))
    assert weights[~present].tolist() == [1.0] * int((~present).sum())
    assert weights.dtype == np.float64


# ------------------------------------------------------------------------------------------- several labels an image


@dataclass(frozen=True)
class Findings:
    """Examples with several labels, some not annotated and some in between, with the site of each."""

    inputs: np.ndarray
    targets: np.ndarray  # (n, K)
    weights: np.ndarray  # (2, K)
    sites: np.ndarray

    def added(self, *, gram: bool = True) -> Sums:
        rows = [self.sites == site for site in range(self.sites.max() + 1)]
        return reduce(add, [labelwise_sums(self.inputs[r], self.targets[r], self.weights, gram=gram) for r in rows])


@st.composite
def findings(draw: st.DrawFn) -> Findings:
    """Data of which whole sites lack a label, as they would be summed with any weights."""
    stream = numpy_stream(draw(st.integers(0, 2**32)), "findings")
    n, width, k = draw(st.integers(6, 60)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    targets = (stream.random((n, k)) < 0.4).astype(np.float32)
    inputs = stream.normal(size=(n, width)) + targets @ stream.normal(size=(k, width)) + stream.uniform(-9, 9, width)
    sites = np.arange(n) % draw(st.integers(1, 4))
    targets[stream.random((n, k)) < draw(st.sampled_from([0.0, 0.4]))] = np.nan
    targets[stream.random((n, k)) < draw(st.sampled_from([0.0, 0.2]))] = 0.5
    if draw(st.booleans()):
        targets[sites == 0, 0] = np.nan
    return Findings(inputs, targets, stream.uniform(0.2, 4.0, (2, k)), sites)


@law
@given(findings())
def test_masked_sums_give_each_label_its_own_pooled_ridge_solution(pool: Findings) -> None:
    """By scikit-learn, on the annotated examples; one in between is two examples of a share of the weight each."""
    added = pool.added()
    mean, scale = standardiser(added)
    z = (pool.inputs - mean.astype(float)) * scale.astype(float)
    for penalty, (weight, bias) in zip(PENALTIES, ridge_heads(added, mean, scale, PENALTIES), strict=True):
        assert (weight.shape, weight.dtype, bias.dtype) == ((pool.targets.shape[1], z.shape[1]), np.float32, np.float32)
        for k, column in enumerate(pool.targets.T.astype(float)):
            known = np.flatnonzero(~np.isnan(column))
            if not len(known):
                assert not weight[k].any() and bias[k] == 0
                continue
            share = column[known]
            w = np.concatenate([pool.weights[1, k] * share, pool.weights[0, k] * (1 - share)])
            oracle = Ridge(alpha=penalty * w.sum(), solver="cholesky")
            oracle.fit(z[np.tile(known, 2)], np.repeat([1.0, 0.0], len(known)), sample_weight=w)
            np.testing.assert_allclose(weight[k], 2 * LOGIT_SCALE * oracle.coef_, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(bias[k], LOGIT_SCALE * (2 * oracle.intercept_ - 1), rtol=1e-5, atol=1e-5)


@law
@given(findings())
def test_a_label_that_everybody_annotated_gets_the_difference_of_two_labels(pool: Findings) -> None:
    y = (np.nan_to_num(pool.targets) == 1).astype(int)
    full = labelwise_sums(pool.inputs, y.astype(np.float32), pool.weights, gram=True)
    mean, scale = standardiser(full)
    for k in range(y.shape[1]):
        two = sums(pool.inputs, y[:, k], pool.weights[:, k], gram=True)
        np.testing.assert_array_equal(standardiser(two), (mean, scale))
        for (weight, bias), (rows, offsets) in zip(
            ridge_heads(full, mean, scale, PENALTIES), ridge_heads(two, mean, scale, PENALTIES), strict=True
        ):
            np.testing.assert_allclose(weight[k], rows[1] - rows[0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(bias[k], offsets[1] - offsets[0], rtol=1e-4, atol=1e-5)


@law
@given(findings())
def test_without_the_gram_matrix_mean_and_deviation_are_the_same(pool: Findings) -> None:
    short, whole = pool.added(gram=False), pool.added()
    assert (short.gram.shape, short.cross.shape) == ((pool.targets.shape[1], 0), (0, 0))
    for name in ("count", "total", "squares", "weight", "weighted", "targets"):
        np.testing.assert_array_equal(getattr(short, name), getattr(whole, name))


def test_no_examples_have_sums_of_zero() -> None:
    found = labelwise_sums(np.zeros((0, 4)), np.zeros((0, 3), np.float32), np.ones((2, 3)), gram=True)
    assert (found.gram.shape, found.cross.shape) == ((3, 10), (4, 3))
    assert not any(getattr(found, field.name).any() for field in fields(Sums))


def test_balanced_weights_of_several_labels_even_out_each_by_itself() -> None:
    counts = np.array([[30, 8, 5], [10, 8, 0]])  # absent, present
    weights = balanced_weights(counts)
    np.testing.assert_allclose(weights, [[40 / 60, 1.0, 0.5], [2.0, 1.0, 1.0]])
    for k in range(2):
        np.testing.assert_array_equal(weights[:, k], balanced_weights(counts[:, k]))
