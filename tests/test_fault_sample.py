from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fault_report import COLUMNS, SAMPLE, sample, table


def items() -> list[Any]:
    moments = ("setup", "round", "end")
    played = [
        SimpleNamespace(
            nodeid=f"t.py::test_x[{name}-{moment}]", callspec=SimpleNamespace(params={"name": name, "moment": moment})
        )
        for name in map(str, range(30))
        for moment in moments
    ]
    return [
        *played,
        SimpleNamespace(nodeid="t.py::test_y"),
        SimpleNamespace(nodeid="t.py::test_z[1]", callspec=SimpleNamespace(params={"n": 1})),
    ]


def test_a_sample_has_some_faults_each_at_one_moment_and_its_seed_decides() -> None:
    drawn = [[item.nodeid for item in sample(items(), seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for found in drawn:
        assert len({nodeid.partition("-")[0] for nodeid in found}) == SAMPLE == len(found)
        assert len({nodeid.rpartition("-")[2] for nodeid in found}) > 1
    assert len(sample(items(), 1, size=99)) == 30


def test_a_table_is_markdown_in_order() -> None:
    rows = [("b", *["1"] * 6), ("a", *["2"] * 6)]
    lines = table(rows).splitlines()
    assert lines[0] == f"| {' | '.join(COLUMNS)} |" and set(lines[1]) <= set("| -")
    assert [line[2] for line in lines[2:]] == ["a", "b"]


def test_every_cell_of_the_table_is_there(pytestconfig: pytest.Config) -> None:
    """At least 18 faults at three moments each, as the page for hospitals promises."""
    from tests import test_fault_table as played

    assert len(played.FAULTS) + len(played.POISON) >= 25 and len(played.MOMENTS) == 3
    assert Path(played.__file__).is_relative_to(pytestconfig.rootpath)
