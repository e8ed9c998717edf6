"""`consilium simulate` from a plan to a report: data, sites, federation, baselines, result."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.app import make_app as make_client_app
from client.augmentation import Augmentation
from client.cohort import Cohort
from client.features import Extractor
from client.workshop import Workshop, choose_device
from common import model, private_plan, private_steps
from common.errors import CheckpointError, ConfigError, ConsiliumError, UsageError, unknown_value
from common.files import write_atomic
from common.model import Built
from common.presets import PRESETS, Preset
from common.run_config import RunConfig, Simulation
from common.weights import Weights
from server import result
from server.app import make_app as make_server_app
from server.company import Cast, Start
from server.coordinator import Coordinator, Outcome
from server.federation import Federation
from server.plan import settled
from server.report import page
from server.result import Surroundings, TrunkFacts
from server.runs import next_folder
from simulations import baselines, datasets, hospitals, partition
from simulations.annotation import Policy
from simulations.datasets import Dataset
from simulations.grid import Fault, InProcessGrid, check_faults, run_in_process, run_on_ray
from simulations.hospitals import LEDGERS

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """What the command was asked to do."""

    plan: RunConfig  # as the options and the file say; labels, names and hashes are still open
    output: Path | None
    cache: Path
    resume: bool = False
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Everything that is settled before the first message."""

    run: RunConfig
    dataset: Dataset
    sites: dict[str, Cohort]
    built: Built
    trunk: bytes
    device: str


def simulate(job: Job, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Run a simulation to its end and return its folder and its result.

    Raises:
        UsageError: something that was asked for cannot be done as asked.
        ConsiliumError: the run failed; what was reached is in the folder.
    """
    begin = time.monotonic()
    plan = continued(job)
    scene = set_scene(plan, job.cache, progress)
    check_private(scene)
    check_faults(job.faults, scene.run.sites.names, scene.run.training.rounds)
    folder = open_folder(job, scene.run)
    workshop = Workshop(job.cache, scene.device)
    seconds = {"features": _fill(scene, job.cache, progress)}
    start = start_of(scene, folder)
    around = around_of(scene)
    workshop.lend(scene.run.fingerprint(), scene.built)
    cast = Cast()
    try:
        outcome = federate(start, scene, workshop, job, cast, progress)
    except ConsiliumError as error:
        rounds = result.read_rounds(folder)
        found = result.failed(str(error), around(None, seconds), cast, rounds, time.monotonic() - begin)
        result.finish(folder, found, page.write)
        raise
    seconds["rounds"] = outcome.seconds["rounds"]
    compared, seconds["baselines"] = compare(scene, start, workshop, folder, progress)
    seconds["total"] = time.monotonic() - begin
    known = around(compared, seconds)
    found = result.completed(outcome, known)
    result.write_model(folder / "model", outcome, known, found)
    result.finish(folder, found, page.write)
    return folder, found


def start_of(scene: Scene, folder: Path) -> Start:
    """Return what a coordinator starts with."""
    upper = scene.built.upper
    return Start(scene.run, scene.trunk, model.trainable_values(upper), folder, stages=upper.head.stages)


def set_scene(plan: RunConfig, cache: Path, progress: Progress) -> Scene:
    """Load the data, cut them into sites, build the model, and settle the run's configuration."""
    simulation = plan.simulation or Simulation()
    device = choose_device(simulation.device)
    preset_name, preset = _preset(plan, simulation)
    size = plan.data.image_size or preset.image_size
    spec = partition.parse_spec(simulation.partition or _default_partition(simulation))
    Weights.parse(plan.model.weights, plan.model.backbone)  # a bad value fails before the data are read
    data_root = Path(simulation.data_root) if simulation.data_root else cache / "datasets"
    dataset = datasets.load(
        simulation.dataset,
        data_root=data_root,
        cache=cache,
        preset=preset,
        image_size=size,
        seed=plan.seed,
        sites=simulation.sites,
        policy=Policy(plan.data.uncertain, plan.data.blank),
        progress=lambda done, total: progress("images", done, total),
    )
    parts = partition.partition(dataset.cohort, dataset.sites, spec, simulation.sites, plan.seed, cache)
    task = plan.task.model_copy(
        update={"name": dataset.name, "labels": dataset.cohort.label_names, "kind": dataset.cohort.kind}
    )
    placed = simulation.model_copy(update={"partition": str(spec), "data_root": str(data_root)})
    found = settled(plan.model_copy(update={"simulation": placed}), task, tuple(parts), preset_name)
    return Scene(found.run, dataset, hospitals.cohorts(dataset.cohort, parts), found.built, found.trunk, device)


def check_private(scene: Scene) -> None:
    """Refuse a private run that the sites would refuse, before anything is computed: it is one person's mistake here.

    Raises:
        ConfigError: no noise reaches the target at a site, or its delta is too large for it.
        NotPrivate: the model's gradients cannot be told apart by patient.
    """
    if not scene.run.privacy.on:
        return
    from client.clipping import require_private  # imports opacus, which takes a second

    for name, cohort in scene.sites.items():
        patients = len(np.unique(cohort.patients[cohort.indices("train")]))
        try:
            private_plan.plan(scene.run, patients)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    require_private(
        scene.built.upper,
        len(scene.run.task.labels),
        multi_label=scene.run.task.kind == "multi-label",
        clip=private_steps.clip_of(scene.run),
    )


def _preset(plan: RunConfig, simulation: Simulation) -> tuple[str, Preset]:
    name = plan.data.preset or ("phantom" if simulation.dataset == "phantoms" else "generic")
    if name not in PRESETS:
        unknown_value("--preset", name, list(PRESETS))
    return name, PRESETS[name]


def _default_partition(simulation: Simulation) -> str:
    """Return how data are cut into sites if nobody says: phantoms are drawn as hospitals, other data are dealt out."""
    return "natural" if simulation.dataset == "phantoms" else "dirichlet:0.5"


def _fill(scene: Scene, cache: Path, progress: Progress) -> float:
    """Pass the whole data set through the trunk once, for all sites and baselines; return the seconds."""
    begin = time.monotonic()
    preset = PRESETS[scene.run.data.preset]
    extractor = Extractor.open(
        scene.built.trunk,
        scene.built.spec,
        sha256=scene.run.model.trunk_sha256,
        cohort=scene.dataset.cohort,
        cache=cache,
        augmentation=Augmentation.of(preset),
        device=scene.device,
    )
    views = scene.run.data.views or 1
    extractor.fill(scene.dataset.cohort, views, lambda done, total: progress("features", done, total))
    return time.monotonic() - begin


def federate(start: Start, scene: Scene, workshop: Workshop, job: Job, cast: Cast, progress: Progress) -> Outcome:
    """Run the two apps, in this process or on Ray; `cast` tells of the sites, also if the run fails.

    Raises:
        ConsiliumError: the run failed.
    """
    outcomes: list[Outcome] = []
    errors: list[ConsiliumError] = []

    def coordinate(grid: Any) -> None:
        try:
            federation = Federation(grid, scene.run.sites.deadline_s)
            outcomes.append(Coordinator(federation, start, progress, cast).execute())
        except ConsiliumError as error:
            errors.append(error)

    server = make_server_app(coordinate)
    folder = start.folder
    assert folder is not None  # noqa: S101  a simulation always has one
    if scene.run.simulation and scene.run.simulation.backend == "ray":
        opener = hospitals.OpenFromDisk.write(folder / "state", scene.sites, job.cache.resolve(), scene.device)
        share = 1 / len(scene.sites) if scene.device == "cuda" else 0.0
        run_on_ray(server, make_client_app(opener), len(scene.sites), len(os.sched_getaffinity(0)), share)
    else:
        client = make_client_app(hospitals.open_in_process(scene.sites, workshop, folder / "state", folder / LEDGERS))
        run_in_process(server, InProcessGrid(client, list(scene.sites), job.faults, folder / "state"))
    if errors:
        raise errors[0]
    if not outcomes:
        raise ConsiliumError("the run did not end; the messages above say why")
    return outcomes[0]


def compare(
    scene: Scene, start: Start, workshop: Workshop, folder: Path, progress: Progress
) -> tuple[dict[str, Any] | None, float]:
    """Return the baselines, if they were asked for, and the seconds that they took."""
    if not (scene.run.simulation and scene.run.simulation.baselines):
        return None, 0.0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".baselines-", dir=folder) as scratch:
        found = baselines.run_all(start, scene.dataset.cohort, scene.sites, workshop, Path(scratch), progress)
    return found, time.monotonic() - begin


