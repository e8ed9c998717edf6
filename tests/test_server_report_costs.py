"""Bytes and seconds add up, and what was not recorded is not called nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report import costs
from server.report.costs import Account
from server.report.reading import Run
from server.report.wording import GAP


def entry(number: int, moved: int = 0) -> dict[str, Any]:
    named = ("bytes_down", "bytes_up", "evaluation_bytes_down", "evaluation_bytes_up")
    return {"round": number, "seconds": float(number), **dict.fromkeys(named, moved)}


def run(**changes: Any) -> Run:
    result = {
        "trunk": {"bytes": 1_000_000, "transfers": {"a": 1, "b": 1}},
        "upper": {"parameters": 2820, "wire_dtype": "float32"},
        "rounds": [entry(0), entry(1, 1000), entry(2, 3000)],
        "traffic": {
            "statistics": {"bytes_down": 100, "bytes_up": 9900},
            "test": {"bytes_down": 4000, "bytes_up": 1000},
        },
        "seconds": {"total": 10.0, "features": 2.0, "rounds": 3.0, "baselines": 4.0},
    }
    return Run.of({**result, **changes})


def printed(account: Account) -> list[tuple[str, str, str]]:
    return [(part.name, part.text.replace(GAP, " "), part.share.replace(GAP, " ")) for part in account.parts]


def test_bytes_are_counted_by_purpose() -> None:
    account = costs.traffic(run())
    assert account.title.replace(GAP, " ") == "2.0 MB in all messages"
    assert printed(account)[:2] == [
        ("Trunk, once to each site", "2.0 MB", "98 %"),
        ("Weights, to the sites", "4.0 kB", "< 1 %"),
    ]
    assert printed(account)[-2:] == [
        ("Start: sums and first heads", "10.0 kB", "< 1 %"),
        ("Last validation and test", "5.0 kB", "< 1 %"),
    ]
    assert "A round moves 8.0 kB on average" in account.note.replace(GAP, " ")


def test_the_trunk_is_counted_for_each_transfer() -> None:
    account = costs.traffic(run(trunk={"bytes": 1_000_000, "transfers": {"a": 1, "b": 2}}))
    assert printed(account)[0][:2] == ("Trunk, 3 times to 2 sites", "3.0 MB")


@pytest.mark.parametrize("trunk", [None, {"bytes": None, "transfers": {"a": 1}}, {"bytes": 5, "transfers": {}}])
def test_bytes_that_were_not_recorded_are_a_dash(trunk: Any) -> None:
    account = costs.traffic(run(trunk=trunk, rounds=[], traffic={}))
    assert account.title == "Bytes were not recorded"
    assert {(text, share) for _, text, share in printed(account)} == {("–", "–")}


def test_what_the_phases_leave_of_the_total_is_shown() -> None:
    account = costs.time(run())
    assert account.title.replace(GAP, " ") == "10.0 s in all"
    assert printed(account)[-1] == ("Data, model, start and test", "1.0 s", "10 %")
    assert account.note.replace(GAP, " ") == "A round took 1.5 s on average."


def test_unknown_time_is_said() -> None:
    account = costs.time(run(seconds=None, rounds=[]))
    assert (account.title, account.note) == ("Time was not recorded", "")


@given(st.lists(st.floats(0, 1e6), min_size=4, max_size=4))
def test_the_parts_fill_the_bar(values: list[float]) -> None:
    seconds = {"total": sum(values), **dict(zip(("features", "rounds", "baselines"), values, strict=False))}
    parts = costs.time(run(seconds=seconds)).parts
    lengths = [float(part.length.rstrip("%")) for part in parts]
    assert sum(lengths) == pytest.approx(100 if any(lengths) else 0, abs=0.05)
    for place, part in enumerate(parts):
        assert float(part.start.rstrip("%")) == pytest.approx(sum(lengths[:place]), abs=0.05)
