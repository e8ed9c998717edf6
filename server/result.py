"""What a run leaves behind: `result.json`, the model folder, and the closing words."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import checkpoint
from common.files import write_json
from common.run_config import RunConfig
from server import census, spending, state
from server.company import Cast
from server.coordinator import Outcome, contributed_rounds
from server.evaluation import curves
from server.federation import Traffic
from server.refusals import troubles

SCHEMA = 1
SPLITS = ("train", "validation", "test")
TINY_SUPPORT = 10
_SOFTWARE = ("consilium", "flwr", "torch", "timm", "numpy")


@dataclass(frozen=True)
class TrunkFacts:
    """What was frozen."""

    sha256: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Surroundings:
    """What is known of a run beside its outcome."""

    run: RunConfig
    trunk: TrunkFacts
    upper_parameters: int
    weights: Mapping[str, Any]  # where the pretrained weights came from
    baselines: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    quarantine: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[Mapping[str, str], ...] = ()
    stages: tuple[int, ...] = ()  # widths of what the head reads, if each stage is scaled by itself


def completed(outcome: Outcome, around: Surroundings) -> dict[str, Any]:
    """Return the result of a run that came to its end."""
    labels = around.run.task.labels
    test = {
        "pooled": outcome.test.summary(labels, outcome.threshold),
        "sites": outcome.test.site_summaries(labels, outcome.threshold),
    }
    return {
        **_common(around),
        "privacy": _privacy(outcome.cast, around.run),
        "status": "completed" if outcome.complete else "completed_partial",
        "trunk": {**around.trunk.__dict__, "transfers": dict(sorted(outcome.cast.transfers.items()))},
        "sites": _sites(outcome.cast, outcome.contributed, around.run),
        "rounds": outcome.rounds,
        "best_round": outcome.best_round,
        "test": test,
        "curves": curves(outcome.test, labels),
        "traffic": {phase: _both_ways(traffic) for phase, traffic in outcome.traffic.items()},
        "warnings": [*around.warnings, *_warnings(outcome, test["pooled"], labels)],
        "seconds": {**outcome.seconds, **around.seconds},
    }


def failed(error: str, around: Surroundings, cast: Cast, rounds: list[dict[str, Any]], total: float) -> dict[str, Any]:
    """Return the result of a run that stopped early; what was reached is kept."""
    return {
        **_common(around),
        "privacy": _privacy(cast, around.run),
        "status": "failed",
        "error": error,
        "trunk": {**around.trunk.__dict__, "transfers": dict(sorted(cast.transfers.items()))},
        "sites": _sites(cast, contributed_rounds(rounds, around.run.sites.names), around.run),
        "rounds": rounds,
        "best_round": None,
        "test": None,
        "baselines": None,
        "curves": None,
        "traffic": {},
        "warnings": [*around.warnings, *_troubles(cast)],
        "seconds": {"features": 0.0, "rounds": 0.0, "baselines": 0.0, **around.seconds, "total": total},
    }


def _common(around: Surroundings) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "fingerprint": around.run.fingerprint(),
        "config": around.run.model_dump(mode="json"),
        "upper": {"parameters": around.upper_parameters, "wire_dtype": around.run.wire.dtype},
        "weights": dict(around.weights),
        "baselines": around.baselines,
        "quarantine": dict(around.quarantine),
        "dropped": dict(around.dropped),
        "software": {
            **{name: importlib.metadata.version(name) for name in _SOFTWARE},
            "python": platform.python_version(),
        },
    }


def _privacy(cast: Cast, run: RunConfig) -> dict[str, Any] | None:
    return spending.document(cast.privacy, run.privacy.histogram_epsilon)


def _sites(cast: Cast, contributed: Mapping[str, int], run: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for site in run.sites.names:
        support = cast.support.get(site, census.nothing(run.task))
        found[site] = {
            "examples": dict(zip(SPLITS, _examples(cast, site, support), strict=True)),
            "labels": dict(zip(run.task.labels, census.present(support).sum(0).tolist(), strict=True)),
            "rounds": contributed[site],
            "status": cast.status.get(site, "lost(absent)"),
        }
        if run.task.kind == "multi-label":
            annotated = census.annotated(support).sum(0).tolist()
            found[site]["annotated"] = dict(zip(run.task.labels, annotated, strict=True))
    return found


def _examples(cast: Cast, site: str, support: NDArray[np.int64]) -> list[int]:
    """Return the examples of each split; of a private run's training the patients, and not by label."""
    train, *rest = census.examples(support).tolist()
    return [cast.examples.get(site, train), *rest]


def _both_ways(traffic: Traffic) -> dict[str, int]:
    return {
        "bytes_down": traffic.weights_down + traffic.other_down,
        "bytes_up": traffic.weights_up + traffic.other_up,
    }


def _warnings(outcome: Outcome, pooled: Mapping[str, Any], labels: tuple[str, ...]) -> list[dict[str, str]]:
    found = []
    if not outcome.complete:
        found.append({"code": "partial_run", "message": "at least one site missed a round or the test"})
        found += _troubles(outcome.cast)
    tiny = [label for label in labels if pooled["support"][label] < TINY_SUPPORT]
    if tiny:
        message = f"fewer than {TINY_SUPPORT} test examples of {', '.join(tiny)}: these figures say little"
        found.append({"code": "tiny_support", "message": message})
    return found


def _troubles(cast: Cast) -> list[dict[str, str]]:
    """Return what is wrong with sites, and what the coordinator can do about it."""
    return [{"code": "site", "message": f"{site}: {text}"} for site, text in troubles(cast.status).items()]


def write_model(folder: Path, outcome: Outcome, around: Surroundings, result: Mapping[str, Any]) -> None:
    """Write `model/`: the trained tensors, and what is needed to put them on their trunk."""
    folder.mkdir(exist_ok=True)
    head: dict[str, NDArray[Any]] = {f"head.{name}": outcome.fixed[name] for name in ("mean", "scale")}
    digest = checkpoint.write_tensors(folder / "upper.safetensors", {**outcome.weights, **head})
    model, data = around.run.model, around.run.data
    card = {
        "schema": SCHEMA,
        "backbone": model.backbone,
        "weights": dict(around.weights),
        "trunk_sha256": around.trunk.sha256,
        "cut": model.trainable,
        "features": model.features,
        "scaling": model.scaling,
        "stages": list(around.stages),
        "labels": list(around.run.task.labels),
        "kind": around.run.task.kind,
        "preprocessing": {
            "preset": data.preset,
            "image_size": data.image_size,
            "views": data.views,
            "id": data.preprocessing,
        },
        "metrics": result["test"]["pooled"],
        "privacy": result["privacy"],
        "best_round": outcome.best_round,
        "upper_sha256": digest,
        "fingerprint": around.run.fingerprint(),
    }
    write_json(folder / "model.json", card)


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Return the rounds that a run's folder has on record."""
    return state.read_rounds(folder / "rounds.jsonl")


def finish(folder: Path, found: Mapping[str, Any], page: Callable[[Mapping[str, Any], Path], None]) -> None:
    """Leave a run's result and report; of a run that is over the state goes."""
    write_json(folder / "result.json", found)
    page(found, folder / "report.html")
    if found["status"] != "failed":
        shutil.rmtree(folder / "state", ignore_errors=True)
