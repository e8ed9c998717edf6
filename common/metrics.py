"""Pooled classification figures from sums: sites send counts and histograms, never scores.

An `Evaluation` holds additive sufficient statistics: the sum over sites *is* the evaluation of the pooled examples.
Figures that are ratios of counts (accuracy, precision, recall, ...) come out exact; figures that need the order of all
scores (AUC, average precision, ROC) come from histograms on common edges, the AUC with a bound on its own error.

Shapes: N examples, K labels, R targets (`targets`), B histogram bins with B - 1 edges.  A score is the log-odds of a
target label; bin b holds the scores s with `edges[b - 1] <= s < edges[b]`.  A figure that is undefined is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

CALIBRATION_BINS: Final = 15
FIELDS: Final = ("confusion", "positives", "negatives", "calibration", "brier", "log_loss")
PER_LABEL: Final = ("precision", "recall", "f1", "specificity", "auc", "auc_bound")

# Real-valued terms are rounded to multiples of 2^-26 before they are summed: sums below 2^27 are then exact in
# float64, so no figure depends on the order or the grouping of sites and batches.
_QUANTUM: Final = 2.0**-26
_LARGEST_LOGIT: Final = float(np.finfo(np.float32).max)  # differences of logits must not overflow
_LARGEST_COUNT: Final = 2**40  # with at most _LARGEST_SIZE entries a sum of counts stays below 2^63
_LARGEST_SIZE: Final = 2**22
_GRID_UNIT: Final = 1e-5  # log-odds below which the coarse grid is linear
_GRID_REACH: Final = 1e4
_FINEST: Final = 1e-9  # least distance of two edges on the even scale: finer than float32 logits can tell
_Z95: Final = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Additive sufficient statistics of a classifier on a set of examples; `a + b` are those of the union.

    Args:
        confusion: (K, K) counts, rows true label, columns argmax (the first of equals).
        positives: (R, B) histogram of the scores of examples that carry the target label.
        negatives: (R, B) histogram of the scores of all other examples.
        calibration: (15, 3) per equal-width bin of top-1 confidence: examples, sum of confidence, correct ones.
        brier: sum over examples of (p_1 - y)^2 for two labels, of the sum over labels of (p - y)^2 for more.
        log_loss: sum over examples of -ln p of the true label.
    """

    confusion: Counts
    positives: Counts
    negatives: Counts
    calibration: Floats
    brier: float
    log_loss: float

    @classmethod
    def empty(cls, num_labels: int, bins: int) -> Evaluation:
        """Return the statistics of no examples, the neutral element of `+`."""
        histogram = (len(targets(num_labels)), bins)
        return cls(
            np.zeros((num_labels, num_labels), np.int64),
            np.zeros(histogram, np.int64),
            np.zeros(histogram, np.int64),
            np.zeros((CALIBRATION_BINS, 3)),
            0.0,
            0.0,
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Return the statistics that `arrays` wrote, after checking everything a sender could get wrong.

        Raises:
            ValueError: a name, type, shape or value is not that of an evaluation, or the totals contradict each other.
        """
        if set(arrays) != set(FIELDS):
            raise ValueError(f"evaluation: expected exactly the arrays {', '.join(FIELDS)}")
        evaluation = cls(
            confusion=_received_counts("confusion", arrays),
            positives=_received_counts("positives", arrays),
            negatives=_received_counts("negatives", arrays),
            calibration=_received_reals("calibration", arrays, (CALIBRATION_BINS, 3)),
            brier=float(_received_reals("brier", arrays, (1,))[0]),
            log_loss=float(_received_reals("log_loss", arrays, (1,))[0]),
        )
        _check_shapes(evaluation)
        _check_totals(evaluation)
        return evaluation

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the six statistics as arrays by name, the two sums as shape (1,)."""
        return {name: np.atleast_1d(np.asarray(getattr(self, name))) for name in FIELDS}

    @property
    def examples(self) -> int:
        """The number of examples counted."""
        return int(self.confusion.sum())

    @property
    def num_labels(self) -> int:
        """The number of labels K."""
        return len(self.confusion)

    @property
    def bins(self) -> int:
        """The number of histogram bins B."""
        return int(self.positives.shape[1])

    @property
    def mean_log_loss(self) -> float | None:
        """The mean of -ln p of the true label; None without examples."""
        return self.log_loss / self.examples if self.examples else None

    @property
    def support(self) -> Counts:
        """(K,) examples of each true label."""
        return np.asarray(self.confusion.sum(axis=1))

    def __add__(self, other: Evaluation) -> Evaluation:
        if not isinstance(other, Evaluation):
            return NotImplemented
        if self.confusion.shape != other.confusion.shape or self.positives.shape != other.positives.shape:
            raise ValueError(
                f"evaluations of {self.num_labels} labels with histograms {self.positives.shape} and of "
                f"{other.num_labels} labels with histograms {other.positives.shape} cannot be added"
            )
        return Evaluation(*(getattr(self, name) + getattr(other, name) for name in FIELDS))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Evaluation):
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        return all(np.array_equal(mine[name], theirs[name]) for name in FIELDS)


