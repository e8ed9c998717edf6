"""How long a run stands still after a kill -9, on this machine: `python -P -m simulations.recovery_bench`.

Coordinator and hospitals are real processes. What is killed is started again by its own supervisor; a whole machine, as
systemd starts it, after a second. Seconds are counted from the kill to the next sign of the run in `events.jsonl`: of a
site the next update that counts, of the coordinator the next round that goes out or is judged.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from common.errors import ConsiliumError
from common.files import write_json
from server import board, runs
from server.events import NAME
from simulations import tiny
from simulations.compare import Findings, Row, show
from simulations.runner import set_scene
from simulations.stage import COORDINATOR, Stage, open_stage

ROUNDS = 400
"""More than there is time for: the run is ended when all has been measured."""

SYSTEMD_S = 1.0
"""Seconds that systemd waits before it starts a unit again."""

LIMIT_S = 180.0
SITE = "site-2"

Strike = Callable[[Stage, Path], None]


def kill_engine(_stage: Stage, folder: Path) -> None:
    """End the engine of a run."""
    os.kill(int((board.read(folder) or {})["pid"]), signal.SIGKILL)


def kill_one(name: str, role: str) -> Strike:
    """Return what ends one process, which its supervisor starts again."""
    return lambda stage, _folder: os.kill(stage.pids(name)[role], signal.SIGKILL)


def kill_all(name: str) -> Strike:
    """Return what ends all processes of a site or of the coordinator, and starts them again."""

    def strike(stage: Stage, folder: Path) -> None:
        pids = stage.pids(name)
        for pid in (pids.pop("supervisor"), *pids.values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if name == COORDINATOR:
            with suppress(ProcessLookupError):
                kill_engine(stage, folder)
        stage.end(name)
        time.sleep(SYSTEMD_S)
        stage.start(name)

    return strike


STRIKES: Mapping[str, tuple[str, Strike, float]] = {
    "a site's daemon": (SITE, kill_one(SITE, "daemon"), 75.0),
    "a site's link": (SITE, kill_one(SITE, "link"), 75.0),
    "all of a site": (SITE, kill_all(SITE), 75.0),
    "the engine": ("", kill_engine, 15.0),
    "the superlink": ("", kill_one(COORDINATOR, "superlink"), 15.0),
    "all of the coordinator": ("", kill_all(COORDINATOR), 15.0),
}
"""What is killed -> whose next update counts (empty: any), how, and the seconds to be below."""


def measure(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each kill."""
    plan = tiny.plan(folder, 3, ROUNDS)
    scene = set_scene(plan, folder / "cache", lambda _phase, _done, _total: None)
    found: dict[str, list[float]] = {name: [] for name in STRIKES}
    with open_stage(scene.sites, scene.device, logs=folder / "logs") as stage:
        place = runs.make_folder(stage.config, scene.run, folder / "run")
        runs.launch(stage.config, place)
        try:
            for _ in range(repeats):
                for name, (site, strike, _) in STRIKES.items():
                    _await(place, site, time.time())  # all is well again
                    begin = time.time()
                    strike(stage, place)
                    found[name].append(_await(place, site, begin) - begin)
        finally:
            runs.stop_latest(stage.config)
    return found


def _await(folder: Path, site: str, since: float) -> float:
    """Wait for the next update after a time, and return when it was used.

    Raises:
        ConsiliumError: it does not come.
    """
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        for event in _events(folder):
            at = datetime.fromisoformat(event["time"]).timestamp()
            counted = event["event"] == "site_contributed" and event["round"] and site in ("", event["site"])
            if counted and at > since + 0.05:
                return at
        time.sleep(0.1)
    raise ConsiliumError(f"{folder}: no update in {LIMIT_S:.0f} s; see what the run says")


def _events(folder: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines[-50:] if line.endswith("\n")]
    return []


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--repeats", type=int, default=3, metavar="N", help="Kills of each kind [3].")
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
def main(repeats: int, as_json: Path | None) -> None:
    """Kill processes of a small federation, and count the seconds until its run goes on.

    Example: python -P -m simulations.recovery_bench --repeats 1
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="consilium-recovery-") as name:
        found = measure(Path(name), repeats)
    rows = [_row(what, seconds, STRIKES[what][2]) for what, seconds in found.items()]
    show("until a run goes on after a kill -9", Findings(found, rows), Console())
    if as_json is not None:
        write_json(as_json, found)
    if not all(row.met for row in rows):
        sys.exit(1)


def _row(what: str, seconds: list[float], aim: float) -> Row:
    told = ", ".join(f"{one:.1f}" for one in seconds)
    return Row(f"{what} is killed", f"{told} s", f"below {aim:.0f} s", max(seconds) < aim)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"recovery_bench: {error}", err=True)
        sys.exit(error.exit_code)
