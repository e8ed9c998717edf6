"""Laws, closed forms and hostile input for the pooled metrics; scikit-learn and SciPy are the independent oracles."""

from __future__ import annotations

import json
import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import norm
from sklearn import metrics as sk

from common.metrics import (
    CALIBRATION_BINS,
    FIELDS,
    Evaluation,
    auc_from_histogram,
    auc_interval,
    average_precision,
    coarse_edges,
    evaluate,
    operating_point,
    quantile_edges,
    reliability_curve,
    roc_curve,
    scores,
    summarise,
    targets,
    youden,
)
from common.seeds import numpy_stream

METRICS = {
    "examples", "support", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "specificity", "auc",
    "auc_bound", "auc_ci95", "average_precision", "ece", "brier", "per_class", "operating_point",
}  # fmt: skip
PER_CLASS = {"precision", "recall", "f1", "specificity", "auc", "auc_bound"}
SHAPES_OF_SCORES = ("plain", "collapsed", "collapsed off centre", "saturated", "far out", "ties", "constant")

seeds = st.integers(0, 2**32)
label_counts = st.sampled_from([2, 3, 5, 9])
kinds = st.sampled_from(SHAPES_OF_SCORES)
law = settings(deadline=None, max_examples=60)


def draw(seed: int, n: int, k: int, kind: str = "plain") -> tuple[np.ndarray, np.ndarray]:
    """Return logits (n, k) with some signal, of one of the shapes that histograms find hard, and labels (n,)."""
    stream = numpy_stream(seed, "metrics", n, k, kind)
    labels = stream.integers(0, k, n)
    z = stream.normal(size=(n, k)) + 1.2 * np.eye(k)[labels]
    shaped = {
        "plain": lambda: z,
        "collapsed": lambda: 1e-4 * z,
        "collapsed off centre": lambda: 1e-4 * z + 3.0 * np.arange(k),
        "saturated": lambda: 1e3 * z,
        "far out": lambda: 1e7 * z,
        "ties": lambda: np.rint(z),
        "constant": lambda: np.zeros((n, k)),
    }[kind]()
    return shaped, labels


def refined(z: np.ndarray, y: np.ndarray, bins: int, passes: int) -> np.ndarray:
    edges = coarse_edges(z.shape[1])
    for _ in range(passes):
        edges = quantile_edges(evaluate(z, y, edges), edges, bins)
    return edges


def names(k: int) -> list[str]:
    return [f"label {i}" for i in range(k)]


# ------------------------------------------------------------------------------------------------------ additivity


@law
@given(seeds, label_counts, kinds, st.integers(0, 60), st.integers(1, 8))
def test_any_partition_sums_to_the_whole_to_the_last_bit(seed: int, k: int, kind: str, n: int, parts: int) -> None:
    z, y = draw(seed, n, k, kind)
    z = np.clip(z, -1e5, 1e5)  # a sum of losses is exact up to 2^27
    edges = coarse_edges(k, 64)
    stream = numpy_stream(seed, "partition")
    site, order = stream.integers(0, parts, n), stream.permutation(parts)
    pieces = [evaluate(z[site == i], y[site == i], edges) for i in order]
    pooled = reduce(Evaluation.__add__, pieces, Evaluation.empty(k, 64))
    whole = evaluate(z, y, edges)
    assert pooled == whole
    assert all(pooled.arrays()[name].tobytes() == whole.arrays()[name].tobytes() for name in FIELDS)


def test_sum_is_exact_where_plain_float_sums_are_not() -> None:
    z, y = draw(1, 5000, 2)
    edges = coarse_edges(2)
    singles = [evaluate(z[i : i + 1], y[i : i + 1], edges) for i in range(len(y))]
    forward = reduce(Evaluation.__add__, singles)
    assert forward == reduce(Evaluation.__add__, reversed(singles)) == evaluate(z, y, edges)
    terms = -log_softmax(z, axis=1)[np.arange(len(y)), y]
    assert sum(terms) != sum(reversed(terms))  # the test could fail


def test_empty_is_neutral_and_no_examples_evaluate_to_it() -> None:
    z, y = draw(2, 20, 3)
    some = evaluate(z, y, coarse_edges(3, 16))
    assert Evaluation.empty(3, 16) + some == some
    assert evaluate(np.empty((0, 3)), np.empty(0), coarse_edges(3, 16)) == Evaluation.empty(3, 16)
    assert some != Evaluation.empty(3, 16)
    assert some != "an evaluation"


