"""Dozens of hospitals as real processes on one machine: `python -P -m simulations.many_sites --sites 50 --rounds 20`.

Each has its daemon and its link, which share the pages of what they import (`simulations.crowd`); with --apart also its
supervisor, and nothing is shared: 540 MB a hospital. The run has to end with every hospital's contribution to every
round, with the simulation's model, to the byte, and with its figures of all rounds. Seconds depend on who else uses the
machine, which the table says.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from client.cohort import Cohort
from common.errors import ConfigError, ConsiliumError
from common.files import write_json
from common.progress import Reporter
from common.supervisor import bound_to
from server import board, runs
from server.endpoints import QUIET
from simulations import tiny
from simulations.compare import Findings, Row, show
from simulations.crowd import ENVIRONMENT, PIDS
from simulations.observed import Sample, watched
from simulations.runner import Job, Progress, set_scene, simulate
from simulations.stage import COORDINATOR, PATIENCE_S, STOP_S, Stage, hospital, open_stage

SAMPLE_S = 15.0
"""Seconds between two samples of memory, which for a hundred processes cost one themselves."""
MODEL = "model/upper.safetensors"
LOGS = Path("runs/many-sites")
"""What the processes said, after a failure."""

_TICKS = os.sysconf("SC_CLK_TCK")


def measure(folder: Path, sites: int, rounds: int, progress: Progress, *, apart: bool) -> Findings:
    """Simulate a run, let real processes do the same, and say what that took.

    Args:
        folder: for all that is written.
        sites: how many.
        rounds: how many.
        progress: told how far it is.
        apart: whether each process imports for itself, under a supervisor.

    Raises:
        ConsiliumError: the run failed.
    """
    plan = tiny.plan(folder, sites, rounds)
    scene = set_scene(plan, folder / "cache", progress)
    simulated, expected = simulate(Job(plan, folder / "simulated", folder / "cache"), progress)
    begin = time.monotonic()
    with (open_stage if apart else open_crowd)(scene.sites, "cpu", progress, LOGS) as stage:
        facts: dict[str, Any] = {"up_s": time.monotonic() - begin}
        place = runs.make_folder(stage.config, scene.run, folder / "run")
        before = _worked(stage.pids(COORDINATOR)["superlink"])
        with watched(_pids(stage, place), SAMPLE_S) as samples:
            begin = time.monotonic()
            _drive(stage, place, progress)
            facts["run_s"] = time.monotonic() - begin
        facts["superlink_cpu_s"] = _worked(stage.pids(COORDINATOR)["superlink"]) - before
    found = json.loads((place / "result.json").read_bytes())
    # The model is that of the best round; what sites say of each round hangs on the weights of all.
    same = [one["sites"] for one in found["rounds"]] == [one["sites"] for one in expected["rounds"]]
    same &= (place / MODEL).read_bytes() == (simulated / MODEL).read_bytes()
    facts.update(sites=sites, rounds=rounds, status=found["status"], same=same, best_round=expected["best_round"])
    facts["contributions"] = sum(site["rounds"] for site in found["sites"].values())
    facts["round_s"] = [entry["seconds"] for entry in found["rounds"][1:]]
    facts["memory"] = memory(samples)
    return Findings(facts, rows(facts))


@contextmanager
def open_crowd(cohorts: Mapping[str, Cohort], device: str, progress: Progress, logs: Path) -> Iterator[Stage]:
    """Set up a coordinator, and hospitals whose processes come from one; take everything away at the end.

    Raises:
        ConsiliumError: a process ends, or they are not connected in time.
    """
    with open_stage({}, device, logs=logs) as stage, ExitStack() as stack:
        folder = stage.config.path.parent.parent / "sites"
        for number, (name, cohort) in enumerate(cohorts.items()):
            progress("hospitals", number, len(cohorts))
            stage.sites[name] = hospital(folder / str(number), stage.config, name, cohort, device)
        crowd = stack.enter_context(_running([sys.executable, "-P", "-m", "simulations.crowd", str(folder)]))
        end = time.monotonic() + PATIENCE_S * (1 + len(cohorts))
        while len(there := stage.connected()) < len(cohorts):
            if crowd.poll() is not None or time.monotonic() >= end:
                raise ConsiliumError(f"{len(there)} of {len(cohorts)} hospitals are connected; the logs are in {logs}")
            progress("connected", len(there), len(cohorts))
            time.sleep(0.5)
        yield stage


@contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the end of the block; it ends with this process, whatever becomes of this process."""
    environment = {**os.environ, **QUIET, **ENVIRONMENT}
    process = subprocess.Popen(command, start_new_session=True, env=environment, preexec_fn=bound_to(os.getpid()))  # noqa: S603
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()  # and with it those that it has started
        process.wait()


