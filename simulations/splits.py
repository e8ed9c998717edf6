"""Training, validation and test: which example goes where, so that nothing tested was ever trained on.

What must stay together is a *unit*: images of one patient, and images whose decoded pixels are identical, joined
transitively. Every function here works on whole arrays, in time n log n.

Labels are (N,) numbers, or of several labels an image (N, K) targets (1 present, 0 absent, NaN not annotated). Of those
a unit is dealt by one stratum: the rarest label that is present in any of its images, so that rare findings are spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.cohort import SPLITS
from common.errors import DataError
from common.seeds import derive

TRAIN, VALIDATION, TEST = (SPLITS.index(name) for name in ("train", "validation", "test"))

Labels = NDArray[Any]

VALIDATION_SHARE = 0.15
TEST_SHARE = 0.15


@dataclass(frozen=True)
class Assignment:
    """The splits of N examples, and which of them may be used."""

    splits: NDArray[np.int8]  # (N,) index into SPLITS; of no meaning where not kept
    keep: NDArray[np.bool_]  # (N,) False: the example was given to a split that must not have it
    dropped: Mapping[str, int]  # reason -> examples not kept
    warnings: tuple[str, ...] = ()  # what was decided on the user's behalf


def assign(
    labels: Labels,
    digests: NDArray[np.uint8],
    patients: NDArray[np.int64],
    given: NDArray[np.int8] | None,
    seed: int,
    label_names: tuple[str, ...],
) -> Assignment:
    """Split the examples 70/15/15 by unit, stratified by label; or clean the splits that the data came with.

    Own splits: the order inside a label is a keyed hash of the unit's images, so neither the order of the files nor
    a change elsewhere reshuffles them. A label of three or more units has one in each split; of fewer, all train.
    Given splits: a unit in several of them stays in the test split, else in validation, and its other examples are
    dropped and counted: `duplicate_across_splits` where the same image is in the better split,
    `patient_across_splits` for the rest. Missing validation is carved out of training, with a warning.

    Args:
        labels: (N,) index into `label_names`, or (N, K) targets.
        digests: (N, 32) SHA-256 of each decoded image.
        patients: (N,) equal for images of one patient.
        given: (N,) index into `SPLITS`, or None.
        seed: the run's seed.
        label_names: name of each label, for messages.

    Raises:
        DataError: a split is empty, or a label is missing from training: no image has it, or of several labels an image
            there is none that lacks it.
    """
    unit = units(patients, digests)
    if given is None:
        splits = _deal(labels, unit, digests, seed, VALIDATION_SHARE, TEST_SHARE)
        result = Assignment(splits, np.ones(len(labels), dtype=bool), {})
    else:
        result = _clean(labels, digests, unit, given, seed)
    _require_usable(result, labels, label_names)
    return result


def units(patients: NDArray[np.int64], digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the unit of each example: (N,) numbers 0..U-1, equal where patient or image is, transitively.

    Examples:
        >>> digests = np.array([[0], [1], [1], [2]], dtype=np.uint8)
        >>> units(np.array([7, 7, 8, 9]), digests).tolist()
        [0, 0, 0, 1]
    """
    links = [np.unique(patients, return_inverse=True)[1], identical(digests)]
    root = np.arange(len(patients))
    while True:
        before = root.copy()
        for link in links:
            lowest = np.full(len(root), len(root))
            np.minimum.at(lowest, link, root)
            np.minimum.at(root, root.copy(), lowest[link])  # the whole tree follows its root: long chains merge fast
            while not np.array_equal(root, root[root]):
                root = root[root]
        if np.array_equal(root, before):
            break
    unit: NDArray[np.int64] = np.unique(root, return_inverse=True)[1]
    return unit


