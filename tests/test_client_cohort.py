"""A site's examples: one label an image or several, counted, cut and matched by name."""

from __future__ import annotations

import numpy as np
import pytest

from client.cohort import Cohort


def cohort_of(labels, names=("a", "b")):
    count = len(labels)
    return Cohort(
        source=lambda rows: np.zeros((len(rows), 1, 4, 4), np.uint8),
        rows=np.arange(count),
        digests=np.zeros((count, 32), np.uint8),
        labels=labels,
        splits=np.array([0, 0, 1, 2][:count], np.int8),
        patients=np.arange(count),
        label_names=names,
        preprocessing="none",
    )


SEVERAL = np.array([[1, 0.5], [np.nan, 0], [1, 1], [0, np.nan]], np.float32)


def test_one_label_an_image():
    cohort = cohort_of(np.array([0, 1, 1, 0]))
    assert cohort.kind == "single-label"
    assert [cohort.support(split).tolist() for split in ("train", "validation", "test")] == [[1, 1], [0, 1], [1, 0]]
    assert cohort.aligned(("a", "b")) is cohort
    assert cohort.aligned(("b", "c", "a")).labels.tolist() == [2, 0, 0, 2]


def test_several_labels_an_image():
    cohort = cohort_of(SEVERAL)
    assert cohort.kind == "multi-label"
    assert cohort.support("train").tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    assert cohort.support("test").tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]
    part = cohort.subset(np.array([2, 1]))
    assert part.kind == "multi-label"
    np.testing.assert_array_equal(part.labels, SEVERAL[[2, 1]])


def test_columns_of_a_run_are_found_by_name_and_what_is_lacking_is_masked():
    found = cohort_of(SEVERAL).aligned(("b", "c"))
    assert found.label_names == ("b", "c")
    np.testing.assert_array_equal(found.labels[:, 0], SEVERAL[:, 1])
    assert np.isnan(found.labels[:, 1]).all()
    assert found.support("train").tolist() == [[0, 0], [1, 0], [1, 0], [0, 2]]


@pytest.mark.parametrize(
    "labels", [SEVERAL.astype(float), np.full((4, 2), -1, np.float32), np.full((4, 2), 2, np.float32)]
)
def test_targets_that_no_loss_can_take_are_refused(labels):
    with pytest.raises(ValueError, match="targets"):
        cohort_of(labels)
