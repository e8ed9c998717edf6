"""The closed-form head of a private run: a ridge regression on sums that each site made noisy before it sent them.

The record of an image is r = [z, 1] / sqrt(37) with z the input of a head whose stages are scaled by themselves,
‖z‖ ≤ 6 (`common.backbone.Head`), so ‖r‖ ≤ 1 whatever the image; no mean, deviation or count of the data is needed. A
patient counts as the mean over their images and views, so that one patient adds at most the outer products of one
record to

    G = Σ r rᵀ    C = Σ r tᵀ

with t = e_y - 1/K (‖t‖² = 1 - 1/K), and with several labels an image t = ±1/sqrt(K), 0 where it was not annotated
(‖t‖² ≤ 1). G travels as its upper triangle with everything off the diagonal times sqrt(2), which keeps norms. So the
L2 sensitivity of the pair (G, C) to adding or removing a patient is exactly sqrt(1 + max ‖t‖²), and Gaussian noise of σ
times that on every entry is one Gaussian release with noise multiplier σ (Dwork and Roth, The Algorithmic Foundations
of Differential Privacy, 2014, theorem A.1; accounted by `common.privacy`).

The pooled sums are solved as (Ĝ + λ I) V = Ĉ. Everything after the noise is post-processing, which costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.analytic import LOGIT_SCALE, STAGE_NORM
from common.run_config import TaskKind

Vector = NDArray[np.float64]

_LARGEST = float(np.finfo(np.float32).max)

RECORD_NORM = math.sqrt(STAGE_NORM**2 + 1)
"""Norm of what the head's layer reads of an image, the bias among it."""


@dataclass(frozen=True)
class Noisy:
    """Sums over patients of one or several sites; `a + b` is that of both. W inputs of the head, K labels."""

    total: Vector  # (W,) sum of u / 6; (0,) where the closed form was asked for
    gram: Vector  # ((W + 1) (W + 2) / 2,) upper triangle, row by row, off the diagonal times sqrt(2)
    cross: Vector  # (W + 1, K)

    def __add__(self, other: Noisy) -> Noisy:
        """Return the sums over the patients of both."""
        return Noisy(self.total + other.total, self.gram + other.gram, self.cross + other.cross)


def records(inputs: Vector) -> Vector:
    """Return r of each row of head inputs: (n, W) of norm at most 6 to (n, W + 1) of norm at most 1.

    Examples:
        >>> records(np.array([[3.6, 4.8]])).round(3)
        array([[0.592, 0.789, 0.164]])
    """
    return np.hstack([bounded(inputs), np.ones((len(inputs), 1))]) / RECORD_NORM


def bounded(inputs: Vector) -> Vector:
    """Return rows of head inputs, (n, W), of which none is longer than 6, whatever the weights made of an image.

    Weights that somebody chose can blow one image up beyond all floats: its row is 0, or the sum would say so.

    Examples:
        >>> bounded(np.array([[np.inf, 1.0], [30.0, 40.0], [3.0, 0.0]]))
        array([[0. , 0. ],
               [3.6, 4.8],
               [3. , 0. ]])
    """
    told = (np.abs(inputs) <= _LARGEST).all(axis=1, keepdims=True)  # a NaN fails every comparison
    kept = np.where(told, inputs, 0.0)
    return np.asarray(kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True) / STAGE_NORM, 1.0))


def single_targets(labels: NDArray[np.int64], count: int) -> Vector:
    """Return t of examples with one label each, (n, K)."""
    return np.eye(count)[labels] - 1 / count


def several_targets(targets: NDArray[np.float32]) -> Vector:
    """Return t of examples with several labels, (n, K): of shares in 0..1, NaN where not annotated."""
    signs = np.where(np.isnan(targets), 0.0, 2 * targets.astype(np.float64) - 1)
    return signs / math.sqrt(targets.shape[1])


def sensitivity(labels: int, kind: TaskKind) -> float:
    """Return the L2 norm of the most that one patient adds to the pair (G, C).

    Examples:
        >>> round(sensitivity(2, "single-label") ** 2, 12)
        1.5
    """
    return math.sqrt(2.0 if kind == "multi-label" else 2 - 1 / labels)


