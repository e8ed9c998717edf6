"""Scales span their values with round ticks, and nothing is drawn outside its canvas."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from server.report.charts import UNIT, Axis, Canvas, Line, Plot, axis, round_axis


@given(st.lists(st.floats(-1e12, 1e12), max_size=6))
def test_an_axis_spans_its_values_with_rising_ticks(values: list[float]) -> None:
    scale = axis(values)
    assert 2 <= len(scale.ticks) <= 12
    assert list(scale.ticks) == sorted(set(scale.ticks))
    slack = 1e-6 * (scale.high - scale.low)
    assert all(scale.low - slack <= value <= scale.high + slack for value in values)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_an_axis_of_shares_stays_within_zero_and_one(values: list[float]) -> None:
    scale = axis(values, least=0.0, most=1.0)
    assert 0 <= scale.low < scale.high <= 1
    assert len(scale.ticks) >= 2


def test_noise_does_not_fill_an_axis() -> None:
    scale = axis([0.9700, 0.9701], least=0.0, most=1.0)
    assert scale.high - scale.low >= 0.05


@given(st.sets(st.integers(0, 1000), min_size=1))
def test_rounds_have_whole_ticks(numbers: set[int]) -> None:
    scale = round_axis(sorted(numbers))
    assert scale.low == min(numbers)
    assert scale.high > scale.low
    assert 1 <= len(scale.ticks) <= 10
    assert all(tick == int(tick) for tick in scale.ticks)


@given(st.floats(-2, 3), st.floats(-2, 3))
def test_whatever_is_drawn_stays_on_its_canvas(x: float, y: float) -> None:
    canvas = Canvas(UNIT, UNIT)
    across, up = canvas.at(x, y)
    assert canvas.left <= across <= canvas.right
    assert canvas.top <= up <= canvas.bottom


def test_the_corners_of_a_canvas() -> None:
    canvas = Canvas(UNIT, UNIT, 400, 400)
    assert canvas.at(0, 0) == (canvas.left, canvas.bottom)
    assert canvas.at(1, 1) == (canvas.right, canvas.top)
    assert [text for _, text in canvas.x_ticks] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_a_path_is_broken_where_a_value_is_undefined() -> None:
    path = Canvas(Axis(0, 4, (), 0), UNIT).path([(0, None), (1, 0.5), (2, 0.6), (3, None), (4, 0.1)])
    assert re.sub(r"[\d. ]", "", path) == "MLM"


def test_a_length_is_the_way_between_two_places() -> None:
    assert UNIT.percent(0.25) == "25.00%"
    assert UNIT.length(0.25, 0.75) == "50.00%"
    assert UNIT.length(0.5, 7) == "50.00%"


def test_extreme_ticks_are_printed_short() -> None:
    assert all(len(scale.text(tick)) <= 9 for scale in (axis([0, 3e11]), axis([1e30])) for tick in scale.ticks)


def test_one_curve_needs_no_legend() -> None:
    lines = tuple(Line(name, "fed", "") for name in ("a", "b", ""))
    canvas = Canvas(UNIT, UNIT)
    assert Plot(canvas, "x", "y", lines[:1]).legend == []
    assert [line.name for line in Plot(canvas, "x", "y", lines).legend] == ["a", "b"]
