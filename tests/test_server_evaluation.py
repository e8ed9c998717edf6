"""Figures of several sites are those of their pooled examples; edges follow the scores; rounds compete by AUC."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import metrics
from common.metrics import Evaluation
from server.evaluation import (
    COARSE_BINS,
    LEAST_BINS,
    MOST_BINS,
    Measured,
    first_edges,
    next_edges,
    score_for_choice,
)

NAMES = ("a", "b")


def drawn(count, labels=2, seed=0):
    random = np.random.default_rng(seed)
    y = random.integers(0, labels, count)
    logits = random.normal(size=(count, labels))
    logits[np.arange(count), y] += 1.0
    return logits, y


def measured(parts, edges):
    return Measured(edges, {name: metrics.evaluate(*part, edges) for name, part in parts.items()})


def scikit_free_auc(logits, y):
    """Every pair of a positive and a negative, one by one."""
    scores = logits[:, 1] - logits[:, 0]
    pairs = scores[y == 1][:, None] - scores[y == 0][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


@given(st.integers(2, 4), st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 1000))
def test_pooled_statistics_are_those_of_all_examples_together(labels, counts, seed):
    edges = first_edges(labels)
    parts = {f"site-{n}": drawn(count, labels, seed + n) for n, count in enumerate(counts)}
    together = [np.concatenate([part[place] for part in parts.values()]) for place in (0, 1)]
    assert measured(parts, edges).pooled == metrics.evaluate(*together, edges)


def test_the_order_of_the_sites_does_not_change_a_bit():
    edges = first_edges(2)
    parts = {name: drawn(30, seed=ord(name)) for name in "dbca"}
    first, second = measured(parts, edges), measured(dict(sorted(parts.items())), edges)
    assert first.summary(NAMES) == second.summary(NAMES)
    assert list(first.site_summaries(NAMES)) == sorted(parts)


def test_each_site_is_summed_up_by_itself():
    edges = first_edges(2)
    found = measured({"x": drawn(30), "y": drawn(20, seed=1)}, edges)
    alone = measured({"y": drawn(20, seed=1)}, edges)
    assert found.site_summaries(NAMES)["y"] == alone.summary(NAMES)
    assert found.summary(NAMES)["examples"] == 50


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_the_first_look_knows_nothing_and_covers_everything(labels):
    edges = first_edges(labels)
    assert edges.shape == (1 if labels == 2 else labels, COARSE_BINS - 1)
    assert (np.diff(edges) > 0).all()
    assert edges[0, 0] < -1000
    assert edges[0, -1] > 1000


@pytest.mark.parametrize(
    ("examples", "bins"), [(0, LEAST_BINS), (1, LEAST_BINS), (33, LEAST_BINS), (100, 50), (5000, MOST_BINS)]
)
def test_later_looks_have_half_as_many_bins_as_examples_within_bounds(examples, bins):
    found = next_edges(measured({"x": drawn(examples)}, first_edges(2)))
    assert found.shape == (1, bins - 1)


def test_a_second_look_on_quantiles_measures_the_auc_within_its_bound():
    part = drawn(2000)
    first = measured({"x": part}, first_edges(2))
    second = measured({"x": part}, next_edges(first))
    summary = second.summary(NAMES)
    assert summary["auc_bound"] <= 1 / MOST_BINS
    assert abs(summary["auc"] - scikit_free_auc(*part)) <= summary["auc_bound"]


def test_the_operating_point_stays_an_edge():
    part = drawn(200)
    first = measured({"x": part}, first_edges(2))
    threshold = 0.123456
    second = measured({"x": part}, next_edges(first, threshold))
    point = second.summary(NAMES, threshold)["operating_point"]
    scores = part[0][:, 1] - part[0][:, 0]
    assert point["recall"] == pytest.approx((scores[part[1] == 1] >= threshold).mean())
    assert point["specificity"] == pytest.approx((scores[part[1] == 0] < threshold).mean())


# ----------------------------------------------------------------------------------- what rounds compete by


def test_rounds_compete_by_auc():
    found = measured({"x": drawn(50)}, first_edges(2))
    assert score_for_choice(found, NAMES) == found.summary(NAMES)["auc"]


def test_with_one_label_in_validation_rounds_compete_by_log_loss():
    logits = np.array([[0.0, 1.0], [0.0, 3.0]])
    found = measured({"x": (logits, np.array([1, 1]))}, first_edges(2))
    expected = -np.mean(np.log1p(np.exp([-1.0, -3.0])))
    assert score_for_choice(found, NAMES) == pytest.approx(expected, abs=1e-7)


def test_without_validation_there_is_nothing_to_compete_by():
    found = Measured(first_edges(2), {"x": Evaluation.empty(2, COARSE_BINS)})
    assert score_for_choice(found, NAMES) is None
    assert found.summary(NAMES)["auc"] is None