def targets(num_labels: int) -> range:
    """Return the labels that have a score: the second of two, each against the rest of more.

    Raises:
        ValueError: fewer than two labels.

    Examples:
        >>> list(targets(2)), list(targets(3))
        ([1], [0, 1, 2])
    """
    if num_labels < 2:
        raise ValueError(f"got {num_labels} labels, expected at least 2")
    return range(1, 2) if num_labels == 2 else range(num_labels)


# ---------------------------------------------------------------------------------------------------- counting


def scores(logits: ArrayLike) -> Floats:
    """Return the log-odds of each target label, s_c = z_c - ln Σ_{j≠c} exp(z_j), (N, K) -> (N, R).

    Monotone in the softmax probability, but it does not saturate: probabilities that all round to 1 keep their order.

    Raises:
        ValueError: not a matrix of finite float32-sized numbers with at least two columns.

    Examples:
        >>> scores([[0.0, 50.0], [0.0, 60.0]])
        array([[50.],
               [60.]])
    """
    return _log_odds(_checked_logits(logits))


def evaluate(logits: ArrayLike, labels: ArrayLike, edges: Floats) -> Evaluation:
    """Count what `logits` say about examples of known `labels`.

    Args:
        logits: (N, K) finite numbers; N = 0 is allowed.
        labels: (N,) integers in [0, K).
        edges: (R, B - 1) strictly increasing log-odds, the same on every site.

    Raises:
        ValueError: a shape or a value is outside of the above; a NaN is never counted.
    """
    z = _checked_logits(logits)
    (n, k), rows = z.shape, np.arange(z.shape[0])
    y = _checked_labels(labels, n, k)
    _check_edges(edges, k)
    shifted = z - z.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(axis=1)
    predicted = z.argmax(axis=1)
    positives, negatives = _histograms(_log_odds(z), y, edges, k)
    return Evaluation(
        confusion=np.bincount(y * k + predicted, minlength=k * k).reshape(k, k),
        positives=positives,
        negatives=negatives,
        calibration=_calibration(1.0 / total, predicted == y),
        brier=_brier(exponentials / total[:, None], y),
        log_loss=float(_quantised(np.log(total) - shifted[rows, y]).sum()),
    )


def _checked_logits(logits: ArrayLike) -> Floats:
    z = np.ascontiguousarray(logits, dtype=np.float64)
    if z.ndim != 2 or z.shape[1] < 2:
        raise ValueError(f"logits: got shape {z.shape}, expected (examples, labels) with at least 2 labels")
    if not (np.abs(z) <= _LARGEST_LOGIT).all():  # a NaN fails every comparison
        raise ValueError("logits: got a value that is not a finite float32; the model diverged or was corrupted")
    return np.asarray(z)


def _checked_labels(labels: ArrayLike, n: int, k: int) -> Counts:
    y = np.asarray(labels)
    if y.shape != (n,) or (n and y.dtype.kind not in "iu"):
        raise ValueError(f"labels: got {y.dtype} of shape {y.shape}, expected integers of shape ({n},)")
    if n and not (y.min() >= 0 and y.max() < k):
        raise ValueError(f"labels: got values in [{y.min()}, {y.max()}], expected 0 to {k - 1}")
    return y.astype(np.int64)


def _check_edges(edges: Floats, num_labels: int) -> None:
    rows = len(targets(num_labels))
    if edges.ndim != 2 or edges.shape[0] != rows:
        raise ValueError(f"edges: got shape {edges.shape}, expected ({rows}, bins - 1)")
    if not ((edges[:, 1:] > edges[:, :-1]).all() and np.isfinite(edges).all()):
        raise ValueError("edges: expected finite and strictly increasing numbers in each row")


