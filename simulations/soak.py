"""Run after run for hours, and whether anything grows: `python -P -m simulations.soak --minutes 120`.

A coordinator and hospitals are up as real processes. Every few seconds they are asked for their memory, open files and
threads, and their folders for their bytes. Of each run the least is kept, which is what a process holds at rest: what a
message needs is gone by then, a leak stays. An engine lives as long as its run: of it the most is kept.

    grows     by more than `LEAST` an hour, over all the time that is judged and over its later half
    flat      it does not
    unclear   the time was too short to tell

With --faults processes are killed at random meanwhile; of one that was, the longest life is judged. Folders of runs and
audit trails grow by what happens: they are told, not judged.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from client.site_config import read_site
from common.errors import ConfigError, ConsiliumError
from common.files import write_json
from common.progress import Reporter
from server import board, runs
from simulations import tiny
from simulations.flatness import Trend, judged
from simulations.observed import held
from simulations.runner import Scene, set_scene
from simulations.stage import COORDINATOR, Stage, open_stage

SAMPLE_S = 2.0
RUN_S = 1800.0
"""Seconds that a run may take, whatever happens to it."""

WARM_UP = 1 / 3
"""Share of the time that is not judged: allocators and caches fill."""

MEASURES = {"processes": ("rss", "files", "threads"), "places": ("bytes",)}
LEAST = {"rss": 2e6, "files": 1.0, "threads": 1.0, "bytes": 2e6}
"""Growth an hour that is put up with: 1.4 GB of memory in a month without a restart, or half of the thousand files that
a process may have open; on disk 17 GB in a year."""

MEGA = {"rss": 1e6, "bytes": 1e6}
ENGINE = "engine"
SUPERVISOR = "supervisor"
_SHORT = "coordinator"


@dataclass
class Soak:
    """What happens to a stage, and what was seen of it.

    Args:
        stage: the coordinator and its hospitals.
        scene: what the runs are of.
        folder: of the runs' folders.
    """

    stage: Stage
    scene: Scene
    folder: Path
    samples: list[dict[str, Any]] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)  # a run each
    kills: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    engine: int = 0  # process of the run at hand

    @property
    def hours(self) -> float:
        """How long it has gone on."""
        return (time.monotonic() - self.began) / 3600

    def pids(self) -> dict[str, int]:
        """Return all processes, as `link site-1`."""
        names = {COORDINATOR: _SHORT, **{name: name for name in self.stage.sites}}
        found = {f"{role} {short}": pid for name, short in names.items() for role, pid in self.stage.pids(name).items()}
        return found | ({ENGINE: self.engine} if self.engine else {})

    def whole(self) -> int:
        """Return how many samples are of runs that have ended."""
        return sum(sample["run"] < len(self.done) for sample in self.samples)

    def look(self) -> None:
        """Take a sample."""
        processes = {name: (pid, held(pid)) for name, pid in self.pids().items()}
        self.samples.append(
            {
                "hours": self.hours,
                "run": len(self.done),
                "processes": {
                    name: {
                        "pid": pid,
                        "rss": found.rss,
                        "pss": found.pss,
                        "files": found.files,
                        "threads": found.threads,
                    }
                    for name, (pid, found) in processes.items()
                    if found is not None
                },
                "places": {name: {"bytes": size} for name, size in self._places().items()},
            }
        )

    def _places(self) -> dict[str, int]:
        config = self.stage.config
        database = sum(map(_size, config.state.glob(f"{config.database.name}*")))
        found = {
            "database": database,
            "coordinator's state": _size(config.state) - database,
            "runs": _size(self.folder),
        }
        for name, path in self.stage.sites.items():
            site = read_site(path)
            found[f"audit {name}"] = sum(map(_size, site.audit.parent.glob(f"{site.audit.stem}*")))
            found[f"state {name}"] = _size(site.state) - found[f"audit {name}"]
        return found

    def drive(self, chance: random.Random | None, every_s: float) -> None:
        """Drive one run to its end, whatever is killed meanwhile; write down what it came to."""
        number, began = len(self.done), time.monotonic()
        run = self.scene.run
        # Another run each time, over the same features.
        training = run.training.model_copy(update={"lr": (run.training.lr or 0.01) * (1 + number * 1e-6)})
        config = self.stage.config
        folder = runs.make_folder(config, run.model_copy(update={"training": training}), self.folder / str(number))
        status = "interrupted"
        while status == "interrupted":
            process = runs.launch(config, folder, bound=True)
            self.engine = process.pid
            status = self._followed(process, folder, began, chance, every_s)
        self.engine = 0
        seconds = time.monotonic() - began
        self.done.append({"hours": self.hours, "seconds": seconds, "status": status})

    def _followed(
        self, process: subprocess.Popen[bytes], folder: Path, began: float, chance: random.Random | None, every_s: float
    ) -> str:
        """Return how a run is once its engine has ended."""
        due = time.monotonic() + chance.expovariate(1 / every_s) if chance else float("inf")
        try:
            while process.poll() is None:
                if chance and time.monotonic() >= due:
                    self._kill(chance)
                    due = time.monotonic() + chance.expovariate(1 / every_s)
                if time.monotonic() - began > RUN_S:
                    return "too long"
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        return str((board.read(folder) or {}).get("status", "interrupted"))

    def _kill(self, chance: random.Random) -> None:
        """Kill a process; a supervisor, which takes its children with it, is started anew."""
        victim, pid = chance.choice(sorted(self.pids().items()))
        self.kills.append({"hours": self.hours, "process": victim})
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        role, _, name = victim.partition(" ")
        if role == SUPERVISOR:
            name = COORDINATOR if name == _SHORT else name
            self.stage.end(name)
            self.stage.start(name)


def _size(place: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; what goes meanwhile counts nothing."""
    found = [place] if place.is_file() else [Path(top, name) for top, _, names in os.walk(place) for name in names]
    total = 0
    for path in found:
        with suppress(OSError):
            total += path.stat().st_size
    return total


