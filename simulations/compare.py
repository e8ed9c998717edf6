"""The project's figures against its aims, measured on this machine: `python -P -m simulations.compare`.

speed          a round beside the same training as a plain Flower app has it (`simulations.plain_flower`)
orchestration  the share of a round that is neither training nor evaluation, and what it is spent on
scale          a thousand sites beside ten: peak memory of each round, each run in a process of its own
warm           from the start of the command to its first round, with everything cached
bytes          what a round sends, over sites times trainable values times their size
accuracy       the federation beside all data pooled, on the test split

Aims are ratios within one run of this command, for seconds depend on the machine and on who else uses it. Ratios do
too, if one side runs on more threads or at another time: each table says how busy the machine was, and a figure
taken while others used it wants repeating.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import client.app
import client.evaluation
import client.training
import common.checkpoint
import common.codec
import common.files
import common.model
import common.parameters
import server.aggregation
import server.coordinator
import server.evaluation
import server.federation
import server.state
from client.app import make_app as make_client_app
from client.augmentation import Augmentation
from client.cohort import Cohort
from client.features import Extractor
from client.workshop import Workshop, threads
from common.errors import ConfigError, ConsiliumError
from common.files import write_json
from common.presets import PRESETS
from common.run_config import RunConfig, base_lr, build
from common.seeds import numpy_stream
from server.app import make_app as make_server_app
from server.coordinator import Coordinator
from server.federation import Federation
from simulations import plain_flower, runner
from simulations.grid import InProcessGrid, run_in_process
from simulations.hospitals import open_in_process
from simulations.runner import Job, Scene, start_of

CUTS = ("head", "stages:2")
BATCH_SIZE = 64
"""Examples a step, on both sides of the comparison of speed."""

SAMPLE = 512
"""Images whose pass through the trunk is timed; the whole data set's is scaled up from them."""

WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PARTITIONS = ("dirichlet:0.5", "dirichlet:0.1")
LEAST_SPEED_UP = {"head": 20.0, "stages:2": 3.0}
MOST_OVERHEAD = 0.05
MOST_MEMORY = 1.5
MOST_GROWTH = 1.02
MOST_BYTES = 1.02
MOST_WARM_S = 5.0


@dataclass(frozen=True)
class Row:
    """One line of the closing table."""

    name: str
    value: str
    aim: str = ""
    met: bool | None = None  # None: the figure is for information


@dataclass(frozen=True)
class Findings:
    """What one section measured: for the JSON file, and for the table."""

    facts: Mapping[str, Any]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Bench:
    """What is measured on, and for how long."""

    dataset: str = "phantoms"
    image_size: int | None = None
    sites: int = 5
    rounds: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    cache: Path = Path()
    crowd: tuple[int, int] = (10, 1000)  # sites of the two runs of `scale`
    cuts: tuple[str, ...] = CUTS
    model: Mapping[str, Any] = field(default_factory=dict)  # entries of [model] for every run

    def plan(self, **sections: Mapping[str, Any]) -> RunConfig:
        """Return the run that the options describe, with these entries over it."""
        simulation = {"dataset": self.dataset, "sites": self.sites, "device": "cpu", "baselines": False}
        values: dict[str, Any] = {"simulation": simulation, "model": dict(self.model), "data": {}}
        if self.image_size is not None:
            values["data"]["image_size"] = self.image_size
        for name, entries in sections.items():
            values[name] = {**values.get(name, {}), **entries}
        return build(values, "options")

    def scene(self, **sections: Mapping[str, Any]) -> Scene:
        """Return the run with its data and its model."""
        return runner.set_scene(self.plan(**sections), self.cache, _silent)


def _silent(_phase: str, _done: int, _total: int) -> None:
    pass


# Running and timing


class Clock:
    """A run's progress that keeps when each round began, and what `at_round` says at these times."""

    def __init__(self, at_round: Callable[[], Any] = lambda: None) -> None:
        self.notes: list[Any] = []
        self._marks: list[float] = []
        self._worked: list[float] = []
        self._at_round = at_round

    def __call__(self, phase: str, _done: int, _total: int) -> None:
        """Hear of a phase; `rounds` is told before each round and after the last."""
        if phase == "rounds":
            self.notes.append(self._at_round())
            self._marks.append(time.perf_counter())
            self._worked.append(time.process_time())

    @property
    def cores(self) -> float:
        """How many cores the rounds kept busy: fewer than their threads when others use the machine."""
        return (self._worked[-1] - self._worked[0]) / (self._marks[-1] - self._marks[0])

    @property
    def seconds(self) -> list[float]:
        """Of each round, with everything that belongs to it: the state on disk too."""
        return [after - before for before, after in pairwise(self._marks)]


