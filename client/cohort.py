"""The labelled, split images of one site: what training and evaluation read, whatever the files were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import multilabel
from common.run_config import TaskKind

SPLITS = ("train", "validation", "test")

PixelSource = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""Maps row numbers (n,) to preprocessed images (n, C, S, S), uint8, C 1 for grey or 3 for colour, S the image size."""


@dataclass(frozen=True)
class Cohort:
    """Examples of one site, or of the whole pool before it is partitioned.

    N examples; the pixels stay where they are (`source` reads them on demand), so a subset costs nothing.

    Raises:
        ValueError: labels of several an image that are neither NaN nor in 0 to 1.
    """

    source: PixelSource
    rows: NDArray[np.int64]  # (N,) row numbers that `source` takes
    digests: NDArray[np.uint8]  # (N, 32) SHA-256 of the decoded image, before resizing
    # (N,) int64, index into label_names; or, of several labels an image, (N, K) float32: 1 present, 0 absent, a share
    # in between where that is uncertain, NaN not annotated
    labels: NDArray[Any]
    splits: NDArray[np.int8]  # (N,) index into SPLITS
    patients: NDArray[np.int64]  # (N,) equal for images of one patient; unique where patients are unknown
    label_names: tuple[str, ...]
    preprocessing: str  # preprocessing id: decides, with the digest, every bit of the preprocessed image
    quarantine: Mapping[str, int] = field(default_factory=dict)  # reason code -> files

    def __post_init__(self) -> None:
        if self.labels.ndim != 1:
            multilabel.check_targets(self.labels)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    @property
    def kind(self) -> TaskKind:
        """Whether an image has one label or several."""
        return "single-label" if self.labels.ndim == 1 else "multi-label"

    def subset(self, indices: NDArray[np.int64]) -> Cohort:
        """Return the cohort of these examples, in this order; quarantine stays with the whole."""
        return replace(
            self,
            rows=self.rows[indices],
            digests=self.digests[indices],
            labels=self.labels[indices],
            splits=self.splits[indices],
            patients=self.patients[indices],
            quarantine={},
        )

    def indices(self, split: str) -> NDArray[np.int64]:
        """Return the indices of the examples of one split."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def pixels(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the preprocessed images of these examples: (n, C, S, S) uint8."""
        return self.source(self.rows[indices])

    def support(self, split: str) -> NDArray[np.int64]:
        """Return how many examples of each label a split holds: (K,).

        Of several labels an image, how many examples are in which state of `common.multilabel.STATES`: (4, K).
        """
        labels = self.labels[self.indices(split)]
        if self.kind == "multi-label":
            return multilabel.count_states(labels)
        return np.bincount(labels, minlength=len(self.label_names))

    def aligned(self, label_names: tuple[str, ...]) -> Cohort:
        """Return the cohort with the labels of a run, by name: of several an image, one that it lacks is masked."""
        if label_names == self.label_names:
            return self
        if self.kind == "single-label":
            places = np.array([label_names.index(name) for name in self.label_names], np.int64)
            return replace(self, labels=places[self.labels], label_names=label_names)
        columns = multilabel.aligned(self.labels, self.label_names, label_names)
        return replace(self, labels=columns, label_names=label_names)