def identical(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return a number for each row that is equal where the rows (N, width) are equal: (N,)."""
    whole = np.ascontiguousarray(digests).view(np.dtype((np.void, digests.shape[1]))).ravel()
    number: NDArray[np.int64] = np.unique(whole, return_inverse=True)[1]
    return number


def unit_labels(unit: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most frequent label of each unit, the lowest of equally frequent ones: (U,).

    Examples:
        >>> unit_labels(np.array([0, 0, 0, 1, 1]), np.array([2, 1, 2, 1, 0])).tolist()
        [2, 0]
    """
    width = int(labels.max(initial=0)) + 1
    pairs, counts = np.unique(unit * width + labels, return_counts=True)
    owner, label = np.divmod(pairs, width)
    order = np.lexsort((label, -counts, owner))
    first = np.unique(owner[order], return_index=True)[1]
    majority: NDArray[np.int64] = label[order][first]
    return majority


def strata(unit: NDArray[np.int64], labels: Labels) -> NDArray[np.int64]:
    """Return by what each unit is dealt, (U,): its most frequent label, or of several labels an image the rarest one.

    The rarest is that of fewest images, the first of equals; a unit without any label has the number K.

    Examples:
        >>> strata(np.array([0, 0, 1, 2]), np.array([[1, 0], [0, 1], [1, np.nan], [0, 0.5]])).tolist()
        [1, 0, 2]
    """
    if labels.ndim == 1:
        return unit_labels(unit, labels)
    present = labels == 1
    held = np.zeros((int(unit.max(initial=-1)) + 1, labels.shape[1]), dtype=bool)
    np.logical_or.at(held, unit, present)
    rarest_first = np.argsort(present.sum(0), kind="stable")
    ordered = held[:, rarest_first]
    found: NDArray[np.int64] = np.where(ordered.any(1), rarest_first[ordered.argmax(1)], labels.shape[1])
    return found


def unit_keys(unit: NDArray[np.int64], digests: NDArray[np.uint8], key: int) -> NDArray[np.uint64]:
    """Return a pseudo-random number for each unit, from its images and `key` alone: (U,).

    Not for secrets: the mixer is that of SplitMix64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014.
    """
    words = np.pad(digests, ((0, 0), (0, -digests.shape[1] % 8))).view("<u8")
    mixed = np.full(len(digests), key, dtype=np.uint64)
    for column in words.T:
        mixed = _mix(mixed ^ column)
    total = np.zeros(int(unit.max(initial=-1)) + 1, dtype=np.uint64)
    np.add.at(total, unit, mixed)  # a sum, modulo 2**64, does not know the order of the images
    return _mix(total)


def rank_within(groups: NDArray[np.int64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each element's rank by key inside its group, from 0, and the size of its group: (n,) and (n,).

    Examples:
        >>> rank, size = rank_within(np.array([0, 1, 0, 0]), np.array([9, 5, 2, 4], dtype=np.uint64))
        >>> rank.tolist(), size.tolist()
        ([2, 0, 0, 1], [3, 1, 3, 3])
    """
    order = np.lexsort((keys, groups))
    _, start, inverse, count = np.unique(groups[order], return_index=True, return_inverse=True, return_counts=True)
    rank, size = np.empty(len(groups), dtype=np.int64), np.empty(len(groups), dtype=np.int64)
    rank[order] = np.arange(len(groups)) - start[inverse]
    size[order] = count[inverse]
    return rank, size


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _deal(
    labels: Labels,
    unit: NDArray[np.int64],
    digests: NDArray[np.uint8],
    seed: int,
    validation_share: float,
    test_share: float,
) -> NDArray[np.int8]:
    """Return the split of each example: shares of the units of each label, at least one where there are enough."""
    rank, size = rank_within(strata(unit, labels), unit_keys(unit, digests, derive(seed, "splits")))
    enough = size >= 1 + (validation_share > 0) + (test_share > 0)
    test = np.maximum(np.floor(test_share * size + 0.5), enough & (test_share > 0))
    validation = np.maximum(np.floor(validation_share * size + 0.5), enough & (validation_share > 0))
    split = np.where(rank < test, TEST, np.where(rank < test + validation, VALIDATION, TRAIN))
    return split.astype(np.int8)[unit]


def _clean(
    labels: Labels,
    digests: NDArray[np.uint8],
    unit: NDArray[np.int64],
    given: NDArray[np.int8],
    seed: int,
) -> Assignment:
    for split in (TRAIN, TEST):
        if not (given == split).any():
            raise DataError(f"splits: got none for {SPLITS[split]!r}: name it, or leave the splits out altogether")
    keep = given == _highest(unit, given)
    duplicate = given < _highest(identical(digests), given)
    counts = {
        "duplicate_across_splits": int(duplicate.sum()),
        "patient_across_splits": int((~keep & ~duplicate).sum()),
    }
    splits, warnings = given.astype(np.int8), []
    if not (given[keep] == VALIDATION).any():
        splits = _carve_validation(labels, digests, unit, splits, keep, seed)
        warnings.append(f"no validation split given: carved {int((splits == VALIDATION).sum())} images out of training")
    return Assignment(splits, keep, {reason: n for reason, n in counts.items() if n}, tuple(warnings))


def _highest(groups: NDArray[np.int64], given: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return, for each example, the highest split of its group: SPLITS is in the order of who may keep a copy."""
    highest = np.zeros(int(groups.max(initial=-1)) + 1, dtype=np.int8)
    np.maximum.at(highest, groups, given)
    return highest[groups]


def _carve_validation(
    labels: Labels,
    digests: NDArray[np.uint8],
    unit: NDArray[np.int64],
    splits: NDArray[np.int8],
    keep: NDArray[np.bool_],
    seed: int,
) -> NDArray[np.int8]:
    """Give validation its share of the training units: 15 of the 85 parts that are not test."""
    training = np.flatnonzero(keep & (splits == TRAIN))
    members = np.unique(unit[training], return_inverse=True)[1].astype(np.int64)
    share = VALIDATION_SHARE / (1 - TEST_SHARE)
    carved = splits.copy()
    carved[training] = _deal(labels[training], members, digests[training], seed, share, 0.0)
    return carved


def _require_usable(result: Assignment, labels: Labels, label_names: tuple[str, ...]) -> None:
    kept = result.splits[result.keep]
    trained = labels[result.keep][kept == TRAIN]
    counts = np.bincount(trained, minlength=len(label_names)) if labels.ndim == 1 else (trained == 1).sum(0)
    missing = [name for name, count in zip(label_names, counts, strict=True) if not count]
    if missing:
        raise DataError(f"splits: no training image has label {missing[0]!r}: add some, or leave the label out")
    always = [] if labels.ndim == 1 else [label_names[k] for k in np.flatnonzero(~(trained == 0).any(0))]
    if always:
        raise DataError(
            f"splits: no training image lacks label {always[0]!r}: add some, leave the label out, or take what was not "
            "annotated for absent (--blank zeros)"
        )
    for split in (VALIDATION, TEST):
        if not (kept == split).any():
            raise DataError(
                f"splits: the {SPLITS[split]} split is empty: expected a label with at least 3 patients (or distinct "
                "images where patients are unknown), or given splits that do not repeat each other's images"
            )
