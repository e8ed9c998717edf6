"""From the sites' additive statistics to pooled and per-site figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import metrics
from common.metrics import Evaluation

COARSE_BINS = 512
"""Bins of the first look, which knows nothing of the scores."""

LEAST_BINS, MOST_BINS = 16, 256
"""Bounds on the bins of later looks; the AUC's error is at most 1 / (2 bins)."""

Edges = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One set of weights, evaluated by the sites on one split and one set of edges."""

    edges: Edges
    sites: Mapping[str, Evaluation]

    @property
    def pooled(self) -> Evaluation:
        """The statistics of all sites together, summed in the order of their names."""
        found = [self.sites[name] for name in sorted(self.sites)]
        return sum(found[1:], found[0])

    def summary(self, labels: tuple[str, ...], threshold: float | None = None) -> dict[str, Any]:
        """Return the METRICS of the pooled examples."""
        return metrics.summarise(self.pooled, labels, self.edges, threshold)

    def site_summaries(self, labels: tuple[str, ...], threshold: float | None = None) -> dict[str, dict[str, Any]]:
        """Return the METRICS of each site."""
        return {name: metrics.summarise(self.sites[name], labels, self.edges, threshold) for name in sorted(self.sites)}


def first_edges(labels: int) -> Edges:
    """Return edges that know nothing of the scores."""
    return metrics.coarse_edges(labels, COARSE_BINS)


def next_edges(measured: Measured, include: float | None = None) -> Edges:
    """Return the pooled quantiles of what was measured, as the edges of the next look."""
    bins = int(np.clip(measured.pooled.examples // 2, LEAST_BINS, MOST_BINS))
    return metrics.quantile_edges(measured.pooled, measured.edges, bins, include)


def score_for_choice(measured: Measured, labels: tuple[str, ...]) -> float | None:
    """Return what rounds compete by: pooled validation AUC, else minus the mean log loss; None without examples."""
    pooled = measured.pooled
    if pooled.examples == 0:
        return None
    auc = measured.summary(labels)["auc"]
    return float(auc) if auc is not None else -pooled.log_loss / pooled.examples
