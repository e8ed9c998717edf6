"""Several labels an image: each label is a yes or no of its own, asked only of the examples that were annotated for it.

A label's figures are those of two labels, absent and present, with the logits 0 and z: everything of `common.metrics`
is used as it is, and what is summed over sites stays additive label by label. The figures of all labels are the means
over the labels for which they are defined.

Targets are (N, K) float32: 1 present, 0 absent, a share in between where the annotator was not sure, NaN where nobody
looked. Only 0 and 1 are evaluated. K labels, B histogram bins with B - 1 edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common import metrics
from common.metrics import FIELDS, PER_LABEL, Counts, Evaluation, Floats

STATES: Final = ("present", "absent", "between", "missing")
"""What an annotation can be: 1, 0, a share in between, NaN."""

ABSENT, PRESENT = "absent", "present"

_STACKED: Final = ("confusion", "calibration")  # a matrix a label; of the other statistics each label has one row
_MEANS: Final = ("accuracy", "balanced_accuracy", *PER_LABEL)
_LATE_MEANS: Final = ("average_precision", "ece", "brier")

Thresholds = Sequence[float | None]


@dataclass(frozen=True)
class LabelwiseEvaluation:
    """Additive statistics of a classifier of several labels on a set of examples; `a + b` are those of the union.

    Args:
        examples: the examples of the set, whatever they were annotated for.
        labels: for each label the statistics of its annotated examples, of two labels: absent and present.
    """

    examples: int
    labels: tuple[Evaluation, ...]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], num_labels: int, examples: int) -> LabelwiseEvaluation:
        """Return the statistics that `arrays` wrote, after checking everything a sender could get wrong.

        Args:
            arrays: as `LabelwiseEvaluation.arrays` gives them.
            num_labels: K.
            examples: of the set, which the arrays do not hold.

        Raises:
            ValueError: a name, type, shape or value is not that of an evaluation, or the totals contradict each other.
        """
        if set(arrays) != set(FIELDS):
            raise ValueError(f"evaluation: expected exactly the arrays {', '.join(FIELDS)}")
        for name, value in arrays.items():
            if not isinstance(value, np.ndarray) or value.ndim == 0 or len(value) != num_labels:
                raise ValueError(f"evaluation: {name!r} does not hold {num_labels} labels")
        found = cls(examples, tuple(Evaluation.from_arrays(_part(arrays, label)) for label in range(num_labels)))
        if any(label.num_labels != 2 or label.examples > examples for label in found.labels):
            raise ValueError(f"evaluation: a label cannot be absent or present in more than {examples} examples")
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the statistics by name: (K, 2, 2), (K, B), (K, B), (K, 15, 3), (K,), (K,)."""
        parts = [label.arrays() for label in self.labels]
        return {
            name: (np.stack if name in _STACKED else np.concatenate)([part[name] for part in parts]) for name in FIELDS
        }

    @property
    def support(self) -> Counts:
        """(2, K) examples in which each label is present, and absent."""
        return np.stack([label.support[::-1] for label in self.labels], axis=1)

    @property
    def bins(self) -> int:
        """B."""
        return self.labels[0].bins

    @property
    def mean_log_loss(self) -> float | None:
        """The mean of -ln p of the truth over all annotations; None without any."""
        annotations = sum(label.examples for label in self.labels)
        return sum(label.log_loss for label in self.labels) / annotations if annotations else None

    @property
    def together(self) -> Evaluation:
        """The statistics of all annotations, as if of one label; of use where labels need not be told apart."""
        return sum(self.labels[1:], self.labels[0])

    def __add__(self, other: LabelwiseEvaluation) -> LabelwiseEvaluation:
        if not isinstance(other, LabelwiseEvaluation):
            return NotImplemented
        if len(self.labels) != len(other.labels):
            raise ValueError(f"evaluations of {len(self.labels)} and of {len(other.labels)} labels cannot be added")
        added = (one + two for one, two in zip(self.labels, other.labels, strict=True))
        return LabelwiseEvaluation(self.examples + other.examples, tuple(added))


