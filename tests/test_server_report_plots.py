"""Each chart shows the figures of the result, and is left out where there are none."""

from __future__ import annotations

from typing import Any

import pytest

from server.report import plots
from server.report.reading import Run


def score(auc: float | None, *interval: float) -> dict[str, Any]:
    return {"examples": 50, "support": {"a": 20, "b": 30}, "auc": auc, "auc_ci95": list(interval) or None}


def run(**groups: Any) -> Run:
    return Run.of({"config": {"task": {"labels": ["a", "b"]}}, **groups})


def entry(number: int, loss: dict[str, float | None], auc: float | None = 0.9) -> dict[str, Any]:
    sites = {site: {"examples": 10, "train_loss": value} for site, value in loss.items()}
    return {"round": number, "validation": {"examples": 20, "auc": auc, "accuracy": 0.8}, "sites": sites}


@pytest.mark.parametrize("chart", [plots.forest, plots.at_sites, plots.validation, plots.loss, plots.roc])
def test_nothing_measured_is_no_chart(chart: Any) -> None:
    assert chart(run()) is None


def test_models_are_ranked_and_the_undefined_come_last() -> None:
    local = {"x": score(0.7, 0.6, 0.8), "y": score(None), "z": score(0.8, 0.75, 0.85)}
    chart = plots.forest(
        run(test={"pooled": score(0.9, 0.85, 0.95)}, baselines={"pooled": score(0.91), "local": local})
    )
    assert chart is not None
    assert [row.name for row in chart.rows] == ["Federated", "All data pooled", "z alone", "x alone", "y alone"]
    assert [row.dot == "" for row in chart.rows] == [False, False, False, False, True]
    assert chart.band == (chart.scale.percent(0.85), chart.scale.length(0.85, 0.95))


def test_many_sites_are_one_line_with_their_median() -> None:
    local = {f"s{k}": score(0.5 + k / 100) for k in range(21)}
    chart = plots.forest(run(test={"pooled": score(0.9)}, baselines={"pooled": None, "local": local}))
    assert chart is not None
    assert [row.name for row in chart.rows] == ["Federated", "Each site alone"]
    crowd = chart.rows[-1]
    assert (crowd.text, crowd.n, len(crowd.marks)) == ("0.600", "21 of 21 sites", 21)


def test_validation_has_a_gap_where_it_is_undefined_and_marks_the_best() -> None:
    rounds = [entry(0, {}), entry(1, {}, None), entry(2, {}), entry(3, {})]
    chart = plots.validation(run(rounds=rounds, best_round=3))
    assert chart is not None
    auc, accuracy = chart.lines
    assert auc.path.count("M") == 2
    assert len(accuracy.dots) == 4
    assert chart.marker is not None
    assert (chart.marker.text, chart.marker.anchor) == ("best: round 3", "end")


def test_loss_draws_each_site_or_the_range_of_many() -> None:
    few = [entry(number, {"x": 0.5, "y": None if number == 1 else 0.7}) for number in range(1, 4)]
    chart = plots.loss(run(rounds=few))
    assert chart is not None
    assert len(chart.lines) == 3
    assert chart.area == ""
    many = [entry(number, {f"s{k}": k / 20 for k in range(20)}) for number in range(1, 4)]
    chart = plots.loss(run(rounds=many))
    assert chart is not None
    assert len(chart.lines) == 1
    least, most = chart.canvas.at(1, 0.0), chart.canvas.at(1, 0.95)
    assert chart.area.startswith(f"M{most[0]:g} {most[1]:g}L")
    assert chart.area.endswith(f"L{least[0]:g} {least[1]:g}Z")


def test_the_operating_point_lies_on_the_plot_of_two_labels() -> None:
    point = {"threshold": 0.4, "precision": 0.8, "recall": 1.0, "specificity": 1.0}
    curve = {"roc": {"b": [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]}}
    chart = plots.roc(run(test={"pooled": {**score(0.9), "operating_point": point}}, curves=curve))
    assert chart is not None
    assert chart.ring is not None
    assert (chart.ring.x, chart.ring.y) == (chart.canvas.left, chart.canvas.top)
    chart = plots.roc(run(test={"pooled": {**score(0.9), "operating_point": None}}, curves=curve))
    assert chart is not None
    assert chart.ring is None


def test_the_area_of_a_dot_is_its_number_of_images() -> None:
    bins = [{"confidence": 0.6, "accuracy": 0.5, "n": 100}, {"confidence": 0.9, "accuracy": 0.9, "n": 400}]
    chart = plots.reliability(run(curves={"reliability": bins}))
    assert chart is not None
    small, large = chart.lines[0].dots
    assert large.radius == 2 * small.radius
    assert plots.reliability(run()) is None
