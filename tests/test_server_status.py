from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from common import live
from common.files import write_atomic
from common.run_config import RunConfig
from server import founding, runs, status, status_view
from server.board import Board
from server.cli import server
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
    status_view.show(found, console)
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


def a_board(folder: Path, starts: int = 1) -> Board:
    """Return the board of a run that is in its third round of five, in which one site was lost."""
    for _ in range(starts):
        board = Board(folder, SITES, 5, 1)
    board.progress("rounds", 2, 5)
    board.moved("north", 2_000_000, 1_000)
    board.judged("north", "contributed", "", (0.5, 2.0))
    board.judged("south", "lost", "absent", None)
    for seconds in (10.0, 14.0):
        board.ended_round(seconds)
    board.chosen(2, 0.8125)
    board.progress("rounds", 2, 5)  # written at once
    return board


def test_a_run_in_figures(config: ServerConfig) -> None:
    a_board(folder := a_run(config), starts=2)
    run = status.status(config)["run"]
    assert (run["starts"], run["best"], run["round_seconds"]) == (2, {"round": 2, "score": 0.8125}, 12.0)
    assert run["quorum"] == {"needed": 1, "usable": 1, "sites": 2}
    assert 30 < run["eta_s"] <= 36 and run["begun"] <= run["since"] <= run["round_since"]
    north = status._site("north", {}, runs.runs(config)[0])
    south = status._site("south", {}, runs.runs(config)[0])
    assert (north["bytes_down"], north["epsilon"], north["epsilon_left"], north["code"]) == (2_000_000, 0.5, 1.5, "")
    assert north["seconds"] is not None and set(north["at"]) == {"at", "done", "total", "since"}
    assert south["code"] == "absent" and south["trouble"].startswith("lost: it is not connected; ask the hospital")
    assert folder.name in run["folder"]


def test_what_is_shown_of_a_run(config: ServerConfig) -> None:
    a_board(a_run(config), starts=2)
    (driven,) = runs.runs(config)
    node = NodeFacts("north", 1, "", "online", "2026-01-02T03:04:05.678+00:00", time.time() + 30)
    found = status.status(config)
    found["sites"] = {name: status._site(name, {"north": node}, driven) for name in SITES}
    console = Console(file=io.StringIO(), width=160)
    console.print(status_view.view(found))
    file: Any = console.file
    text = file.getvalue()
    assert "12 s a round; rounds end in about 3" in text and "1 of 2 sites usable, quorum 1" in text
    assert "best round 2 (0.8125); engine 2 of this run" in text
    assert re.search(r"north +connected .* 2.0 MB / 1.0 kB +2.0 MB / 1.0 kB +0.0 s +0.500 / 1.500 +0.0 s ago", text)
    assert "south lost: it is not connected" in text


def test_what_a_site_was_seen_to_do_stays_after_the_end(config: ServerConfig) -> None:
    board = a_board(a_run(config))
    board.end("failed", "why", {"north": "contributed", "south": "refused(policy)"})
    found = status.status(config)
    assert found["run"]["eta_s"] is None and found["run"]["quorum"]["usable"] == 1
    south = status._site("south", {}, runs.runs(config)[0])
    assert (south["code"], south["at"], south["bytes_down"]) == ("policy", None, 0)
    assert south["trouble"].startswith("refused: its own policy")


def test_a_board_of_an_earlier_version(config: ServerConfig) -> None:
    folder = a_run(config)
    Board(folder, SITES, 5).progress("rounds", 1, 5)
    facts = json.loads((folder / "progress.json").read_text())
    new = {"quorum", "begun", "phase_since", "round_since", "round_seconds", "best"}
    old = {key: value for key, value in facts.items() if key not in new}
    bare = {name: {key: held[key] for key in ("at", "done", "total", "since")} for name, held in facts["sites"].items()}
    (folder / "progress.json").write_text(json.dumps({**old, "sites": bare}))
    run = status.status(config)["run"]
    assert (run["eta_s"], run["quorum"], run["best"], run["begun"]) == (None, None, None, None)
    assert status._site("north", {}, runs.runs(config)[0])["bytes_down"] == 0
    assert "running, round 2 of 5 (rounds)" in shown(status.status(config))


def test_watching_prints_a_document_for_each_change(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    board = a_board(a_run(config))
    steps: list[Callable[[], object]] = [dict, dict, lambda: board.progress("test", 0, 2)]
    real, looks = status.status, iter(steps)

    def looked(asked: ServerConfig) -> dict[str, Any]:
        step = next(looks, None)
        if step is None:
            raise KeyboardInterrupt
        step()
        return real(asked)

    monkeypatch.setattr(status, "status", looked)
    monkeypatch.setattr(live, "PAUSE_S", 0.0)
    command = ["status", "--server", str(config.path), "--watch", "--json"]
    run = CliRunner().invoke(server, command, standalone_mode=False)
    assert run.return_value == 1  # the coordinator is not up
    assert [json.loads(line)["run"]["phase"] for line in run.stdout.splitlines()] == ["rounds", "test"]


@pytest.mark.slow
def test_a_site_that_is_connected(superlink: Any, links: Callable[..., Any], config: ServerConfig) -> None:
    link = links(superlink)
    with Control(superlink.endpoints) as control:
        control.register("north", link.public_key)
        link.activate()
        (node,) = control.nodes()
    found = status._site("north", {"north": node}, None)
    assert (found["connected"], found["state"]) == (True, "connected") and found["since"][:2] == "20"
