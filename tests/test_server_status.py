from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.files import write_atomic
from common.run_config import RunConfig
from server import founding, runs, status
from server.board import Board
from server.control import Control, NodeFacts
from server.server_config import ServerConfig, read_server

SITES = ("north", "south")
KEYS = {"schema", "name", "address", "up", "certificate", "sites", "run", "runs", "warnings"}


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    made = founding.found(tmp_path / "chest", "127.0.0.1:9443", "chest")
    made.config.write_text(made.config.read_text().replace("operator_port = 9444", "operator_port = 1"))
    return read_server(made.config)


def a_run(config: ServerConfig, seed: int = 0) -> Path:
    values = {"task": {"name": "blobs", "labels": ("a", "b")}, "seed": seed}
    return runs.make_folder(config, RunConfig.model_validate(values), None)


def shown(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=60)
    status.show(found, console)
    file: Any = console.file
    return str(file.getvalue())


def test_nothing_is_there_yet(config: ServerConfig) -> None:
    found = status.status(config)
    assert set(found) == KEYS and json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["up"], found["sites"], found["run"], found["runs"]) == (False, {}, None, [])
    assert found["warnings"] == [
        f"the coordinator is not up; start it with `consilium server up --server {config.path}`"
    ]
    text = shown(found)
    assert "coordinator chest at 127.0.0.1:9443: not up; certificate good for " in text
    assert "no run yet\nno site is enrolled; invite one with `consilium server invite NAME`\nwarning: " in text


def test_a_run_that_is_driven_goes_before_the_latest(config: ServerConfig) -> None:
    folders = [a_run(config, seed) for seed in range(2)]
    driven = Board(folders[0], SITES, 5)
    driven.progress("rounds", 2, 5)
    Board(folders[1], SITES, 5).end("failed", "why")
    found = status.status(config)
    run = found["run"]
    assert [one["status"] for one in found["runs"]] == ["running", "failed"]
    assert {key: run[key] for key in ("folder", "status", "phase", "round", "rounds", "done", "total", "error")} == {
        "folder": str(folders[0]),
        "status": "running",
        "phase": "rounds",
        "round": 3,
        "rounds": 5,
        "done": 2,
        "total": 5,
        "error": "",
    }
    assert run["pid"] and len(run["fingerprint"]) == 64
    assert f"run {folders[0]}: running, round 3 of 5 (rounds)" in shown(found)


def test_a_run_without_a_board_has_the_same_keys(config: ServerConfig) -> None:
    Board(a_run(config, 0), SITES, 5).end("failed", "why")
    whole = status.status(config)["run"]
    a_run(config, 1)
    bare = status.status(config)["run"]
    assert whole.keys() == bare.keys()
    assert (bare["status"], bare["pid"], bare["error"]) == ("new", None, "")


def test_an_engine_that_is_gone_is_a_warning(config: ServerConfig) -> None:
    folder = a_run(config)
    Board(folder, SITES, 5)
    facts = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**facts, "process": "1"}))
    found = status.status(config)
    assert found["run"]["status"] == "interrupted"
    assert f"{folder}: its engine is gone; go on with `consilium server resume`" in found["warnings"]


def test_a_site_is_what_superlink_and_board_say(config: ServerConfig) -> None:
    now = time.time()
    online = NodeFacts("north", 1, "", "online", "2026-01-02T03:04:05.678+00:00", now + 30)
    late = NodeFacts("north", 1, "", "online", "2026-01-02T03:04:05.678+00:00", now - 1)
    never = NodeFacts("north", 1, "", "registered", "", 0.0)
    states = [
        status._site("north", {} if node is None else {"north": node}, None) for node in (online, late, never, None)
    ]
    assert [one["state"] for one in states] == ["connected", "not connected", "never seen", "never seen"]
    assert [one["connected"] for one in states] == [True, False, False, False]
    folder = a_run(config)
    board = Board(folder, SITES, 5)
    board.site("north", "features", 3, 9)
    board.progress("prepare", 0, 2)
    (driven,) = runs.runs(config)
    at = status._site("north", {"north": online}, driven)
    assert (at["at"]["at"], at["at"]["done"], at["at"]["total"], at["trouble"]) == ("features", 3, 9, "")
    board.end("failed", "why", {"north": "refused(policy)", "south": "contributed"})
    (over,) = runs.runs(config)
    refused = status._site("north", {"north": online}, over)
    assert refused["at"] is None and refused["trouble"].startswith("refused: its own policy does not allow the run; ")
    assert status._site("south", {}, over)["trouble"] == ""
    found = {**status.status(config), "sites": {"north": at | {"trouble": refused["trouble"]}}}
    text = shown(found)
    assert "2026-01-02 03:04:05 UTC" in text and "features 3/9" in text
    assert "north refused: its own policy does not allow the run; its log says which limit" in text


@pytest.mark.parametrize("name", ["sites.json", "runs.json", "server.pem", "operator.secret"])
def test_a_damaged_file_hides_nothing_else(config: ServerConfig, name: str) -> None:
    a_run(config)
    write_atomic(config.state / name, b"{", mode=0o600)
    found = status.status(config)
    assert set(found) == KEYS
    assert any(name in warning for warning in found["warnings"])
    assert all("\n" not in warning for warning in found["warnings"])
    assert (found["run"] is None) == (name == "runs.json")
    assert (found["certificate"] is None) == (name == "server.pem")


@pytest.mark.slow
def test_a_site_that_is_connected(superlink: Any, links: Callable[..., Any], config: ServerConfig) -> None:
    link = links(superlink)
    with Control(superlink.endpoints) as control:
        control.register("north", link.public_key)
        link.activate()
        (node,) = control.nodes()
    found = status._site("north", {"north": node}, None)
    assert (found["connected"], found["state"]) == (True, "connected") and found["since"][:2] == "20"
