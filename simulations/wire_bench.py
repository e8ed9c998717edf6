"""What a federation costs on the wire, in time and in memory, on loopback: `python -P -m simulations.wire_bench`.

bytes          counted on the sockets between each site and the coordinator: a round beside its weights, the trunk once
round          the seconds of a round in which nothing is to be trained, beside a stock deployment of Flower
coordinator    memory of its two processes with twenty sites and an upper of 40 MB, over the rounds
site           memory, open files and threads of a site's daemon and link, over the rounds

All processes are true ones and speak over TLS; behind the twenty sites there is nobody (`simulations.light_sites`).
Aims are ratios within one run of this command, but for the coordinator's memory. Seconds depend on who else uses the
machine: each table says how busy it was, and a figure taken while others used it wants repeating.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
from rich.console import Console
from safetensors.torch import save_file

from common import model
from common.errors import ConfigError, ConsiliumError
from common.files import write_json
from common.run_config import RunConfig, Task, build
from server.plan import settled
from server.settling import HEAD_WEIGHT
from simulations import plain_deployment
from simulations.compare import Findings, Row, show
from simulations.light_sites import FACTS
from simulations.observed import Held, Sample, watched
from simulations.runner import Scene, set_scene
from simulations.tap import Counts
from simulations.wire_stage import Journey, Stage, light_sites, real_sites

BACKBONE = "resnet18"
"""Its last stage and head are 34 MB of 45, the last two 42 MB."""

SMALL_BACKBONE = "resnet10t"
SIDE, IMAGES = 32, 60
RUN_S = 1800.0
SAMPLE_S = 0.2
MOST_BYTES = 1.03
LEAST_TRUNK_GAP = 0.02
"""A second run's set-up stays below this share of the trunk."""

MOST_OF_PLAIN = 0.5
MOST_COORDINATOR = 1.5e9
MOST_GROWTH = 1.05
TEN = 10
"""Rounds at either end that are compared."""

_SET_UP = ("starting", "trunk", "prepare")


@dataclass(frozen=True)
class Bench:
    """For how long is measured, and on how many."""

    cache: Path
    sites: int = 2
    byte_rounds: int = 3
    empty_rounds: int = 10
    plain_rounds: int = 3
    crowd: int = 20
    crowd_rounds: int = 3
    crowd_cut: str = "stages:2"
    long_rounds: int = 50

    def scene(self, backbone: str, cut: str, rounds: int) -> Scene:
        """Return a few images at the sites, and a backbone whose weights no site has."""
        path, weights = self.cache / "few.npz", self.cache / f"{backbone}.safetensors"
        if not weights.exists():
            _draw_weights(weights, backbone)
        if not path.exists():
            _draw(path)
        sections = {
            "simulation": {"dataset": str(path), "sites": self.sites, "device": "cpu", "partition": "iid"},
            "data": {"image_size": SIDE},
            "model": {"backbone": backbone, "weights": str(weights), "trainable": cut, "ridge": [1.0]},
            # A rate that never ends, and a head that is not zero: a change of zeros would be sent once, not whole.
            "training": {"rounds": rounds, "local_steps": 1, "batch_size": 8, "schedule": "constant"},
        }
        return set_scene(build(sections, "wire_bench"), self.cache, lambda _phase, _done, _total: None)


