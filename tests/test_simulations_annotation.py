"""Annotations as files write them become targets, by the policy that was chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.multilabel import check_targets
from common.run_config import Data
from simulations.annotation import BLANK, UNCERTAIN, Policy, names, notices, targets

MEANING = {"ignore": None, "zeros": 0.0, "ones": 1.0, "soft": 0.5}


@given(st.sampled_from(sorted(UNCERTAIN)), st.sampled_from(sorted(BLANK)), st.integers(0, 2**32))
def test_every_annotation_becomes_what_the_policy_says(uncertain, blank, seed):
    values = np.random.default_rng(seed).choice([1.0, 0.0, -1.0, np.nan], (15, 3))
    found = targets(values, "labels", Policy(uncertain, blank))
    check_targets(found)
    for value, target in zip(values.flat, found.flat, strict=True):
        wanted = MEANING[blank] if np.isnan(value) else MEANING[uncertain] if value == -1 else value
        assert np.isnan(target) if wanted is None else target == wanted


def test_the_policy_unless_asked_is_that_of_the_run():
    assert Policy() == Policy(Data().uncertain, Data().blank) == Policy("ignore", "zeros")


def test_what_was_given_is_not_changed():
    values = np.array([[-1.0, np.nan]], np.float32)
    targets(values, "labels", Policy("ones", "zeros"))
    np.testing.assert_array_equal(values, [[-1, np.nan]])


@pytest.mark.parametrize("value", [2, -2, 0.5, np.inf, "1", None, 1j])
def test_other_values_are_refused_without_being_told(value):
    with pytest.raises(DataError, match="labels: expected 1, 0, -1 or NaN") as caught:
        targets(np.array([[value, value]]), "labels", Policy())
    assert "1j" not in str(caught.value) and "inf" not in str(caught.value)


def test_a_site_that_left_a_label_blank_in_part_did_annotate_it():
    values, sites = np.array([[np.nan, 1], [np.nan, np.nan], [np.nan, np.nan]]), np.array(["b", "b", "a"])
    found = targets(values, "labels", Policy(), sites)
    np.testing.assert_array_equal(found, [[np.nan, 1], [np.nan, 0], [np.nan, np.nan]])
    assert notices(found, ("x", "y"), sites) == ["not annotated at every site, and masked where it was not: x, y"]
    assert notices(found, ("x", "y"), None) == []


def test_labels_without_names_are_numbered():
    assert names(None, 3) == ("0", "1", "2")
    assert names((" a", "b"), 2) == ("a", "b")
