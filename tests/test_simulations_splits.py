"""Splits: shares, whole units, stability, and what becomes of splits that the data came with."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from simulations.splits import TEST, TRAIN, VALIDATION, assign, identical, strata, unit_keys, unit_labels, units


def digests_of(images):
    """Return the digest of each image, here told apart by a number: (N, 32)."""
    found = [np.frombuffer(hashlib.sha256(str(image).encode()).digest(), dtype=np.uint8) for image in images]
    return np.array(found, dtype=np.uint8).reshape(len(found), 32)


def names(labels):
    return tuple(str(label) for label in range(int(max(labels)) + 1))


@st.composite
def pools(draw):
    """Labels, images and patients with many repeats of each; every label has images of its own to train on."""
    size = draw(st.integers(12, 60))
    labels = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    images = draw(st.lists(st.integers(0, 80), min_size=size, max_size=size))
    patients = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    own = range(12)
    labels += [label % 3 for label in own]
    images += [1000 + image for image in own]
    patients += [1000 + patient for patient in own]
    return np.array(labels), digests_of(images), np.array(patients)


@st.composite
def split_pools(draw):
    labels, digests, patients = draw(pools())
    count = len(labels) - 12
    splits = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return labels, digests, patients, np.array(splits + [0] * 6 + [1] * 3 + [2] * 3, dtype=np.int8)


def spans(groups, splits):
    """Return the largest number of splits that one group has."""
    return max(len(np.unique(splits[groups == group])) for group in np.unique(groups))


@settings(max_examples=20, deadline=None)
@given(pools())
def test_units_are_the_smallest_groups_that_keep_patients_and_images_together(pool):
    _, digests, patients = pool
    unit = units(patients, digests)
    image = identical(digests)
    for one in range(len(unit)):  # flood fill, the slow way
        group = {one}
        while True:
            more = {
                other
                for other in range(len(unit))
                if any(patients[other] == patients[each] or image[other] == image[each] for each in group)
            }
            if more == group:
                break
            group = more
        assert group == set(np.flatnonzero(unit == unit[one]).tolist())
    assert sorted(np.unique(unit)) == list(range(int(unit.max()) + 1))


def test_a_chain_of_shared_patients_and_images_is_one_unit_and_quickly_found():
    count = 100_000
    place = np.random.default_rng(0).permutation(count)
    patients, digests = np.empty(count, dtype=np.int64), np.zeros((count, 32), dtype=np.uint8)
    patients[place] = np.arange(count) // 2
    digests[place, :4] = ((np.arange(count) + 1) // 2).astype("<u4").view(np.uint8).reshape(count, 4)
    assert units(patients, digests).max() == 0


def test_majority_label_of_a_unit_and_the_lowest_of_a_tie():
    assert unit_labels(np.array([0, 0, 0, 1, 1, 2]), np.array([4, 1, 4, 3, 2, 0])).tolist() == [4, 2, 0]


def test_keys_depend_on_the_key_and_not_on_the_order_of_images():
    digests, unit = digests_of(range(6)), np.array([0, 0, 0, 1, 1, 2])
    back = unit_keys(unit[::-1].copy(), digests[::-1].copy(), 1)
    assert unit_keys(unit, digests, 1).tolist() == back.tolist()
    assert not set(unit_keys(unit, digests, 1).tolist()) & set(unit_keys(unit, digests, 2).tolist())


def test_larger_units_are_not_favoured_by_their_keys():
    unit = np.concatenate([np.repeat(np.arange(2000), 9), np.arange(2000, 4000)])
    keys = unit_keys(unit, digests_of(range(len(unit))), 0)
    share = (keys[:2000] < np.uint64(2**63)).mean()
    assert abs(share - 0.5) < 0.05


@settings(deadline=None)
@given(pools(), st.integers(0, 5))
def test_own_splits_keep_units_whole_keep_everything_and_give_each_label_its_share(pool, seed):
    labels, digests, patients = pool
    made = assign(labels, digests, patients, None, seed, names(labels))
    unit = units(patients, digests)
    assert made.keep.all() and not made.dropped and not made.warnings
    assert spans(unit, made.splits) == spans(patients, made.splits) == spans(identical(digests), made.splits) == 1
    of_unit = unit_labels(unit, labels)
    split = np.array([made.splits[unit == number][0] for number in range(len(of_unit))])
    for label in np.unique(of_unit):
        members = split[of_unit == label]
        if len(members) >= 3:
            assert set(members) == {TRAIN, VALIDATION, TEST}
        for held_out in (VALIDATION, TEST):
            assert abs((members == held_out).sum() - 0.15 * len(members)) <= 1


@pytest.mark.parametrize(("count", "expected"), [(20, [14, 3, 3]), (100, [70, 15, 15]), (3, [1, 1, 1]), (4, [2, 1, 1])])
def test_closed_form_shares(count, expected):
    labels = np.repeat([0, 1], count)
    made = assign(labels, digests_of(range(2 * count)), np.arange(2 * count), None, 0, ("a", "b"))
    for label in (0, 1):
        assert np.bincount(made.splits[labels == label], minlength=3).tolist() == expected


@settings(deadline=None)
@given(pools(), st.randoms(use_true_random=False))
def test_own_splits_do_not_depend_on_the_order_of_the_files(pool, random):
    labels, digests, patients = pool
    order = list(range(len(labels)))
    random.shuffle(order)
    whole = assign(labels, digests, patients, None, 3, names(labels))
    other = assign(labels[order], digests[order], patients[order], None, 3, names(labels))
    assert np.array_equal(whole.splits[order], other.splits)


def test_another_seed_gives_other_splits():
    labels, digests, patients = np.arange(200) % 2, digests_of(range(200)), np.arange(200)
    first, second = (assign(labels, digests, patients, None, seed, ("a", "b")).splits for seed in (0, 1))
    assert (first != second).sum() > 20


@settings(deadline=None)
@given(split_pools())
def test_given_splits_are_kept_but_no_unit_straddles_them(pool):
    labels, digests, patients, splits = pool
    made = assign(labels, digests, patients, splits, 0, names(labels))
    assert np.array_equal(made.splits[made.keep], splits[made.keep])
    assert spans(units(patients, digests)[made.keep], made.splits[made.keep]) == 1
    assert sum(made.dropped.values()) == (~made.keep).sum()
    assert made.keep[splits == TEST].all()  # nothing is ever taken from the test split


@settings(deadline=None)
@given(split_pools())
def test_given_splits_without_overlap_are_left_alone(pool):
    labels, digests, patients, splits = pool
    made = assign(labels, digests, patients, splits, 0, names(labels))
    again = assign(labels[made.keep], digests[made.keep], patients[made.keep], splits[made.keep], 0, names(labels))
    assert again.keep.all() and again.dropped == {}


def test_the_copy_in_training_is_dropped_and_counted_by_reason():
    # five images in training, two in validation, three in test
    images = np.array([0, 1, 2, 3, 7, 0, 4, 1, 5, 6])
    patients = np.array([0, 1, 2, 3, 9, 4, 5, 6, 7, 2])
    labels = np.array([0, 1, 0, 1, 0, 0, 1, 1, 0, 0])
    splits = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 2], dtype=np.int8)
    made = assign(labels, digests_of(images), patients, splits, 0, ("a", "b"))
    assert made.keep.tolist() == [False, False, False, True, True, True, True, True, True, True]
    assert made.dropped == {"duplicate_across_splits": 2, "patient_across_splits": 1}


def test_a_duplicate_of_validation_and_test_stays_in_test():
    splits = np.array([0, 0, 1, 1, 2, 2], dtype=np.int8)
    made = assign(np.array([0, 1, 0, 1, 0, 1]), digests_of([0, 1, 2, 3, 2, 5]), np.arange(6), splits, 0, ("a", "b"))
    assert made.keep.tolist() == [True, True, False, True, True, True]


def test_repeats_inside_one_split_stay():
    splits = np.array([0, 0, 0, 1, 2], dtype=np.int8)
    made = assign(np.array([0, 1, 1, 1, 0]), digests_of([0, 1, 1, 3, 4]), np.arange(5), splits, 0, ("a", "b"))
    assert made.keep.all()


def test_missing_validation_is_carved_out_of_training_by_unit_and_said():
    count = 200
    labels = np.arange(count) % 2
    splits = np.where(np.arange(count) < 170, TRAIN, TEST).astype(np.int8)
    patients = np.arange(count) // 2 * 2 + labels  # one unit an image, but images 0..169 are repeated below
    doubled = np.concatenate([np.arange(count), np.arange(170)])
    made = assign(labels[doubled], digests_of(doubled), patients[doubled], splits[doubled], 0, ("a", "b"))
    assert np.bincount(made.splits).tolist() == [2 * 140, 2 * 30, 30]
    assert spans(doubled, made.splits) == 1
    assert made.warnings == ("no validation split given: carved 60 images out of training",)


@pytest.mark.parametrize(("given_splits", "missing"), [([0, 0, 0, 1, 1, 1], "test"), ([1, 1, 1, 2, 2, 2], "train")])
def test_given_splits_need_training_and_test(given_splits, missing):
    splits = np.array(given_splits, dtype=np.int8)
    with pytest.raises(DataError, match=missing):
        assign(np.array([0, 1] * 3), digests_of(range(6)), np.arange(6), splits, 0, ("a", "b"))


def test_a_label_without_training_images_is_named():
    splits = np.array([0, 0, 1, 1, 2, 2], dtype=np.int8)
    with pytest.raises(DataError, match="'effusion'"):
        assign(np.array([0, 0, 0, 1, 0, 1]), digests_of(range(6)), np.arange(6), splits, 0, ("normal", "effusion"))


def test_too_few_units_for_a_test_split_is_an_error():
    with pytest.raises(DataError, match="at least 3 patients"):
        assign(np.array([0, 1] * 50), digests_of(range(100)), np.array([0, 1] * 50), None, 0, ("a", "b"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1))
def test_any_seed_is_accepted(seed):
    made = assign(np.arange(20) % 2, digests_of(range(20)), np.arange(20), None, seed, ("a", "b"))
    assert np.bincount(made.splits).tolist() == [12, 4, 4]


def test_a_hundred_thousand_images_take_under_two_seconds():
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (100_000, 32), dtype=np.uint8)
    made = assign(rng.integers(0, 9, 100_000), digests, rng.integers(0, 30_000, 100_000), None, 0, tuple("abcdefghi"))
    assert abs((made.splits == TEST).mean() - 0.15) < 0.01


# Several labels an image


def findings(count, seed=0, shares=(0.5, 0.2, 0.05)):
    """Targets of labels from frequent to rare, some not annotated: (N, K)."""
    stream = np.random.default_rng(seed)
    found = (stream.random((count, len(shares))) < shares).astype(np.float32)
    found[stream.random(found.shape) < 0.1] = np.nan
    return found


def test_a_unit_stands_for_its_rarest_label_and_else_for_none():
    labels = np.array([[1, 0], [1, 1], [1, np.nan], [0, 0], [np.nan, 0.5]], np.float32)
    assert strata(np.arange(5), labels).tolist() == [0, 1, 0, 2, 2]
    assert strata(np.array([0, 0, 1, 1, 1]), labels).tolist() == [1, 0]
    single = np.array([1, 1, 0, 0, 2])
    assert strata(np.array([0, 0, 1, 1, 1]), single).tolist() == [1, 0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_every_label_has_its_share_in_every_split(seed):
    labels = findings(1200, seed)
    made = assign(labels, digests_of(range(1200)), np.arange(1200) // 2, None, seed, ("a", "b", "c"))
    assert spans(np.arange(1200) // 2, made.splits) == 1
    present = labels == 1
    for split, share in ((TRAIN, 0.7), (VALIDATION, 0.15), (TEST, 0.15)):
        chosen = made.splits == split
        assert abs(chosen.mean() - share) < 0.01
        rarest = present[:, 2]
        assert abs(rarest[chosen].sum() / rarest.sum() - share) < 0.08
        assert present[chosen].any(0).all()


def test_a_label_that_training_never_or_always_has_is_named():
    digests, alone = digests_of(range(40)), np.arange(40)
    labels = findings(40, shares=(0.5, 0.5))
    labels[:, 1] = np.where(labels[:, 1] == 1, 0, labels[:, 1])
    with pytest.raises(DataError, match="no training image has label 'b'"):
        assign(labels, digests, alone, None, 0, ("a", "b"))
    labels[:, 1] = np.where(np.isnan(labels[:, 1]), np.nan, 1)
    with pytest.raises(DataError, match="no training image lacks label 'b'.*--blank zeros"):
        assign(labels, digests, alone, None, 0, ("a", "b"))


def test_given_splits_of_several_labels_are_cleaned_and_validation_is_carved():
    labels = findings(200, shares=(0.5, 0.3))
    given_splits = np.where(np.arange(200) < 160, TRAIN, TEST).astype(np.int8)
    images = np.arange(200)
    images[5] = images[190]
    made = assign(labels, digests_of(images), np.arange(200), given_splits, 0, ("a", "b"))
    assert made.dropped == {"duplicate_across_splits": 1} and not made.keep[5]
    assert 20 < (made.splits == VALIDATION).sum() < 40