@pytest.mark.parametrize("other", [Evaluation.empty(3, 16), Evaluation.empty(2, 8)])
def test_different_shapes_do_not_add(other: Evaluation) -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        Evaluation.empty(2, 16) + other


def test_evaluation_adds_to_nothing_else() -> None:
    with pytest.raises(TypeError):
        Evaluation.empty(2, 16) + 1  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------------- scores


@law
@given(seeds, label_counts, kinds)
def test_scores_are_log_odds(seed: int, k: int, kind: str) -> None:
    z, _ = draw(seed, 15, k, kind)
    for column, c in enumerate(targets(k)):
        others = logsumexp(np.delete(z, c, axis=1), axis=1)
        np.testing.assert_allclose(scores(z)[:, column], z[:, c] - others, rtol=1e-12, atol=1e-9)


def test_scores_keep_the_order_of_saturated_probabilities() -> None:
    z = np.array([[0.0, 800.0, 1.0], [0.0, 900.0, 1.0]])
    assert softmax(z, axis=1)[0, 1] == softmax(z, axis=1)[1, 1] == 1.0
    assert scores(z)[0, 1] < scores(z)[1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("k", [2, 3])
def test_a_value_that_is_not_finite_is_never_counted(bad: float, k: int) -> None:
    z = np.zeros((4, k))
    z[2, 1] = bad
    with pytest.raises(ValueError, match="not a finite float32"):
        evaluate(z, np.zeros(4, int), coarse_edges(k))
    with pytest.raises(ValueError, match="not a finite float32"):
        scores(z)


@pytest.mark.parametrize("k", [2, 4])
def test_the_largest_float32_logits_are_counted(k: int) -> None:
    z = np.zeros((2, k), np.float32)
    z[:, 0], z[:, 1] = np.finfo(np.float32).max, np.finfo(np.float32).min
    result = evaluate(z, np.array([0, 1]), coarse_edges(k))
    assert Evaluation.from_arrays(result.arrays()) == result
    assert math.isfinite(result.log_loss)
    json.dumps(summarise(result, names(k), coarse_edges(k)), allow_nan=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1]), "expected integers of shape"),
        (np.array([0.0, 1.0, 1.0]), "expected integers"),
        (np.array([0, 1, 2]), "expected 0 to 1"),
        (np.array([0, -1, 1]), "expected 0 to 1"),
    ],
)
def test_wrong_labels_are_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(np.zeros((3, 2)), labels, coarse_edges(2))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 2)])
def test_wrong_logit_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits"):
        evaluate(np.zeros(shape), np.zeros(3, int), coarse_edges(2))


@pytest.mark.parametrize(
    "edges", [[[1.0, 1.0]], [[2.0, 1.0]], [[0.0, math.nan]], [[0.0, math.inf]], [0.0, 1.0], [[0.0], [1.0]]]
)
def test_wrong_edges_are_refused(edges: list) -> None:
    with pytest.raises(ValueError, match="edges"):
        evaluate(np.zeros((3, 2)), np.zeros(3, int), np.array(edges))


def test_a_score_on_an_edge_belongs_to_the_bin_above() -> None:
    z = np.array([[0.0, 1.0], [0.0, np.nextafter(1.0, 0.0)], [0.0, -5.0]])
    result = evaluate(z, np.array([1, 1, 0]), np.array([[0.0, 1.0]]))
    assert result.positives.tolist() == [[0, 1, 1]]
    assert result.negatives.tolist() == [[1, 0, 0]]


# ------------------------------------------------------------------------------------------- figures from counts