def _log_odds(z: Floats) -> Floats:
    if z.shape[1] == 2:
        return np.asarray(z[:, 1:] - z[:, :1])
    rows, top = np.arange(z.shape[0]), z.argmax(axis=1)
    shifted = z - z[rows, top][:, None]
    rest = np.exp(shifted)
    rest[rows, top] = 0.0
    # Against a label that is not the top one stand the top's exp(0) = 1 and the others: never a small difference.
    odds: Floats = shifted - np.log1p(np.maximum(rest.sum(axis=1, keepdims=True) - rest, 0.0))
    shifted[rows, top] = -np.inf
    second = shifted.max(axis=1)
    odds[rows, top] = -second - np.log(np.exp(shifted - second[:, None]).sum(axis=1))
    return odds


def _histograms(log_odds: Floats, y: Counts, edges: Floats, k: int) -> tuple[Counts, Counts]:
    """Return the (R, B) counts of examples with and without each target label, by bin of their score."""
    rows, bins = edges.shape[0], edges.shape[1] + 1
    # One flat index for (with or without, target, bin), so that a single pass counts everything.
    flat = [
        np.searchsorted(edges[r], log_odds[:, r], side="right") + bins * (r + rows * (y != label))
        for r, label in enumerate(targets(k))
    ]
    counts = np.bincount(np.concatenate(flat), minlength=2 * rows * bins).reshape(2, rows, bins)
    return counts[0], counts[1]


def _quantised(terms: Floats) -> Floats:
    return np.rint(terms / _QUANTUM) * _QUANTUM


def _calibration(confidence: Floats, correct: NDArray[np.bool_]) -> Floats:
    index = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    columns = (None, _quantised(confidence), correct)
    return np.stack([np.bincount(index, column, CALIBRATION_BINS) for column in columns], axis=1, dtype=np.float64)


def _brier(probabilities: Floats, y: Counts) -> float:
    k = probabilities.shape[1]
    terms = np.square(probabilities - (y[:, None] == np.arange(k))).sum(axis=1)
    # Of two labels (p_0 - y_0)^2 = (p_1 - y_1)^2: counted once.
    return float(_quantised(terms / 2.0 if k == 2 else terms).sum())


# ----------------------------------------------------------------------------------------------------- receiving


def _received_counts(name: str, arrays: Mapping[str, object]) -> Counts:
    value = arrays[name]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.ndim != 2:
        raise ValueError(f"evaluation: {name!r} is {_described(value)}, expected a matrix of integers")
    if not 0 < value.size <= _LARGEST_SIZE:
        raise ValueError(f"evaluation: {name!r} has {value.size} entries, expected 1 to {_LARGEST_SIZE}")
    if value.min() < 0 or value.max() > _LARGEST_COUNT:
        raise ValueError(f"evaluation: {name!r} holds a count outside of 0 to 2^40")
    return value.astype(np.int64)


def _received_reals(name: str, arrays: Mapping[str, object], shape: tuple[int, ...]) -> Floats:
    value = arrays[name]
    if not isinstance(value, np.ndarray) or value.dtype != np.float64 or value.shape != shape:
        raise ValueError(f"evaluation: {name!r} is {_described(value)}, expected float64 of shape {shape}")
    if not (np.isfinite(value).all() and (value >= 0).all()):
        raise ValueError(f"evaluation: {name!r} holds a number that is negative or not finite")
    return value.copy()


def _described(value: object) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _check_shapes(evaluation: Evaluation) -> None:
    rows, columns = evaluation.confusion.shape
    if rows != columns:
        raise ValueError(f"evaluation: 'confusion' has shape ({rows}, {columns}), expected a square")
    expected = (len(targets(rows)), evaluation.positives.shape[1])
    for name in ("positives", "negatives"):
        shape = getattr(evaluation, name).shape
        if shape != expected:
            raise ValueError(f"evaluation: {name!r} has shape {shape}, expected {expected}")


