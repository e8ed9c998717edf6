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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from server import board
from simulations.hosts import Hosts, entered, hosts, missing
from simulations.runner import Scene
from simulations.shaper import FREE, Line
from simulations.stage import COORDINATOR, Places, Stage, open_stage
from tests import drill
from tests.drill import SITES, Play, until

pytestmark = [pytest.mark.faults, pytest.mark.skipif(bool(missing()), reason=missing())]

LINE = Line(delay_s=0.05, bits_s=10e6, loss=0.01)
LONG = 8
"""Rounds of a run in which a site is lost and found again."""

BROKEN_S = 90.0
"""Seconds without a connection: longer than the coordinator holds a silent site for connected."""

_log = logging.getLogger("consilium.hosts")  # --log-cli-level=INFO shows what was measured


class Played(Play):
    """A stage on hosts of its own, and what a run on it must come to."""

    def __init__(self, hosts: Hosts, stage: Stage, scene: Scene, undisturbed: bytes, folder: Path) -> None:
        super().__init__(stage, scene, undisturbed, folder)
        self.hosts = hosts

    def passed(self) -> int:
        """Return the bytes that passed all lines so far."""
        return sum(way.passed_bytes for site in SITES for way in self.hosts.shaper.counts(site).values())


def namespace(pid: object) -> str:
    """Return the network that a process is on, an empty text where it has gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Set the stage on hosts, and know from the simulation what a run on it must end with."""
    folder = tmp_path_factory.mktemp("hosts")
    scene, undisturbed = drill.simulated(folder)
    with hosts(SITES, LINE) as found, entered(found.coordinator):
        places = Places(found.address, found.prefixes)
        with open_stage(scene.sites, "cpu", logs=folder / "logs", places=places) as stage:
            yield Played(found, stage, scene, undisturbed, folder)
            ours = {namespace(pid) for name in (*SITES, COORDINATOR) for pid in stage.pids(name).values()}
    assert len(ours) == 4
    assert not [path for path in Path("/proc").glob("[0-9]*") if namespace(path.name) in ours], "a process was left"


def test_every_process_is_on_its_own_host_which_leads_nowhere_else(play: Played) -> None:
    found = [{namespace(pid) for pid in play.stage.pids(name).values()} for name in (*SITES, COORDINATOR)]
    assert all(len(one) == 1 for one in found) and len(set.union(*found)) == 4
    for name in SITES:
        prefix = play.hosts.prefixes[name]
        routes = subprocess.run([*prefix, "ip", "route"], check=True, capture_output=True, text=True).stdout
        assert len(routes.splitlines()) == 1 and routes.startswith("10.77.0.0/24 ")
        with pytest.raises(OSError) as raised:
            play.hosts.sites[name].run(lambda: socket.create_connection(("192.0.2.1", 443), 5.0))
        assert raised.value.errno == errno.ENETUNREACH


def test_a_run_over_bad_lines_ends_with_the_bytes_of_the_simulation(play: Played) -> None:
    for name, line in (("first", LINE), ("free", FREE), ("shaped", LINE)):
        play.hosts.shaper.set_lines(line)
        before = play.passed()
        with play.run(name) as folder:
            found = play.check_undisturbed(folder)
        seconds = [round(entry["seconds"], 2) for entry in found["rounds"][1:]]
        _log.info("%s lines: rounds of %s s, %d bytes in all", name, seconds, play.passed() - before)
    lost = [way.lost for site in SITES for way in play.hosts.shaper.counts(site).values()]
    assert all(lost), "or the lines were not bad"


def test_a_line_that_breaks_for_90_seconds_in_a_round_costs_only_time(play: Played) -> None:
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


def test_a_quorum_goes_on_without_a_broken_line_and_takes_the_site_back(play: Played) -> None:
    with play.run("left", rounds=LONG, quorum=2, patience_s=20.0) as folder:
        until(play.training("site-2", 2))
        play.hosts.shaper.partition("site-2")
        until(lambda: bool(rounds_of(folder, 2)))
        play.hosts.shaper.heal("site-2")
        found = play.outcome(folder)
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
        play.check_undisturbed(folder)


def rounds_of(folder: Path, number: int) -> list[Any]:
    """Return what a run wrote of a round."""
    path = folder / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["round"] == number]


def status(entry: dict[str, Any], site: str) -> str:
    found: str = entry["sites"][site]["status"]
    return found