@law
@given(seeds, label_counts, st.integers(1, 80))
def test_figures_of_counts_equal_scikit_learn(seed: int, k: int, n: int) -> None:
    z, y = draw(seed, n, k)
    edges = coarse_edges(k)
    figures = summarise(evaluate(z, y, edges), names(k), edges)
    predicted = z.argmax(axis=1)
    every = list(range(k))
    assert figures["accuracy"] == sk.accuracy_score(y, predicted)
    assert figures["support"] == {name: int((y == i).sum()) for i, name in enumerate(names(k))}

    def by_label(measure: str) -> list[float]:
        one = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}[measure]
        return one(y, predicted, labels=every, average=None, zero_division=np.nan).tolist()

    for measure in ("precision", "recall", "f1"):
        expected = by_label(measure)
        for i, name in enumerate(names(k)):
            assert same(figures["per_class"][name][measure], expected[i])
        assert same(figures[measure], expected[1] if k == 2 else nan_mean(expected))
    assert same(figures["balanced_accuracy"], nan_mean(by_label("recall")))
    for i, name in enumerate(names(k)):
        others = (y != i).sum()
        expected = ((y != i) & (predicted != i)).sum() / others if others else math.nan
        assert same(figures["per_class"][name]["specificity"], expected)


def same(ours: float | None, theirs: float) -> bool:
    return ours is None if math.isnan(theirs) else ours == pytest.approx(theirs, abs=1e-14)


def nan_mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


@law
@given(seeds, label_counts, kinds, st.integers(1, 60))
def test_brier_log_loss_and_calibration_have_their_closed_form(seed: int, k: int, kind: str, n: int) -> None:
    z, y = draw(seed, n, k, kind)
    result = evaluate(z, y, coarse_edges(k))
    p, truth = softmax(z, axis=1), np.eye(k)[y]
    squares = (p[:, 1] - y) ** 2 if k == 2 else ((p - truth) ** 2).sum(axis=1)
    assert result.brier == pytest.approx(squares.sum(), abs=1e-8 * n)
    assert result.log_loss == pytest.approx(-log_softmax(z, axis=1)[np.arange(n), y].sum(), abs=1e-8 * n, rel=1e-12)
    correct = z.argmax(axis=1) == y
    assert result.calibration[:, 0].sum() == n
    assert result.calibration[:, 1].sum() == pytest.approx(p.max(axis=1).sum(), abs=1e-8 * n)
    assert result.calibration[:, 2].sum() == correct.sum()


def test_ece_and_reliability_by_hand() -> None:
    p = np.array([0.62, 0.64, 0.95, 0.99])  # bins 9, 9, 14, 14 of 15
    z = np.stack([np.zeros(4), np.log(p / (1 - p))], axis=1)
    result = evaluate(z, np.array([1, 0, 1, 1]), coarse_edges(2))
    figures = summarise(result, names(2), coarse_edges(2))
    assert figures["ece"] == pytest.approx((abs(1.26 - 1) + abs(1.94 - 2)) / 4, abs=1e-7)
    assert figures["brier"] == pytest.approx((0.38**2 + 0.64**2 + 0.05**2 + 0.01**2) / 4, abs=1e-7)
    low, high = reliability_curve(result)
    assert low == {"confidence": pytest.approx(0.63), "accuracy": 0.5, "n": 2}
    assert high == {"confidence": pytest.approx(0.97), "accuracy": 1.0, "n": 2}
    assert reliability_curve(Evaluation.empty(2, 4)) == []


def test_certainty_falls_into_the_last_calibration_bin() -> None:
    result = evaluate(np.array([[0.0, 1000.0]]), np.array([1]), coarse_edges(2))
    assert result.calibration[CALIBRATION_BINS - 1].tolist() == [1.0, 1.0, 1.0]


# --------------------------------------------------------------------------------------------------- AUC and bound


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(seeds, label_counts, kinds, st.integers(2, 120), st.sampled_from([0, 1, 2]))
@example(seed=0, k=2, kind="collapsed", n=120, passes=0)
def test_auc_is_within_its_bound(seed: int, k: int, kind: str, n: int, passes: int) -> None:
    z, y = draw(seed, n, k, kind)
    edges = refined(z, y, 32, passes)
    result = evaluate(z, y, edges)
    for column, label in enumerate(targets(k)):
        auc, bound = auc_from_histogram(result.positives[column], result.negatives[column])
        if len(set(y == label)) < 2:
            assert auc is bound is None
        else:
            assert auc is not None
            assert bound is not None
            truth = sk.roc_auc_score(y == label, scores(z)[:, column])
            assert abs(auc - truth) <= bound + 1e-12


