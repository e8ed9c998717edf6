"""How much a label goes with the device, the view or the modality: what a model may learn in place of the disease."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_IMAGES = 40
"""Images below which no strength is told: chance alone makes strong ones."""

LEAST_LEVEL = 5
"""Images of a device or view from which it counts."""

STRONG = 0.5
NOTABLE = 0.3


def association(present: NDArray[np.bool_], levels: NDArray[np.int64]) -> float | None:
    """Return Cramér's V of a label and a factor, 0 (independent) to 1 (one decides the other), corrected for bias.

    With φ² = χ²/n, r levels and 2 outcomes: φ̃² = max(0, φ² - (r - 1)/(n - 1)), r̃ = r - (r - 1)²/(n - 1),
    2̃ = 2 - 1/(n - 1), V = sqrt(φ̃² / min(r̃ - 1, 2̃ - 1)). None where there is one level, or one outcome, or too little.

    Args:
        present: (N,) whether each image has the label.
        levels: (N,) device, view or modality of each image, as numbers.

    Source: Bergsma, Journal of the Korean Statistical Society 42 (2013) 323-328.

    Examples:
        >>> half = np.arange(100) < 50
        >>> round(association(half, half.astype(int)), 2), association(half, np.arange(100) % 2)
        (1.0, 0.0)
    """
    _, level, sizes = np.unique(levels, return_inverse=True, return_counts=True)
    large = (sizes >= LEAST_LEVEL)[level]
    present, level = present[large], np.unique(level[large], return_inverse=True)[1]
    n, r = len(present), int(level.max(initial=-1)) + 1
    if n < LEAST_IMAGES or r < 2 or present.all() or not present.any():
        return None
    counts = np.zeros((r, 2))
    np.add.at(counts, (level, present.astype(np.int64)), 1)
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0, keepdims=True) / n
    phi = float((np.square(counts - expected) / expected).sum()) / n
    corrected = max(0.0, phi - (r - 1) / (n - 1))
    least = min(r - (r - 1) ** 2 / (n - 1), 2 - 1 / (n - 1)) - 1
    return min(1.0, float(np.sqrt(corrected / least)))
