"""Numbers are printed short, in few digits, and undefined ones as a dash."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report.wording import DASH, GAP, duration, fixed, grouped, joined, percent, plural, size


@given(st.floats(0, 1e15))
def test_sizes_and_durations_are_short(value: float) -> None:
    assert len(size(value)) <= 10
    assert re.match(r"\d", size(value))
    assert re.match(r"\d", duration(value))


@pytest.mark.parametrize("text", [fixed(None), grouped(None), size(None), duration(None)])
def test_undefined_is_a_dash(text: str) -> None:
    assert text == DASH


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (59.96, "1 min 0 s"), (3599.6, "1 h 0 min")],
)
def test_no_unit_runs_over(seconds: float, said: str) -> None:
    assert duration(seconds).replace(GAP, " ") == said


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (10**15, "1000 TB")])
def test_bytes_change_unit_at_a_thousand(count: int, said: str) -> None:
    assert size(count).replace(GAP, " ") == said


def test_a_negative_figure_has_a_true_minus_sign() -> None:
    assert fixed(-0.0104) == "\N{MINUS SIGN}0.010"


def test_names_are_counted_beyond_the_first_few() -> None:
    assert joined(["a", "b", "c"]) == "a, b, c"
    assert joined(["a", "b"], most=1) == "a and 1 more"
    assert plural(0, "round") == "0 rounds"


@given(st.floats(0, 1))
def test_a_share_is_zero_only_if_it_is_nothing(share: float) -> None:
    assert percent(share).startswith("0") == (share == 0)
