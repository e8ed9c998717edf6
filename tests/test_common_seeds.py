"""Streams: fixed for ever, apart from one another, independent of the order of use."""

from __future__ import annotations

import hashlib
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.seeds import derive, numpy_stream

scopes = st.lists(
    st.one_of(st.integers(0, 999), st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=8)),
    max_size=4,
)


@given(st.integers(0, 2**63 - 1), scopes)
def test_a_stream_is_the_head_of_a_sha256_and_fits_every_generator(seed: int, scope: list[str | int]) -> None:
    text = "\x1f".join(map(str, [seed, *scope])).encode()
    assert derive(seed, *scope) == int(hashlib.sha256(text).hexdigest()[:16], 16) // 2
    assert 0 <= derive(seed, *scope) < 2**63


def test_recorded_runs_keep_their_streams() -> None:
    assert derive(0) == 3456079177858693020
    assert derive(0, "train", "site-1", 1) == 8640968260439357321
    assert numpy_stream(0, "train", "site-1", 1).integers(0, 1000, 4).tolist() == [399, 671, 635, 332]


@given(st.integers(0, 2**63 - 1), scopes, scopes)
def test_different_scopes_and_seeds_give_different_streams(
    seed: int, one: list[str | int], other: list[str | int]
) -> None:
    if list(map(str, one)) != list(map(str, other)):
        assert derive(seed, *one) != derive(seed, *other)
    assert derive(seed, *one) != derive(seed + 1, *one)


def test_parts_do_not_run_into_each_other() -> None:
    assert len({derive(0, "ab", "c"), derive(0, "a", "bc"), derive(0, "abc"), derive(0, "", "abc")}) == 4
    assert derive(1, 2) != derive(12)


def test_streams_neither_read_nor_move_the_global_generators() -> None:
    random.seed(1)
    np.random.seed(1)
    before = (random.getstate(), np.random.get_state()[1].tobytes())
    first = numpy_stream(3, "noise").normal(size=4)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before
    np.random.seed(2)
    np.testing.assert_array_equal(numpy_stream(3, "noise").normal(size=4), first)