@law
@given(seeds, st.integers(3, 8))
def test_auc_of_sites_with_one_label_each_is_within_its_bound(seed: int, sites: int) -> None:
    z, y = draw(seed, 12 * sites, 2)
    y = np.repeat(np.arange(sites) % 2, 12)
    edges = coarse_edges(2, 128)
    parts = [evaluate(a, b, edges) for a, b in zip(np.split(z, sites), np.split(y, sites), strict=True)]
    assert all(summarise(part, names(2), edges)["auc"] is None for part in parts)
    figures = summarise(reduce(Evaluation.__add__, parts), names(2), edges)
    truth = sk.roc_auc_score(y, scores(z)[:, 0])
    assert abs(figures["auc"] - truth) <= figures["auc_bound"] + 1e-12


def test_auc_is_exact_and_bound_zero_when_bins_separate_the_labels() -> None:
    assert auc_from_histogram([0, 3, 0, 2], [4, 0, 1, 0]) == ((3 * 4 + 2 * 5) / 25, 0.0)


def test_equal_scores_count_one_half() -> None:
    z, y = draw(3, 100, 2, "constant")
    result = evaluate(z, y, coarse_edges(2))
    assert auc_from_histogram(result.positives[0], result.negatives[0]) == (0.5, 0.5)


@pytest.mark.parametrize("bins", [32, 128, 256])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(
    ("kind", "passes"),
    [("plain", 1), ("plain", 2), ("collapsed", 2), ("collapsed off centre", 5), ("saturated", 2), ("far out", 3)],
)
def test_refinement_reaches_the_bound_of_equal_mass(kind: str, passes: int, k: int, bins: int) -> None:
    z, y = draw(4, 6000, k, kind)
    result = evaluate(z, y, refined(z, y, bins, passes))
    for pos, neg in zip(result.positives, result.negatives, strict=True):
        bound = auc_from_histogram(pos, neg)[1]
        assert bound is not None
        assert bound <= 1 / (2 * bins)


@pytest.mark.parametrize("after", ["plain", "saturated", "collapsed"])
@pytest.mark.parametrize("before", ["plain", "saturated", "collapsed", "constant"])
def test_edges_recover_from_any_other_distribution(before: str, after: str) -> None:
    old = draw(5, 3000, 2, before)
    new, y = draw(6, 3000, 2, after)
    edges = refined(*old, 128, 4)
    for _ in range(3):
        edges = quantile_edges(evaluate(new, y, edges), edges, 128)
    result = evaluate(new, y, edges)
    bound = auc_from_histogram(result.positives[0], result.negatives[0])[1]
    assert bound is not None
    assert bound <= 1 / 256


# ----------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("bins", [2, 3, 64, 512])
@pytest.mark.parametrize("k", [2, 3, 40])
def test_coarse_edges_are_a_symmetric_grid_about_indifference(k: int, bins: int) -> None:
    edges = coarse_edges(k, bins)
    assert edges.shape == (len(targets(k)), bins - 1)
    assert (np.diff(edges) > 0).all()
    offset = edges + math.log(k - 1)
    gaps = np.diff(edges, prepend=-2e4, append=2e4)
    assert (np.abs(offset + offset[:, ::-1]) <= 0.02 * np.minimum(gaps[:, 1:], gaps[:, :-1])).all()  # but for rounding
    if bins == 512:
        assert gaps[0].argmin() in (255, 256)
        assert edges[0, 0] <= -1e4
        assert edges[0, -1] > 9990


def test_coarse_edges_of_two_labels_are_exactly_symmetric() -> None:
    edges = coarse_edges(2)[0]
    assert np.array_equal(edges, -edges[::-1])
    assert edges[255] == 0.0


@settings(deadline=None, max_examples=100)
@given(seeds, label_counts, kinds, st.integers(0, 40), st.integers(4, 300), st.integers(1, 6))
def test_quantile_edges_are_always_valid(seed: int, k: int, kind: str, n: int, bins: int, passes: int) -> None:
    z, y = draw(seed, n, k, kind)
    edges = refined(z, y, bins, passes)
    assert edges.shape == (len(targets(k)), bins - 1)
    assert np.isfinite(edges).all()
    assert (np.diff(edges) > 0).all()
    assert evaluate(z, y, edges).examples == n


def test_quantile_edges_have_few_digits() -> None:
    z, y = draw(7, 5000, 2)
    edges = refined(z, y, 128, 2)[0]
    assert all(len(f"{abs(edge):.12f}".rstrip("0").replace(".", "").lstrip("0")) <= 6 for edge in edges)


