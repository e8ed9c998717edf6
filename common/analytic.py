"""The closed-form head: standardisation and ridge regression from sums that sites add up.

Let x be an example's head input, w its weight by label, t its label as a 0/1 vector. A site sends

    n = Σ 1,  s = Σ x,  q = Σ x²  (unweighted: for mean and deviation),
    m = Σ w,  a = Σ w x,  u = Σ w t,  G = Σ w x xᵀ,  C = Σ w x tᵀ  (for the head).

Sums over sites equal sums over the pooled data, so the head below is the pooled ridge solution whatever the partition.
With z = (x - μ) ⊙ c, and z̄, t̄ the weighted means,

    W = (Σ w (z - z̄)(z - z̄)ᵀ + λ m I)⁻¹ Σ w (z - z̄)(t - t̄)ᵀ,   b = t̄ - z̄ᵀ W,

and the logits are `LOGIT_SCALE` (zᵀ W + b). Hoerl and Kennard, Ridge Regression, Technometrics 12 (1970), eq. 2.1.

With several labels an image each label k is a problem of its own, of present against absent: its sums m, a, u, G, C run
over the examples that are annotated for it, an example of target t (1, 0 or a share in between) counting as t of an
example with w = w₁ₖ, t = 1 and 1 - t of one with w = w₀ₖ, t = 0. The logit of a label is what two labels would differ
by, `LOGIT_SCALE` (2 (zᵀ Wₖ + bₖ) - 1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

LOGIT_SCALE = 4.0
"""Ridge scores lie near 0 and 1; four times as much is a usable logit for the training that follows."""

STAGE_NORM = 6.0
"""Norm of the head's input where stages are scaled by themselves: the bias, 1 beside it, takes little of a record."""

DEVIATION_FLOOR = 0.01
"""Added to each deviation, as a share of their root mean square, so that a constant input is not blown up."""

ROUNDING = 1e-12
"""A variance below this share of the mean square is what rounding leaves of a constant input, and counts as zero."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Additive statistics of one site's training split; `a + b` is that of the union. W inputs, K labels."""

    count: Vector  # (1,) n
    total: Vector  # (W,) s
    squares: Vector  # (W,) q
    weight: Vector  # (1,) m; several labels: (K,)
    weighted: Vector  # (W,) a; several labels: (K, W)
    targets: Vector  # (K,) u
    # (W (W + 1) / 2,) upper triangle of G, row by row; several labels: (K, W (W + 1) / 2). (0,) and (K, 0) when only
    # mean and deviation are wanted
    gram: Vector
    cross: Vector  # (W, K) C; (0, 0) likewise

    def __add__(self, other: Sums) -> Sums:
        """Return the sums of the union."""
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def sums(inputs: Vector, labels: NDArray[np.int64], class_weights: Vector, *, gram: bool) -> Sums:
    """Return the additive statistics of these examples.

    Args:
        inputs: (n, W) head inputs, not standardised.
        labels: (n,) in 0..K-1.
        class_weights: (K,) weight of an example by its label.
        gram: whether the closed form is wanted, or mean and deviation alone.
    """
    weights = class_weights[labels]
    weighted = inputs * weights[:, None]
    targets = np.bincount(labels, weights, minlength=len(class_weights)).astype(np.float64)
    width = inputs.shape[1]
    return Sums(
        count=np.array([float(len(labels))]),
        total=inputs.sum(0),
        squares=np.square(inputs).sum(0),
        weight=np.array([weights.sum()]),
        weighted=weighted.sum(0),
        targets=targets,
        gram=(weighted.T @ inputs)[np.triu_indices(width)] if gram else np.zeros(0),
        cross=weighted.T @ np.eye(len(class_weights))[labels] if gram else np.zeros((0, 0)),
    )


def labelwise_sums(inputs: Vector, targets: NDArray[np.float32], class_weights: Vector, *, gram: bool) -> Sums:
    """Return the additive statistics of examples with several labels.

    Args:
        inputs: (n, W) head inputs, not standardised.
        targets: (n, K) in 0..1, NaN where an example was not annotated for a label.
        class_weights: (2, K) weight of an example in which a label is absent, and present.
        gram: whether the closed form is wanted, or mean and deviation alone.
    """
    known = ~np.isnan(targets)
    share = np.where(known, targets, 0).astype(np.float64)
    present = class_weights[1] * share
    weights = present + class_weights[0] * (known - share)
    return Sums(
        count=np.array([float(len(targets))]),
        total=inputs.sum(0),
        squares=np.square(inputs).sum(0),
        weight=weights.sum(0),
        weighted=weights.T @ inputs,
        targets=present.sum(0),
        gram=_labelwise_gram(inputs, known, share, class_weights) if gram else np.zeros((targets.shape[1], 0)),
        cross=inputs.T @ present if gram else np.zeros((0, 0)),
    )