def _part(arrays: Mapping[str, NDArray[Any]], label: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of one label, as `Evaluation.from_arrays` takes them."""
    return {
        name: value[label] if name in _STACKED else value[label : label + 1]
        for name, value in arrays.items()
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ annotations


def check_targets(targets: NDArray[Any]) -> None:
    """Check that targets are what training and evaluation take them for.

    Raises:
        ValueError: not float32 of shape (N, K), K at least 1, or a value that is neither NaN nor in 0 to 1.
    """
    if targets.dtype != np.float32 or targets.ndim != 2 or targets.shape[1] == 0:
        raise ValueError(f"targets: got {targets.dtype} of shape {targets.shape}, expected float32 of shape (N, K)")
    if not (((targets >= 0) & (targets <= 1)) | np.isnan(targets)).all():
        raise ValueError("targets: got a value that is neither NaN (not annotated) nor in 0 to 1")


def count_states(targets: NDArray[np.float32]) -> Counts:
    """Return how many examples each label is in which state of `STATES` for: (N, K) to (4, K).

    Each column sums to N.

    Examples:
        >>> count_states(np.array([[1, 0.5], [0, np.nan], [1, 0]], np.float32)).tolist()
        [[2, 0], [1, 1], [0, 1], [0, 1]]
    """
    present, absent, missing = targets == 1, targets == 0, np.isnan(targets)
    masks = (present, absent, ~(present | absent | missing), missing)
    return np.stack([mask.sum(0, dtype=np.int64) for mask in masks])


def aligned(
    targets: NDArray[np.float32], own: Sequence[str], wanted: Sequence[str]
) -> NDArray[np.float32]:  # fmt: skip
    """Return the columns of the wanted labels, by name; a label that `own` lacks is annotated nowhere.

    Examples:
        >>> aligned(np.array([[1, 0]], np.float32), ("a", "b"), ("b", "c")).tolist()
        [[0.0, nan]]
    """
    columns = np.full((len(targets), len(wanted)), np.nan, np.float32)
    for place, name in enumerate(wanted):
        if name in own:
            columns[:, place] = targets[:, own.index(name)]
    return columns


# --------------------------------------------------------------------------------------------------------- counting


def evaluate(logits: ArrayLike, targets: NDArray[np.float32], edges: Floats) -> LabelwiseEvaluation:
    """Count what `logits` say about the annotated examples of each label.

    Args:
        logits: (N, K) finite numbers, also where nothing was annotated; N = 0 is allowed.
        targets: (N, K).
        edges: (K, B - 1) strictly increasing log-odds, the same on every site.

    Raises:
        ValueError: a shape or a value is outside of the above; a NaN is never counted.
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.shape != targets.shape or edges.ndim != 2 or len(edges) != z.shape[1]:
        raise ValueError(
            f"evaluation: got logits {z.shape}, targets {targets.shape}, edges {edges.shape}, expected (N, K), (N, K) "
            "and (K, bins - 1)"
        )
    if not np.isfinite(z).all():
        raise ValueError("logits: got a value that is not finite; the model diverged or was corrupted")
    return LabelwiseEvaluation(
        len(z), tuple(_evaluate(z[:, k], targets[:, k], edges[k : k + 1]) for k in range(z.shape[1]))
    )


def _evaluate(logits: Floats, targets: NDArray[np.float32], edges: Floats) -> Evaluation:
    clear = (targets == 0) | (targets == 1)
    both = np.stack([np.zeros(int(clear.sum())), logits[clear]], axis=1)
    return metrics.evaluate(both, targets[clear].astype(np.int64), edges)


def coarse_edges(num_labels: int, bins: int) -> Floats:
    """Return edges that need no data: (K, bins - 1)."""
    return np.repeat(metrics.coarse_edges(2, bins), num_labels, axis=0)


def quantile_edges(
    evaluation: LabelwiseEvaluation, edges: Floats, bins: int, include: Thresholds | None = None
) -> Floats:
    """Return edges of near-equal pooled mass for each label, (K, bins - 1), from histograms on other edges.

    Args:
        evaluation: histograms on `edges`.
        edges: (K, B - 1).
        bins: number of bins wanted, at least 4.
        include: for each label a score that shall be an edge, or None.
    """
    wanted = include or [None] * len(edges)
    rows = [
        metrics.quantile_edges(label, edges[k : k + 1], bins, score)
        for k, (label, score) in enumerate(zip(evaluation.labels, wanted, strict=True))
    ]
    return np.concatenate(rows)


def youden(evaluation: LabelwiseEvaluation, edges: Floats) -> list[float | None]:
    """Return Youden's threshold of each label, None where it is not both present and absent."""
    return [metrics.youden(label, edges[k : k + 1]) for k, label in enumerate(evaluation.labels)]


# -------------------------------------------------------------------------------------------------------- summaries


def summarise(
    evaluation: LabelwiseEvaluation,
    label_names: Sequence[str],
    edges: Floats,
    thresholds: Thresholds | None = None,
) -> dict[str, Any]:
    """Return all figures of an evaluation as plain numbers, dicts and lists, None where undefined.

    The keys are those of `metrics.summarise`. `examples` are those of the set; `support` is the number of examples in
    which a label is present. Every other figure is the mean over the labels for which it is defined, accuracy and
    balanced accuracy, calibration error and Brier score among them. The interval of the mean AUC takes the mean of
    the standard errors, which is the largest that correlated errors could make it. Operating points are those of the
    labels, in `per_class`; there is none of all together.

    Args:
        evaluation: pooled or of one site.
        label_names: K different names.
        edges: (K, B - 1), those of the histograms.
        thresholds: for each label a score that is one of its edges, or None; for the operating points.

    Raises:
        ValueError: names, edges or thresholds do not fit the evaluation.
    """
    if len(set(label_names)) != len(label_names) or len(label_names) != len(evaluation.labels):
        raise ValueError(f"label_names: got {list(label_names)}, expected {len(evaluation.labels)} different names")
    points = thresholds or [None] * len(label_names)
    each = {
        name: _of_label(label, edges[k : k + 1], point)
        for k, (name, label, point) in enumerate(zip(label_names, evaluation.labels, points, strict=True))
    }
    histograms = [metrics.histogram_figures(label.positives[0], label.negatives[0]) for label in evaluation.labels]

    def means(keys: Sequence[str]) -> dict[str, float | None]:
        return {key: metrics.mean(figures[key] for figures in each.values()) for key in keys}

    return {
        "examples": evaluation.examples,
        "support": dict(zip(label_names, evaluation.support[0].tolist(), strict=True)),
        **means(_MEANS),
        "auc_ci95": metrics.mean_interval(histograms),
        **means(_LATE_MEANS),
        "per_class": each,
        "operating_point": None,
    }


def _of_label(label: Evaluation, edges: Floats, threshold: float | None) -> dict[str, Any]:
    """Return the figures of one label: those of `present`, and what else belongs to this label alone."""
    whole = metrics.summarise(label, (ABSENT, PRESENT), edges, threshold)
    return {
        **{key: whole[key] for key in PER_LABEL},
        "annotated": whole["examples"],
        **{key: whole[key] for key in ("accuracy", "balanced_accuracy", "auc_ci95", *_LATE_MEANS, "operating_point")},
    }