def _check_totals(evaluation: Evaluation) -> None:
    """Raise ValueError unless the statistics can be those of one and the same set of examples."""
    n, k = evaluation.examples, evaluation.num_labels
    carriers = evaluation.support[list(targets(k))]
    count, confidence, correct = evaluation.calibration.T
    told = bool(evaluation.calibration.any())  # it may be withheld
    slack = count * 2 * _QUANTUM
    bins = np.arange(CALIBRATION_BINS)
    consistent = {
        "examples": n <= _LARGEST_COUNT,
        "positives": np.array_equal(evaluation.positives.sum(axis=1), carriers),
        "negatives": np.array_equal(evaluation.negatives.sum(axis=1), n - carriers),
        "calibration (examples)": not told or (count.sum() == n and np.array_equal(count, np.rint(count))),
        "calibration (correct)": (not told or correct.sum() == np.trace(evaluation.confusion))
        and np.array_equal(correct, np.rint(correct))
        and bool((correct <= count).all()),
        "calibration (confidence)": bool(
            (confidence >= count * bins / CALIBRATION_BINS - slack).all()
            and (confidence <= count * (bins + 1) / CALIBRATION_BINS + slack).all()
        ),
        "brier": evaluation.brier <= (1 if k == 2 else 2) * n * (1 + 1e-9),
        "log_loss": evaluation.log_loss <= 3.0 * _LARGEST_LOGIT * n,
    }
    wrong = [name for name, holds in consistent.items() if not holds]
    if wrong:
        raise ValueError(f"evaluation: {', '.join(wrong)} cannot belong to the {n} examples of 'confusion'")


# --------------------------------------------------------------------------------------------------------- edges


def coarse_edges(num_labels: int, bins: int = 512) -> Floats:
    """Return edges that need no data: (R, bins - 1) log-odds to ±1e4, finest where an undecided model scores.

    They are equidistant in arsinh((s - c) / 1e-5): linear near the centre c, geometric further out.  The centre is
    the log-odds of a uniform prediction, -ln(K - 1), which is 0 for two labels.

    Raises:
        ValueError: fewer than two labels or two bins.

    Examples:
        >>> coarse_edges(2, bins=4)
        array([[-10000.,      0.,  10000.]])
    """
    rows = len(targets(num_labels))
    _check_bins(bins, 2)
    steps = np.linspace(-1.0, 1.0, bins - 1) if bins > 2 else np.zeros(1)
    even = np.arcsinh(_GRID_REACH / _GRID_UNIT) * (steps - steps[::-1]) / 2.0
    return np.tile(_to_scores(even, _centre(num_labels)), (rows, 1))


def quantile_edges(evaluation: Evaluation, edges: Floats, bins: int = 256, include: float | None = None) -> Floats:
    """Return edges of near-equal pooled mass, (R, bins - 1), from a histogram on other edges.

    The first and the last edge enclose the scores, as far as the histogram tells; those between have equal mass.
    Inside a bin the mass is taken as evenly spread on the scale of `coarse_edges`, which is linear for any narrow
    bin.  Heavy bins are thereby split, and repeating the two steps closes in on any continuous distribution of
    scores, where the error bound of the AUC is at most about 1 / (2 bins).  Edges are rounded to a hundredth of the
    distance to their neighbour.  An empty histogram gives the coarse edges.

    Args:
        evaluation: a histogram on `edges`.
        edges: (R, B - 1).
        bins: number of bins wanted, at least 4.
        include: a score that shall be an edge of row 0, exactly; it takes the place of the nearest.

    Raises:
        ValueError: the shapes do not fit, fewer than four bins, or `include` is not finite.
    """
    _check_fit(evaluation, edges)
    _check_bins(bins, 4)
    if evaluation.examples == 0:
        result = coarse_edges(evaluation.num_labels, bins)
    else:
        mass, centre = evaluation.positives + evaluation.negatives, _centre(evaluation.num_labels)
        result = np.stack([_row_quantiles(m, e, centre, bins) for m, e in zip(mass, edges, strict=True)])
    if include is not None:
        if not math.isfinite(include):
            raise ValueError(f"include: got {include}, expected a finite score")
        result[0, np.abs(result[0] - include).argmin()] = include  # the nearest: its neighbours stay apart
    return result


def _centre(num_labels: int) -> float:
    """Return the log-odds of one label in a uniform prediction."""
    return -math.log(num_labels - 1)