def sums(found: Vector, targets: Vector, shares: Vector) -> Noisy:
    """Return the sums without noise.

    Args:
        found: (n, W + 1) records.
        targets: (n, K).
        shares: (n,) of a patient that each record stands for; those of one patient add up to 1.
    """
    weighted = found * shares[:, None]
    return Noisy(np.zeros(0), _packed(weighted.T @ found), weighted.T @ targets)


def totals(inputs: Vector, shares: Vector) -> Noisy:
    """Return the sum behind the centre, without noise; a patient adds a vector of norm at most 1.

    Args:
        inputs: (n, W) of the head, not centred, of norm at most 6.
        shares: (n,) as for `sums`.
    """
    return Noisy(shares @ bounded(inputs) / STAGE_NORM, np.zeros(0), np.zeros((0, 0)))


def centre(pooled: Noisy, noise: float, patients: int, stages: Sequence[int]) -> NDArray[np.float32]:
    """Return the centre of the head's inputs, (W,), from their noisy sum, each stage drawn to 0 by its noise.

    With m the mean of a stage's w inputs and v the variance of the noise in each, the stage gets
    max(0, 1 - w v / ‖m‖²) m (James and Stein, Estimation with quadratic loss, 1961): few patients, or much noise, leave
    the centre at 0.

    Args:
        pooled: the sites' sums.
        noise: standard deviation of the noise in each entry of the total.
        patients: of all sites.
        stages: widths w of the stages; they add up to W.
    """
    scale = STAGE_NORM / patients
    mean, variance = pooled.total * scale, (noise * scale) ** 2
    parts = []
    for part in np.split(mean, np.cumsum(stages)[:-1]):
        square = float(part @ part)
        parts.append(part * max(0.0, 1 - len(part) * variance / square) if square else part)
    return np.concatenate(parts).astype(np.float32)


def _packed(gram: Vector) -> Vector:
    return np.asarray((gram * _stretch(len(gram)))[np.triu_indices(len(gram))])


def _unpacked(packed: Vector, size: int) -> Vector:
    gram = np.zeros((size, size))
    gram[np.triu_indices(size)] = packed
    gram /= _stretch(size)
    return np.asarray(gram + np.triu(gram, 1).T)


def _stretch(size: int) -> Vector:
    return np.full((size, size), math.sqrt(2)) - (math.sqrt(2) - 1) * np.eye(size)


NOISE_SHARE, LEAST_PENALTY = 0.4, 1e-3


def penalty(noise: float, width: int, patients: int) -> float:
    """Return λ: 0.4 of the norm of the noise in G, and a thousandth of the patients.

    Measured alike from 0.2 to 0.6; validation would choose less, and lose by it.

    Args:
        noise: standard deviation of the noise on each entry of the pooled sums, off the diagonal before the stretch.
        width: W + 1; a symmetric matrix of such noise has norm about sqrt(2 (W + 1)) times it.
        patients: of all sites.
    """
    return NOISE_SHARE * noise * math.sqrt(2 * width) + LEAST_PENALTY * patients


def head(pooled: Noisy, ridge: float, kind: TaskKind) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the linear layer, weight (K, W) and bias (K,), on inputs whose stages are scaled by themselves.

    Args:
        pooled: the sites' sums.
        ridge: λ.
        kind: of the task.
    """
    size, labels = pooled.cross.shape
    values, vectors = np.linalg.eigh(_unpacked(pooled.gram, size))
    # Noise leaves directions of negative weight, which no patient does: they count as none.
    solution = vectors @ ((vectors.T @ pooled.cross) / (np.maximum(values, 0) + ridge)[:, None])
    scale = LOGIT_SCALE * (math.sqrt(labels) if kind == "multi-label" else 1.0) / RECORD_NORM
    scaled = (scale * solution.T).astype(np.float32)
    return scaled[:, :-1], scaled[:, -1]
