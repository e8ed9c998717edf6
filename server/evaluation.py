"""From the sites' additive statistics to pooled and per-site figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import metrics, multilabel
from common.metrics import Evaluation
from common.multilabel import LabelwiseEvaluation, Thresholds
from common.run_config import METRICS, MetricKind, TaskKind

COARSE_BINS = 512
"""Bins of the first look, which knows nothing of the scores."""

LEAST_BINS, MOST_BINS = 16, 256
"""Bounds on the bins of later looks; the AUC's error is at most 1 / (2 bins)."""

Edges = NDArray[np.float64]

Statistic = Evaluation | LabelwiseEvaluation
"""Of one label an image, or of several: all sites of a run send the same kind."""

_RESTS = {"calibration": "ece", "losses": "brier"}
"""What a site may withhold -> the figure that rests on it."""

Threshold = float | Thresholds | None
"""The operating point in score space: of several labels an image one each."""


@dataclass(frozen=True)
class Measured:
    """One set of weights, evaluated by the sites on one split and one set of edges."""

    edges: Edges
    sites: Mapping[str, Statistic]
    metrics: tuple[MetricKind, ...] = METRICS  # what the sites told

    @property
    def pooled(self) -> Statistic:
        """The statistics of all sites together, summed in the order of their names."""
        found: list[Any] = [self.sites[name] for name in sorted(self.sites)]
        pooled: Statistic = sum(found[1:], found[0])
        return pooled

    def summary(self, labels: tuple[str, ...], threshold: Threshold = None) -> dict[str, Any]:
        """Return the METRICS of the pooled examples."""
        return self._told(_summarise(self.pooled, labels, self.edges, threshold))

    def site_summaries(self, labels: tuple[str, ...], threshold: Threshold = None) -> dict[str, dict[str, Any]]:
        """Return the METRICS of each site."""
        found = {name: _summarise(self.sites[name], labels, self.edges, threshold) for name in sorted(self.sites)}
        return {name: self._told(summary) for name, summary in found.items()}

    def _told(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Return figures with null for those that rest on what was withheld."""
        withheld = [figure for kind, figure in _RESTS.items() if kind not in self.metrics]
        each = {name: _blanked(figures, withheld) for name, figures in summary["per_class"].items()}
        return {**_blanked(summary, withheld), "per_class": each}


def _blanked(figures: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return figures with null for those of these names."""
    return {name: None if name in names else value for name, value in figures.items()}


def _summarise(found: Statistic, labels: tuple[str, ...], edges: Edges, threshold: Threshold) -> dict[str, Any]:
    if isinstance(found, LabelwiseEvaluation):
        return multilabel.summarise(found, labels, edges, _each(threshold))
    return metrics.summarise(found, labels, edges, _one(threshold))


def _each(threshold: Threshold) -> Thresholds | None:
    return None if isinstance(threshold, float) else threshold


def _one(threshold: Threshold) -> float | None:
    return threshold if isinstance(threshold, float) else None


def first_edges(labels: int, kind: TaskKind = "single-label") -> Edges:
    """Return edges that know nothing of the scores."""
    coarse = multilabel.coarse_edges if kind == "multi-label" else metrics.coarse_edges
    return coarse(labels, COARSE_BINS)


def next_edges(measured: Measured, include: Threshold = None) -> Edges:
    """Return the pooled quantiles of what was measured, as the edges of the next look."""
    pooled = measured.pooled
    bins = int(np.clip(pooled.examples // 2, LEAST_BINS, MOST_BINS))
    if isinstance(pooled, LabelwiseEvaluation):
        return multilabel.quantile_edges(pooled, measured.edges, bins, _each(include))
    return metrics.quantile_edges(pooled, measured.edges, bins, _one(include))


def operating_threshold(measured: Measured) -> Threshold:
    """Return the score at which recall + specificity is largest, of several labels an image one for each label."""
    pooled = measured.pooled
    if isinstance(pooled, LabelwiseEvaluation):
        return multilabel.youden(pooled, measured.edges)
    return metrics.youden(pooled, measured.edges)


def score_for_choice(measured: Measured, labels: tuple[str, ...]) -> float | None:
    """Return what rounds compete by: pooled validation AUC, else minus the mean log loss; None without examples."""
    if not measured.pooled.examples:
        return None
    auc, loss = measured.summary(labels)["auc"], measured.pooled.mean_log_loss
    if auc is not None:
        return float(auc)
    return None if loss is None or "losses" not in measured.metrics else -loss


def curves(measured: Measured, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the ROC curve of each label that has one, and the reliability of what was said of all."""
    pooled = measured.pooled
    if isinstance(pooled, LabelwiseEvaluation):
        named = [
            (name, label.positives[0], label.negatives[0]) for name, label in zip(labels, pooled.labels, strict=True)
        ]
        together = pooled.together
    else:
        targets = metrics.targets(len(labels))
        named = [(labels[target], pooled.positives[row], pooled.negatives[row]) for row, target in enumerate(targets)]
        together = pooled
    roc = {name: [list(point) for point in metrics.roc_curve(pos, neg)] for name, pos, neg in named}
    reliability = metrics.reliability_curve(together) if "calibration" in measured.metrics else []
    return {"roc": roc, "reliability": reliability}
