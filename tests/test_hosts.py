"""A coordinator and three hospitals on hosts of their own, over lines that are long, narrow and bad, and that break.

Every line has 50 ms of delay each way (100 ms there and back), 10 Mbit/s and 1 % loss. Wherever no site is lost, the
run ends with the bytes of the simulation.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site_config import read_site
from client.status import ask
from common.run_config import build
from server import board, runs
from simulations.hosts import Hosts, entered, hosts, missing
from simulations.runner import Job, Scene, set_scene, simulate
from simulations.shaper import FREE, Line
from simulations.stage import COORDINATOR, Places, Stage, open_stage

pytestmark = [pytest.mark.faults, pytest.mark.skipif(bool(missing()), reason=missing())]

SITES = ("site-1", "site-2", "site-3")
LINE = Line(delay_s=0.05, bits_s=10e6, loss=0.01)
ROUNDS = 3
PLAN = {
    "simulation": {"sites": 3, "partition": "iid", "baselines": False, "device": "cpu"},
    "model": {"backbone": "test_efficientnet", "weights": "none", "init": "zero"},
    "data": {"image_size": 32, "views": 1},
    "training": {"rounds": ROUNDS, "local_steps": 600, "lr": 0.001},
}
LONG = 8
"""Rounds of a run in which a site is lost and found again."""

BROKEN_S = 90.0
"""Seconds without a connection: longer than the coordinator holds a silent site for connected."""

_log = logging.getLogger("consilium.hosts")  # --log-cli-level=INFO shows what was measured

LIMIT = 400.0
"""Seconds for whatever is waited for: far more than it takes where cores are free."""


def silent(_phase: str, _done: int, _total: int) -> None:
    pass


class Play:
    """A stage on hosts of its own, and what a run on it must come to."""

    def __init__(self, found: Hosts, stage: Stage, scene: Scene, undisturbed: bytes, folder: Path) -> None:
        self.hosts, self.stage, self.scene, self.undisturbed = found, stage, scene, undisturbed
        self._folder = folder

    @contextmanager
    def run(self, name: str, rounds: int = ROUNDS, **sites: Any) -> Iterator[Path]:
        """Start a run, yield its folder, and wait for its end."""
        run = self.scene.run
        changes = {
            "sites": run.sites.model_copy(update=sites),
            "training": run.training.model_copy(update={"rounds": rounds}),
        }
        folder = runs.make_folder(self.stage.config, run.model_copy(update=changes), self._folder / name)
        engine = runs.launch(self.stage.config, folder, bound=True)
        try:
            yield folder
            engine.wait(LIMIT)
        finally:
            engine.kill()
            engine.wait()

    def check_undisturbed(self, folder: Path) -> dict[str, Any]:
        """Check that a run ended as if nothing had happened, and return its result."""
        found = result(folder)
        assert found["status"] == "completed", found.get("error")
        assert (folder / "model/upper.safetensors").read_bytes() == self.undisturbed
        assert all(site["rounds"] == ROUNDS for site in found["sites"].values())
        return found

    def training(self, site: str, number: int) -> Callable[[], bool]:
        """Return the question whether a site is training in a round."""
        config = read_site(self.stage.sites[site])

        def asked() -> bool:
            said = ask(config)
            return said.get("state") == "working" and (said.get("run") or {}).get("round") == number

        return asked

    def passed(self) -> int:
        """Return the bytes that passed all lines so far."""
        return sum(way.passed_bytes for site in SITES for way in self.hosts.shaper.counts(site).values())


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
    return found


def namespace(pid: object) -> str:
    """Return the network that a process is on, an empty text where it has gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def until(happened: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


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
    """Set the stage on hosts, and know from the simulation what a run on it must end with."""
    folder = tmp_path_factory.mktemp("hosts")
    plan = build({**PLAN, "simulation": {**PLAN["simulation"], "dataset": str(stripes(folder))}}, "test")
    scene = set_scene(plan, folder / "cache", silent)
    simulate(Job(plan, folder / "simulated", folder / "cache"), silent)
    undisturbed = (folder / "simulated/model/upper.safetensors").read_bytes()
    assert result(folder / "simulated")["best_round"] > 0, "or nothing trained counts"
    with hosts(SITES, LINE) as found, entered(found.coordinator):
        places = Places(found.address, found.prefixes)
        with open_stage(scene.sites, "cpu", logs=folder / "logs", places=places) as stage:
            yield Play(found, stage, scene, undisturbed, folder)
            ours = {namespace(pid) for name in (*SITES, COORDINATOR) for pid in stage.pids(name).values()}
    assert len(ours) == 4
    assert not [path for path in Path("/proc").glob("[0-9]*") if namespace(path.name) in ours], "a process was left"


def test_every_process_is_on_its_own_host_which_leads_nowhere_else(play: Play) -> None:
    found = [{namespace(pid) for pid in play.stage.pids(name).values()} for name in (*SITES, COORDINATOR)]
    assert all(len(one) == 1 for one in found) and len(set.union(*found)) == 4
    for name in SITES:
        prefix = play.hosts.prefixes[name]
        routes = subprocess.run([*prefix, "ip", "route"], check=True, capture_output=True, text=True).stdout
        assert len(routes.splitlines()) == 1 and routes.startswith("10.77.0.0/24 ")
        with pytest.raises(OSError) as raised:
            play.hosts.sites[name].run(lambda: socket.create_connection(("192.0.2.1", 443), 5.0))
        assert raised.value.errno == errno.ENETUNREACH


def test_a_run_over_bad_lines_ends_with_the_bytes_of_the_simulation(play: Play) -> None:
    for name, line in (("first", LINE), ("free", FREE), ("shaped", LINE)):
        play.hosts.shaper.set_lines(line)
        before = play.passed()
        with play.run(name) as folder:
            pass
        found = play.check_undisturbed(folder)
        seconds = [round(entry["seconds"], 2) for entry in found["rounds"][1:]]
        _log.info("%s lines: rounds of %s s, %d bytes in all", name, seconds, play.passed() - before)
    lost = [way.lost for site in SITES for way in play.hosts.shaper.counts(site).values()]
    assert all(lost), "or the lines were not bad"


def test_a_line_that_breaks_for_90_seconds_in_a_round_costs_only_time(play: Play) -> None:
    with play.run("broken", patience_s=300.0) as folder:
        until(play.training("site-2", 2))
        play.hosts.shaper.partition("site-2")
        broken = time.monotonic()
        until(lambda: "site-2" not in play.stage.connected())
        time.sleep(max(0.0, broken + BROKEN_S - time.monotonic()))
        assert (board.read(folder) or {})["status"] == "running"
        assert not rounds_of(folder, 2), "it was waited for"
        play.hosts.shaper.heal("site-2")
        healed = time.monotonic()
        play.stage.await_connected(SITES)
        _log.info("connected again after %.1f s", time.monotonic() - healed)
    play.check_undisturbed(folder)
    counts = play.hosts.shaper.counts("site-2")
    assert all(way.cut for way in counts.values()), asdict(counts["up"])


def test_a_quorum_goes_on_without_a_broken_line_and_takes_the_site_back(play: Play) -> None:
    with play.run("left", rounds=LONG, quorum=2, patience_s=20.0) as folder:
        until(play.training("site-2", 2))
        play.hosts.shaper.partition("site-2")
        until(lambda: bool(rounds_of(folder, 2)))
        play.hosts.shaper.heal("site-2")
    found = result(folder)
    assert found["status"] == "completed_partial"
    contributed = [entry["round"] for entry in found["rounds"][1:] if status(entry, "site-2") == "contributed"]
    assert contributed[0] == 1 and 2 not in contributed and contributed[-1] == LONG, contributed
    assert status(found["rounds"][2], "site-2") == "lost"
    _log.info("contributed to rounds %s", contributed)
    assert found["sites"]["site-2"]["rounds"] == len(contributed)
    assert found["sites"]["site-2"]["status"] == "contributed"
    assert [found["sites"][site]["rounds"] for site in ("site-1", "site-3")] == [LONG, LONG]
    assert set(found["test"]["sites"]) == set(SITES)
    with play.run("after") as folder:
        pass
    play.check_undisturbed(folder)


def rounds_of(folder: Path, number: int) -> list[Any]:
    """Return what a run wrote of a round."""
    path = folder / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["round"] == number]


def status(entry: dict[str, Any], site: str) -> str:
    found: str = entry["sites"][site]["status"]
    return found
