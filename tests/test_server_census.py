"""What sites declare is believed only where it can be true."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import DataError
from common.run_config import Task
from server import census

SINGLE = Task(labels=("a", "b"))
SEVERAL = Task(labels=("a", "b"), kind="multi-label")
ONE = np.array([[5, 7], [2, 4], [1, 1]])
MANY = np.array([
    [[5, 2], [4, 6], [1, 0], [2, 4]],
    [[1, 1], [1, 1], [0, 0], [0, 0]],
    [[0, 0], [0, 0], [0, 0], [0, 0]],
])  # fmt: skip


def test_counts_of_both_kinds_are_believed_and_read():
    assert census.believable(ONE, SINGLE) and census.believable(MANY, SEVERAL)
    assert not census.believable(ONE, SEVERAL) and not census.believable(MANY, SINGLE)
    assert census.examples(ONE).tolist() == [12, 6, 2]
    assert census.examples(MANY).tolist() == [12, 2, 0]
    assert census.present(ONE).tolist() == ONE.tolist()
    assert census.present(MANY).tolist() == [[5, 2], [1, 1], [0, 0]]
    assert census.annotated(MANY).tolist() == [[10, 8], [2, 2], [0, 0]]
    assert census.nothing(SINGLE).shape == (3, 2) and census.nothing(SEVERAL).shape == (3, 4, 2)


def changed(place, value):
    found = MANY.copy()
    found[place] = value
    return found


@pytest.mark.parametrize(
    "support",
    [
        changed((0, 0, 0), 6),  # one label counted over more examples than the other
        changed((1, 3, 1), 1),
        changed((0, 0, 0), -1),
        changed((0, 0, slice(None)), 2**41),
        changed((0, slice(0, 2), slice(None)), 2**40),  # each believable, not their sum
        MANY.astype(np.uint16),
        MANY.astype(float),
        MANY[:, :3],
        MANY[:2],
        MANY[:, :, :1],
        MANY[None],
    ],
)
def test_counts_that_cannot_be_are_not_believed(support):
    assert not census.believable(support, SEVERAL)


def test_weights_follow_from_the_pooled_training_counts():
    np.testing.assert_allclose(census.class_weights(ONE, balanced=True), [12 / 10, 12 / 14])
    np.testing.assert_allclose(census.class_weights(MANY, balanced=True), [[9 / 8, 8 / 12], [9 / 10, 8 / 4]])
    assert census.class_weights(ONE, balanced=False).tolist() == [1, 1]
    assert census.class_weights(MANY, balanced=False).tolist() == [[1, 1], [1, 1]]


def test_a_label_must_be_present_and_absent_somewhere():
    census.check_labels(MANY, ("a", "b"))
    with pytest.raises(DataError, match="label 'b' has no training example"):
        census.check_labels(changed((0, 0, 1), 0), ("a", "b"))
    with pytest.raises(DataError, match="label 'a' is absent in no training example"):
        census.check_labels(changed((0, 1, 0), 0), ("a", "b"))
    census.check_labels(ONE, ("a", "b"))
    with pytest.raises(DataError, match="label 'a' has no training example"):
        census.check_labels(np.array([[0, 5], [1, 1], [1, 1]]), ("a", "b"))
