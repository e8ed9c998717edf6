"""The model of a settled run, as numbers: built in a process of its own, which takes torch and its memory with it."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from common.errors import ConsiliumError
from common.run_config import RunConfig


@dataclass(frozen=True)
class Drawing:
    """What a coordinator needs of a model."""

    fingerprint: str  # of the run with the trunk that its backbone has now
    trunk: bytes  # the frozen content
    frozen: int  # values in it
    weights: dict[str, NDArray[np.float32]]  # trainable values before round 1
    stages: tuple[int, ...]  # widths of what the head reads, if each stage is scaled by itself
    source: str  # where the backbone's weights came from


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
