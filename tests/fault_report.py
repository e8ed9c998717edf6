"""The table of faults and outcomes, and which of its cells are played: hooks of pytest, for `conftest.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

COLUMNS = ("fault", "moment", "struck in", "outcome", "status", "model", "seconds")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults", choices=("all", "sample"), default="all", help="sample: one moment of each fault")
    group.addoption("--fault-seed", type=int, default=0, help="draws a sample's moments, and the pauses before faults")
    group.addoption("--fault-table", type=Path, metavar="FILE", help="write the table of faults as Markdown")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults", "all") == "all":
        return
    kept = {item.nodeid for item in sample(items, int(config.getoption("--fault-seed")))}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def sample(items: Iterable[pytest.Item], seed: int) -> Iterator[pytest.Item]:
    """Yield one moment of each fault, and every test that has no moments."""
    moments: dict[str, list[pytest.Item]] = {}
    for item in items:
        called = getattr(item, "callspec", None)
        params = called.params if called is not None else {}
        fault = params.get("name", params.get("kind"))
        if fault is None or not {"moment", "number"} & set(params):
            yield item
        else:
            moments.setdefault(f"{item.nodeid.partition('[')[0]} {fault}", []).append(item)
    for name, found in moments.items():
        yield random.Random(f"{seed} {name}").choice(found)


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
        if "test_fault_table" in report.nodeid and "fault" not in dict(report.user_properties)
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
