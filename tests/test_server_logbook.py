"""What an engine writes down of a run: the board and the events say the same, also over several engines."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import rotated
from common.run_config import RunConfig
from server import board, logbook
from server.events import NAME
from server.federation import Traffic
from server.logbook import Logbook
from server.runs import LOG
from server.spending import Spent

SITES = ("north", "south")
PLAN = RunConfig.model_validate({"sites": {"names": SITES, "quorum": 1}, "training": {"rounds": 3}})
SPENT = Spent("patient", 1e-5, 2.0, 0.5, 1.0, 0.1, 100, 25)
ENTRY: dict[str, Any] = {
    "round": 1,
    "seconds": 4.0,
    "bytes_down": 10,
    "bytes_up": 20,
    "evaluation_bytes_down": 1,
    "evaluation_bytes_up": 2,
    "sites": {"north": {"status": "contributed"}, "south": {"status": "lost", "reason": "absent"}},
    "validation": {"auc": 0.75, "examples": 8, "per_class": {"a": {}}},
}


def events(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / NAME).read_bytes().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("schema", "time")} for line in found]


def shown(folder: Path) -> dict[str, Any]:
    time.sleep(board.LEAST_S)
    found = board.read(folder)
    assert found is not None
    return dict(found)


def a_round(book: Logbook) -> None:
    book.progress("rounds", 0, 3)
    book.moved("north", Traffic(100, 50, 4, 2))
    book.judged("north", "contributed", SPENT)
    book.moved("south", Traffic(100))
    book.judged("south", "lost(absent)", None)
    book.ended_round(ENTRY)
    book.kept(1)


def test_a_round_is_told_in_order(tmp_path: Path) -> None:
    book = Logbook(tmp_path, PLAN)
    for at in ("awaited", "connected", "connected", "training", "not connected", "unreachable", "answered"):
        book.site("north", at, 0, 0)
    a_round(book)
    book.progress("rounds", 1, 3)
    book.judged_round(ENTRY, 1, 0.75)
    book.end("failed", "why", {"south": "lost(absent)"})
    assert events(tmp_path) == [
        {"event": "run_started", "round": 0, "sites": list(SITES), "rounds": 3, "quorum": 1},
        {"event": "site_connected", "round": 0, "site": "north"},
        {"event": "site_away", "round": 0, "site": "north"},
        {"event": "site_connected", "round": 0, "site": "north"},
        {"event": "phase", "round": 0, "phase": "rounds"},
        {"event": "round_started", "round": 1},
        {"event": "site_contributed", "round": 1, "site": "north", "epsilon": 0.5, "planned_epsilon": 2.0},
        {"event": "site_lost", "round": 1, "site": "south", "code": "absent"},
        {
            "event": "round_ended",
            "round": 1,
            "seconds": 4.0,
            "contributed": ["north"],
            **{key: value for key, value in ENTRY.items() if "bytes" in key},
        },
        {"event": "checkpoint", "round": 1},
        {"event": "round_started", "round": 2},
        {
            "event": "round_judged",
            "round": 1,
            "figures": {"auc": 0.75, "examples": 8},
            "best_round": 1,
            "best_score": 0.75,
        },
        {"event": "run_ended", "round": 2, "status": "failed"},
    ]


def test_the_board_counts_what_moved_and_what_was_spent(tmp_path: Path) -> None:
    book = Logbook(tmp_path, PLAN)
    a_round(book)
    book.progress("rounds", 1, 3)
    book.moved("north", Traffic(7, 3))
    book.progress("test", 0, 2)
    found = shown(tmp_path)
    north, south = found["sites"]["north"], found["sites"]["south"]
    assert [north[key] for key in ("bytes_down", "bytes_up", "round_bytes_down", "round_bytes_up")] == [111, 55, 7, 3]
    assert (north["status"], north["code"], north["epsilon"], north["epsilon_left"]) == ("contributed", "", 0.5, 1.5)
    assert 0 <= north["seconds"] < 5
    assert (south["status"], south["code"], south["seconds"], south["bytes_down"]) == ("lost", "absent", None, 100)
    assert (found["quorum"], found["round_seconds"], found["starts"]) == (1, [4.0], 1)


def test_the_next_engine_goes_on_counting(tmp_path: Path) -> None:
    first = Logbook(tmp_path, PLAN)
    a_round(first)
    first.judged_round(ENTRY, 1, 0.75)
    first.end("stopped", "why")
    begun = shown(tmp_path)["begun"]
    second = Logbook(tmp_path, PLAN)
    second.moved("north", Traffic(1, 1))
    second.progress("prepare", 0, 2)
    found = shown(tmp_path)
    assert (found["starts"], found["begun"], found["best"]) == (2, begun, {"round": 1, "score": 0.75})
    assert found["sites"]["north"]["bytes_down"] == 105 and found["sites"]["north"]["epsilon"] == 0.5
    assert found["sites"]["south"]["code"] == ""  # what the last engine saw of it
    resumed = next(line for line in events(tmp_path) if line["event"] == "run_resumed")
    assert resumed["starts"] == 2


def test_every_status_of_a_site_is_an_event(tmp_path: Path) -> None:
    book = Logbook(tmp_path, PLAN)
    for status in ("registered", "contributed", "lost(deadline)", "refused(policy)", "quarantined(bad_statistics)"):
        book.judged("north", status, replace(SPENT, planned=0.25))
    assert [line["event"] for line in events(tmp_path)[1:]] == [
        "site_registered",
        "site_contributed",
        "site_lost",
        "site_refused",
        "site_quarantined",
    ]


@pytest.mark.parametrize("value", ["x", [], {"round": "x"}, -1, None])
@pytest.mark.parametrize("key", ["best", "begun", "round_seconds", "starts", "quorum"])
def test_a_board_that_somebody_edited_is_gone_on_with(key: str, value: Any, tmp_path: Path) -> None:
    Logbook(tmp_path, PLAN).end("failed")
    facts = json.loads((tmp_path / board.NAME).read_text())
    facts["sites"]["north"] = {"bytes_down": value, "seen": value, "epsilon": value}
    (tmp_path / board.NAME).write_text(json.dumps({**facts, key: value}))
    book = Logbook(tmp_path, PLAN)
    book.moved("north", Traffic(1))
    a_round(book)
    book.end("completed")
    assert shown(tmp_path)["status"] == "completed"


def test_what_the_engine_prints_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "LOOK_S", 0.0)
    book = Logbook(tmp_path, PLAN)
    with (tmp_path / LOG).open("ab", buffering=0) as printed:  # as `server.runs` opens it for the engine
        for number in range(4):
            printed.write(b"%d\n" % number * (rotated.LIMIT // 3))
            book.site("north", "training", 0, 0)
        assert (tmp_path / LOG).stat().st_size < rotated.LIMIT
    kept = (tmp_path / f"{LOG}.1").read_bytes()
    assert rotated.LIMIT <= len(kept) < 2 * rotated.LIMIT and not kept.startswith(b"\0")
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG, f"{LOG}.1", NAME, board.NAME]


def test_what_a_killed_engine_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    torn = [tmp_path / ".progress.json.ab_12cde", tmp_path / "state" / ".round-000003.safetensors.x9x9x9x9"]
    other = [tmp_path / "run.toml", tmp_path / ".note", tmp_path / "state" / "round-000002.safetensors"]
    for path in (*torn, *other):
        path.write_bytes(b"x")
    Logbook(tmp_path, PLAN)
    assert not any(path.exists() for path in torn) and all(path.exists() for path in other)