def around_of(scene: Scene) -> Callable[[Mapping[str, Any] | None, Mapping[str, float]], Surroundings]:
    """Return what completes the facts of a run once baselines and times are known."""
    values = model.trainable_values(scene.built.upper)
    trunk = TrunkFacts(scene.run.model.trunk_sha256, model.frozen_count(scene.built), len(scene.trunk))
    source = Weights.parse(scene.run.model.weights, scene.run.model.backbone)
    random = {"code": "random_weights", "message": "the backbone has random weights: --weights none was asked for"}

    decided = [{"code": "data", "message": text} for text in scene.dataset.warnings]

    def complete(compared: Mapping[str, Any] | None, seconds: Mapping[str, float]) -> Surroundings:
        return Surroundings(
            run=scene.run,
            trunk=trunk,
            upper_parameters=sum(value.size for value in values.values()),
            weights={"source": source.source, "backbone": scene.run.model.backbone},
            baselines=compared,
            seconds=seconds,
            quarantine=scene.dataset.cohort.quarantine,
            dropped=scene.dataset.dropped,
            warnings=(*((random,) if source.source == "none" else ()), *decided),
            stages=scene.built.upper.head.stages,
        )

    return complete


# The run's folder


def continued(job: Job) -> RunConfig:
    """Return the plan, or with --resume the one that the folder holds."""
    if not job.resume:
        return job.plan
    if job.output is None:
        raise UsageError("--resume: name the run's folder with --output")
    path = job.output / "run.toml"
    if not path.is_file():
        raise UsageError(f"--resume: {job.output} holds no run (no run.toml); leave --resume out to start one there")
    return RunConfig.from_toml(path.read_text(encoding="utf-8"), str(path))


def open_folder(job: Job, run: RunConfig) -> Path:
    """Make the run's folder, or check that it is this run's.

    Raises:
        UsageError: the folder is in use, or cannot be written.
        CheckpointError: it holds another run.
    """
    folder = job.output or next_folder(Path("runs"), run)
    if job.resume:
        _check_same(folder, run)
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"--output {folder}: the folder is in use; name another, or go on with --resume")
        write_atomic(folder / "run.toml", run.to_toml().encode())
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written ({error.strerror})") from None
    return folder


def _check_same(folder: Path, run: RunConfig) -> None:
    held = RunConfig.from_toml((folder / "run.toml").read_text(encoding="utf-8"), "run.toml")
    if held.fingerprint() != run.fingerprint():
        raise CheckpointError(f"--resume: the data or the weights have changed since {folder} was begun; start anew")
