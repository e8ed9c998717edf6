"""Evaluation counts under Laplace noise: what one look at a split tells of one patient is limited by an epsilon.

One image of each patient is evaluated. It adds 1 to one cell of the confusion counts and to one bin of each histogram:
with R histograms the L1 sensitivity to a patient is 1 + R, with several labels an image 2 K, for each of K labels has
both. Every cell gets Laplace noise of that over epsilon (Dwork et al., Calibrating Noise to
Sensitivity in Private Data Analysis, TCC 2006, proposition 1). What follows is post-processing: cells are rounded, none
is below 0, and histograms are rescaled to the totals of the confusion counts. Calibration and losses are withheld.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.cohort import Cohort
from client.noise import Noise
from common.metrics import CALIBRATION_BINS, Counts, Evaluation, targets
from common.multilabel import LabelwiseEvaluation

Found = Evaluation | LabelwiseEvaluation


def one_of_each(cohort: Cohort, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one example of each patient, that whose digest comes first, so that others have no say in it.

    Args:
        cohort: the site's.
        indices: the examples to choose from.
    """
    order = sorted(indices.tolist(), key=lambda index: bytes(cohort.digests[index]))
    first: dict[int, int] = {}
    for index in order:
        first.setdefault(int(cohort.patients[index]), index)
    return np.array(sorted(first.values()), np.int64)


def noisy(found: Found, epsilon: float, noise: Noise) -> Found:
    """Return counts that may be seen.

    Args:
        found: exact ones.
        epsilon: of this look.
        noise: its source.
    """
    if isinstance(found, Evaluation):
        return _one(found, (1 + len(found.positives)) / epsilon, noise)
    scale = 2 * len(found.labels) / epsilon
    labels = tuple(_one(label, scale, noise) for label in found.labels)
    return LabelwiseEvaluation(max(label.examples for label in labels), labels)


def _one(found: Evaluation, scale: float, noise: Noise) -> Evaluation:
    confusion = _counts(found.confusion, scale, noise)
    carriers = confusion.sum(axis=1)[list(targets(len(confusion)))]
    positives = _counts(found.positives, scale, noise)
    negatives = _counts(found.negatives, scale, noise)
    return Evaluation(
        confusion=confusion,
        positives=np.stack([rescaled(row, total) for row, total in zip(positives, carriers, strict=True)]),
        negatives=np.stack(
            [rescaled(row, total) for row, total in zip(negatives, confusion.sum() - carriers, strict=True)]
        ),
        calibration=np.zeros((CALIBRATION_BINS, 3)),
        brier=0.0,
        log_loss=0.0,
    )


def _counts(exact: Counts, scale: float, noise: Noise) -> Counts:
    drawn = noise.laplace(exact.shape, scale).numpy()
    return np.asarray(np.maximum(np.rint(exact + drawn), 0), np.int64)


def rescaled(counts: Counts, total: int) -> Counts:
    """Return counts in the same proportions that add up to a total, by largest remainders; all in the middle if empty.

    Examples:
        >>> rescaled(np.array([1, 1, 2]), 6).tolist()
        [2, 1, 3]
    """
    if not counts.sum():
        counts = np.eye(1, len(counts), len(counts) // 2, dtype=np.int64)[0]
    shares = counts * (int(total) / counts.sum())
    whole = np.floor(shares).astype(np.int64)
    order = np.argsort(whole - shares, kind="stable")
    whole[order[: int(total) - int(whole.sum())]] += 1
    return np.asarray(whole)
