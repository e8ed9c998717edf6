"""A result reads the same whatever is null in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report.reading import Round, Run, Score, natural, total


def entry(**changes: Any) -> dict[str, Any]:
    return {"round": 1, "sites": {}, "validation": None, **changes}


def test_an_empty_result_has_nothing_but_a_status() -> None:
    run = Run.of({"schema": 1})
    assert (run.status, run.labels, run.sites, run.rounds, run.trained, run.best) == ("unknown", (), (), (), 0, None)
    assert run.test.auc is None
    assert run.section("config", "model") == {}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, "not measured"),
        ({"examples": 0, "support": {"a": 0}}, "undefined: no images"),
        ({"examples": 3, "support": {"a": 3, "b": 0}}, "undefined: one label only"),
        ({"examples": 3, "support": {"a": 2, "b": 1}}, "undefined"),
        (
            {"examples": 3, "support": {"a": 3}, "per_class": {"a": {"annotated": 3}}},
            "undefined: no label is both present and absent",
        ),
        ({"examples": 0, "annotated": 0}, "undefined: not annotated in any image"),
        ({"examples": 0, "annotated": 4}, "undefined: present in no image"),
        ({"examples": 4, "annotated": 4}, "undefined: absent in no image"),
        ({"examples": 1, "annotated": 4}, "undefined"),
    ],
)
def test_a_dash_has_its_reason(values: dict[str, Any], why: str) -> None:
    figure = Score(values).figure("auc")
    assert (figure.text, figure.why) == ("–", why)


def test_a_figure_that_is_defined_needs_no_reason() -> None:
    assert Score({"auc": 0.5}).figure("auc").why == ""


@pytest.mark.parametrize(("bound", "said"), [(None, ""), (0.0, "± 0.000"), (0.0004, "± 0.001"), (0.0021, "± 0.003")])
def test_the_bound_is_rounded_up(bound: float | None, said: str) -> None:
    assert Score({"auc_bound": bound}).bound_text.replace("\N{NO-BREAK SPACE}", " ") == said


def test_mean_loss_is_weighted_by_images_and_leaves_out_the_silent() -> None:
    sites = {
        "a": {"examples": 30, "train_loss": 1.0, "status": "contributed"},
        "b": {"examples": 10, "train_loss": 2.0, "status": "contributed"},
        "c": {"examples": 0, "train_loss": None, "status": "lost"},
    }
    read = Round.of(entry(sites=sites))
    assert read.mean_loss == 1.25
    assert read.contributors == 2
    assert Round.of(entry()).mean_loss is None


def test_a_round_moves_weights_and_everything_else() -> None:
    bytes_ = {"bytes_down": 100, "bytes_up": 80, "evaluation_bytes_down": 7, "evaluation_bytes_up": 5}
    assert Round.of(entry(**bytes_)).traffic == 192
    assert Round.of(entry()).traffic is None


def test_the_best_round_is_found_by_its_number() -> None:
    rounds = [entry(round=0), entry(round=1)]
    best = Run.of({"rounds": rounds, "best_round": 1}).best
    assert best is not None
    assert best.number == 1
    assert Run.of({"rounds": rounds, "best_round": None}).best is None


@pytest.mark.parametrize(
    ("init", "strategy", "closed"),
    [("analytic", "fedavg", True), ("zero", "fedavg", False), ("zero", "analytic", True)],
)
def test_the_start_is_known_from_the_configuration(init: str, strategy: str, closed: bool) -> None:
    run = Run.of({"config": {"model": {"init": init}, "training": {"strategy": strategy}}})
    assert run.closed_form is closed


def test_sites_come_in_natural_order() -> None:
    names = [f"site-{k}" for k in range(1, 120)]
    assert sorted(sorted(names), key=natural) == names


@given(st.lists(st.none() | st.integers(0, 10**9)))
def test_a_total_of_nothing_known_is_unknown(values: list[int | None]) -> None:
    known = [value for value in values if value is not None]
    assert total(values) == (sum(known) if known else None)
