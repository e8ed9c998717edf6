"""A site evaluates weights: additive statistics on shared histogram edges, never a score of an image."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.features import Features
from common import metrics, multilabel
from common.backbone import Upper
from common.metrics import Evaluation
from common.multilabel import LabelwiseEvaluation

LOSSES = ("brier", "log_loss")

_LARGEST = 1e30

CHUNK = 256
"""Examples a forward pass."""


@torch.inference_mode()
def logits(upper: Upper, features: Features, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the logits of these examples, averaged over their views: (n, K)."""
    upper.eval()
    parts = []
    for chunk in features.chunks(indices, CHUNK):
        count, batch, _ = chunk.shape
        parts.append(upper(chunk.flatten(0, 1)).unflatten(0, (count, batch)).double().mean(0).cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, upper.head.linear.out_features))


def evaluate(
    upper: Upper,
    features: Features,
    labels: NDArray[Any],
    indices: NDArray[np.int64],
    edges: NDArray[np.float64],
    *,
    lenient: bool = False,
) -> Evaluation | LabelwiseEvaluation:
    """Return the additive statistics of these examples on the shared edges.

    Args:
        upper: with the weights to be judged.
        features: of the site's examples.
        labels: of a cohort.
        indices: the examples.
        edges: of the histograms.
        lenient: whether logits that are no numbers count as 0, for counts under noise: that weights blow one patient's
            image up must not end in an error that tells of it.

    Raises:
        ValueError: a logit is no finite number, and that is not overlooked.
    """
    count = metrics.evaluate if labels.ndim == 1 else multilabel.evaluate
    judged = logits(upper, features, indices)
    if lenient:
        judged = np.clip(np.nan_to_num(judged, posinf=0.0, neginf=0.0), -_LARGEST, _LARGEST)
    found: Evaluation | LabelwiseEvaluation = count(judged, labels[indices], edges)
    return found


def shown(cohort: Cohort, split: str, least: int) -> NDArray[np.int64]:
    """Return the examples of a split that is told of; none if one of the site's labels has fewer than so many.

    Args:
        cohort: the site's, in the labels that it holds.
        split: validation or test.
        least: examples of each label of the site; 0 or 1: any.
    """
    indices = cohort.indices(split)
    support = cohort.support(split)
    counted = support if support.ndim == 1 else support[:2]
    return indices[:0] if len(indices) and counted.min() < least else indices


def told(found: Evaluation | LabelwiseEvaluation, metrics: Collection[str]) -> dict[str, NDArray[Any]]:
    """Return the statistics that a run asks for, as arrays; the others as zeros.

    Args:
        found: all of them.
        metrics: names of `common.run_config.METRICS`.
    """
    withheld = [*(() if "calibration" in metrics else ("calibration",)), *(() if "losses" in metrics else LOSSES)]
    return {name: np.zeros_like(value) if name in withheld else value for name, value in found.arrays().items()}


@torch.inference_mode()
def head_inputs(upper: Upper, features: Features, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what the head reads of every view of these examples, (K n, W).

    A mean and deviation over all sites is not taken off, for it is these inputs that it is found from; stages that are
    scaled by themselves are scaled.
    """

    def read(chunk: Tensor) -> Tensor:
        taps = upper.taps(chunk.flatten(0, 1))
        return upper.head.scaled(taps) if upper.head.stages else taps

    parts = [read(chunk).double().cpu().numpy() for chunk in features.chunks(indices, CHUNK)]
    return np.concatenate(parts) if parts else np.zeros((0, upper.head.linear.in_features))


def in_order_of_inputs(values: NDArray[Any], views: int) -> NDArray[Any]:
    """Return what belongs to examples, (n, …), in the order of `head_inputs`: chunk by chunk, view by view."""
    chunks = [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]
    return np.concatenate([chunk for chunk in chunks for _ in range(views)] or [values])
