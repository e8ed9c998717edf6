"""What sites say they hold: counts by split and label, checked, added up, and what follows from them.

With one label an image a site declares (3, K) examples by split and label; with several, (3, 4, K) by split, state of
the annotation (`common.multilabel.STATES`) and label, where the states of every label sum to the examples of the split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common import analytic
from common.errors import DataError
from common.multilabel import STATES
from common.run_config import Task

TRAIN, VALIDATION, TEST = 0, 1, 2

MOST_EXAMPLES = 2**40
"""Examples of one label and split that a site is believed to have; sums over sites then stay below 2^63."""

_PRESENT, _ABSENT = STATES.index("present"), STATES.index("absent")

Support = NDArray[np.int64]


def nothing(task: Task) -> Support:
    """Return the counts of a site that was not heard."""
    labels = len(task.labels)
    return np.zeros((3, len(STATES), labels) if task.kind == "multi-label" else (3, labels), np.int64)


def believable(support: Support, task: Task) -> bool:
    """Return whether counts can be a site's: of the run's shape and kind, every label over the same examples."""
    if support.shape != nothing(task).shape or support.dtype != np.int64:
        return False
    within = bool((support >= 0).all() and (support <= MOST_EXAMPLES).all())
    return within and _whole(support)


def _whole(support: Support) -> bool:
    """Return whether every label of a split is counted over the same examples."""
    if support.ndim == 2:
        return True
    totals = support.sum(1)
    return bool((totals == totals[:, :1]).all() and (totals <= MOST_EXAMPLES).all())


def examples(support: Support) -> NDArray[np.int64]:
    """Return the examples of each split: (3,)."""
    return np.asarray(support.sum(1) if support.ndim == 2 else support[:, :, 0].sum(1))


def present(support: Support) -> NDArray[np.int64]:
    """Return in how many examples each label is present, by split: (3, K)."""
    return support if support.ndim == 2 else support[:, _PRESENT]


def annotated(support: Support) -> NDArray[np.int64]:
    """Return in how many examples each label was annotated as present, absent or in between, by split: (3, K)."""
    return np.asarray(support.sum(1) - support[:, STATES.index("missing")])


def class_weights(pooled: Support, *, balanced: bool) -> NDArray[np.float64]:
    """Return the weights of the training loss from the pooled counts: (K,), or (2, K) of absent and present."""
    train = pooled[TRAIN] if pooled.ndim == 2 else pooled[TRAIN, [_ABSENT, _PRESENT]]
    return analytic.balanced_weights(train) if balanced else np.ones(train.shape)


def check_labels(pooled: Support, labels: tuple[str, ...]) -> None:
    """Check that there is something to learn of every label.

    Raises:
        DataError: a label is nowhere present, or of several labels an image nowhere absent, in the training splits.
    """
    for label, count in zip(labels, present(pooled)[TRAIN], strict=True):
        if count == 0:
            raise DataError(f"label {label!r} has no training example at any site: leave it out or add examples")
    if pooled.ndim == 3:
        for label, count in zip(labels, pooled[TRAIN, _ABSENT], strict=True):
            if count == 0:
                raise DataError(
                    f"label {label!r} is absent in no training example at any site: leave it out, add examples, or "
                    'take blank annotations for absent (blank = "zeros")'
                )