@law
@given(seeds, st.floats(-1e6, 1e6), st.sampled_from([4, 5, 64]), st.sampled_from([0, 50]))
def test_an_included_threshold_is_exactly_an_edge(seed: int, threshold: float, bins: int, n: int) -> None:
    z, y = draw(seed, n, 2)
    coarse = coarse_edges(2)
    edges = quantile_edges(evaluate(z, y, coarse), coarse, bins, include=threshold)
    assert threshold in edges[0]
    assert edges.shape == (1, bins - 1)
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize("bin_", [0, -1])
def test_a_histogram_that_always_lies_outside_cannot_push_the_edges_to_infinity(bin_: int) -> None:
    mass = np.zeros((1, 16), np.int64)
    mass[0, bin_] = 9
    liar = Evaluation(np.array([[0, 0], [0, 9]]), mass, 0 * mass, np.zeros((15, 3)), 0.0, 0.0)
    edges = coarse_edges(2, 16)
    for _ in range(200):
        edges = quantile_edges(liar, edges, 16)
    assert (np.diff(edges) > 0).all()
    assert np.abs(edges).max() < 1e40


def test_quantile_edges_refuse_what_does_not_fit() -> None:
    empty = Evaluation.empty(2, 8)
    with pytest.raises(ValueError, match="that of the histograms"):
        quantile_edges(empty, coarse_edges(2, 9))
    with pytest.raises(ValueError, match="expected a finite score"):
        quantile_edges(empty, coarse_edges(2, 8), include=math.nan)
    with pytest.raises(ValueError, match="bins"):
        quantile_edges(empty, coarse_edges(2, 8), bins=3)
    with pytest.raises(ValueError, match="at least 2"):
        coarse_edges(1)
    np.testing.assert_array_equal(quantile_edges(empty, coarse_edges(2, 8), 16), coarse_edges(2, 16))


# --------------------------------------------------------------------------------- interval, precision, curve


def exact_delong(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """Return DeLong's interval from all pairs of scores."""
    psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = psi.mean(axis=1).var(ddof=1) / len(positive) + psi.mean(axis=0).var(ddof=1) / len(negative)
    half = norm.ppf(0.975) * math.sqrt(variance)
    return psi.mean() - half, psi.mean() + half


@pytest.mark.parametrize("prevalence", [0.05, 0.3])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e3])
def test_interval_is_close_to_exact_delong(prevalence: float, spread: float) -> None:
    stream = numpy_stream(8, "delong", str(prevalence))
    y = (stream.random(3000) < prevalence).astype(int)
    s = spread * (stream.normal(size=3000) + 1.2 * y)
    z = np.stack([np.zeros(3000), s], axis=1)
    result = evaluate(z, y, refined(z, y, 256, 2))
    interval = auc_interval(result.positives[0], result.negatives[0])
    assert interval is not None
    expected = exact_delong(s[y == 1], s[y == 0])
    np.testing.assert_allclose(interval, expected, atol=5e-4)
    assert interval[1] - interval[0] == pytest.approx(expected[1] - expected[0], rel=0.01)


@law
@given(seeds, st.integers(2, 30), st.integers(2, 30))
def test_interval_equals_exact_delong_when_every_score_has_its_bin(seed: int, p: int, n: int) -> None:
    stream = numpy_stream(seed, "delong")
    positive, negative = stream.integers(0, 12, p), stream.integers(0, 12, n)
    interval = auc_interval(np.bincount(positive, minlength=12), np.bincount(negative, minlength=12))
    assert interval is not None
    np.testing.assert_allclose(interval, np.clip(exact_delong(positive, negative), 0, 1), atol=1e-12)


@pytest.mark.parametrize(("pos", "neg"), [([1, 0], [5, 5]), ([5, 5], [0, 1]), ([0, 0], [5, 5]), ([0, 0], [0, 0])])
def test_interval_needs_two_of_each(pos: list[int], neg: list[int]) -> None:
    assert auc_interval(pos, neg) is None


