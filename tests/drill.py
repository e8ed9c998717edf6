"""A stage on which processes are killed and networks parted, and what a run on it must come to in spite of that."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from client import audit
from client.site_config import read_site
from client.status import ask
from common import checkpoint
from common.run_config import RunConfig, build
from server import board, keeper, runs, up
from server.server_config import read_server
from simulations.runner import Job, Scene, set_scene, simulate
from simulations.stage import COORDINATOR, Stage, free_ports, open_stage
from simulations.tap import Tap, tapped
from tests import test_deploy_nginx as shipped

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 3
PLAN = {
    "simulation": {"sites": 3, "partition": "iid", "baselines": False, "device": "cpu"},
    "model": {"backbone": "test_efficientnet", "weights": "none", "init": "zero"},
    "data": {"image_size": 32, "views": 1},
    "training": {"rounds": ROUNDS, "local_steps": 600, "lr": 0.001},
}
LIMIT = 240.0
"""Seconds for whatever is waited for: far more than it takes where cores are free."""

ROOM = "64m"
"""Of the disks that are filled."""


def silent(_phase: str, _done: int, _total: int) -> None:
    pass


def until(happened: Callable[[], bool], limit: float = LIMIT) -> None:
    """Wait until something is so."""
    end = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Play:
    """A stage, and what a run on it must come to."""

    def __init__(self, stage: Stage, scene: Scene, undisturbed: bytes, folder: Path) -> None:
        self.stage, self.scene, self.undisturbed = stage, scene, undisturbed
        self._folder = folder
        self._engines: list[Any] = []
        self.front: Front | None = None
        self.line: Tap | None = None  # of site-2
        self.disks: dict[str, Path] = {}  # of the coordinator and of site-3, if they are small ones

    @contextmanager
    def run(self, name: str, rounds: int = ROUNDS, **sites: Any) -> Iterator[Path]:
        """Start a run with other `[sites]`, and yield its folder; whatever happens, its engine is gone afterwards."""
        run: RunConfig = self.scene.run
        training = run.training.model_copy(update={"rounds": rounds})
        run = run.model_copy(update={"sites": run.sites.model_copy(update=sites), "training": training})
        place = self.disks.get(COORDINATOR, self._folder)
        folder = runs.make_folder(self.stage.config, run, place / "played" / name)
        self.start(folder)
        try:
            yield folder
        finally:
            self.end_engines(folder)

    def start(self, folder: Path) -> None:
        """Start the engine of a run, as `run` and `resume` do."""
        self._engines.append(runs.launch(self.stage.config, folder, bound=True))

    def kill_engine(self, folder: Path) -> None:
        """End the engine as a power cut does."""
        facts = board.read(folder)
        if facts is not None and facts["status"] == "running":
            os.kill(facts["pid"], signal.SIGKILL)
        for engine in self._engines:
            if facts is not None and engine.pid == facts["pid"]:
                engine.wait()

    def end_engines(self, folder: Path) -> None:
        for engine in self._engines:
            engine.kill()
            engine.wait()
        self._engines.clear()
        with suppress(ProcessLookupError):
            runs.stop_latest(self.stage.config)
        self.kill_engine(folder)

    def outcome(self, folder: Path) -> dict[str, Any]:
        """Wait for the end of a run and return its result."""
        end = time.monotonic() + LIMIT

        def looked(_facts: Any) -> None:
            assert time.monotonic() < end, f"the run does not end: {_facts}"

        there = partial(keeper.is_there, up.logs(self.stage.config))
        status = runs.follow(folder, looked, lambda: there() or time.monotonic() < end)
        found = result(folder)
        assert found["status"] == status, (found["status"], status)
        return found

    def check_undisturbed(self, folder: Path) -> dict[str, Any]:
        """Check that a run ended as if nothing had happened."""
        found = self.outcome(folder)
        assert found["status"] == "completed", {site: facts["status"] for site, facts in found["sites"].items()}
        assert self.same(folder)
        assert [entry["round"] for entry in found["rounds"]] == list(range(ROUNDS + 1))
        assert all(site["rounds"] == ROUNDS for site in found["sites"].values())
        self.check_clean(folder)
        return found

    def same(self, folder: Path) -> bool:
        """Return whether a run ended with the bytes of the undisturbed one."""
        return (folder / "model/upper.safetensors").read_bytes() == self.undisturbed

    def check_partial(self, folder: Path, site: str, statuses: tuple[str, ...], rounds: range) -> dict[str, Any]:
        """Check that a run went on without a site's full part, says so, and lost nothing of the others."""
        found = self.outcome(folder)
        assert found["status"] == "completed_partial"
        part = found["sites"][site]
        assert part["status"] in statuses and part["rounds"] in rounds, part
        counted = [entry["sites"].get(site, {}).get("status") == "contributed" for entry in found["rounds"][1:]]
        assert sum(counted) == part["rounds"]
        others = [facts for name, facts in found["sites"].items() if name != site]
        assert all(facts["rounds"] == len(counted) and facts["status"] == "contributed" for facts in others)
        self.check_finite(folder)
        self.check_clean(folder)
        return found

    def check_finite(self, folder: Path) -> None:
        """Check that the model is one: finite, and no value far beyond those of the undisturbed one."""
        usual = checkpoint.from_bytes(self.undisturbed)
        for name, value in checkpoint.read_tensors(folder / "model/upper.safetensors").items():
            assert np.isfinite(value).all()
            assert np.abs(value).max() < 10 * max(1.0, float(np.abs(usual[name]).max())), name

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

    def ready(self, site: str) -> bool:
        """Return whether a site's daemon has opened its cohort."""
        return ask(read_site(self.stage.sites[site])).get("state") in ("ready", "working")

    def settle(self) -> None:
        """Wait until every site can take part."""
        self.stage.await_connected(SITES)
        until(lambda: all(self.ready(site) for site in SITES))

    def pid(self, name: str, role: str) -> int:
        """Return a process of a site or of the coordinator, once there is one."""
        until(lambda: role in self.stage.pids(name))
        return self.stage.pids(name)[role]


