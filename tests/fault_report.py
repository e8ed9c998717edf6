"""The table of faults and outcomes, and which of its cells are played: hooks of pytest, for `conftest.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

SAMPLE = 10
"""Faults of a sample: some minutes."""

PLAYED = "test_fault_table"
COLUMNS = ("fault", "moment", "struck in", "outcome", "status", "model", "seconds")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption(
        "--faults", choices=("all", "sample"), default="all", help=f"sample: {SAMPLE} faults, each at one moment"
    )
    group.addoption("--fault-seed", type=int, default=0, help="draws a sample's moments, and the pauses before faults")
    group.addoption("--fault-table", type=Path, metavar="FILE", help="write the table of faults as Markdown")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults", "all") == "all":
        return
    cells = [item for item in items if PLAYED in item.nodeid]
    kept = {item.nodeid for item in sample(cells, int(config.getoption("--fault-seed")))}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def sample(items: Iterable[pytest.Item], seed: int, size: int = SAMPLE) -> list[pytest.Item]:
    """Return some faults, each at one moment, drawn by a seed; the same for the same seed."""
    moments: dict[str, list[pytest.Item]] = {}
    for item in items:
        called = getattr(item, "callspec", None)
        params = called.params if called is not None else {}
        if {"moment", "number"} & set(params):
            fault = params.get("name", params.get("kind"))
            moments.setdefault(f"{item.nodeid.partition('[')[0]} {fault}", []).append(item)
    draw = random.Random(seed)
    return [draw.choice(moments[name]) for name in draw.sample(sorted(moments), min(size, len(moments)))]


@pytest.fixture
def fault_seed(pytestconfig: pytest.Config) -> int:
    """Return the seed of the pauses before faults."""
    return int(pytestconfig.getoption("--fault-seed"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [
        _row(value, outcome)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in report.user_properties
        if name == "fault" and report.when == "call"
    ]
    failed = [
        (report.nodeid.partition("[")[2].rstrip("]"), "", "", "FAILED", "", "", "")
        for report in terminalreporter.stats.get("failed", [])
        if PLAYED in report.nodeid and "fault" not in dict(report.user_properties)
    ]
    if not rows and not failed:
        return
    text = table([*rows, *failed])
    terminalreporter.section("faults and outcomes")
    terminalreporter.write(text)
    place = config.getoption("--fault-table", None)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"# Faults and outcomes, seed {config.getoption('--fault-seed')}\n\n{text}", encoding="utf-8")


def _row(found: Mapping[str, Any], outcome: str) -> tuple[str, ...]:
    statuses = "; ".join(
        f"{site} {status}" for site, status in found["sites"].items() if "contributed, 3" not in status
    )
    status = found["status"] + (f" ({statuses})" if statuses else "")
    return (
        *(str(found[key]) for key in ("fault", "moment", "phase")),
        outcome,
        status,
        str(found["bytes"]),
        json.dumps(found["seconds"]),
    )


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows as Markdown, by fault."""
    lines = [" | ".join(row) for row in (COLUMNS, tuple("---" for _ in COLUMNS), *sorted(rows))]
    return "".join(f"| {line} |\n" for line in lines)
