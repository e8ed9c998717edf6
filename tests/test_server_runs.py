from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import ConfigError, ConsiliumError, UsageError
from common.files import write_atomic
from common.run_config import RunConfig
from server import board, founding, runs
from server.board import Board
from server.server_config import ServerConfig, read_server

SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def keys() -> list[str]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form).decode() for _ in SITES]


@pytest.fixture
def config(tmp_path: Path, keys: list[str]) -> ServerConfig:
    made = founding.found(tmp_path / "chest", "127.0.0.1:9443", "chest")
    found = read_server(made.config)
    sites = [
        {"name": name, "public_key": key, "enrolled_at": "2026-01-02T03:04:05Z"}
        for name, key in zip(SITES, keys, strict=True)
    ]
    write_atomic(found.sites, json.dumps({"version": 1, "sites": sites}).encode(), mode=0o600)
    return found


def a_run(seed: int = 0, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"task": {"name": "blobs", "labels": ("a", "b")}, "seed": seed, **sections})


def planned(config: ServerConfig, folder: Path, **sections: Any) -> RunConfig:
    path = folder / "plan.toml"
    path.write_text(tomli_w.dumps({"task": {"labels": ["a", "b"]}, **sections}))
    return runs.plan_of(path, config)[0]


def ended(folder: Path, status: str) -> None:
    Board(folder, SITES, 1).end(status)


def names(found: list[runs.RunFacts]) -> list[str]:
    return [run.folder.name for run in found]


