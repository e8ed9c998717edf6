"""The faults that have no moments, or end otherwise than those of the table: real processes.

The stage is set once: a coordinator and three hospitals. Each test plays a run of its own on it; wherever no site is
lost, the run ends with the bytes of the simulation. `test_fault_table.py` has all faults at several moments.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from client import audit
from client.site_config import read_site
from server import board, roll, runs
from server.enrolment import enrolled, remove
from tests import drill
from tests.drill import Play, until

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    with drill.opened(tmp_path_factory.mktemp("faults"), hard=False) as found:
        yield found


@pytest.mark.parametrize("role", ["daemon", "link"])
def test_a_sites_process_that_is_killed_in_training_costs_nothing(role: str, play: Play) -> None:
    with play.run(f"no-{role}") as folder:
        until(play.training("site-2", 2))
        killed = play.pid("site-2", role)
        os.kill(killed, signal.SIGKILL)
        play.check_undisturbed(folder)
    assert play.pid("site-2", role) != killed


def test_an_engine_that_is_killed_goes_on_by_itself(play: Play) -> None:
    with play.run("no-engine") as folder:
        until(play.training("site-3", 2))
        first = board.read(folder)
        play.kill_engine(folder)
        assert (folder / "state/state.json").exists()
        play.check_undisturbed(folder)
        last = board.read(folder)
    assert first is not None and last is not None
    assert (first["starts"], last["starts"]) == (1, 2) and first["pid"] != last["pid"]


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
        assert found["status"] == "completed_partial"
        assert {site: facts["status"] for site, facts in found["sites"].items()} == {
            "site-1": "contributed", "site-2": "contributed", "site-3": "refused(policy)"
        }  # fmt: skip
        assert found["sites"]["site-3"]["rounds"] == 0
        play.check_clean(folder)
        with play.run("refused-all") as folder:
            found = play.outcome(folder)
    assert found["status"] == "failed" and "\n" not in found["error"]
    assert "site-3: refused: its own policy" in found["error"]


def test_a_run_that_is_stopped_while_it_waits_is_not_begun_again(play: Play) -> None:
    with play.run("stopped") as folder:
        until(play.training("site-1", 2))
        os.kill(play.pid("the coordinator", "keeper"), signal.SIGKILL)  # so that the run waits for a moment
        play.kill_engine(folder)
        stopped = runs.stop_latest(play.stage.config)
        assert stopped is not None and stopped.folder == folder
        play.pid("the coordinator", "keeper")
        play.settle()
        assert (board.read(folder) or {})["status"] == "stopped"
        play.start(folder)
        play.check_undisturbed(folder)


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
