from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, ConsiliumError, Interrupted
from common.locks import exclusive
from common.run_config import RunConfig
from server import board, engine, founding, runs
from server.plan import settled
from server.server_config import ServerConfig, read_server
from simulations import runner
from simulations.stage import open_stage

ROOT = Path(__file__).parent.parent
PLAN = {
    "data": {"image_size": 32, "views": 1},
    "model": {"backbone": "test_efficientnet", "weights": "none", "ridge": (1.0,)},
    "training": {"rounds": 8, "batch_size": 16},
    "simulation": {"dataset": "phantoms", "sites": 2, "baselines": False, "device": "cpu"},
}


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    made = founding.found(tmp_path / "chest", "127.0.0.1:9443", "chest")
    made.config.write_text(made.config.read_text().replace("operator_port = 9444", "operator_port = 1"))
    return read_server(made.config)


def a_run(config: ServerConfig) -> Path:
    plan = RunConfig.model_validate({**PLAN, "simulation": None, "task": {"name": "blobs", "labels": ("a", "b")}})
    return runs.make_folder(config, settled(plan, plan.task, ("north", "south"), "generic").run, None)


@pytest.mark.slow
def test_what_a_run_starts_with_is_built_from_the_run_alone(config: ServerConfig) -> None:
    folder = a_run(config)
    plan = runs.read_plan(folder)
    bench = engine.prepared(config, plan, folder)
    assert (bench.start.run, bench.start.folder, bench.start.ended) == (plan, folder, ())
    assert bench.around.trunk.sha256 == plan.model.trunk_sha256
    assert [warning["code"] for warning in bench.around.warnings] == ["random_weights"]
    other = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 9})})
    assert engine.prepared(config, other, folder).start.ended == (plan.fingerprint(),)
    changed = plan.model_copy(update={"model": plan.model.model_copy(update={"trunk_sha256": "0" * 64})})
    with pytest.raises(CheckpointError, match="the backbone's weights have changed since the run was made; start a"):
        engine.prepared(config, changed, folder)


def test_one_engine_drives_a_run_and_one_a_coordinator(config: ServerConfig) -> None:
    folder = a_run(config)
    with exclusive(config.state / "engine.lock", "it"), pytest.raises(ConsiliumError, match="engine of a run runs alr"):
        engine.run(config, folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConsiliumError, match="an engine is at work on this run; see `consilium server status`"):
            engine.run(config, folder)
    finally:
        os.close(handle)
    assert board.read(folder) is None


@pytest.mark.slow
def test_without_a_superlink_a_run_is_interrupted_in_one_line(config: ServerConfig) -> None:
    folder = a_run(config)
    with pytest.raises(
        ConsiliumError, match=r"the coordinator's SuperLink does not answer at 127\.0\.0\.1:1; start it"
    ):
        engine.run(config, folder)
    facts = board.read(folder)
    assert facts is not None and facts["status"] == "interrupted" and "does not answer" in facts["error"]
    assert not (folder / "result.json").exists(), "the run goes on"


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOENT, "No such file or directory"),
        ConsiliumError("it fails"),
        Interrupted("it is away"),
        engine.Stopped(),
    ],
    ids=str,
)
def test_whatever_ends_a_run_is_one_line_on_its_board(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    folder = a_run(config)
    monkeypatch.setattr(engine, "_drive", fail)
    with pytest.raises(ConsiliumError) as caught:
        engine.run(config, folder)
    expected = {
        str(OSError(errno.ENOSPC, "No space left on device")): (
            "interrupted",
            f"{folder}: cannot be used (No space left on device)",
        ),
        str(OSError(errno.ENOENT, "No such file or directory")): (
            "failed",
            f"{folder}: cannot be used (No such file or directory)",
        ),
        "it fails": ("failed", "it fails"),
        "it is away": ("interrupted", "it is away"),
        "": ("stopped", engine.STOPPED),
    }[str(error)]
    facts = board.read(folder)
    assert facts is not None and (facts["status"], facts["error"]) == expected
    assert str(caught.value) == expected[1]
    if expected[0] == "interrupted":
        assert not (folder / "result.json").exists(), "the run goes on"
    else:
        assert json.loads((folder / "result.json").read_text())["error"] == expected[1]


def test_a_folder_that_is_gone(config: ServerConfig, tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match=r"run\.toml: cannot be read"):
        engine.run(config, tmp_path / "gone")


# Over real sites


def consilium(config: ServerConfig, *arguments: object) -> tuple[int, str, str]:
    line = [sys.executable, "-P", "-c", "from common.cli import main; main()", "server", *map(str, arguments)]
    ended = subprocess.run([*line, "--server", str(config.path)], capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout, ended.stderr


def facts_of(folder: Path, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return what the board says as soon as it is what is waited for."""
    end = time.monotonic() + 120
    while True:
        facts = dict(board.read(folder) or {})
        if facts and until(facts):
            return facts
        assert time.monotonic() < end and facts.get("status") in (None, "running", "stopped"), facts
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_that_is_stopped_in_two_phases_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def quiet(_phase: str, _done: int, _total: int) -> None:
        pass

    job = runner.Job(RunConfig.model_validate(PLAN), tmp_path / "disturbed", tmp_path / "cache")
    scene = runner.set_scene(job.plan, job.cache, quiet)
    folder = runner.open_folder(job, scene.run)
    with open_stage(scene.sites, scene.device) as stage:
        config = stage.config
        runs.remember(config, folder)
        assert consilium(config, "resume", folder, "--detach")[0] == 0
        first = facts_of(folder, lambda facts: facts["status"] == "running")
        assert first["phase"] == "starting"  # no site was told of the run yet
        code, out, err = consilium(config, "stop")
        assert (code, err) == (0, ""), err
        assert facts_of(folder, lambda _: True)["status"] == "stopped"

        assert consilium(config, "resume", folder, "--detach")[0] == 0
        facts_of(folder, lambda facts: facts["phase"] == "rounds" and facts["round"] >= 2)
        slow = stage.pids("site-2")["daemon"]
        os.kill(slow, signal.SIGSTOP)
        try:
            time.sleep(2)
            before = facts_of(folder, lambda _: True)
            assert (before["status"], before["phase"]) == ("running", "rounds")
            code, out, err = consilium(config, "stop", "--json")
        finally:
            os.kill(slow, signal.SIGCONT)
        assert (code, err) == (0, ""), err
        assert json.loads(out) == {"folder": str(folder), "status": "stopped"}
        assert (folder / "state").is_dir()

        code, out, err = consilium(config, "resume", "--quiet", "--json")
        assert (code, err) == (0, ""), err
        document = json.loads(out)
        assert (document["status"], len(document["rounds"])) == ("completed", 9)
        assert {warning["code"] for warning in document["warnings"]} <= {"random_weights", "tiny_support"}
        assert not (folder / "state").exists()
        log = (folder / runs.LOG).read_text()
        names = {path.name for path in (config.path.parent.parent / "sites").rglob("*")}
        assert names and not any(word in log for word in ("flwr", "httpx", "Traceback", "cohort.npz", str(ROOT)))
    calm = runner.Job(job.plan, tmp_path / "calm", job.cache)
    assert runner.simulate(calm, quiet)[1]["status"] == "completed"
    model = "model/upper.safetensors"
    assert (folder / model).read_bytes() == (calm.output / model).read_bytes()