@law
@given(seeds, kinds, st.integers(2, 100))
def test_average_precision_and_curve_equal_scikit_learn_on_binned_scores(seed: int, kind: str, n: int) -> None:
    z, y = draw(seed, n, 2, kind)
    edges = coarse_edges(2, 64)
    result = evaluate(z, y, edges)
    binned = np.searchsorted(edges[0], scores(z)[:, 0], side="right")
    precision = average_precision(result.positives[0], result.negatives[0])
    curve = roc_curve(result.positives[0], result.negatives[0])
    if y.sum() in (0, n):
        assert precision is None
    else:
        assert precision == pytest.approx(sk.average_precision_score(y, binned), abs=1e-12)
    if 0 < y.sum() < n:
        fpr, tpr, _ = sk.roc_curve(y, binned, drop_intermediate=False)
        np.testing.assert_allclose(curve, np.stack([fpr, tpr], axis=1), atol=1e-15)
        area = np.trapezoid([t for _, t in curve], [f for f, _ in curve])
        assert area == pytest.approx(auc_from_histogram(result.positives[0], result.negatives[0])[0])
        assert len(curve) <= 65
    else:
        assert curve == []


# --------------------------------------------------------------------------------------------- operating point


@law
@given(seeds, kinds, st.integers(2, 80))
def test_youden_is_the_best_edge_and_its_figures_are_exact(seed: int, kind: str, n: int) -> None:
    z, y = draw(seed, n, 2, kind)
    edges = coarse_edges(2)
    result = evaluate(z, y, edges)
    threshold = youden(result, edges)
    if y.sum() in (0, n):
        assert threshold is None
        return
    assert threshold is not None
    s = scores(z)[:, 0]

    def gain(edge: float) -> float:
        return (s >= edge)[y == 1].mean() - (s >= edge)[y == 0].mean()

    assert gain(threshold) == pytest.approx(max(gain(edge) for edge in edges[0]))
    assert point_of(s, y, threshold) == operating_point(result, edges, threshold)


def point_of(s: np.ndarray, y: np.ndarray, threshold: float) -> dict[str, float | None]:
    called = s >= threshold
    return {
        "threshold": pytest.approx(softmax([0.0, threshold])[1]),
        "precision": y[called].mean() if called.any() else None,
        "recall": called[y == 1].mean(),
        "specificity": (~called)[y == 0].mean(),
    }


def test_a_frozen_threshold_is_exact_on_other_data() -> None:
    validation, test = draw(9, 400, 2), draw(10, 300, 2)
    edges = refined(*validation, 64, 2)
    threshold = youden(evaluate(*validation, edges), edges)
    assert threshold is not None
    assert threshold in edges[0]
    coarse = coarse_edges(2)
    others = quantile_edges(evaluate(*test, coarse), coarse, 64, include=threshold)
    figures = summarise(evaluate(*test, others), names(2), others, threshold)
    assert figures["operating_point"] == point_of(scores(test[0])[:, 0], test[1], threshold)


def test_of_equally_good_edges_the_one_nearest_to_zero_is_taken() -> None:
    edges = np.array([[-3.0, -2.0, 1.0, 4.0]])
    z = np.array([[0.0, -5.0], [0.0, 6.0]])
    assert youden(evaluate(z, np.array([0, 1]), edges), edges) == 1.0


def test_operating_point_refuses_a_threshold_between_edges_and_more_labels() -> None:
    z, y = draw(11, 20, 2)
    edges = coarse_edges(2)
    result = evaluate(z, y, edges)
    for foreign in (0.123, math.nan, np.nextafter(edges[0, 300], 9)):
        with pytest.raises(ValueError, match="is not one of the 511 edges"):
            operating_point(result, edges, foreign)
        with pytest.raises(ValueError, match="is not one of the 511 edges"):
            summarise(result, names(2), edges, foreign)
    with pytest.raises(ValueError, match="two labels"):
        operating_point(Evaluation.empty(3, 8), coarse_edges(3, 8), 0.0)


def test_extreme_thresholds_have_a_probability() -> None:
    z, y = draw(12, 20, 2)
    edges = coarse_edges(2)
    result = evaluate(z, y, edges)
    low = operating_point(result, edges, float(edges[0, 0]))
    high = operating_point(result, edges, float(edges[0, -1]))
    assert low == {"threshold": 0.0, "precision": y.mean(), "recall": 1.0, "specificity": 0.0}
    assert high == {"threshold": 1.0, "precision": None, "recall": 0.0, "specificity": 1.0}


