"""Splits: one to a patient, by a keyed hash alone; copies under several patients are on one side only."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import splitting
from client.cohort import SPLITS
from client.duplicates import dhash, thumb
from client.identity import Identity
from client.splitting import TEST, TRAIN, VALIDATION

PATIENTS = [f"{number:07d}" for number in range(20_000)]


def splits_of(secret: bytes, names: list[str]) -> np.ndarray:
    who = Identity(secret)
    return splitting.by_patient([who.patient("H", name) for name in names])


def digests(names: list[int]) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.sha256(bytes([n])).digest() for n in names), np.uint8).reshape(-1, 32)


def test_shares_over_many_patients() -> None:
    """Over 20,000 the standard errors of 70, 15, 15 per cent are 0.32, 0.25, 0.25 per cent: four are allowed."""
    shares = np.bincount(splits_of(b"a" * 32, PATIENTS), minlength=3) / len(PATIENTS)
    assert abs(shares - np.array([0.70, 0.15, 0.15])).max() < 0.013


def test_another_secret_gives_another_split() -> None:
    one, other = (splits_of(letter * 32, PATIENTS) for letter in (b"a", b"b"))
    equal = (one == other).mean()
    assert abs(equal - (0.7**2 + 2 * 0.15**2)) < 0.02  # as often as by chance
    assert np.array_equal(one, splits_of(b"a" * 32, PATIENTS))


def test_the_issuer_is_part_of_the_patient() -> None:
    who = Identity(b"a" * 32)
    mine, theirs = ([who.patient(issuer, name) for name in PATIENTS[:2000]] for issuer in ("A", "B"))
    assert (splitting.by_patient(mine) != splitting.by_patient(theirs)).mean() > 0.3


@pytest.mark.parametrize(
    ("share", "split"), [(0.0, TRAIN), (0.6999, TRAIN), (0.7001, VALIDATION), (0.8499, VALIDATION), (0.8501, TEST)]
)
def test_where_a_digest_falls(share: float, split: int) -> None:
    assert splitting.split_of(int(share * 2**64).to_bytes(8, "big") + bytes(24)) == split


def test_nothing_at_all() -> None:
    assert splitting.by_patient([]).shape == splitting.number([]).shape == (0,)
    assert splitting.together(np.zeros(0, np.int8), np.zeros(0, np.int64)).shape == (0,)
    assert splitting.straddling(np.zeros(0, np.int8), np.zeros((0, 32), np.uint8)).shape == (0,)


images = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=60)


@given(images)
def test_given_splits_move_a_patient_whole_and_only_upwards(rows: list[tuple[int, int]]) -> None:
    patients = splitting.number([bytes([patient]) for patient, _ in rows])
    before = np.array([split for _, split in rows], np.int8)
    after = splitting.together(before, patients)
    assert (after >= before).all()
    for patient in np.unique(patients):
        mine = patients == patient
        assert set(after[mine]) == {before[mine].max()}


@given(images, st.randoms(use_true_random=False))
def test_order_decides_nothing(rows: list[tuple[int, int]], random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    names = [bytes([patient]) for patient, _ in rows]
    before = np.array([split for _, split in rows], np.int8)
    after = splitting.together(before, splitting.number(names))
    shuffled = splitting.together(before[order], splitting.number([names[place] for place in order]))
    assert np.array_equal(after[order], shuffled)


@given(images)
def test_what_is_left_of_copies_is_in_one_split(rows: list[tuple[int, int]]) -> None:
    splits = np.array([split for _, split in rows], np.int8)
    names = digests([image for image, _ in rows])
    out = splitting.straddling(splits, names)
    for image in {image for image, _ in rows}:
        mine = np.array([image == other for other, _ in rows])
        kept = splits[mine & ~out]
        assert set(kept) == {splits[mine].max()}
        assert len(kept) == (splits[mine] == splits[mine].max()).sum()  # copies within a split stay


def test_any_of_several_names_makes_a_copy() -> None:
    out = splitting.straddling(np.array([0, 1, 2], np.int8), digests([1, 1, 3]), digests([4, 5, 5]))
    assert out.tolist() == [True, True, False]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(0, 2**32))
def test_near_copies_are_in_one_split(splits: list[int], seed: int) -> None:
    """One picture under many patients, each time with another brightness and other noise."""
    random = np.random.default_rng(seed)
    whole = np.kron(random.integers(40, 200, (8, 8)), np.ones((12, 12)))
    copies = [
        np.clip(whole * random.uniform(0.9, 1.1) + random.normal(0, 4, whole.shape), 0, 255).astype(np.uint8)[None]
        for _ in splits
    ]
    hashes = np.array([dhash(copy) for copy in copies], np.uint64)
    thumbs = np.stack([np.frombuffer(thumb(copy), np.uint8) for copy in copies])
    given_splits = np.array(splits, np.int8)
    out = splitting.nearly_straddling(given_splits, hashes, thumbs)
    assert set(given_splits[~out]) == {max(splits)}
    assert np.array_equal(~out, given_splits == max(splits))


def test_names_of_splits_are_in_the_order_of_precedence() -> None:
    assert SPLITS == ("train", "validation", "test")
    assert TRAIN < VALIDATION < TEST
