"""Training, validation and test of one site: by patient, by a keyed hash, so that nothing moves when data grow.

Where the same image, or nearly, lies under two patients of different splits, the split that has precedence keeps it:
test before validation before training. The other copy is left out, so that no patient ever changes the split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.cohort import SPLITS
from client.duplicates import near_copies

TRAIN, VALIDATION, TEST = (SPLITS.index(name) for name in ("train", "validation", "test"))

VALIDATION_FROM, TEST_FROM = 0.70, 0.85


def split_of(patient: bytes) -> int:
    r"""Return the split of a patient: 70/15/15 by the first 64 bits of the keyed digest, read as a share of 1.

    Examples:
        >>> split_of(bytes(32)), split_of(b"\xff" * 32)
        (0, 2)
    """
    share = int.from_bytes(patient[:8], "big") / 2**64
    return TEST if share >= TEST_FROM else VALIDATION if share >= VALIDATION_FROM else TRAIN


def by_patient(patients: Sequence[bytes]) -> NDArray[np.int8]:
    """Return the split of each image by its patient: (N,)."""
    return np.array([split_of(patient) for patient in patients], np.int8)


def number(patients: Sequence[bytes]) -> NDArray[np.int64]:
    """Return a number for each image that is equal for images of one patient: (N,)."""
    known = {patient: place for place, patient in enumerate(dict.fromkeys(patients))}
    return np.array([known[patient] for patient in patients], np.int64)


def together(splits: NDArray[np.int8], patients: NDArray[np.int64]) -> NDArray[np.int8]:
    """Return given splits with each patient in one: of several the one that has precedence.

    Examples:
        >>> together(np.array([0, 2, 0], np.int8), np.array([7, 7, 8])).tolist()
        [2, 2, 0]
    """
    _, place = np.unique(patients, return_inverse=True)
    highest = np.zeros(int(place.max(initial=-1)) + 1, np.int8)
    np.maximum.at(highest, place, splits)
    return highest[place]


def straddling(splits: NDArray[np.int8], *names: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which images have an exact copy in a split of precedence.

    Args:
        splits: (N,).
        names: each (N, 32); images with an equal row in any of them are copies.
    """
    lower = np.zeros(len(splits), bool)
    for name in names:
        _, group = np.unique(np.ascontiguousarray(name).view("V32").ravel(), return_inverse=True)
        lower |= splits < together(splits, group)
    return lower


def nearly_straddling(
    splits: NDArray[np.int8], hashes: NDArray[np.uint64], thumbs: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Return which images have a near copy in a split of precedence; see `client.duplicates`."""
    lower = np.zeros(len(splits), bool)
    pairs = near_copies(hashes, thumbs, splits)
    first, second = pairs.T
    lower[np.where(splits[first] < splits[second], first, second)] = True
    return lower