def inside(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Plans


def test_every_enrolled_site_takes_part_unless_named(config: ServerConfig, tmp_path: Path) -> None:
    assert planned(config, tmp_path).sites.names == SITES
    assert planned(config, tmp_path, sites={"names": ["west", "north"], "quorum": 1}).sites.names == ("west", "north")


def test_a_run_that_was_simulated_is_a_draft(config: ServerConfig, tmp_path: Path) -> None:
    assert planned(config, tmp_path, simulation={"dataset": "phantoms", "sites": 5}).simulation is None


def test_one_label_is_enough_where_an_image_has_several(config: ServerConfig, tmp_path: Path) -> None:
    assert planned(config, tmp_path, task={"labels": ["a"], "kind": "multi-label"}).task.labels == ("a",)
    with pytest.raises(ConfigError, match=r"\[task\] labels: got \['a'\]"):
        planned(config, tmp_path, task={"labels": ["a"]})


# Folders


def test_folders_are_numbered(config: ServerConfig) -> None:
    folders = [runs.make_folder(config, a_run(seed), None) for seed in range(3)]
    assert [folder.name for folder in folders] == ["blobs-fedavg-1", "blobs-fedavg-2", "blobs-fedavg-3"]
    assert all(folder.parent == config.runs and folder.stat().st_mode & 0o777 == 0o755 for folder in folders)
    assert runs.read_plan(folders[2]) == a_run(2)
    assert names(runs.runs(config)) == [folder.name for folder in folders]
    unnamed = a_run().model_copy(update={"task": a_run().task.model_copy(update={"name": ""})})
    assert runs.make_folder(config, unnamed, None).name == "run-fedavg-1"


def test_a_folder_elsewhere_is_remembered(config: ServerConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "far" / "away", tmp_path / "empty"):
        assert runs.make_folder(config, a_run(), folder) == folder
        assert runs.named(config, folder, resumable=True).folder == folder


def test_a_folder_in_use_stays_as_it_is(config: ServerConfig, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("x")
    (tmp_path / "link").symlink_to("used")
    (tmp_path / "file").write_text("x")
    before = inside(tmp_path)
    for name, message in (
        ("used", "in use"),
        ("link", "in use"),
        ("file", "Not a directory"),
        ("file/x", "no run can"),
    ):
        with pytest.raises(UsageError, match=message):
            runs.make_folder(config, a_run(), tmp_path / name)
    assert inside(tmp_path) == before


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_folder_is_made_whole_or_not_at_all(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = inside(tmp_path)
    if step == "write":
        monkeypatch.setattr(runs, "write_atomic", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UsageError, match="no run can be made there"):
        runs.make_folder(config, a_run(), None)
    assert inside(tmp_path) == before


def test_a_damaged_list_is_told_before_anything_is_made(config: ServerConfig) -> None:
    (config.state / runs.LIST).write_text("{")
    with pytest.raises(ConsiliumError, match=r"runs\.json: damaged"):
        runs.make_folder(config, a_run(), None)
    assert inside(config.runs) == []


# Which runs there are


def test_runs_are_found_without_their_list(config: ServerConfig) -> None:
    first, second = runs.make_folder(config, a_run(1), None), runs.make_folder(config, a_run(2), None)
    os.utime(first / runs.RUN, (1, 1))
    (config.state / runs.LIST).unlink()
    half_made = config.runs / ".blobs-fedavg-3-x"
    half_made.mkdir()
    (half_made / runs.RUN).write_text("")
    assert [run.folder for run in runs.runs(config)] == [first, second]


def test_a_run_that_was_deleted_is_forgotten_and_one_that_is_damaged_is_not(config: ServerConfig) -> None:
    gone, damaged, whole = (runs.make_folder(config, a_run(seed), None) for seed in range(3))
    (gone / runs.RUN).unlink()
    (damaged / runs.RUN).write_bytes(b"\xff")
    found = runs.runs(config)
    assert [run.folder for run in found] == [damaged, whole]
    assert [run.fingerprint for run in found] == ["", a_run(2).fingerprint()]
    assert [run.status for run in found] == ["new", "new"]
    assert runs.ended_runs(config, "") == (a_run(2).fingerprint(),)
    with pytest.raises(ConfigError, match=r"run\.toml: cannot be read \(not UTF-8 text\)"):
        runs.read_plan(damaged)


def test_the_active_run_is_the_one_that_is_driven(config: ServerConfig) -> None:
    folders = [runs.make_folder(config, a_run(seed), None) for seed in range(3)]
    assert runs.active(config) is None
    runs.check_idle(config)
    Board(folders[1], SITES, 1)
    ended(folders[2], "failed")
    found = runs.active(config)
    assert found is not None and (found.folder, found.status) == (folders[1], "running")
    for start in (lambda: runs.launch(config, folders[0]), lambda: runs.begin(config, a_run(9), None)):
        with pytest.raises(ConsiliumError, match="blobs-fedavg-2: this run is being driven; wait for its end"):
            start()
    assert len(inside(config.runs)) == 8  # nothing was made: three folders, three plans, two boards
    assert runs.ended_runs(config, a_run(0).fingerprint()) == (a_run(2).fingerprint(),)


def test_ended_runs_are_the_latest_twenty_each_once(config: ServerConfig) -> None:
    for seed in range(23):
        ended(runs.make_folder(config, a_run(max(seed, 2)), None), "completed")
    found = runs.ended_runs(config, a_run(22).fingerprint())
    assert found == tuple(a_run(seed).fingerprint() for seed in range(3, 22))


def test_what_can_be_resumed_is_the_latest_that_has_not_ended(config: ServerConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run of this coordinator"):
        runs.named(config, None, resumable=False)
    statuses = ("interrupted", "stopped", "completed", "completed_partial")
    folders = [runs.make_folder(config, a_run(seed), None) for seed in range(4)]
    for folder, status in zip(folders, statuses, strict=True):
        ended(folder, status)
    assert runs.named(config, None, resumable=True).folder == folders[1]
    assert runs.named(config, None, resumable=False).folder == folders[3]
    assert runs.named(config, folders[0], resumable=True).status == "interrupted"
    with pytest.raises(UsageError, match="the run is completed: nothing to resume"):
        runs.named(config, folders[2], resumable=True)
    with pytest.raises(UsageError, match="holds no run of this coordinator"):
        runs.named(config, tmp_path, resumable=False)


# Stopping and looking on


def test_who_has_ended_is_not_stopped_again(config: ServerConfig) -> None:
    folder = runs.make_folder(config, a_run(), None)
    Board(folder, SITES, 1)
    facts = dict(board.read(folder) or {})
    runs.stop(runs.RunFacts(folder, "", {**facts, "process": "1"}))  # its number is this process's now: left alone
    runs.stop(runs.RunFacts(folder, "", {**facts, "pid": 2**22 + 1, "process": "1"}))


def test_looking_on_ends_with_the_run(config: ServerConfig, tmp_path: Path) -> None:
    folder = runs.make_folder(config, a_run(), None)
    made = Board(folder, SITES, 1)
    seen: list[str] = []

    def look(facts: Any) -> None:
        seen.append(facts["phase"])
        made.end("completed")

    assert runs.follow(folder, look) == "completed"
    assert seen == ["starting", "ended"]
    (folder / board.NAME).unlink()
    assert runs.follow(folder, look) == "interrupted"
    assert runs.follow(tmp_path / "deleted", look) == "gone"


@pytest.mark.slow
def test_an_engine_that_cannot_begin_says_why_in_one_line(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.make_folder(config, a_run(), None)
    (folder / runs.LOG).write_text("2026-01-01 00:00:00,000 ERROR consilium.engine of an earlier attempt\n")
    (folder / runs.RUN).write_text("[task")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    with pytest.raises(ConsiliumError, match=r"^[^\n]*run\.toml: not TOML \([^\n]*\)$"):
        runs.launch(config, folder)
    assert runs.active(config) is None
    monkeypatch.setenv("PYTHONPATH", str(config.state))
    monkeypatch.chdir(config.state)
    (config.state / "server").mkdir()
    (config.state / "server" / "__init__.py").touch()
    (config.state / "server" / "engine.py").write_text("raise SystemExit('no such thing')")
    with pytest.raises(ConsiliumError, match=r"the engine ended before the run began \(no such thing\); see .*log$"):
        runs.launch(config, folder)
