from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import board
from server.board import Board

SITES = ("north", "south")


def shown(folder: Path) -> dict[str, Any]:
    found = board.read(folder)
    assert found is not None
    return dict(found)


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    made = Board(tmp_path, SITES, 3)
    first = shown(tmp_path)
    assert (first["status"], first["phase"], first["rounds"], first["pid"]) == ("running", "starting", 3, os.getpid())
    assert first["process"] == board.process_start(os.getpid()) != ""
    made.progress("rounds", 1, 3)
    assert [shown(tmp_path)[key] for key in ("phase", "round", "done", "total")] == ["rounds", 2, 1, 3]
    made.progress("rounds", 3, 3)
    assert shown(tmp_path)["round"] == 3
    made.site("south", "training", 4, 9)
    made.site("stranger", "training", 4, 9)
    made.progress("test", 0, 2)
    found = shown(tmp_path)["sites"]
    assert set(found) == set(SITES)
    assert {key: found["south"][key] for key in ("at", "done", "total")} == {"at": "training", "done": 4, "total": 9}
    made.end("failed", "why", {"north": "refused(policy)"})
    last = shown(tmp_path)
    assert (last["status"], last["error"], last["phase"]) == ("failed", "why", "ended")
    assert last["sites"]["north"]["ended"] == "refused(policy)"


def test_what_changes_often_is_written_now_and_then(tmp_path: Path) -> None:
    made = Board(tmp_path, SITES, 1)
    made.progress("statistics", 0, 2)
    before = (tmp_path / board.NAME).stat().st_ino
    for done in range(50):
        made.site("north", "features", done, 50)
    assert (tmp_path / board.NAME).stat().st_ino == before
    made.progress("freeze", 0, 2)  # another phase is told at once, with all that came before
    assert shown(tmp_path)["sites"]["north"]["done"] == 49


def test_an_engine_that_is_gone_without_a_word_was_interrupted(tmp_path: Path) -> None:
    Board(tmp_path, SITES, 1)
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    facts = {**shown(tmp_path), "pid": ended.pid, "process": board.process_start(ended.pid) or "1"}
    ended.wait()
    (tmp_path / board.NAME).write_text(json.dumps(facts))
    assert shown(tmp_path)["status"] == "interrupted"


def test_a_number_that_another_process_has_now_is_not_the_engines(tmp_path: Path) -> None:
    Board(tmp_path, SITES, 1)
    facts = shown(tmp_path)
    (tmp_path / board.NAME).write_text(json.dumps({**facts, "process": str(int(facts["process"]) - 1)}))
    assert shown(tmp_path)["status"] == "interrupted"
    (tmp_path / board.NAME).write_text(json.dumps({**facts, "status": "completed", "process": "1"}))
    assert shown(tmp_path)["status"] == "completed"  # an end stands, whoever has the number


def test_a_process_that_was_not_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert board.process_start(child.pid) == ""
    child.wait()


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b'{"status": "running"}', b"\xff", b'"x"', b"{"])
def test_what_somebody_edited_is_no_board(tmp_path: Path, content: bytes) -> None:
    (tmp_path / board.NAME).write_bytes(content)
    assert board.read(tmp_path) is None


@given(key=st.sampled_from(sorted(board._KINDS)), value=st.sampled_from([None, [], "x", {"a": 1}]))
def test_a_value_of_another_kind_ends_nobody(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    folder = tmp_path_factory.mktemp("run")
    Board(folder, SITES, 1)
    (folder / board.NAME).write_text(json.dumps({**shown(folder), key: value}))
    found = board.read(folder)
    assert found is None or isinstance(value, str | dict)


def test_no_board_yet(tmp_path: Path) -> None:
    assert board.read(tmp_path) is None
    assert board.read(tmp_path / "gone") is None


def test_a_site_that_has_answered_is_asked_in_the_next_round(tmp_path: Path) -> None:
    made = Board(tmp_path, SITES, 3)
    made.progress("rounds", 0, 3)
    made.site("north", "answered", 0, 0)
    made.site("south", "not connected", 0, 0)
    before = shown(tmp_path)
    made.progress("rounds", 1, 3)
    after = shown(tmp_path)["sites"]
    assert (after["north"]["at"], after["south"]["at"]) == ("asked", "not connected")
    assert after["north"]["since"] >= before["sites"]["north"]["since"]


def test_a_round_that_is_told_twice_is_one(tmp_path: Path) -> None:
    made = Board(tmp_path, SITES, 3)
    made.progress("rounds", 0, 3)
    made.moved("north", 5, 7)
    made.progress("rounds", 0, 3)
    found = shown(tmp_path)
    assert found["sites"]["north"]["round_bytes_up"] == 7 and found["round_since"] is not None
    made.progress("rounds", 3, 3)
    assert shown(tmp_path)["round_since"] is None