@contextmanager
def _watched(soak: Soak) -> Iterator[None]:
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_S):
            soak.look()

    with ThreadPoolExecutor(1, thread_name_prefix="watch") as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            stop.set()
            watching.result()


# What was seen


@dataclass(frozen=True)
class Finding:
    """One measure of one process or place."""

    name: str
    measure: str
    hours: tuple[float, ...]
    values: tuple[float, ...]
    trend: Trend | None
    verdict: str  # flat, grows, unclear; empty for what is not judged
    a_run: float  # growth from one run to the next


def findings(samples: Sequence[dict[str, Any]], warm_up: float) -> list[Finding]:
    """Return what became of every measure of every process and place.

    Args:
        samples: of `Soak`.
        warm_up: hours that are not judged.
    """
    keys = {
        (group, name, measure)
        for sample in samples
        for group in ("processes", "places")
        for name in sample[group]
        for measure in MEASURES[group]
    }
    found = []
    for group, name, measure in sorted(keys):
        hours, values = by_run(samples, group, name, measure)
        warm = [number for number, at in enumerate(hours) if at >= warm_up]
        hours, values = [hours[number] for number in warm], [values[number] for number in warm]
        line, verdict = judged(hours, values, LEAST[measure])
        a_run = (values[-1] - values[0]) / (len(values) - 1) if len(values) > 1 else 0.0
        told = "" if name == "runs" or name.startswith("audit") else verdict
        found.append(Finding(name, measure, tuple(hours), tuple(values), line, told, a_run))
    return found


def by_run(samples: Sequence[dict[str, Any]], group: str, name: str, measure: str) -> tuple[list[float], list[float]]:
    """Return hours and figures by run: the least of each, of an engine the most, in the longest life of a process.

    The first run of a life is left out, for the process came up in it.
    """
    seen = [(sample, sample[group][name]) for sample in samples if name in sample[group]]
    if name != ENGINE:
        lives = [list(life) for _, life in groupby(seen, key=lambda pair: pair[1].get("pid"))]
        seen = max(lives, key=lambda life: life[-1][0]["hours"] - life[0][0]["hours"])
    kept = max if name == ENGINE else min
    hours, values = [], []
    for _, pairs in groupby(seen, key=lambda pair: pair[0]["run"]):
        held_then = list(pairs)
        hours.append(held_then[-1][0]["hours"])
        values.append(float(kept(entry[measure] for _, entry in held_then)))
    came_up = int(group == "processes" and name != ENGINE)
    return hours[came_up:], values[came_up:]


def table(found: Sequence[Finding]) -> Table:
    """Return a line for each finding."""
    shown = Table(title="what grew, after the warm-up", title_justify="left")
    for column in ("of", "measure", "at first", "at last", "an hour (95 % limits)", "a run", ""):
        shown.add_column(column)
    for one in found:
        unit = MEGA.get(one.measure, 1.0)
        figures = [f"{one.values[place] / unit:.1f}" for place in (0, -1)] if one.values else ["", ""]
        line = one.trend
        slope = f"{line.slope / unit:+.2f} ({line.low / unit:+.2f} to {line.high / unit:+.2f})" if line else ""
        name = f"{one.measure}, MB" if unit > 1 else one.measure
        shown.add_row(one.name, name, *figures, slope, f"{one.a_run / unit:+.4f}", said(one))
    return shown


