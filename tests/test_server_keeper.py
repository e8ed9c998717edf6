from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConsiliumError
from common.run_config import RunConfig
from server import board, founding, keeper, runs
from server.board import Board
from server.keeper import Keeper
from server.server_config import ServerConfig, read_server

SITES = ("north", "south")


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return read_server(founding.found(tmp_path / "chest", "127.0.0.1:9443", "chest").config)


class World:
    """A coordinator whose engines are counted, and a clock that stands until it is turned."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.up = True
        self.now = 1e9
        self.started: list[str] = []
        self.refusal = ""
        self.keeper = Keeper(config, lambda: self.up, self.launch, lambda: self.now)

    def a_run(self, name: str = "one", status: str = board.INTERRUPTED, **facts: Any) -> Path:
        run = RunConfig.model_validate({"task": {"name": name, "labels": ("a", "b")}})
        folder = runs.make_folder(self.config, run, None)
        Board(folder, SITES, 9).end(status)
        self.tell(folder, **{"updated": self.now, **facts})
        return folder

    def tell(self, folder: Path, **facts: Any) -> None:
        held = dict(board.read(folder) or {})
        (folder / board.NAME).write_text(json.dumps({**held, **facts}))

    def launch(self, folder: Path) -> None:
        if self.refusal:
            raise ConsiliumError(self.refusal)
        self.started.append(folder.name)
        self.tell(folder, status="completed")

    def look(self, seconds: float = 0.0) -> int:
        """Let time pass, let the keeper look, and return how many engines have been started."""
        self.now += seconds
        self.keeper.look()
        return len(self.started)


@pytest.fixture
def world(config: ServerConfig) -> World:
    return World(config)


def test_an_interrupted_run_goes_on_at_once_and_others_are_left_alone(world: World) -> None:
    for status in ("stopped", "failed", "completed", "completed_partial"):
        world.a_run(status, status)
    assert world.look() == 0
    world.a_run("one")
    world.a_run("two")
    world.look()
    assert world.started == ["one-fedavg-1"], "one at a time, the oldest first"
    world.look()
    assert world.started == ["one-fedavg-1", "two-fedavg-1"]


def test_nothing_is_started_beside_an_engine_or_without_a_superlink(world: World) -> None:
    world.up = False
    world.a_run()
    assert world.look() == 0
    world.up = True
    Board(runs.make_folder(world.config, RunConfig(), None), SITES, 9)  # this process drives it
    assert world.look() == 0


def test_the_pauses_grow_while_no_round_comes_of_it(world: World) -> None:
    folder = world.a_run(fruitless=3)
    assert world.look() == 0 and world.look(7.9) == 0
    assert world.look(0.2) == 1
    world.tell(folder, status=board.INTERRUPTED, fruitless=0)
    assert world.look() == 2, "a round has come of it"
    world.tell(folder, status=board.INTERRUPTED, fruitless=100, error="the disk is full")
    assert world.look() == 2 and world.look(keeper.LONGEST_PAUSE_S) == 3


def test_an_engine_that_always_dies_is_given_up(world: World) -> None:
    folder = world.a_run(fruitless=keeper.MOST_DEATHS)
    assert world.look(1e6 - 1) == 0
    world.tell(folder, updated=world.now)
    assert world.look() == 0
    facts = board.read(folder)
    assert facts is not None and facts["status"] == "failed"
    assert facts["error"] == f"its engine ended without a word 5 times in a row; see {folder / 'engine.log'}"


def test_trouble_that_is_told_is_waited_for_a_day(world: World) -> None:
    folder = world.a_run(fruitless=keeper.MOST_DEATHS, error="the disk is full")
    world.look()
    assert world.look(keeper.LONGEST_PAUSE_S) == 1
    world.tell(folder, status=board.INTERRUPTED, fruitless=keeper.MOST_TROUBLES, error="the disk is full")
    world.look()
    assert (board.read(folder) or {})["error"] == "the disk is full" and len(world.started) == 1
    assert (board.read(folder) or {})["status"] == "failed"


def test_an_engine_that_does_not_get_as_far_as_its_board_is_given_up_too(world: World) -> None:
    folder = world.a_run()
    world.refusal = "another version wrote it"
    for _ in range(keeper.MOST_DEATHS):
        assert world.look(keeper.LONGEST_PAUSE_S) == 0
    assert (board.read(folder) or {})["status"] == board.INTERRUPTED
    world.look()
    assert (board.read(folder) or {})["status"] == "failed"


def test_a_full_disk_is_waited_for_and_is_no_failure_of_the_engine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.a_run()

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "write_atomic", no_room)
        for _ in range(3 * keeper.MOST_DEATHS):
            assert world.look(keeper.ROOM_PAUSE_S) == 0
    assert world.look(keeper.ROOM_PAUSE_S) == 1
    assert not (folder / ".room").exists()


def test_a_run_of_long_ago_is_the_operators_business(world: World) -> None:
    world.a_run()
    assert world.look(keeper.LONG_AGO_S + 1) == 0


def test_who_listens_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert keeper._listens(port)
    assert not keeper._listens(port)


def test_a_stop_ends_what_would_go_on_by_itself(world: World) -> None:
    folder = world.a_run()
    found = runs.stop_latest(world.config)
    assert found is not None and found.folder == folder
    facts = board.read(folder)
    assert facts is not None and (facts["status"], facts["error"]) == ("stopped", runs.STOPPED)
    assert runs.stop_latest(world.config) is None
    assert world.look() == 0


def test_a_board_counts_engines_until_a_round_comes_of_one(tmp_path: Path) -> None:
    for number in range(3):
        Board(tmp_path, SITES, 9).end(board.INTERRUPTED)
        facts = board.read(tmp_path)
        assert facts is not None and (facts["starts"], facts["fruitless"]) == (number + 1, number)
    made = Board(tmp_path, SITES, 9)
    made.progress("rounds", 0, 9)
    assert (board.read(tmp_path) or {})["fruitless"] == 3
    made.progress("rounds", 1, 9)
    assert (board.read(tmp_path) or {})["fruitless"] == 0
    made.end(board.INTERRUPTED)
    again = Board(tmp_path, SITES, 9)
    again.progress("rounds", 1, 9)
    assert (board.read(tmp_path) or {})["fruitless"] == 1, "the same round"