def federate(scene: Scene, cache: Path, clock: Clock) -> None:
    """Run the scene's federation as `consilium simulate` does, with its state on disk; nothing of it is kept.

    Raises:
        ConsiliumError: the run did not end.
    """
    ended: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="consilium-compare-") as name:
        folder = Path(name)
        start = start_of(scene, folder)
        workshop = Workshop(cache, scene.device)
        workshop.lend(scene.run.fingerprint(), scene.built)

        def coordinate(grid: Any) -> None:
            Coordinator(Federation(grid, scene.run.sites.deadline_s), start, clock).execute()
            ended.append(True)

        app = make_client_app(open_in_process(scene.sites, workshop, folder / "state"))
        run_in_process(make_server_app(coordinate), InProcessGrid(app, list(scene.sites)))
    if not ended:
        raise ConsiliumError("the run to be measured did not end")


# Speed


def speed(bench: Bench) -> Findings:
    """Time a round of ours and of a plain Flower app: ours, theirs, ours again."""
    found = {cut: _speed(bench, cut) for cut in bench.cuts}
    return Findings(found, [row for cut, facts in found.items() for row in _speed_rows(cut, facts, bench.rounds)])


def _speed(bench: Bench, cut: str) -> dict[str, Any]:
    training = {"rounds": max(3, bench.rounds // 3), "batch_size": BATCH_SIZE}
    one_view = {"model": {**bench.model, "trainable": cut}, "training": training, "data": _data(bench, views=1)}
    default = {**one_view, "data": _data(bench)}
    before = _rounds_of(bench.scene(**one_view), bench.cache)
    theirs = _plain_rounds(bench, one_view)
    after = _rounds_of(bench.scene(**one_view), bench.cache)
    first, again = before.seconds, after.seconds
    views = bench.scene(**default)
    with_views = _rounds_of(views, bench.cache).seconds
    one_pass = _one_pass(views)
    ours, plain = statistics.median(first + again), statistics.median(theirs.seconds)
    whole = one_pass + bench.rounds * ours
    return {
        "plain_s": plain,
        "plain_state_bytes": theirs.state_bytes,
        "plain_losses": theirs.losses,
        "plain_cores": theirs.cores,
        "ours_cores": [before.cores, after.cores],
        "ours_s": ours,
        "ours_rounds_s": [first, again],
        "ratio": plain / ours,
        "views": views.run.data.views,
        "ours_with_views_s": statistics.median(with_views),
        "ratio_with_views": plain / statistics.median(with_views),
        "one_pass_s": one_pass,
        "one_pass_share": one_pass / whole,
        "ratio_of_whole_run": bench.rounds * plain / whole,
    }


def _data(bench: Bench, **entries: Any) -> dict[str, Any]:
    return entries if bench.image_size is None else {"image_size": bench.image_size, **entries}


def _rounds_of(scene: Scene, cache: Path) -> Clock:
    clock = Clock()
    federate(scene, cache, clock)
    return clock


def _plain_rounds(bench: Bench, sections: Mapping[str, Mapping[str, Any]]) -> plain_flower.Measured:
    scene = bench.scene(**sections)
    deep = scene.built.upper.body is not None
    rate = base_lr(scene.run.training, deep=deep)
    recipe = plain_flower.Recipe(BATCH_SIZE, rate, scene.built.spec)
    return plain_flower.run(scene.built, list(scene.sites.values()), recipe, rounds=1)


def _one_pass(scene: Scene) -> float:
    """Return the seconds of passing every image, in one view, through the trunk into an empty cache."""
    pool = scene.dataset.cohort
    sample = pool.subset(np.arange(min(SAMPLE, len(pool))))
    with tempfile.TemporaryDirectory(prefix="consilium-compare-") as name, threads():
        extractor = _extractor(scene, pool, Path(name))
        extractor.fill(pool.subset(np.arange(len(pool) - 1, len(pool))), 1)  # the first pass is slower than any other
        begin = time.perf_counter()
        rows = extractor.fill(sample, 1)
        return (time.perf_counter() - begin) / max(rows, 1) * len(pool)


def _extractor(scene: Scene, pool: Cohort, cache: Path) -> Extractor:
    return Extractor.open(
        scene.built.trunk,
        scene.built.spec,
        sha256=scene.run.model.trunk_sha256,
        cohort=pool,
        cache=cache,
        augmentation=Augmentation.of(PRESETS[scene.run.data.preset]),
        device=scene.device,
    )


def _speed_rows(cut: str, facts: Mapping[str, Any], rounds: int) -> list[Row]:
    least = LEAST_SPEED_UP.get(cut, 1.0)
    share = f"{facts['one_pass_share']:.0%} of a run of {rounds} rounds"
    return [
        Row(f"{cut}: a plain Flower round", f"{facts['plain_s']:.2f} s"),
        Row(f"{cut}: a round, 1 view", f"{facts['ours_s']:.3f} s"),
        Row(f"{cut}: times faster", f"{facts['ratio']:.1f}", f"at least {least:g}", facts["ratio"] >= least),
        Row(
            f"{cut}: times faster, {facts['views']} views",
            f"{facts['ratio_with_views']:.1f}",
            f"at least {least:g}",
            facts["ratio_with_views"] >= least,
        ),
        Row(f"{cut}: cores kept busy", f"plain {facts['plain_cores']:.2f}, ours {min(facts['ours_cores']):.2f}"),
        Row(f"{cut}: one pass through the trunk, 1 view", f"{facts['one_pass_s']:.1f} s, {share}"),
        Row(f"{cut}: times faster, {rounds} rounds with that pass", f"{facts['ratio_of_whole_run']:.1f}"),
    ]


# Orchestration

# What is timed inside a round: where it is looked up, and what it counts as. The first two are the work itself.
_WORK = ("training", "evaluation")
_PROBES: tuple[tuple[object, str, str], ...] = (
    (client.training, "fit", _WORK[0]),
    (client.evaluation, "evaluate", _WORK[1]),
    (server.state, "save", "state: save"),
    (server.state.RoundLog, "append", "state: append to rounds.jsonl"),
    (common.files, "write_atomic", "state: files and fsync"),
    (common.checkpoint, "write_atomic", "state: files and fsync"),
    (common.codec, "encode", "weights: encode"),
    (common.codec, "decode", "weights: decode"),
    (common.model, "load_trainable", "weights: into the model"),
    (common.model, "load_standardiser", "weights: into the model"),
    (common.model, "trainable_values", "weights: out of the model"),
    (common.parameters, "subtract", "weights: difference"),
    (server.coordinator, "admit_update", "admission"),
    (server.coordinator, "admit_evaluation", "admission"),
    (server.aggregation.Aggregator, "aggregate", "aggregation"),
    (server.evaluation.Measured, "summary", "summary: pooled"),
    (server.evaluation.Measured, "site_summaries", "summary: by site"),
    (server.coordinator, "next_edges", "summary: next edges"),
    (common.metrics, "youden", "summary: threshold"),
    (client.app, "from_record", "messages: records"),
    (client.app, "to_record", "messages: records"),
    (server.federation, "from_record", "messages: records"),
    (server.federation, "to_record", "messages: records"),
    (server.federation, "count_bytes", "messages: count bytes"),
    (InProcessGrid, "pull_messages", "messages: grid, app and site"),
)


class Ledger:
    """Seconds by what they were spent on; of nested calls each counts its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return the function, its time written down under `name`."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - begin
                self.seconds[name] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return wrapper

    def page(self) -> dict[str, float]:
        """Return a copy of the seconds so far."""
        return dict(self.seconds)


@contextmanager
def probes(ledger: Ledger) -> Iterator[None]:
    """Time the parts of a round in place, and take the clocks out again."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in _PROBES]
    try:
        for (owner, name, label), (_, _, original) in zip(_PROBES, originals, strict=True):
            setattr(owner, name, ledger.timed(original, label))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def orchestration(bench: Bench) -> Findings:
    """Find out what a round spends beside training and evaluation."""
    found = {cut: _orchestration(bench, cut) for cut in bench.cuts}
    rows = [row for cut, facts in found.items() for row in _orchestration_rows(cut, facts)]
    return Findings(found, rows)


def _orchestration(bench: Bench, cut: str) -> dict[str, Any]:
    training = {"rounds": bench.rounds if cut == "head" else min(bench.rounds, 3)}
    scene = bench.scene(model={**bench.model, "trainable": cut}, training=training)
    ledger = Ledger()
    clock = Clock(ledger.page)
    with probes(ledger):
        federate(scene, bench.cache, clock)
    spent = [_difference(after, before) for before, after in pairwise(clock.notes)]
    rest = [1 - sum(page.get(name, 0.0) for name in _WORK) / whole for page, whole in _paired(spent, clock)]
    names = sorted({name for page in spent for name in page})
    seconds = {name: statistics.median(page.get(name, 0.0) for page in spent) for name in names}
    unnamed = statistics.median(whole - sum(page.values()) for page, whole in _paired(spent, clock))
    return {
        "round_s": statistics.median(clock.seconds),
        "share": statistics.median(rest),
        "shares": rest,
        "seconds": {**dict(sorted(seconds.items(), key=lambda item: -item[1])), "not named": unnamed},
    }


def _paired(spent: list[dict[str, float]], clock: Clock) -> Iterator[tuple[dict[str, float], float]]:
    return zip(spent, clock.seconds, strict=True)


def _difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def _orchestration_rows(cut: str, facts: Mapping[str, Any]) -> list[Row]:
    share, whole = facts["share"], facts["round_s"]
    rows = [
        Row(f"{cut}: a round", f"{1000 * whole:.0f} ms"),
        Row(f"{cut}: not work", f"{share:.1%}", f"below {MOST_OVERHEAD:.0%}", share < MOST_OVERHEAD),
    ]
    parts = [(name, value) for name, value in facts["seconds"].items() if value >= 0.001 * whole]
    return rows + [Row(f"{cut}:   {name}", f"{1000 * value:.1f} ms, {value / whole:.1%}") for name, value in parts]


# Scale

_IMAGES_EACH = 5
_SMALL = 32


def scale(bench: Bench) -> Findings:
    """Run few and many sites of five images, each run in a fresh process, and compare their memory."""
    rounds = bench.rounds
    few, many = (_in_own_process(sites, rounds) for sites in bench.crowd)
    ratio = max(many["peak_mb"]) / max(few["peak_mb"])
    growth = max(many["peak_mb"][1:]) / many["peak_mb"][1]
    facts = {"few": few, "many": many, "ratio": ratio, "growth": growth}
    label = f"{bench.crowd[1]:,} sites"
    return Findings(
        facts,
        [
            Row(f"{bench.crowd[0]:,} sites: peak of a round", f"{max(few['peak_mb']):.0f} MB"),
            Row(f"{label}: peak of a round", f"{max(many['peak_mb']):.0f} MB"),
            Row(f"{label}: over few sites", f"{ratio:.2f}", f"below {MOST_MEMORY:g}", ratio < MOST_MEMORY),
            Row(f"{label}: highest round over the first", f"{growth:.3f}", f"≤ {MOST_GROWTH:g}", growth <= MOST_GROWTH),
            Row(f"{label}: seconds a round", f"{many['round_s']:.2f}"),
            Row(f"{label}: a site", f"{1000 * many['round_s'] / bench.crowd[1]:.2f} ms a round"),
            Row(f"{label}: before the first round", f"{many['setup_s']:.1f} s"),
        ],
    )


def _in_own_process(sites: int, rounds: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_crowd, sites, rounds).result()


def _crowd(sites: int, rounds: int) -> dict[str, Any]:
    """Run a federation of small sites; return its seconds, and its peak memory before, in and after each round."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="consilium-compare-") as name:
        folder = Path(name)
        bench = Bench(
            str(_write_crowd(folder, sites)), _SMALL, sites, cache=folder / "cache", model={"weights": "none"}
        )
        simulation = {**bench.plan().model_dump()["simulation"], "partition": "natural"}
        scene = bench.scene(simulation=simulation, training={"rounds": rounds}, data=_data(bench, views=1))
        clock = Clock(_take_peak)
        federate(scene, bench.cache, clock)
        whole = time.perf_counter() - begin
        seconds = clock.seconds
        return {
            "sites": sites,
            "peak_mb": clock.notes,  # the first is of everything before round 1
            "round_s": statistics.median(seconds),
            "rounds_s": seconds,
            "setup_s": whole - sum(seconds),
        }


def _write_crowd(folder: Path, sites: int) -> Path:
    """Write random images of two labels that differ in brightness; each site has three, one and one of the splits."""
    count = sites * _IMAGES_EACH
    drawn = numpy_stream(0, "crowd")
    labels = np.arange(count) % 2
    images = drawn.integers(0, 200, (count, _SMALL, _SMALL), np.uint8) + (labels * 50).astype(np.uint8)[:, None, None]
    split = np.tile(["train", "train", "train", "validation", "test"], sites)
    site = np.repeat([f"site-{number:04d}" for number in range(sites)], _IMAGES_EACH)
    path = folder / "crowd.npz"
    np.savez(path, allow_pickle=False, images=images, labels=labels, split=split, site=site)
    return path


def _take_peak() -> float:
    """Return the most memory held since the last call, in MB, and begin anew."""
    held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    return int(cast("re.Match[str]", held)[1]) / 1000


# A warm start


def warm(bench: Bench) -> Findings:
    """Run the command three times; time the last two up to the state that is written before round 1."""
    with tempfile.TemporaryDirectory(prefix="consilium-compare-") as name:
        seconds = [_until_first_round(bench, Path(name) / str(number)) for number in range(3)]
    imports = _seconds_of([sys.executable, "-P", "-c", "import simulations.runner"])
    second = statistics.median(seconds[1:])
    facts = {"first_s": seconds[0], "again_s": seconds[1:], "imports_s": imports}
    return Findings(
        facts,
        [
            Row("to the first round, first run", f"{seconds[0]:.2f} s"),
            Row(
                "to the first round, run again", f"{second:.2f} s", f"at most {MOST_WARM_S:g} s", second <= MOST_WARM_S
            ),
            Row("of it, imports", f"{imports:.2f} s"),
        ],
    )


def _until_first_round(bench: Bench, output: Path) -> float:
    command = [sys.executable, "-P", "-c", "from common.cli import main; main()", "simulate", "--quiet", "--json"]
    command += ["--dataset", bench.dataset, "--sites", str(bench.sites), "--rounds", "1", "--no-baselines"]
    command += ["--cache", str(bench.cache), "--output", str(output), "--device", "cpu"]
    command += ["--image-size", str(bench.image_size)] if bench.image_size else []
    command += [part for key, value in bench.model.items() for part in (f"--{key}", str(value))]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:  # noqa: S603  this very program
        while not (output / "state" / "state.json").exists() and process.poll() is None:
            time.sleep(0.002)
        seconds = time.perf_counter() - begin
    if process.returncode:
        raise ConsiliumError(f"the run to be measured failed with exit code {process.returncode}")
    return seconds


def _seconds_of(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True)  # noqa: S603  this very program
    return time.perf_counter() - begin


# Bytes


def count_bytes(bench: Bench) -> Findings:
    """Compare what the rounds sent with the least that they could send at each wire type."""
    found = {wire: _bytes(bench, wire, bench.cuts[0]) for wire in WIRE_BYTES}
    rows = []
    for wire, facts in found.items():
        for way in ("down", "up"):
            value = facts[way]
            rows.append(Row(f"{wire}: {way}", f"{value:.4f}", f"≤ {MOST_BYTES:g}", value <= MOST_BYTES))
        beside = f"{facts['evaluation_down']:,} down, {facts['evaluation_up']:,} up"
        rows.append(Row(f"{wire}: evaluation and facts, a site and round", beside))
    return Findings(found, rows)


def _bytes(bench: Bench, wire: str, cut: str) -> dict[str, Any]:
    plan = bench.plan(
        model={**bench.model, "trainable": cut},
        wire={"dtype": wire},
        training={"rounds": 2},
        data=_data(bench, views=1),
    )
    with tempfile.TemporaryDirectory(prefix="consilium-compare-") as name:
        folder, _ = runner.simulate(Job(plan, Path(name) / "run", bench.cache), _silent)
        result = json.loads((folder / "result.json").read_text())
    sites, rounds = len(result["sites"]), result["rounds"][1:]
    least = sites * result["upper"]["parameters"] * WIRE_BYTES[wire]
    return {
        "least_bytes": least,
        "down": max(entry["bytes_down"] for entry in rounds) / least,
        "up": max(entry["bytes_up"] for entry in rounds) / least,
        "evaluation_down": rounds[-1]["evaluation_bytes_down"] // sites,
        "evaluation_up": rounds[-1]["evaluation_bytes_up"] // sites,
    }


# Accuracy


def accuracy(bench: Bench) -> Findings:
    """Compare the federation with pooled training, over partitions and seeds."""
    found: dict[str, Any] = {}
    for rule in PARTITIONS:
        runs = [_accuracy(bench, rule, seed) for seed in bench.seeds]
        keys = runs[0].keys()
        found[rule] = {"runs": runs, **{key: _mean([run[key] for run in runs]) for key in keys}}
    return Findings(found, [row for rule, facts in found.items() for row in _accuracy_rows(rule, facts)])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _accuracy(bench: Bench, rule: str, seed: int) -> dict[str, float | None]:
    simulation = {"dataset": bench.dataset, "sites": bench.sites, "partition": rule, "device": "cpu"}
    plan = bench.plan(simulation=simulation | {"baselines": True}, training={"rounds": bench.rounds})
    plan = plan.model_copy(update={"seed": seed})
    with tempfile.TemporaryDirectory(prefix="consilium-compare-") as name:
        _, result = runner.simulate(Job(plan, Path(name) / "run", bench.cache), _silent)
    ours, pooled = result["test"]["pooled"], result["baselines"]["pooled"]
    found: dict[str, float | None] = {}
    for key in ("auc", "accuracy"):
        known = ours[key] is not None and pooled[key] is not None
        found |= {key: ours[key], f"pooled_{key}": pooled[key]}
        found[f"{key}_difference"] = ours[key] - pooled[key] if known else None
    return found


def _accuracy_rows(rule: str, facts: Mapping[str, Any]) -> list[Row]:
    def shown(key: str, sign: str = "") -> str:
        return "not defined" if facts[key] is None else f"{facts[key]:{sign}.4f}"

    return [
        Row(
            f"{rule}: {key.upper() if key == 'auc' else key}",
            f"{shown(key)}, pooled {shown('pooled_' + key)}, difference {shown(key + '_difference', '+')}",
        )
        for key in ("auc", "accuracy")
    ]


# The command

SECTIONS: Mapping[str, Callable[[Bench], Findings]] = {
    "speed": speed,
    "orchestration": orchestration,
    "scale": scale,
    "warm": warm,
    "bytes": count_bytes,
    "accuracy": accuracy,
}


def show(title: str, findings: Findings, console: Console) -> None:
    """Print one section's table."""
    table = Table(title=title, title_justify="left")
    for column in ("figure", "measured", "aim", ""):
        table.add_column(column)
    for row in findings.rows:
        table.add_row(row.name, row.value, row.aim, {None: "", True: "met", False: "missed"}[row.met])
    console.print(table)


def _seeds(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise click.BadParameter(f"got {text!r}, expected whole numbers with commas between")
    return tuple(int(part) for part in text.split(","))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dataset", default="phantoms", metavar="NAME|FILE|FOLDER", help="As of consilium simulate [phantoms].")
@click.option("--image-size", type=int, metavar="PIXELS", help="Side of the square input [the preset's].")
@click.option("--sites", type=int, default=5, metavar="N", help="Hospitals [5].")
@click.option("--rounds", type=int, default=10, metavar="N", help="Rounds of a run [10].")
@click.option("--seeds", default="0,1,2", metavar="N,N,…", callback=_seeds, help="Of the runs of accuracy [0,1,2].")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="A section; repeatable [all].")
@click.option(
    "--cache", type=click.Path(path_type=Path), metavar="DIR", help="Features and images [a folder for once]."
)
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
def main(
    dataset: str,
    image_size: int | None,
    sites: int,
    rounds: int,
    seeds: tuple[int, ...],
    only: tuple[str, ...],
    cache: Path | None,
    as_json: Path | None,
) -> None:
    """Measure the figures that the project promises, and compare each with its aim."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if rounds < 2 or sites < 1:
        raise ConfigError(f"--rounds and --sites: got {rounds} and {sites}, expected at least 2 and 1")
    console, facts = Console(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="consilium-compare-") as name:
        bench = Bench(dataset, image_size, sites, rounds, seeds, cache or Path(name))
        for section in only or SECTIONS:
            before = os.getloadavg()[0]
            findings = SECTIONS[section](bench)
            load = (before, os.getloadavg()[0])
            facts[section] = {**findings.facts, "load": load}
            beside = f"load {load[0]:.1f} before, {load[1]:.1f} after, {len(os.sched_getaffinity(0))} cores"
            show(f"{section} ({beside})", findings, console)
    if as_json is not None:
        write_json(as_json, facts)


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"compare: {error}", err=True)
        sys.exit(error.exit_code)
