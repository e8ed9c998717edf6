"""The model of a settled run, as numbers: built in a process of its own, which takes torch and its memory with it.

It is kept beside the run's state, so that a resumed run goes on without the seconds that building it takes.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common import checkpoint
from common.errors import CheckpointError, ConsiliumError
from common.files import write_json
from common.run_config import RunConfig

FACTS, TENSORS = "drawing.json", "drawing.safetensors"
_TRUNK, _WEIGHT = "trunk", "weight "


@dataclass(frozen=True)
class Drawing:
    """What a coordinator needs of a model."""

    fingerprint: str  # of the run with the trunk that its backbone has now
    trunk: bytes  # the frozen content
    frozen: int  # values in it
    weights: dict[str, NDArray[np.float32]]  # trainable values before round 1
    stages: tuple[int, ...]  # widths of what the head reads, if each stage is scaled by itself
    source: str  # where the backbone's weights came from


def drawn_once(run: RunConfig, folder: Path) -> Drawing:
    """Return the drawing of a run's model: the one that is kept in its state, or a new one, which is kept.

    Raises:
        ConsiliumError: the model cannot be built, or its process was killed.
        OSError: it cannot be kept.
    """
    with suppress(CheckpointError, KeyError, TypeError, ValueError):  # what cannot be read is drawn again
        held = _kept(folder)
        if held is not None and held.fingerprint == run.fingerprint():
            return held
    found = drawn_apart(run)
    folder.mkdir(exist_ok=True)
    _keep(found, folder)
    return found


def _keep(found: Drawing, folder: Path) -> None:
    weights = {f"{_WEIGHT}{name}": value for name, value in found.weights.items()}
    digest = checkpoint.write_tensors(folder / TENSORS, {**weights, _TRUNK: np.frombuffer(found.trunk, np.uint8)})
    facts = {"fingerprint": found.fingerprint, "frozen": found.frozen, "stages": found.stages, "source": found.source}
    write_json(folder / FACTS, {**facts, "sha256": digest})


def _kept(folder: Path) -> Drawing | None:
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except OSError:
        return None
    tensors = checkpoint.read_tensors(folder / TENSORS, str(facts["sha256"]))
    weights = {name.removeprefix(_WEIGHT): value for name, value in tensors.items() if name != _TRUNK}
    return Drawing(
        fingerprint=str(facts["fingerprint"]),
        trunk=tensors[_TRUNK].tobytes(),
        frozen=int(facts["frozen"]),
        weights={name: np.asarray(value, np.float32) for name, value in weights.items()},
        stages=tuple(map(int, facts["stages"])),
        source=str(facts["source"]),
    )


def drawn_apart(run: RunConfig) -> Drawing:
    """Return the drawing of a run's model.

    Raises:
        ConsiliumError: the model cannot be built, or its process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(drawn, run).result()
        except BrokenProcessPool:
            raise ConsiliumError(
                f"backbone {run.model.backbone}: the process that builds it was killed; has the machine enough memory?"
            ) from None


def drawn(run: RunConfig) -> Drawing:
    """Return the drawing of a run's model, built in this process.

    Raises:
        ConsiliumError: it cannot be built.
    """
    from common import model
    from common.weights import Weights
    from server.plan import with_trunk

    settled = with_trunk(run)
    return Drawing(
        settled.run.fingerprint(),
        settled.trunk,
        model.frozen_count(settled.built),
        model.trainable_values(settled.built.upper),
        settled.built.upper.head.stages,
        Weights.parse(run.model.weights, run.model.backbone).source,
    )