# ---------------------------------------------------------------------------------------------------- summaries


@law
@given(seeds, label_counts, kinds, st.integers(0, 60))
def test_summary_has_every_key_and_is_plain_json(seed: int, k: int, kind: str, n: int) -> None:
    z, y = draw(seed, n, k, kind)
    edges = coarse_edges(k)
    result = evaluate(z, y, edges)
    figures = summarise(result, names(k), edges, youden(result, edges))
    assert set(figures) == METRICS
    assert list(figures["per_class"]) == list(figures["support"]) == names(k)
    assert all(set(label) == PER_CLASS for label in figures["per_class"].values())
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert (figures["operating_point"] is None) == (k > 2 or y.sum() in (0, n))


@pytest.mark.parametrize("k", [2, 3])
def test_no_examples_have_no_figures(k: int) -> None:
    edges = coarse_edges(k)
    figures = summarise(Evaluation.empty(k, 512), names(k), edges, 0.0)
    assert figures.pop("examples") == 0
    assert figures.pop("support") == dict.fromkeys(names(k), 0)
    assert figures.pop("per_class") == {name: dict.fromkeys(PER_CLASS) for name in names(k)}
    assert set(figures.values()) == {None}


def test_the_first_of_two_labels_mirrors_the_second() -> None:
    z, y = draw(13, 500, 2)
    edges = refined(z, y, 64, 1)
    ours = summarise(evaluate(z, y, edges), ["a", "b"], edges)
    mirrored = -edges[:, ::-1]
    swapped = summarise(evaluate(z[:, ::-1], 1 - y, mirrored), ["b", "a"], mirrored)
    for name in ("a", "b"):
        assert ours["per_class"][name] == pytest.approx(swapped["per_class"][name])
    assert ours["per_class"]["a"]["auc"] == pytest.approx(ours["auc"])
    assert ours["per_class"]["b"] == {key: ours[key] for key in PER_CLASS}


def test_means_over_labels_leave_out_the_undefined() -> None:
    z, y = draw(14, 200, 4)
    y[y == 3] = 0  # label 3 has no examples
    edges = refined(z, y, 128, 2)
    result = evaluate(z, y, edges)
    figures = summarise(result, names(4), edges)
    absent = figures["per_class"]["label 3"]
    assert absent["recall"] is absent["auc"] is absent["auc_bound"] is None
    truth = [sk.roc_auc_score(y == i, scores(z)[:, i]) for i in range(3)]
    assert abs(figures["auc"] - np.mean(truth)) <= figures["auc_bound"] + 1e-12
    bounds = [figures["per_class"][f"label {i}"]["auc_bound"] for i in range(3)]
    assert figures["auc_bound"] == pytest.approx(np.mean(bounds))
    widths = [np.diff(auc_interval(result.positives[i], result.negatives[i]))[0] for i in range(3)]
    assert np.diff(figures["auc_ci95"])[0] == pytest.approx(np.mean(widths))
    precisions = [average_precision(result.positives[i], result.negatives[i]) for i in range(3)]
    assert figures["average_precision"] == pytest.approx(np.mean(precisions))


def test_mean_interval_is_undefined_when_one_of_its_labels_has_a_single_example() -> None:
    z, y = draw(15, 60, 3)
    y = np.where(np.arange(60) == 0, 2, y % 2)
    edges = coarse_edges(3)
    figures = summarise(evaluate(z, y, edges), names(3), edges)
    assert figures["auc"] is not None
    assert figures["auc_ci95"] is None


def test_a_label_that_is_never_predicted_has_no_precision() -> None:
    z = np.tile([1.0, 0.0], (4, 1))
    figures = summarise(evaluate(z, np.array([0, 0, 1, 1]), coarse_edges(2)), ["a", "b"], coarse_edges(2))
    assert figures["precision"] is None
    assert figures["recall"] == figures["f1"] == 0.0
    assert figures["specificity"] == 1.0


