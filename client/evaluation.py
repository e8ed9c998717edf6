"""A site evaluates weights: additive statistics on shared histogram edges, never a score of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.features import Features
from common import metrics, multilabel
from common.backbone import Upper
from common.metrics import Evaluation
from common.multilabel import LabelwiseEvaluation

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
    upper: Upper, features: Features, labels: NDArray[Any], indices: NDArray[np.int64], edges: NDArray[np.float64]
) -> Evaluation | LabelwiseEvaluation:
    """Return the additive statistics of these examples on the shared edges; `labels` are those of a cohort."""
    count = metrics.evaluate if labels.ndim == 1 else multilabel.evaluate
    found: Evaluation | LabelwiseEvaluation = count(logits(upper, features, indices), labels[indices], edges)
    return found


@torch.inference_mode()
def head_inputs(upper: Upper, features: Features, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what the head reads, not standardised, of every view of these examples: (K n, W)."""
    parts = [upper.taps(chunk.flatten(0, 1)).double().cpu().numpy() for chunk in features.chunks(indices, CHUNK)]
    return np.concatenate(parts) if parts else np.zeros((0, upper.head.linear.in_features))
