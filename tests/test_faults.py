"""Real processes on one machine are killed, stopped and turned away, and the run ends as it must.

The stage is set once: a coordinator and three hospitals. Each test plays a run of its own on it; wherever no site is
lost, the run ends with the bytes of the simulation.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import audit
from client.site_config import read_site
from client.status import ask
from common.run_config import RunConfig, build
from server import board, roll, runs
from server.enrolment import enrolled, remove
from simulations.runner import Job, Scene, set_scene, simulate
from simulations.stage import COORDINATOR, Stage, open_stage

pytestmark = pytest.mark.slow

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 3
PLAN = {
    "simulation": {"sites": 3, "partition": "iid", "baselines": False, "device": "cpu"},
    "model": {"backbone": "test_efficientnet", "weights": "none", "init": "zero"},
    "data": {"image_size": 32, "views": 1},
    "training": {"rounds": ROUNDS, "local_steps": 600, "lr": 0.001},
}
LIMIT = 150.0
"""Seconds for whatever is waited for: far more than it takes where cores are free."""


def silent(_phase: str, _done: int, _total: int) -> None:
    pass


class Play:
    """A stage, and what a run on it must come to."""

    def __init__(self, stage: Stage, scene: Scene, undisturbed: bytes, folder: Path) -> None:
        self.stage, self.scene, self.undisturbed = stage, scene, undisturbed
        self._folder = folder
        self._engines: list[Any] = []

    @contextmanager
    def run(self, name: str, **sites: Any) -> Iterator[Path]:
        """Start a run with other `[sites]`, and yield its folder; whatever happens, its engine is gone afterwards."""
        run: RunConfig = self.scene.run
        run = run.model_copy(update={"sites": run.sites.model_copy(update=sites)})
        folder = runs.make_folder(self.stage.config, run, self._folder / name)
        self.start(folder)
        try:
            yield folder
        finally:
            self.end_engines()

    def start(self, folder: Path) -> None:
        """Start the engine of a run, as `run` and `resume` do."""
        self._engines.append(runs.launch(self.stage.config, folder, bound=True))

    def kill_engine(self) -> None:
        """End the engine as a power cut does."""
        self._engines[-1].kill()
        self._engines[-1].wait()

    def end_engines(self) -> None:
        for engine in self._engines:
            engine.kill()
            engine.wait()
        self._engines.clear()

    def outcome(self, folder: Path) -> dict[str, Any]:
        """Wait for the end of a run and return its result."""
        self._engines[-1].wait(LIMIT)
        facts = board.read(folder)
        assert facts is not None and facts["status"] != "running"
        found: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
        assert found["status"] == facts["status"], facts
        return found

    def check_undisturbed(self, folder: Path) -> None:
        """Check that a run ended as if nothing had happened."""
        found = self.outcome(folder)
        assert found["status"] == "completed"
        assert (folder / "model/upper.safetensors").read_bytes() == self.undisturbed
        assert [entry["round"] for entry in found["rounds"]] == list(range(ROUNDS + 1))
        assert all(site["rounds"] == ROUNDS for site in found["sites"].values())
        self.check_clean(folder)

    def check_clean(self, folder: Path) -> None:
        """Check that nothing half-made is left, at the coordinator and at the sites."""
        assert not (folder / "state").exists()
        lines = (folder / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(len(lines)))
        for place in (folder, self.stage.config.path.parent, *(path.parent for path in self.stage.sites.values())):
            assert not [*place.rglob("*.part")]
        for path in self.stage.sites.values():
            assert audit.verify(read_site(path).audit) > 0

    def training(self, site: str, number: int) -> Callable[[], bool]:
        """Return the question whether a site is training in a round."""
        config = read_site(self.stage.sites[site])

        def asked() -> bool:
            said = ask(config)
            return said.get("state") == "working" and (said.get("run") or {}).get("round") == number

        return asked

    def pid(self, name: str, role: str) -> int:
        """Return a process of a site or of the coordinator, once there is one."""
        until(lambda: role in self.stage.pids(name))
        return self.stage.pids(name)[role]


def until(happened: Callable[[], bool], limit: float = LIMIT) -> None:
    """Wait until something is so."""
    end = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def stripes(folder: Path) -> Path:
    """Write images whose stripes lie or stand, under noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 2
    wave = (np.sin(np.arange(24) * 1.3) * 60 + 120)[None, :].repeat(24, 0)
    images = np.stack([wave if label else wave.T for label in labels]) + rng.normal(0, 60, (90, 24, 24))
    np.savez(folder / "stripes.npz", images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return folder / "stripes.npz"


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Set the stage, and know from the simulation what a run on it must end with."""
    folder = tmp_path_factory.mktemp("faults")
    plan = build({**PLAN, "simulation": {**PLAN["simulation"], "dataset": str(stripes(folder))}}, "test")
    scene = set_scene(plan, folder / "cache", silent)
    simulate(Job(plan, folder / "simulated", folder / "cache"), silent)
    undisturbed = (folder / "simulated/model/upper.safetensors").read_bytes()
    assert json.loads((folder / "simulated/result.json").read_bytes())["best_round"] > 0, "or nothing trained counts"
    with open_stage(scene.sites, "cpu", logs=folder / "logs") as stage:
        yield Play(stage, scene, undisturbed, folder)
        pids = [pid for name in (*SITES, COORDINATOR) for pid in stage.pids(name).values()]
    assert pids and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("role", ["daemon", "link"])
def test_a_sites_process_that_is_killed_in_training_costs_nothing(role: str, play: Play) -> None:
    with play.run(f"no-{role}") as folder:
        until(play.training("site-2", 2))
        killed = play.pid("site-2", role)
        os.kill(killed, signal.SIGKILL)
        play.check_undisturbed(folder)
    assert play.pid("site-2", role) != killed


@pytest.mark.faults
def test_a_whole_site_that_is_killed_and_started_again_costs_nothing(play: Play) -> None:
    with play.run("no-site") as folder:
        until(play.training("site-1", 2))
        os.kill(play.pid("site-1", "supervisor"), signal.SIGKILL)
        play.stage.end("site-1")
        play.stage.start("site-1")
        play.check_undisturbed(folder)


def resumed(play: Play, folder: Path) -> int:
    """Run `consilium server resume` to its end, and return its exit code."""
    line = [sys.executable, "-P", "-c", "from common.cli import main; main()", "server", "resume", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    options = ["--server", str(play.stage.config.path), "--quiet"]
    try:
        return subprocess.run([*line, *options], env=environment, stdout=subprocess.DEVNULL, timeout=LIMIT).returncode
    finally:
        facts = board.read(folder) or {}
        if facts.get("status") == "running":
            os.kill(facts["pid"], signal.SIGKILL)


def test_an_engine_that_is_killed_is_resumed(play: Play) -> None:
    with play.run("no-engine") as folder:
        until(play.training("site-3", 2))
        play.kill_engine()
        assert (board.read(folder) or {})["status"] == "interrupted"
        assert (folder / "state/state.json").exists()
        assert resumed(play, folder) == 0
        play.check_undisturbed(folder)


@pytest.mark.faults
def test_a_superlink_that_is_killed_in_a_round_comes_back(play: Play) -> None:
    with play.run("no-superlink") as folder:
        until(play.training("site-1", 2))
        os.kill(play.pid(COORDINATOR, "superlink"), signal.SIGKILL)
        play.check_undisturbed(folder)


@contextmanager
def policy(play: Play, site: str, lines: str) -> Iterator[None]:
    """Let a site have a policy for a while."""
    path = play.stage.sites[site]
    before = path.read_bytes()

    def anew() -> None:
        play.stage.end(site)
        play.stage.start(site)
        play.stage.await_connected([site])

    path.write_bytes(before + f"\n[policy]\n{lines}\n".encode())
    try:
        anew()
        yield
    finally:
        path.write_bytes(before)
        anew()


def test_a_site_whose_policy_says_no_is_left_out_or_ends_the_run(play: Play) -> None:
    with policy(play, "site-3", "max_rounds = 1"):
        with play.run("refused", quorum=2) as folder:
            found = play.outcome(folder)
            assert play._engines[-1].returncode == 3
        assert found["status"] == "completed_partial"
        assert {site: facts["status"] for site, facts in found["sites"].items()} == {
            "site-1": "contributed", "site-2": "contributed", "site-3": "refused(policy)"
        }  # fmt: skip
        assert found["sites"]["site-3"]["rounds"] == 0
        play.check_clean(folder)
        with play.run("refused-all") as folder:
            found = play.outcome(folder)
            assert play._engines[-1].returncode == 1
    assert found["status"] == "failed" and "\n" not in found["error"]
    assert "site-3: refused: its own policy" in found["error"]


@pytest.mark.faults
def test_a_site_that_hangs_is_left_out_and_joins_the_next_run(play: Play) -> None:
    hung = [play.pid("site-2", role) for role in ("daemon", "link")]
    with play.run("hung", quorum=2, deadline_s=20.0, patience_s=8.0) as folder:
        until(play.training("site-2", ROUNDS))
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        try:
            found = play.outcome(folder)
            assert play._engines[-1].returncode == 3
        finally:
            for pid in hung:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    assert found["status"] == "completed_partial"
    assert found["sites"]["site-2"]["status"] in ("lost(deadline)", "lost(absent)", "lost(unavailable)")
    assert found["sites"]["site-2"]["rounds"] == ROUNDS - 1
    assert [found["sites"][site]["rounds"] for site in ("site-1", "site-3")] == [ROUNDS, ROUNDS]
    assert found["rounds"][ROUNDS]["sites"]["site-2"]["status"] == "lost"
    assert set(found["test"]["sites"]) == {"site-1", "site-3"}
    play.check_clean(folder)
    with play.run("after") as folder:
        play.check_undisturbed(folder)


@pytest.mark.faults
def test_a_site_that_never_connects_is_waited_for_and_no_longer(play: Play) -> None:
    play.stage.end("site-3")
    try:
        with play.run("absent", quorum=2, patience_s=2.0) as folder:
            found = play.outcome(folder)
            assert play._engines[-1].returncode == 3
    finally:
        play.stage.start("site-3")
        play.stage.await_connected(["site-3"])
    assert found["status"] == "completed_partial"
    assert found["sites"]["site-3"] == {**found["sites"]["site-3"], "rounds": 0, "status": "lost(absent)"}
    play.check_clean(folder)


@pytest.mark.faults
def test_a_site_that_is_taken_out_while_a_run_waits_gets_nothing(play: Play) -> None:
    config = play.stage.config
    kept = enrolled(config)
    before = audit.verify(read_site(play.stage.sites["site-3"]).audit)
    play.stage.end("site-2")  # the run waits for it
    try:
        with play.run("stranger", quorum=1, patience_s=8.0) as folder:
            until(lambda: (board.read(folder) or {"sites": {}})["sites"]["site-2"]["at"] == "awaited")
            remove(config, "site-3")
            assert roll.call(config)
            found = play.outcome(folder)
    finally:
        play.stage.start("site-2")
    assert len(kept) == 3
    assert found["sites"]["site-3"]["status"] == "lost(absent)"
    assert audit.verify(read_site(play.stage.sites["site-3"]).audit) == before, "it was asked for something"
