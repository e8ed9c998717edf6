"""Privacy in the report: what was spent is never told as less, and a sweep is drawn from the strictest to none."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report import privacy
from server.report.page import render
from server.report.reading import Run

SPENT = {
    "epsilon": 2.9871,
    "planned_epsilon": 3.0,
    "delta": 1e-5,
    "noise_multiplier": 1.23456,
    "sampling_rate": 0.05,
    "steps": 240,
}


def run(**groups: Any) -> Run:
    return Run.of({"schema": 1, "config": {"task": {"labels": ["a", "b"]}}, **groups})


def point(epsilon: float | None, auc: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    return {
        "epsilon": epsilon,
        "folder": "none" if epsilon is None else f"epsilon-{epsilon:g}",
        "federated": {"auc": auc, "auc_ci95": [0.85, 0.95], "accuracy": 0.8},
        "pooled": {"auc": 0.96, "auc_ci95": None, "accuracy": 0.9},
        "local": {"north": 0.8, "south": 0.7, "west": None},
        **changes,
    }


# What was spent


def test_privacy_is_shown_as_spent() -> None:
    found = privacy.spent(run(privacy={"unit": "patient", "sites": {"s10": SPENT, "s2": None}, "outside": ["Sizes."]}))
    assert found is not None
    assert (found.unit, found.largest, found.outside) == ("patient", "2.988", ["Sizes."])
    assert found.rows == [("s2", ["–"] * 6), ("s10", ["2.988", "3.000", "1e-05", "1.235", "0.05", "240"])]


@pytest.mark.parametrize("group", [None, {}, {"sites": None}, {"sites": {}}])
def test_a_run_without_privacy_has_no_table(group: Any) -> None:
    assert privacy.spent(run(privacy=group)) is None


def test_what_is_unknown_is_a_dash() -> None:
    found = privacy.spent(run(privacy={"unit": None, "sites": {"a": {"epsilon": None}}}))
    assert found is not None
    assert (found.unit, found.largest, found.rows) == ("–", "–", [("a", ["–"] * 6)])


@given(st.floats(0, 1000))
def test_no_epsilon_is_shown_as_less_than_it_is(epsilon: float) -> None:
    found = privacy.spent(run(privacy={"sites": {"a": {**SPENT, "epsilon": epsilon}}}))
    assert found is not None
    assert epsilon - 1e-9 <= float(found.largest) <= epsilon + 0.001
    assert found.rows[0][1][0] == found.largest


# A sweep


def test_a_single_run_is_no_sweep() -> None:
    assert privacy.sweep(run()) == []
    assert privacy.utility([]) is None


def test_the_runs_of_a_sweep_stand_by_epsilon_that_without_privacy_last() -> None:
    points = privacy.sweep(run(sweep=[point(8.0), point(None), point(0.5), point(3.0)]))
    assert [one.name for one in points] == ["0.5", "3", "8", "none"]
    assert [one.folder for one in points] == ["epsilon-0.5", "epsilon-3", "epsilon-8", "none"]


def test_the_table_of_a_sweep_has_every_figure_or_a_dash() -> None:
    whole, bare = privacy.sweep(run(sweep=[point(1.0), {"epsilon": None, "federated": None}]))
    assert whole.cells == ["0.900", "0.850 to 0.950", "0.800", "0.960", "0.750", "0.700 to 0.800"]
    assert bare.cells == ["–"] * 6
    assert bare.folder == ""


def test_the_plot_has_a_line_for_each_way_to_train() -> None:
    chart = privacy.utility(privacy.sweep(run(sweep=[point(1.0), point(10.0), point(None)])))
    assert chart is not None
    assert [line.name for line in chart.lines] == ["federated", "all data pooled", "mean of the sites alone"]
    assert [len(line.dots) for line in chart.lines] == [3, 3, 3]
    assert [text for _, text in chart.canvas.x_ticks] == ["1", "10", "none"]
    places = [place for place, _ in chart.canvas.x_ticks]
    assert places == sorted(places)
    assert places[1] - places[0] > places[2] - places[1]  # logarithmic; none is a little beyond the largest


def test_without_a_run_without_privacy_the_largest_epsilon_is_itself() -> None:
    chart = privacy.utility(privacy.sweep(run(sweep=[point(1.0), point(10.0)])))
    assert chart is not None
    assert [text for _, text in chart.canvas.x_ticks] == ["1", "10"]


def test_a_line_breaks_where_a_figure_is_undefined_and_is_left_out_where_all_are() -> None:
    without = {"pooled": None, "local": {}}
    points = [point(1.0, **without), point(2.0, None, **without), point(4.0, **without), point(None, **without)]
    chart = privacy.utility(privacy.sweep(run(sweep=points)))
    assert chart is not None
    (line,) = chart.lines
    assert line.path.count("M") == 2
    assert len(line.dots) == 3


@pytest.mark.parametrize(
    "points", [[point(1.0)], [point(1.0, None, pooled=None, local={}), point(None, None, pooled=None, local={})]]
)
def test_one_point_or_no_figure_is_no_plot(points: list[dict[str, Any]]) -> None:
    assert privacy.utility(privacy.sweep(run(sweep=points))) is None


# On the page


def text_of(page: str) -> str:
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", page[page.index("<body") :], flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_a_page_with_a_sweep_shows_plot_and_table() -> None:
    sweep = [point(8.0), point(None, folder="<b>none</b>"), point(0.5, None)]
    page = render({"schema": 1, "status": "completed", "sweep": sweep, "privacy": {"sites": {"a": SPENT}}})
    text = text_of(page)
    assert "Accuracy against privacy" in text
    assert "The other sections of this page are those of ε 8;" in text
    assert "0.5 – 0.850 to 0.950 0.800 0.960 0.750 0.700 to 0.800 epsilon-0.5" in text
    assert page.count("mean of the sites alone") >= 3
    assert "<b>none</b>" not in page
    assert not re.search(r"\b(None|nan|Undefined)\b", text)


def test_a_page_of_one_run_tells_of_its_privacy_alone() -> None:
    outside = ["Validation patients are outside."]
    spent = {"unit": "patient", "outside": outside, "sites": {"north": SPENT}}
    text = text_of(render({"schema": 1, "status": "completed", "privacy": spent}))
    assert "Accuracy against privacy" not in text
    assert "The largest ε of a site is 2.988" in text
    assert "Validation patients are outside." in text
    assert "north 2.988 3.000 1e-05 1.235 0.05 240" in text