def _row_quantiles(mass: Counts, edges: Floats, centre: float, bins: int) -> Floats:
    filled = np.flatnonzero(mass)
    span = slice(filled[0], filled[-1] + 2)
    reached = np.concatenate([[0], mass.cumsum()])[span].astype(np.float64)
    knots = _enclosed(np.arcsinh((edges - centre) / _GRID_UNIT))[span]
    even = np.interp(reached[-1] * np.linspace(0.0, 1.0, bins - 1), reached, knots)
    # A step is relative far from the centre and absolute near it, as the precision of a score is.
    steps = _FINEST * np.arange(bins - 1)
    return _to_scores(np.maximum.accumulate(even - steps) + steps, centre)


def _enclosed(even: Floats) -> Floats:
    """Return edges on the even scale with an end for each of the two open outer bins: the grid's, or far beyond."""
    reach, beyond = float(np.arcsinh(_GRID_REACH / _GRID_UNIT)), math.log(1e3)
    limit = float(np.arcsinh(3.0 * _LARGEST_LOGIT / _GRID_UNIT))
    low, high = min([-reach, *(even[:1] - beyond)]), max([reach, *(even[-1:] + beyond)])
    return np.concatenate([[max(low, -limit)], even, [min(high, limit)]])


def _to_scores(even: Floats, centre: float) -> Floats:
    return _rounded(_GRID_UNIT * np.sinh(even) + centre)


def _rounded(row: Floats) -> Floats:
    gaps = np.concatenate([[1.0], np.diff(row), [1.0]])
    nearest = np.minimum(gaps[:-1], gaps[1:])
    scale = 10.0 ** (2.0 - np.floor(np.log10(nearest)))
    return np.asarray(np.rint(row * scale) / scale + 0.0)  # + 0.0 turns -0.0 into 0.0


def _check_bins(bins: int, least: int) -> None:
    if bins < least:
        raise ValueError(f"bins: got {bins}, expected at least {least}")


def _check_fit(evaluation: Evaluation, edges: Floats) -> None:
    rows, bins = evaluation.positives.shape
    if edges.shape != (rows, bins - 1):
        raise ValueError(f"edges: got shape {edges.shape}, expected ({rows}, {bins - 1}), that of the histograms")


# ----------------------------------------------------------------------------------------- figures of histograms


def auc_from_histogram(pos: ArrayLike, neg: ArrayLike) -> tuple[float | None, float | None]:
    """Return the area under the ROC curve and a bound on its distance from that of the scores themselves.

    AUC_h = Σ_b p_b (N_{<b} + n_b / 2) / (P N).  Pairs in different bins are ordered exactly; one in the same bin
    counts 0, 1/2 or 1 in truth and 1/2 here, so |AUC - AUC_h| <= E = Σ_b p_b n_b / (2 P N).  (None, None) where one
    of the two groups is empty.

    Args:
        pos: (B,) counts of examples with the label, in bins of rising score.
        neg: (B,) counts of examples without it.

    Examples:
        >>> auc_from_histogram([0, 1, 1], [1, 1, 0])
        (0.875, 0.125)
    """
    p, n = _as_floats(pos, neg)
    pairs = float(p.sum() * n.sum())
    if pairs == 0:
        return None, None
    return float(p @ (n.cumsum() - n / 2.0)) / pairs, float(p @ n) / 2.0 / pairs


def auc_interval(pos: ArrayLike, neg: ArrayLike) -> tuple[float, float] | None:
    """Return DeLong's 95 % interval of the AUC, clipped to [0, 1]; None with fewer than two of either group.

    Takes examples as independent.  At an AUC of exactly 0 or 1 its width is 0, however few the examples.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988) 837-845, on mid-rank bins.
    """
    return _interval(auc_from_histogram(pos, neg)[0], _standard_error(pos, neg))


def average_precision(pos: ArrayLike, neg: ArrayLike) -> float | None:
    """Return Σ_b (recall gained in bin b) · (precision at its lower edge), from the top.

    None without positives, and without negatives, where it would be 1 whatever the scores.

    Examples:
        >>> average_precision([0, 1, 1], [1, 1, 0])
        0.8333333333333333
    """
    p, n = (counts[::-1] for counts in _as_floats(pos, neg))
    if p.sum() == 0 or n.sum() == 0:
        return None
    gained = p > 0
    precision = p.cumsum()[gained] / (p + n).cumsum()[gained]
    return float(p[gained] @ precision / p.sum())


