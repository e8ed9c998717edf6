"""Sentences say the figures of the result and claim no more than the intervals carry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report import verdict
from server.report.reading import Run, Score
from server.report.verdict import compare

ENDS = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


def score(auc: float | None, *interval: float, n: int = 200) -> dict[str, Any]:
    support = {"a": n // 2, "b": n - n // 2}
    return {"examples": n, "support": support, "auc": auc, "accuracy": 0.75, "auc_ci95": list(interval) or None}


def run(**changes: Any) -> Run:
    """A run of sites s1, s2, s3 that went well: federated 0.95, pooled 0.96."""
    names = ("s1", "s2", "s3")
    result = {
        "status": "completed",
        "config": {"model": {"init": "analytic"}, "training": {"rounds": 2, "strategy": "fedavg"}},
        "sites": {name: {"rounds": 2, "labels": {"a": 40, "b": 60}} for name in names},
        "rounds": [{"round": number, "validation": score(0.9, n=80), "sites": {}} for number in range(3)],
        "best_round": 1,
        "test": {"pooled": score(0.95, 0.93, 0.97), "sites": {name: score(0.95, n=60) for name in names}},
        "baselines": {"pooled": score(0.96, 0.94, 0.98), "local": {name: score(0.85, 0.8, 0.9) for name in names}},
    }
    return Run.of({**result, **changes})


@given(ENDS, ENDS)
def test_comparison_is_the_mirror_image_of_itself(one: list[float], other: list[float]) -> None:
    a, b = Score({"auc_ci95": one}), Score({"auc_ci95": other})
    mirror = {"above": "below", "below": "above", "overlap": "overlap"}
    assert compare(a, b) == mirror[compare(b, a)]


def test_without_an_interval_there_is_no_comparison() -> None:
    assert compare(Score({"auc_ci95": None}), Score({"auc_ci95": [0.1, 0.2]})) == "unknown"


def test_the_finding_is_one_sentence() -> None:
    said = verdict.finding(run()).replace("\N{NO-BREAK SPACE}", " ")
    assert said == (
        "The federated model reaches AUC 0.950 (95 % interval 0.930 to 0.970) on 200 test images of 3 sites; "
        "single sites alone reach 0.850 to 0.850 (mean 0.850); pooling all data would give 0.960."
    )


def test_without_a_test_there_is_no_finding_and_no_judgement() -> None:
    said = run(test=None)
    assert "not measured" in verdict.finding(said)
    assert verdict.judgement(said) == ""


def test_an_undefined_auc_is_said_with_its_reason() -> None:
    lonely = {"examples": 9, "support": {"a": 9, "b": 0}, "auc": None, "accuracy": 0.75}
    said = run(test={"pooled": lonely, "sites": {}})
    expected = "is not defined on 9 test images (one label only); its accuracy is 0.750."
    assert expected in verdict.finding(said)
    assert verdict.judgement(said) == ""


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.94, 0.98), "the intervals overlap: no difference can be shown."),
        ((0.98, 0.99), "the federated model is worse: the intervals do not overlap."),
        ((0.90, 0.92), "the federated model is better: the intervals do not overlap."),
        ((), "nothing can be said, because an interval is missing."),
    ],
)
def test_pooling_is_judged_by_the_intervals(interval: tuple[float, ...], said: str) -> None:
    judged = verdict.judgement(run(baselines={"pooled": score(0.95, *interval), "local": {}}))
    assert judged == f"Against pooling all data {said}"


def test_sites_are_tallied_by_outcome() -> None:
    local = {"a": score(0.7, 0.6, 0.8), "b": score(0.9, 0.88, 0.94), "c": score(0.98, 0.975, 0.99), "d": score(0.9)}
    assert verdict.judgement(run(baselines={"pooled": None, "local": local})) == (
        "Against 4 sites alone: better than 1 (intervals apart); worse than 1 (intervals apart); "
        "no difference can be shown for 1 (intervals overlap); no comparison for 1 (an interval is missing)."
    )


@pytest.mark.parametrize(
    ("names", "interval", "said"),
    [
        ("a", (0.7, 0.8), "Against 1 site alone: better than it (intervals apart)."),
        ("abc", (0.7, 0.8), "Against 3 sites alone: better than each (intervals apart)."),
        ("abc", (0.9, 1.0), "Against 3 sites alone: no difference can be shown for any (intervals overlap)."),
    ],
)
def test_a_unanimous_comparison_reads_as_one(names: str, interval: tuple[float, float], said: str) -> None:
    local = {name: score(0.75, *interval) for name in names}
    assert verdict.judgement(run(baselines={"pooled": None, "local": local})) == said


def test_sites_of_one_label_are_no_fair_rivals() -> None:
    held = {"s1": {"a": 9, "b": 0}, "s2": {"a": 0, "b": 9}, "s3": {"a": 5, "b": 5}}
    sites = {name: {"rounds": 2, "labels": labels} for name, labels in held.items()}
    assert "2 of 3 sites hold images of one label only" in verdict.judgement(run(sites=sites))
    assert "one label only" not in verdict.judgement(run())


def test_a_model_no_better_than_chance_is_called_so() -> None:
    weak = run(test={"pooled": score(0.55, 0.42, 0.68), "sites": {}})
    assert verdict.judgement(weak).startswith("The interval reaches down to 0.5, which is chance")
    assert "chance" not in verdict.judgement(run())


def test_without_baselines_nothing_is_claimed() -> None:
    said = run(baselines=None)
    assert verdict.judgement(said) == "No baseline was measured, so nothing can be said about what federation gained."
    assert verdict.finding(said).endswith("on 200 test images of 3 sites.")


def test_a_complete_run_has_nothing_to_excuse() -> None:
    assert verdict.status(run()) == ""


def test_a_partial_run_says_what_is_missing() -> None:
    sites = {"s1": {"rounds": 2}, "s2": {"rounds": 1}, "s10": {"rounds": 2}}
    config = {"training": {"rounds": 10}}
    test = {"pooled": score(0.9), "sites": {"s1": score(0.9), "s2": score(0.9)}}
    said = verdict.status(run(status="completed_partial", sites=sites, config=config, test=test))
    assert said == (
        "This run is complete only in part. 1 of 3 sites did not contribute to every round: s2. "
        "1 of 3 sites gave no test figures: s10. It ran 2 of 10 planned rounds."
    )


@pytest.mark.parametrize(("error", "said"), [("no quorum.", "no quorum."), (None, "no reason was recorded.")])
def test_a_failed_run_says_why(error: str | None, said: str) -> None:
    assert verdict.status(run(status="failed", error=error)) == f"This run failed after 2 rounds: {said}"


@pytest.mark.parametrize(
    ("best", "init", "said"),
    [
        (1, "zero", "Round 1 of 2 was chosen on validation. Round 0, the start, is a head of zeros."),
        (0, "analytic", "no round of training did better on validation. It is a head solved in closed form"),
    ],
)
def test_the_choice_names_round_and_start(best: int, init: str, said: str) -> None:
    chosen = verdict.choice(run(best_round=best, config={"model": {"init": init}}))
    assert said in chosen
    assert chosen.endswith("the chosen model has AUC 0.900 and accuracy 0.750 (n\N{NO-BREAK SPACE}80).")


def test_a_closed_form_alone_has_no_rival() -> None:
    start = [{"round": 0, "validation": score(0.9), "sites": {}}]
    said = verdict.choice(run(rounds=start, best_round=0, config={"training": {"strategy": "analytic"}}))
    assert said.startswith("The start, round 0, was the only candidate. It is a head solved in closed form")
    assert verdict.choice(run(best_round=None)) == ""


def test_small_numbers_are_warned_of() -> None:
    test = {"pooled": {"support": {"a": 9, "b": 10}}, "sites": {"s1": score(0.9, n=18), "s2": score(0.9, n=60)}}
    assert dict(verdict.warnings(run(test=test))) == {
        "tiny_support": "Label “a” has 9 test images, fewer than 10: its figures say little.",
        "tiny_site_support": "1 of 2 sites had fewer than 10 test images of some label; "
        "the figures of these sites say little: s1.",
    }


def test_a_warning_of_the_run_comes_first_and_is_not_said_twice() -> None:
    given = [{"code": "tiny_support", "message": "Said once."}]
    said = verdict.warnings(run(warnings=given, test={"pooled": {"support": {"a": 1}}, "sites": {}}))
    assert said == [("tiny_support", "Said once.")]
