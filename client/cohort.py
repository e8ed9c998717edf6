"""The labelled, split images of one site: what training and evaluation read, whatever the files were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")

PixelSource = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""Maps row numbers (n,) to preprocessed images (n, C, S, S), uint8, C 1 for grey or 3 for colour, S the image size."""


@dataclass(frozen=True)
class Cohort:
    """Examples of one site, or of the whole pool before it is partitioned.

    N examples; the pixels stay where they are (`source` reads them on demand), so a subset costs nothing.
    """

    source: PixelSource
    rows: NDArray[np.int64]  # (N,) row numbers that `source` takes
    digests: NDArray[np.uint8]  # (N, 32) SHA-256 of the decoded image, before resizing
    labels: NDArray[np.int64]  # (N,) index into label_names
    splits: NDArray[np.int8]  # (N,) index into SPLITS
    patients: NDArray[np.int64]  # (N,) equal for images of one patient; unique where patients are unknown
    label_names: tuple[str, ...]
    preprocessing: str  # preprocessing id: decides, with the digest, every bit of the preprocessed image
    quarantine: Mapping[str, int] = field(default_factory=dict)  # reason code -> files

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

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
        """Return how many examples of each label a split holds: (K,)."""
        return np.bincount(self.labels[self.indices(split)], minlength=len(self.label_names))