def roc_curve(pos: ArrayLike, neg: ArrayLike) -> list[tuple[float, float]]:
    """Return the (false, true) positive rates from (0, 0) to (1, 1), one point a non-empty bin; [] if undefined.

    Examples:
        >>> roc_curve([0, 1, 1], [1, 1, 0])
        [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """
    p, n = (counts[::-1] for counts in _as_floats(pos, neg))
    if p.sum() == 0 or n.sum() == 0:
        return []
    filled = p + n > 0
    rates = zip((n.cumsum() / n.sum())[filled].tolist(), (p.cumsum() / p.sum())[filled].tolist(), strict=True)
    return [(0.0, 0.0), *rates]


def _as_floats(pos: ArrayLike, neg: ArrayLike) -> tuple[Floats, Floats]:
    return np.asarray(pos, dtype=np.float64), np.asarray(neg, dtype=np.float64)


def _standard_error(pos: ArrayLike, neg: ArrayLike) -> float | None:
    p, n = _as_floats(pos, neg)
    if p.sum() < 2 or n.sum() < 2:
        return None
    beaten = (n.cumsum() - n / 2.0) / n.sum()  # by a positive in bin b: share of negatives
    beating = (p[::-1].cumsum()[::-1] - p / 2.0) / p.sum()  # a negative in bin b: share of positives
    return math.sqrt(_variance_of_mean(beaten, p) + _variance_of_mean(beating, n))


def _variance_of_mean(values: Floats, weights: Floats) -> float:
    total = weights.sum()
    mean = weights @ values / total
    return float(weights @ np.square(values - mean) / (total - 1.0) / total)


def _interval(centre: float | None, error: float | None) -> tuple[float, float] | None:
    if centre is None or error is None:
        return None
    return max(0.0, centre - _Z95 * error), min(1.0, centre + _Z95 * error)


# -------------------------------------------------------------------------------------------------- one threshold


def youden(evaluation: Evaluation, edges: Floats) -> float | None:
    """Return the edge at which recall + specificity is largest, of equals the one nearest to 0.

    None unless there are two labels and examples of both.  Choose on validation, freeze, then `operating_point`.

    Raises:
        ValueError: `edges` are not those of the histograms.

    Source: Youden, Cancer 3 (1950) 32-35.
    """
    _check_fit(evaluation, edges)
    if evaluation.num_labels != 2 or not evaluation.support.all() or edges.size == 0:
        return None
    p, n = _as_floats(evaluation.positives[0], evaluation.negatives[0])
    # Differences of rates times P N are whole numbers: ties are found exactly.
    gain = n[:-1].cumsum() * p.sum() - p[:-1].cumsum() * n.sum()
    best = edges[0][gain == gain.max()]
    return float(best[np.abs(best).argmin()])


def operating_point(evaluation: Evaluation, edges: Floats, threshold: float) -> dict[str, float | None]:
    """Return exact figures of the rule "positive when the score is at least `threshold`", for two labels.

    `threshold` is reported as a probability, the logistic function of the score.

    Raises:
        ValueError: more than two labels, or `threshold` is not one of the `edges`.
    """
    _check_fit(evaluation, edges)
    if evaluation.num_labels != 2:
        raise ValueError(f"an operating point needs two labels, got {evaluation.num_labels}")
    at = np.flatnonzero(edges[0] == threshold)
    if at.size == 0:
        raise ValueError(f"threshold: {threshold!r} is not one of the {edges.size} edges; pass it as `include`")
    first = int(at[0]) + 1
    p, n = evaluation.positives[0], evaluation.negatives[0]
    found, false = int(p[first:].sum()), int(n[first:].sum())
    return {
        "threshold": _logistic(threshold),
        "precision": _ratio(found, found + false),
        "recall": _ratio(found, int(p.sum())),
        "specificity": _ratio(int(n[:first].sum()), int(n.sum())),
    }


def _logistic(score: float) -> float:
    small = math.exp(-abs(score))
    return (1.0 if score >= 0 else small) / (1.0 + small)


# ----------------------------------------------------------------------------------------------------- summaries