def _draw(path: Path) -> None:
    labels = np.arange(IMAGES) % 2
    noise = np.random.default_rng(0).integers(0, 150, (IMAGES, SIDE, SIDE), np.uint8)
    split = np.tile(["train", "train", "train", "validation", "test", "train"], IMAGES // 6)
    np.savez(path, images=noise + (labels * 100).astype(np.uint8)[:, None, None], labels=labels, split=split)


def _draw_weights(path: Path, backbone: str) -> None:
    """Write random weights none of which is zero: timm's own leave blocks without a gradient, whose change is zero."""
    network = timm.create_model(backbone, pretrained=False, zero_init_last=False)
    save_file(network.state_dict(), path)


# Bytes on the wire


def count_bytes(bench: Bench) -> Findings:
    """Count what passes between each site and the coordinator in two runs, the second without a trunk to send."""
    scene = bench.scene(SMALL_BACKBONE, "stages:1", bench.byte_rounds)
    again = replace_lr(scene.run)
    with real_sites(scene) as stage:
        first = stage.drive(scene.run, stage.root / "first", RUN_S)
        second = stage.drive(again, stage.root / "second", RUN_S)
        recorded = _recorded(first)
    values = sum(value.size for value in model.trainable_values(scene.built.upper).values())
    payload = 2 * 4 * values
    by_round = [round_bytes(journey, payload) for journey in (first, second)]
    facts = {
        "payload_bytes": payload,
        "recorded_weight_bytes": recorded,
        "trunk_bytes": len(scene.trunk),
        "rounds": by_round,
        "set_up_bytes": [set_up_bytes(journey) for journey in (first, second)],
        "phases": [phase_bytes(journey) for journey in (first, second)],
    }
    return Findings(facts, bytes_rows(facts))


def replace_lr(run: RunConfig) -> RunConfig:
    """Return another run over the same data and the same trunk."""
    lr = (run.training.lr or 1e-4) / 2
    return run.model_copy(update={"training": run.training.model_copy(update={"lr": lr})})


def _recorded(journey: Journey) -> list[int]:
    """Return the bytes of weights that the run itself says each round had, of all sites."""
    result = json.loads((journey.folder / "result.json").read_bytes())
    return [entry["bytes_down"] + entry["bytes_up"] for entry in result["rounds"] if entry["round"]]


def round_bytes(journey: Journey, payload: int) -> list[dict[str, float]]:
    """Return, by site, what a round took on average, and its ratio to the payload."""
    edges = journey.edges()
    begin, end = edges[0].passed, edges[-1].passed
    found = []
    for site in sorted(begin):
        passed = end[site] - begin[site]
        each = (passed.up + passed.down) / journey.rounds
        found.append({"down": passed.down / journey.rounds, "up": passed.up / journey.rounds, "ratio": each / payload})
    return found


def set_up_bytes(journey: Journey) -> list[int]:
    """Return what passed each site, both ways, until all had the trunk and had passed their images through it."""
    begin, end = journey.marks[0].passed, journey.after(_SET_UP).passed
    return [(passed := end[site] - begin[site]).up + passed.down for site in sorted(begin)]


def phase_bytes(journey: Journey) -> dict[str, int]:
    """Return what passed all sites, both ways, by phase."""
    found: dict[str, int] = {}
    marks = journey.marks
    for mark, after in pairwise(marks):
        passed = sum((after.passed[site] - mark.passed[site] for site in mark.passed), Counts())
        found[mark.phase] = found.get(mark.phase, 0) + passed.up + passed.down
    return found


def bytes_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the lines of the section."""
    payload, trunk = facts["payload_bytes"], facts["trunk_bytes"]
    ratios = [entry["ratio"] for run in facts["rounds"] for entry in run]
    worst = max(ratios)
    excess = (worst - 1) * payload
    first, second = facts["set_up_bytes"]
    return [
        Row(
            "a round and site, on the socket",
            f"{payload * worst / 1e6:.2f} MB over {payload / 1e6:.2f} MB of weights: {worst:.4f}",
            f"1 to {MOST_BYTES}",
            worst <= MOST_BYTES and min(ratios) >= 1,  # less would mean that something was not sent
        ),
        Row(
            "what is not weights in it",
            f"{excess / 1e3:.0f} kB; the trunk is {trunk / 1e6:.2f} MB",
            "no trunk",
            excess < LEAST_TRUNK_GAP * trunk,
        ),
        Row(
            "set-up of a first run, a site",
            f"{max(first) / 1e6:.2f} MB: {max(first) / trunk:.3f} of the trunk",
            f"the trunk once, at most {MOST_BYTES}",
            max(first) <= MOST_BYTES * trunk,
        ),
        Row(
            "set-up of a second run, a site",
            f"{max(second) / 1e3:.1f} kB: {max(second) / trunk:.5f} of the trunk",
            f"no trunk: below {LEAST_TRUNK_GAP}",
            max(second) < LEAST_TRUNK_GAP * trunk,
        ),
    ]


# Seconds of an empty round


def empty_round(bench: Bench) -> Findings:
    """Time rounds that train one step of a tiny head on features that are there, and those of a stock deployment."""
    scene = bench.scene(SMALL_BACKBONE, "head", bench.empty_rounds)
    values = sum(value.size for value in model.trainable_values(scene.built.upper).values())
    with real_sites(scene) as stage:
        ours = stage.drive(scene.run, stage.root / "run", RUN_S).round_seconds()
    with tempfile.TemporaryDirectory(prefix="consilium-plain-") as name:
        plain = plain_deployment.round_seconds(Path(name), bench.sites, values, bench.plain_rounds)
    facts = {"values": values, "ours": ours, "plain": plain}
    return Findings(facts, round_rows(facts))


def round_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the lines of the section; the first round of each, which warms up, does not count."""
    ours, plain = (statistics.mean(facts[name][1:] or facts[name]) for name in ("ours", "plain"))
    ratio = ours / plain
    return [
        Row("an empty round, ours", f"{ours:.2f} s (median {statistics.median(facts['ours']):.2f})"),
        Row("an empty round, plain Flower: train, then evaluate", f"{plain:.2f} s"),
        Row("ours over plain", f"{ratio:.3f}", f"at most {MOST_OF_PLAIN}", ratio <= MOST_OF_PLAIN),
    ]


# Memory of the coordinator


def coordinator(bench: Bench) -> Findings:
    """Watch the SuperLink and the engine while many sites exchange large weights."""
    names = tuple(f"site-{number:02}" for number in range(bench.crowd))
    sections = {
        "data": {"image_size": SIDE, "views": 1},
        "model": {"backbone": BACKBONE, "weights": "none", "trainable": bench.crowd_cut, "init": "zero"},
        "training": {"rounds": bench.crowd_rounds, "local_steps": 1},
    }
    task = Task(name="crowd", labels=("no", "yes"))
    found = settled(build(sections, "wire_bench"), task, names, "generic")
    shapes = {name: value.shape for name, value in model.trainable_values(found.built.upper).items()}
    upper = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    width = shapes[HEAD_WEIGHT][1]

    def prepare(folder: Path) -> None:
        (folder / FACTS).write_text(json.dumps({"width": width}), encoding="utf-8")

    run = found.run
    del found
    with light_sites(names, prepare) as stage, watched(stage.coordinator_pids, SAMPLE_S) as samples:
        journey = stage.drive(run, stage.root / "run", RUN_S)
    facts = {
        "sites": len(names),
        "upper_bytes": upper,
        "rounds": peaks(samples, journey),
        "set_up": _peak(samples, float("-inf"), journey.edges()[0].at),
        "seconds": journey.round_seconds(),
    }
    return Findings(facts, coordinator_rows(facts))


def peaks(samples: Sequence[Sample], journey: Journey) -> list[dict[str, int]]:
    """Return the peaks of each round: of each process, and of their sum."""
    return [_peak(samples, begin.at, end.at) for begin, end in pairwise(journey.edges())]


def _peak(samples: Sequence[Sample], begin: float, end: float) -> dict[str, int]:
    within = [sample for sample in samples if begin <= sample.at < end]
    names = sorted({name for sample in within for name in sample.held})
    found = {name: max(sample.held[name].rss for sample in within if name in sample.held) for name in names}
    totals = [sample.total for sample in within]
    return found | {
        "sum": max((total.rss for total in totals), default=0),
        "sum_pss": max((total.pss for total in totals), default=0),
    }


def ends(figures: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last ten rounds; of fewer than twenty: of each half.

    Examples:
        >>> ends([1, 1, 2, 2])
        (1, 2)
    """
    count = max(1, min(TEN, len(figures) // 2))
    return statistics.mean(figures[:count]), statistics.mean(figures[-count:])


def coordinator_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the lines of the section."""
    sums = [entry["sum"] for entry in facts["rounds"]]
    worst = max(sums)
    before, after = ends(sums)
    each = {
        name: max(entry[name] for entry in facts["rounds"] if name in entry)
        for name in facts["rounds"][-1]
        if not name.startswith("sum")
    }
    size = f"{facts['sites']} sites, {facts['upper_bytes'] / 1e6:.0f} MB"
    return [
        Row(
            f"peak of SuperLink and engine, {size}",
            f"{worst / 1e9:.2f} GB ({', '.join(f'{name} {value / 1e9:.2f}' for name, value in each.items())})",
            f"below {MOST_COORDINATOR / 1e9} GB",
            worst < MOST_COORDINATOR,
        ),
        Row(
            f"its growth over {len(sums)} rounds",
            f"{before / 1e9:.2f} to {after / 1e9:.2f} GB: {after / before:.3f}",
            f"at most {MOST_GROWTH}",
            after <= MOST_GROWTH * before,
        ),
        Row("a round", f"{statistics.median(facts['seconds']):.1f} s"),
    ]


# Memory and handles of a site


def site(bench: Bench) -> Findings:
    """Watch a site's daemon and link over many rounds."""
    scene = bench.scene(SMALL_BACKBONE, "head", bench.long_rounds)
    with real_sites(scene) as stage, watched(_pids(stage), SAMPLE_S) as samples:
        journey = stage.drive(scene.run, stage.root / "run", RUN_S)
    facts = {"rounds": bench.long_rounds, "processes": over_rounds(samples, journey)}
    return Findings(facts, site_rows(facts))


def _pids(stage: Stage) -> Callable[[], Mapping[str, int]]:
    found = stage.site_pids()  # they stay the same, or the run fails
    return lambda: found


def over_rounds(samples: Sequence[Sample], journey: Journey) -> dict[str, list[dict[str, int]]]:
    """Return, by process, what it held as each round ended."""
    ended = [mark.at for mark in journey.edges()[1:]]
    found: dict[str, list[dict[str, int]]] = {}
    for at in ended:
        sample = min(samples, key=lambda sample: abs(sample.at - at))
        for name, held in sample.held.items():
            found.setdefault(name, []).append(_shown(held))
    return found


def _shown(held: Held) -> dict[str, int]:
    return {"rss": held.rss, "files": held.files, "threads": held.threads}


def site_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the lines of the section: the worst site's of each kind of process."""
    rows = []
    for kind in ("daemon", "link"):
        found = [rounds for name, rounds in facts["processes"].items() if name.startswith(kind)]
        before, after = max(
            (ends([entry["rss"] for entry in rounds]) for rounds in found), key=lambda pair: pair[1] / pair[0]
        )
        rows.append(
            Row(
                f"memory of a site's {kind} over {facts['rounds']} rounds",
                f"{before / 1e6:.0f} to {after / 1e6:.0f} MB: {after / before:.3f}",
                f"at most {MOST_GROWTH}",
                after <= MOST_GROWTH * before,
            )
        )
        for what in ("files", "threads"):
            # The least of ten rounds: whatever a message in work has open is gone by the next, a leak stays.
            least = [
                (min(entry[what] for entry in rounds[:TEN]), min(entry[what] for entry in rounds[-TEN:]))
                for rounds in found
            ]
            first, last = max(least, key=lambda pair: pair[1] - pair[0])
            named = "open files" if what == "files" else what
            rows.append(Row(f"{named} of it at rest", f"{first} to {last}", "no more", last <= first))
    return rows


# The command

SECTIONS: Mapping[str, Callable[[Bench], Findings]] = {
    "bytes": count_bytes,
    "round": empty_round,
    "coordinator": coordinator,
    "site": site,
}


def _sized(bench: Bench, rounds: int | None) -> Bench:
    if rounds is None:
        return bench
    if rounds < 2:
        raise ConfigError(f"--rounds: got {rounds}, expected at least 2")
    return replace(bench, byte_rounds=rounds, empty_rounds=rounds, crowd_rounds=rounds, long_rounds=rounds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--section", multiple=True, type=click.Choice(list(SECTIONS)), help="One of them; repeatable [all].")
@click.option("--rounds", type=int, metavar="N", help="Rounds of each run [3, 10, 3 and 50, by section].")
@click.option("--sites", type=int, default=20, metavar="N", help="Sites of the coordinator's section [20].")
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
def main(section: tuple[str, ...], rounds: int | None, sites: int, as_json: Path | None) -> None:
    """Measure what the federation costs on the wire, and compare each figure with its aim."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if sites < 1:
        raise ConfigError(f"--sites: got {sites}, expected at least 1")
    console, facts = Console(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="consilium-wire-") as name:
        bench = _sized(Bench(Path(name), crowd=sites), rounds)
        for one in section or SECTIONS:
            before = os.getloadavg()[0]
            findings = SECTIONS[one](bench)
            load = (before, os.getloadavg()[0])
            facts[one] = {**findings.facts, "load": load}
            beside = f"load {load[0]:.1f} before, {load[1]:.1f} after, {len(os.sched_getaffinity(0))} cores"
            show(f"{one} ({beside})", findings, console)
    if as_json is not None:
        write_json(as_json, facts)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # no process is left behind
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"wire_bench: {error}", err=True)
        sys.exit(error.exit_code)