def said(one: Finding) -> str:
    """Return the verdict in words."""
    if one.verdict != "grows" or one.trend is None:
        return one.verdict or "told only"
    unit = MEGA.get(one.measure, 1.0)
    return f"grows: {one.trend.slope / unit:.1f} {'MB' if unit > 1 else one.measure}/h"


def plot(path: Path, found: Sequence[Finding], kills: Sequence[dict[str, Any]]) -> None:
    """Draw memory, files, threads and bytes over the hours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = list(LEAST)
    figure, axes = pyplot.subplots(len(measures), 1, figsize=(10, 14), sharex=True, layout="constrained")
    for axis, measure in zip(axes, measures, strict=True):
        for one in found:
            if one.measure == measure:
                values = [value / MEGA.get(measure, 1.0) for value in one.values]
                axis.plot(one.hours, values, label=f"{one.name}: {said(one)}", linewidth=1)
        axis.set_ylabel(f"{measure}, MB" if measure in MEGA else measure)
        axis.set_yscale("log" if measure in MEGA else "linear")
        if axis.lines:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
        for kill in kills:
            axis.axvline(kill["hours"], color="0.8", linewidth=0.5, zorder=0)
    axes[-1].set_xlabel("hours")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


# The command


def soak(output: Path, minutes: float, sites: int, rounds: int, faults: float | None, seed: int) -> bool:
    """Let runs follow each other for so long, write what was seen, and return whether all is well."""
    chance = random.Random(seed) if faults else None
    with tempfile.TemporaryDirectory(prefix="consilium-soak-") as name, Reporter(quiet=False) as reporter:
        scene = set_scene(tiny.plan(Path(name), sites, rounds), Path(name) / "cache", reporter)
        with open_stage(scene.sites, "cpu", reporter, output / "logs") as stage:
            going = Soak(stage, scene, Path(name) / "runs")
            with _watched(going):
                while going.hours * 60 < minutes:
                    reporter("minutes", int(going.hours * 60), int(minutes))
                    going.drive(chance, faults or 0.0)
    del going.samples[going.whole() :]
    found = findings(going.samples, minutes / 60 * WARM_UP)
    write_json(output / "soak.json", _facts(going, found))
    plot(output / "soak.png", findings(going.samples, 0.0), going.kills)
    console = Console(width=140)
    console.print(table(found))
    bad = [run for run in going.done if run["status"] != "completed"]
    console.print(f"{len(going.done)} runs, {len(bad)} of them not completed; {len(going.kills)} processes killed")
    console.print(f"{output / 'soak.json'}, {output / 'soak.png'}", soft_wrap=True)
    return not bad and not any(one.verdict == "grows" for one in found)


def _facts(going: Soak, found: Sequence[Finding]) -> dict[str, Any]:
    verdicts = [
        {
            "of": one.name,
            "measure": one.measure,
            "verdict": one.verdict,
            "a_run": one.a_run,
            "line": vars(one.trend) if one.trend else None,
        }
        for one in found
    ]
    return {"runs": going.done, "kills": going.kills, "verdicts": verdicts, "samples": going.samples}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=float, default=120.0, metavar="N", help="How long [120].")
@click.option("--sites", type=int, default=3, metavar="N", help="Hospitals [3].")
@click.option("--rounds", type=int, default=3, metavar="N", help="Rounds of each run [3].")
@click.option("--faults", type=float, metavar="SECONDS", help="Kill a process every so often, on average [never].")
@click.option("--seed", type=int, default=0, metavar="N", help="Decides what is killed when [0].")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("runs/soak"), metavar="DIR", help="Folder [runs/soak]."
)
def main(minutes: float, sites: int, rounds: int, faults: float | None, seed: int, output: Path) -> None:
    """Let a federation of real processes do run after run, and say whether anything of it grows.

    Exit code 1: something grows, or a run did not complete.

    Example: python -P -m simulations.soak --minutes 120 --faults 300
    """
    for option, value in (("--minutes", minutes), ("--sites", sites), ("--rounds", rounds), ("--faults", faults)):
        if value is not None and not value > 0:
            raise ConfigError(f"{option}: got {value:g}, expected more than 0")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    output.mkdir(parents=True, exist_ok=True)
    if not soak(output, minutes, sites, rounds, faults, seed):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # no process is left behind
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"soak: {error}", err=True)
        sys.exit(error.exit_code)