def _drive(stage: Stage, folder: Path, progress: Progress) -> None:
    engine = runs.launch(stage.config, folder, bound=True)
    try:
        status = runs.follow(folder, lambda facts: progress(f"run: {facts['phase']}", facts["done"], facts["total"]))
    finally:
        engine.terminate()  # it has ended, or is given up
        engine.wait()
    if status not in runs.ENDED:
        raise ConsiliumError(f"the run is {status}: {(board.read(folder) or {}).get('error', '')}; see {LOGS}")


def _pids(stage: Stage, folder: Path) -> Callable[[], Mapping[str, int]]:
    """Return what finds all processes, as `daemon site-01`."""
    crowd = stage.config.path.parent.parent / "sites" / PIDS
    forked = json.loads(crowd.read_bytes()) if crowd.exists() else {}

    def found() -> dict[str, int]:
        names = [COORDINATOR, *stage.sites]
        each = {f"{role} {name}": pid for name in names for role, pid in stage.pids(name).items()} | forked
        facts = board.read(folder)
        return each | ({"engine": facts["pid"]} if facts else {})

    return found


def memory(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the peaks of all processes together, and the medians and peaks of each kind of process."""
    kinds: dict[str, list[int]] = {}
    for sample in samples:
        for name, held in sample.held.items():
            kinds.setdefault(name.partition(" ")[0], []).append(held.pss)
    each = {kind: {"median": statistics.median(found), "peak": max(found)} for kind, found in kinds.items()}
    return {"sum_pss": max((sample.total.pss for sample in samples), default=0), "kinds": each}


def _worked(pid: int) -> float:
    """Return the seconds that a process has had of the cores."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the lines of the table."""
    all_of_them = facts["sites"] * facts["rounds"]
    each = [
        Row(f"memory of a {kind} (PSS)", f"{found['median'] / 1e6:.0f} MB, peak {found['peak'] / 1e6:.0f} MB")
        for kind, found in facts["memory"]["kinds"].items()
    ]
    return [
        Row("the run", facts["status"], "completed", facts["status"] == "completed"),
        Row("contributions", str(facts["contributions"]), str(all_of_them), facts["contributions"] == all_of_them),
        Row(
            "model and figures of all rounds",
            "the simulation's" if facts["same"] else "others",
            "the simulation's",
            facts["same"],
        ),
        Row("best round", str(facts["best_round"]), "one that was trained", facts["best_round"] > 0),
        Row("until all sites were connected", f"{facts['up_s']:.0f} s"),
        Row("the run, with its engine's start", f"{facts['run_s']:.0f} s"),
        Row("a round", f"{statistics.median(facts['round_s']):.2f} s, the longest {max(facts['round_s']):.2f} s"),
        Row("the superlink's work on the run", f"{facts['superlink_cpu_s']:.0f} s of a core"),
        Row("memory of all processes (PSS)", f"{facts['memory']['sum_pss'] / 1e9:.2f} GB"),
        *each,
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--sites", type=int, default=50, metavar="N", help="Hospitals [50].")
@click.option("--rounds", type=int, default=20, metavar="N", help="Rounds of the run [20].")
@click.option("--apart", is_flag=True, help="Let each process import for itself, under supervisors: 540 MB a hospital.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
def main(sites: int, rounds: int, apart: bool, as_json: Path | None) -> None:
    """Let many hospitals run as real processes, and compare the run with its simulation.

    Example: python -P -m simulations.many_sites --sites 50 --rounds 20
    """
    for option, value in (("--sites", sites), ("--rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{option}: got {value}, expected at least 1")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="consilium-many-") as name, Reporter(quiet=False) as reporter:
        findings = measure(Path(name), sites, rounds, reporter, apart=apart)
    load = (before, os.getloadavg()[0])
    beside = f"load {load[0]:.1f} before, {load[1]:.1f} after, {len(os.sched_getaffinity(0))} cores"
    show(f"{sites} sites ({beside})", findings, Console())
    if as_json is not None:
        write_json(as_json, {**findings.facts, "load": load})
    if not all(row.met for row in findings.rows if row.aim):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # no process is left behind
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"many_sites: {error}", err=True)
        sys.exit(error.exit_code)