def summarise(
    evaluation: Evaluation, label_names: Sequence[str], edges: Floats, threshold: float | None = None
) -> dict[str, Any]:
    """Return all figures of an evaluation as plain numbers, dicts and lists, None where undefined.

    Two labels: precision, recall, f1, specificity, AUC and average precision are those of the second label, by
    argmax.  More: their means over the labels for which they are defined, the AUC one against rest.  The interval of
    a mean AUC takes the mean of the standard errors, which is the largest that correlated errors could make it.

    Args:
        evaluation: pooled or of one site.
        label_names: K different names.
        edges: (R, B - 1), those of the histograms.
        threshold: a score of two labels that is one of the edges, for `operating_point`.

    Raises:
        ValueError: names, edges or threshold do not fit the evaluation.
    """
    _check_fit(evaluation, edges)
    if len(set(label_names)) != len(label_names) or len(label_names) != evaluation.num_labels:
        raise ValueError(f"label_names: got {list(label_names)}, expected {evaluation.num_labels} different names")
    n = evaluation.examples
    _, confidence, correct = evaluation.calibration.T
    per_class = [
        _confusion_figures(evaluation.confusion, label) | histogram_figures(pos, neg)
        for label, (pos, neg) in enumerate(_one_against_rest(evaluation))
    ]
    leading = per_class[1:] if evaluation.num_labels == 2 else per_class
    point = None
    if threshold is not None and evaluation.num_labels == 2 and n > 0:
        point = operating_point(evaluation, edges, threshold)
    return {
        "examples": n,
        "support": dict(zip(label_names, evaluation.support.tolist(), strict=True)),
        "accuracy": _ratio(int(np.trace(evaluation.confusion)), n),
        "balanced_accuracy": mean(figures["recall"] for figures in per_class),
        **{name: mean(figures[name] for figures in leading) for name in PER_LABEL},
        "auc_ci95": mean_interval(leading),
        "average_precision": mean(figures["average_precision"] for figures in leading),
        "ece": _ratio(float(np.abs(confidence - correct).sum()), n),
        "brier": _ratio(evaluation.brier, n),
        "per_class": {
            name: {key: figures[key] for key in PER_LABEL} for name, figures in zip(label_names, per_class, strict=True)
        },
        "operating_point": point,
    }


def reliability_curve(evaluation: Evaluation) -> list[dict[str, float | int]]:
    """Return mean confidence, accuracy and number of examples of each non-empty bin of top-1 confidence."""
    return [
        {"confidence": confidence / n, "accuracy": correct / n, "n": int(n)}
        for n, confidence, correct in evaluation.calibration.tolist()
        if n > 0
    ]


def _one_against_rest(evaluation: Evaluation) -> list[tuple[Counts, Counts]]:
    """Return the histograms of examples with and without each label, by rising score of that label."""
    pairs = list(zip(evaluation.positives, evaluation.negatives, strict=True))
    if evaluation.num_labels == 2:  # the score of the first label is minus that of the second
        return [(pairs[0][1][::-1], pairs[0][0][::-1]), *pairs]
    return pairs


def _confusion_figures(confusion: Counts, label: int) -> dict[str, float | None]:
    hit = int(confusion[label, label])
    missed = int(confusion[label].sum()) - hit
    false = int(confusion[:, label].sum()) - hit
    clear = int(confusion.sum()) - hit - missed - false
    return {
        "precision": _ratio(hit, hit + false),
        "recall": _ratio(hit, hit + missed),
        "f1": _ratio(2 * hit, 2 * hit + false + missed),
        "specificity": _ratio(clear, clear + false),
    }


def histogram_figures(pos: Counts, neg: Counts) -> dict[str, float | None]:
    """Return AUC, its bound and standard error, and average precision of one label's histograms (B,) and (B,)."""
    auc, bound = auc_from_histogram(pos, neg)
    return {
        "auc": auc,
        "auc_bound": bound,
        "auc_error": _standard_error(pos, neg),
        "average_precision": average_precision(pos, neg),
    }


def mean_interval(leading: Sequence[Mapping[str, float | None]]) -> list[float] | None:
    """Return the 95 % interval of the mean AUC of labels, each with what `histogram_figures` gives."""
    defined = [figures for figures in leading if figures["auc"] is not None]
    if any(figures["auc_error"] is None for figures in defined):
        return None
    interval = _interval(mean(f["auc"] for f in defined), mean(f["auc_error"] for f in defined))
    return None if interval is None else list(interval)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those values that are defined, None if none is."""
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None
