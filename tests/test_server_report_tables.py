"""Every cell of the tables is the result's, in order, with a reason where it is a dash."""

from __future__ import annotations

from typing import Any

import pytest

from server.report import tables
from server.report.reading import Run
from server.report.wording import GAP


def score(auc: float | None, *interval: float) -> dict[str, Any]:
    return {"examples": 50, "support": {"a": 20, "b": 30}, "auc": auc, "auc_ci95": list(interval) or None}


def run(**changes: Any) -> Run:
    result = {
        "config": {"task": {"name": "t", "labels": ["a", "b"]}},
        "sites": {
            "s10": {"examples": {"train": 30, "validation": 5, "test": 5}, "labels": {"a": 10, "b": 30}, "rounds": 2},
            "s2": {"examples": None, "labels": None, "rounds": None},
        },
        "test": {"pooled": score(0.96, 0.95, 0.97), "sites": {"s10": score(0.9), "s2": score(None)}},
        "baselines": {"pooled": None, "local": {"s10": score(0.912, 0.90, 0.92), "s2": None}},
    }
    return Run.of({**result, **changes})


def test_tiles_carry_the_interval_and_the_pooled_figure() -> None:
    both = run(baselines={"pooled": score(0.97)})
    auc = tables.tiles(both)[0]
    assert (auc.figure.text, auc.other) == ("0.960", "all data pooled 0.970")
    assert auc.below.replace(GAP, " ") == "95 % interval 0.950 to 0.970"
    assert tables.tiles(run())[3].below == "of label “b”"
    assert tables.tiles(run(test=None)) == []


def test_the_operating_point_is_shown_where_there_is_one() -> None:
    assert tables.operating_point(run()) == []
    point = {"threshold": 0.4, "precision": None, "recall": 0.9, "specificity": 0.8}
    shown = tables.operating_point(run(test={"pooled": {**score(0.9), "operating_point": point}}))
    assert [(name, figure.text) for name, figure in shown] == [
        ("Threshold", "0.400"),
        ("Precision", "–"),
        ("Recall", "0.900"),
        ("Specificity", "0.800"),
    ]


def test_the_start_has_no_time_and_no_bytes_of_its_own() -> None:
    moved = {"bytes_down": 0, "bytes_up": 0, "evaluation_bytes_down": 0, "evaluation_bytes_up": 0}
    start, first = tables.rounds(run(rounds=[{"round": k, "seconds": 0.0, **moved} for k in range(2)]))
    assert (start.seconds, start.bytes) == ("–", "–")
    assert (first.seconds.replace(GAP, " "), first.bytes.replace(GAP, " ")) == ("0 ms", "0 B")


def test_sites_stand_in_natural_order_with_their_figures() -> None:
    s2, s10 = tables.sites(run())
    assert (s2.name, s10.name) == ("s2", "s10")
    assert [text for _, text in s10.examples] == ["30", "5", "5"]
    assert [text for _, text in s2.examples] == ["–", "–", "–"]
    assert s10.mix == [("0.00%", "25.00%", 0), ("25.00%", "75.00%", 1)]
    assert (s2.mix, s2.rounds, s2.status) == ([], "–", "–")


@pytest.mark.parametrize(
    ("alone", "text", "why", "tone"),
    [
        (score(0.912, 0.90, 0.92), "+0.048", "the intervals lie apart", "up"),
        (score(0.985, 0.98, 0.99), "−0.025", "the intervals lie apart", "down"),
        (score(0.97, 0.94, 0.99), "−0.010", "the intervals overlap: no difference can be shown", ""),
        (score(0.9602, 0.94, 0.99), "0.000", "the intervals overlap: no difference can be shown", ""),
        (score(0.9), "+0.060", "no interval to compare", ""),
        (score(None), "–", "undefined", ""),
        (None, "–", "not measured", ""),
    ],
)
def test_gain_is_the_difference_on_the_same_images(alone: Any, text: str, why: str, tone: str) -> None:
    row = tables.sites(run(baselines={"pooled": None, "local": {"s10": alone}}))[1]
    assert (row.gain.text, row.gain.why, row.tone) == (text, why, tone)


def test_missed_rounds_are_named_with_their_reason() -> None:
    reasons = {1: "deadline", 2: None, 3: "deadline", 4: "unreachable"}
    rounds = [{"round": k, "sites": {"s10": {"reason": reason}}} for k, reason in reasons.items()]
    s2, s10 = tables.sites(run(rounds=rounds))
    assert s10.reasons == "deadline (rounds 1, 3); unreachable (round 4)"
    assert s2.reasons == ""


def test_each_label_has_its_own_figures() -> None:
    per_class = {"a": {"auc": 0.9, "recall": None}, "b": None}
    a, b = tables.labels(run(test={"pooled": {**score(0.9), "per_class": per_class}}))
    assert (a.name, a.n, a.figures[0].text, a.figures[2].text) == ("a", "20", "0.900", "–")
    assert {figure.text for figure in b.figures} == {"–"}
    assert tables.labels(run(test=None)) == []


def test_images_left_out_are_counted_by_reason() -> None:
    shown = tables.left_out(run(quarantine={"no_label": 12, "decode_failed": 3}, dropped={"duplicate": 4}))
    assert shown == [
        ("quarantined", "decode_failed", "3"),
        ("quarantined", "no_label", "12"),
        ("dropped", "duplicate", "4"),
    ]


def test_the_configuration_is_shown_in_full() -> None:
    config = {
        "training": {"lr": 0.003, "local_steps": None, "deterministic": True},
        "privacy": {},
        "simulation": {"faults": [], "options": {"nested": {"depth": 2}}},
        "seed": 0,
    }
    assert tables.configuration(run(config=config, software={"torch": "2.6", "flwr": None})) == [
        ("run", [("seed", "0")]),
        ("training", [("lr", "0.003"), ("local_steps", "–"), ("deterministic", "true")]),
        ("simulation", [("faults", "–"), ("options.nested.depth", "2")]),
        ("software", [("torch", "2.6"), ("flwr", "–")]),
    ]