class Front:
    """The shipped nginx before the stage's coordinator."""

    def __init__(self, folder: Path, stage: Stage, port: int) -> None:
        self.folder, self._stage, self._port = folder, stage, port
        self.certify()
        self._process = self._begun()

    def certify(self) -> None:
        """Lay out configuration and certificate, as they are at the coordinator now."""
        shipped.lay_out(self.folder, self._stage.config.endpoints, self._port)
        text = (self.folder / "consilium.conf").read_text()
        (self.folder / "consilium.conf").write_text(text.replace("/etc/consilium/server", f"{self.folder}/server"))

    def reload(self) -> None:
        """Take up another certificate, as an administrator has it done."""
        self.certify()
        shipped.unprivileged(self.folder)
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """Kill master and workers."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def begin(self) -> None:
        """Start it again, as systemd does."""
        self._process = self._begun()

    def _begun(self) -> subprocess.Popen[bytes]:
        command = [str(shipped.NGINX), "-p", str(self.folder), "-c", f"{self.folder}/nginx.conf", "-e", "stderr"]
        own = shipped.unprivileged(self.folder)
        with (self.folder / "said.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True, **own)
        shipped.await_port(self._port, process)
        return process


@contextmanager
def fronted(play: Play) -> Iterator[None]:
    """Put nginx before a stage whose coordinator is ended: at its address, so that nothing changes for its sites."""
    config = play.stage.config
    (inner,) = free_ports(1)
    text = config.path.read_text()
    listen = next(line for line in text.splitlines() if line.startswith("listen"))
    config.path.write_text(
        text.replace(listen, f'listen = "127.0.0.1:{inner}"\ntls = "proxy"').replace('tls = "direct"', "")
    )
    play.stage.config = read_server(config.path)
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        play.front = Front(Path(name), play.stage, config.address.port)
        try:
            yield
        finally:
            play.front.kill()


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """Put a folder that nobody uses on a disk of its own that can be filled."""
    aside = place.with_name(f"{place.name}-aside")
    place.rename(aside)
    place.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM},mode=0700", "tmpfs", str(place)], check=True)
    try:
        shutil.copytree(aside, place, dirs_exist_ok=True, symlinks=True)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def can_mount() -> bool:
    """Return whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", name], capture_output=True, check=False)
        return not done.returncode and not subprocess.run(["umount", name], check=True).returncode


def fill(disk: Path) -> None:
    """Leave no room on a disk."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        size = 2**20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def stripes(folder: Path) -> Path:
    """Write images whose stripes lie or stand, under noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 2
    wave = (np.sin(np.arange(24) * 1.3) * 60 + 120)[None, :].repeat(24, 0)
    images = np.stack([wave if label else wave.T for label in labels]) + rng.normal(0, 60, (90, 24, 24))
    np.savez(folder / "stripes.npz", images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return folder / "stripes.npz"


def simulated(folder: Path) -> tuple[Scene, bytes]:
    """Return what is played, and the bytes of the model that the simulation of it ends with."""
    plan = build({**PLAN, "simulation": {**PLAN["simulation"], "dataset": str(stripes(folder))}}, "test")
    scene = set_scene(plan, folder / "cache", silent)
    simulate(Job(plan, folder / "simulated", folder / "cache"), silent)
    assert result(folder / "simulated")["best_round"] > 0, "or nothing trained counts"
    return scene, (folder / "simulated/model/upper.safetensors").read_bytes()


def result(folder: Path) -> dict[str, Any]:
    """Return the result of a run that has ended."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
    return found


@contextmanager
def opened(folder: Path, *, hard: bool) -> Iterator[Play]:
    """Set the stage, and know from the simulation what a run on it must end with.

    Args:
        folder: for data and logs.
        hard: whether nginx stands before the coordinator, site-2's line can be cut, and disks can be filled.
    """
    scene, undisturbed = simulated(folder)
    with ExitStack() as stack:
        stage = stack.enter_context(open_stage(scene.sites, "cpu", logs=folder / "logs"))
        play = Play(stage, scene, undisturbed, folder)
        if hard:
            _harden(play, stack)
        yield play
        pids = [pid for name in (*SITES, COORDINATOR) for pid in stage.pids(name).values()]
        stage.end()
    assert pids and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _harden(play: Play, stack: ExitStack) -> None:
    stage = play.stage
    stage.end("site-2", "site-3", COORDINATOR)
    if can_mount():
        for name in (COORDINATOR, "site-3"):
            place = (stage.config.path if name == COORDINATOR else stage.sites[name]).parent
            play.disks[name] = stack.enter_context(small_disk(place))
    if shipped.NGINX is not None:
        stack.enter_context(fronted(play))
    play.line = stack.enter_context(tapped(stage.config.address.port))
    path = stage.sites["site-2"]
    path.write_text(path.read_text().replace(f":{stage.config.address.port}", f":{play.line.port}"))
    stack.callback(stage.end)
    for name in (COORDINATOR, "site-2", "site-3"):
        stage.start(name)
    play.settle()


def jitter(seed: int, *what: str) -> float:
    """Return a pause in seconds, the same for the same seed: a fault does not wait for a good moment."""
    return random.Random(" ".join((str(seed), *what))).uniform(0.0, 0.4)