def _labelwise_gram(inputs: Vector, known: NDArray[np.bool_], share: Vector, class_weights: Vector) -> Vector:
    """Return G of each label, (K, W (W + 1) / 2), as w₀ Σ x xᵀ + (w₁ - w₀) Σ t x xᵀ over its annotated examples.

    The first sum is shared by labels that were annotated in the same examples, the second runs over the few of which
    the label is present: one matrix product over all examples where plain sums would take K.
    """
    masks, mask_of = np.unique(known, axis=1, return_inverse=True)
    whole = [_gram(inputs, mask.astype(np.float64)) for mask in masks.T]
    absent, present = class_weights
    return np.stack([
        absent[label] * whole[mask] + (present[label] - absent[label]) * _gram(inputs, share[:, label])
        for label, mask in enumerate(mask_of.reshape(-1).tolist())
    ])  # fmt: skip


def _gram(inputs: Vector, weights: Vector) -> Vector:
    """Return the upper triangle of Σ w x xᵀ over the examples that weigh anything."""
    kept = np.flatnonzero(weights)
    scaled = inputs[kept]
    scaled *= np.sqrt(weights[kept, None])  # in place, and a matrix by itself: half the memory and half the time
    return (scaled.T @ scaled)[np.triu_indices(inputs.shape[1])]


def balanced_weights(support: NDArray[np.int64]) -> Vector:
    """Return n / (K n_k): every label then weighs the same. Labels without examples get 1.

    Of several labels an image, (2, K) counts of absent and present give the weights of each label's two sides, (2, K).

    Examples:
        >>> balanced_weights(np.array([1, 3]))
        array([2.        , 0.66666667])
    """
    present = np.maximum(support, 1)
    return np.where(support > 0, support.sum(0) / (len(support) * present), 1.0)


def standardiser(pooled: Sums) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean (W,) and scale (W,), the inverse of the floored deviation, of the pooled inputs."""
    mean = pooled.total / pooled.count
    square = pooled.squares / pooled.count
    variance = square - mean**2
    deviation = np.sqrt(np.where(variance > ROUNDING * square, variance, 0.0))
    floor = DEVIATION_FLOOR * float(np.sqrt(np.mean(deviation**2))) or 1.0
    return mean.astype(np.float32), (1.0 / (deviation + floor)).astype(np.float32)


@dataclass(frozen=True)
class _Moments:
    """Centred second moments of the standardised inputs."""

    gram: Vector  # (W, W)
    cross: Vector  # (W, K)
    mean: Vector  # (W,) z̄
    targets: Vector  # (K,) t̄


def _moments(pooled: Sums, mean: NDArray[np.float32], scale: NDArray[np.float32]) -> _Moments:
    width = len(pooled.total)
    m, c = mean.astype(np.float64), scale.astype(np.float64)
    gram = np.zeros((width, width))
    gram[np.triu_indices(width)] = pooled.gram
    gram = gram + np.triu(gram, 1).T
    centre = pooled.weighted / pooled.weight
    centred = gram - np.outer(pooled.weighted, centre)
    cross = pooled.cross - np.outer(centre, pooled.targets)
    return _Moments(centred * np.outer(c, c), cross * c[:, None], (centre - m) * c, pooled.targets / pooled.weight)


def ridge_heads(
    pooled: Sums, mean: NDArray[np.float32], scale: NDArray[np.float32], penalties: tuple[float, ...]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the linear layer (weight (K, W), bias (K,)) of each ridge penalty, on standardised inputs.

    Of several labels an image, one without any annotation gets zeros.

    Args:
        pooled: summed statistics with the Gram matrix.
        mean: (W,) of the standardiser.
        scale: (W,) of the standardiser.
        penalties: λ, per example.
    """
    if pooled.gram.ndim == 2:
        return _labelwise_heads(pooled, mean, scale, penalties)
    moments = _moments(pooled, mean, scale)
    return [_solve(moments, penalty * float(pooled.weight[0])) for penalty in penalties]


def _labelwise_heads(
    pooled: Sums, mean: NDArray[np.float32], scale: NDArray[np.float32], penalties: tuple[float, ...]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    (labels, _), width = pooled.gram.shape, len(pooled.total)
    heads = [(np.zeros((labels, width), np.float32), np.zeros(labels, np.float32)) for _ in penalties]
    for label in np.flatnonzero(pooled.weight > 0).tolist():
        moments = _moments(_of_label(pooled, label), mean, scale)
        for (weight, bias), penalty in zip(heads, penalties, strict=True):
            row, offset = _solve(moments, penalty * float(pooled.weight[label]))
            weight[label], bias[label] = 2 * row[0], 2 * offset[0] - LOGIT_SCALE
    return heads


def _of_label(pooled: Sums, label: int) -> Sums:
    """Return the sums of one of several labels, as if it were the only one."""
    one = slice(label, label + 1)
    return Sums(
        count=pooled.count,
        total=pooled.total,
        squares=pooled.squares,
        weight=pooled.weight[one],
        weighted=pooled.weighted[label],
        targets=pooled.targets[one],
        gram=pooled.gram[label],
        cross=pooled.cross[:, one],
    )


def _solve(moments: _Moments, ridge: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    regular = moments.gram + ridge * np.eye(len(moments.gram))
    solution = np.linalg.solve(regular, moments.cross)
    bias = moments.targets - moments.mean @ solution
    return (LOGIT_SCALE * solution.T).astype(np.float32), (LOGIT_SCALE * bias).astype(np.float32)