@pytest.mark.parametrize("wrong", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_names_must_be_one_for_each_label(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="expected 2 different names"):
        summarise(Evaluation.empty(2, 512), wrong, coarse_edges(2))


# -------------------------------------------------------------------------------------------------- hostile input


@law
@given(seeds, label_counts, kinds, st.integers(0, 40))
def test_arrays_survive_the_wire(seed: int, k: int, kind: str, n: int) -> None:
    result = evaluate(*draw(seed, n, k, kind), coarse_edges(k, 64))
    arrays = result.arrays()
    assert tuple(arrays) == FIELDS
    again = Evaluation.from_arrays(arrays)
    assert again == result
    assert not any(np.shares_memory(again.arrays()[name], arrays[name]) for name in FIELDS[:4])


def changed(name: str, index: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    """Return the arrays of a sound evaluation with one entry set to `value`."""
    arrays = {key: array.copy() for key, array in evaluate(*draw(16, 30, 2), coarse_edges(2, 8)).arrays().items()}
    arrays[name][index] = value
    return arrays


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        *[(name, (0, 0), value) for name in FIELDS[:3] for value in (-1, 999, 2**41, 2**63 - 1)],
        *[("calibration", (12, c), bad) for c in range(3) for bad in (-1.0, math.nan, math.inf, 0.5, 1e6)],
        *[("brier", (0,), bad) for bad in (-1e-9, math.nan, math.inf, 30.1)],
        *[("log_loss", (0,), bad) for bad in (-1e-9, math.nan, math.inf)],
    ],
)
def test_a_single_impossible_entry_is_refused(name: str, index: tuple[int, ...], value: float) -> None:
    with pytest.raises(ValueError, match=name.removesuffix("s") if name != "confusion" else "evaluation"):
        Evaluation.from_arrays(changed(name, index, value))


def test_more_correct_than_counted_in_a_bin_is_refused() -> None:
    arrays = changed("brier", (0,), 1.0)
    Evaluation.from_arrays(arrays)
    full, other = np.flatnonzero(arrays["calibration"][:, 2])[:2]
    arrays["calibration"][full, 2] += arrays["calibration"][other, 2]
    arrays["calibration"][other, 2] = 0
    assert arrays["calibration"][full, 2] > arrays["calibration"][full, 0]
    with pytest.raises(ValueError, match="correct"):
        Evaluation.from_arrays(arrays)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("confusion", np.zeros((2, 3), np.int64)),
        ("confusion", np.zeros((1, 1), np.int64)),
        ("confusion", np.zeros(4, np.int64)),
        ("confusion", np.zeros((2, 2))),
        ("confusion", np.zeros((2, 2), object)),
        ("confusion", [[0, 0], [0, 0]]),
        ("confusion", None),
        ("positives", np.zeros((2, 8), np.int64)),
        ("positives", np.zeros((1, 0), np.int64)),
        ("negatives", np.zeros((1, 9), np.int64)),
        ("negatives", np.zeros((1, 8), np.complex128)),
        ("negatives", np.broadcast_to(np.int64(0), (1, 2**23))),
        ("calibration", np.zeros((14, 3))),
        ("calibration", np.zeros((15, 3), np.float32)),
        ("calibration", np.zeros((15, 3), np.int64)),
        ("brier", np.zeros(())),
        ("brier", np.array(["0"])),
        ("log_loss", 0.0),
        ("log_loss", np.ones(1)),
    ],
)
def test_wrong_types_and_shapes_are_refused(name: str, value: object) -> None:
    arrays = Evaluation.empty(2, 8).arrays()
    assert Evaluation.from_arrays(arrays) == Evaluation.empty(2, 8)
    with pytest.raises(ValueError, match=r"evaluation|labels"):
        Evaluation.from_arrays({**arrays, name: value})  # type: ignore[dict-item]


def test_missing_and_foreign_arrays_are_refused() -> None:
    arrays = Evaluation.empty(2, 8).arrays()
    with pytest.raises(ValueError, match="exactly the arrays"):
        Evaluation.from_arrays({**arrays, "scores": np.zeros(1)})
    del arrays["brier"]
    with pytest.raises(ValueError, match="exactly the arrays"):
        Evaluation.from_arrays(arrays)


def test_counts_of_any_integer_type_are_accepted() -> None:
    arrays = evaluate(*draw(17, 30, 2), coarse_edges(2, 8)).arrays()
    narrow = {name: array.astype(np.uint16) for name, array in arrays.items() if array.dtype == np.int64}
    assert Evaluation.from_arrays(arrays | narrow) == Evaluation.from_arrays(arrays)
