"""What the sites of one process share: the device, the cache folder, and the model of the run, built once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from client.augmentation import Augmentation
from client.cohort import Cohort
from client.features import Extractor
from common import checkpoint, codec, model
from common.backbone import Upper
from common.codec import Shapes
from common.errors import ConfigError
from common.model import Built
from common.presets import PRESETS
from common.run_config import RunConfig


@dataclass(frozen=True)
class Bench:
    """A run's model, ready for work: the trunk behind its extractor, the upper on the device."""

    extractor: Extractor
    upper: Upper
    shapes: Shapes  # of the trainable values, in the order of the wire


class Workshop:
    """Builds each run's model once and hands it to every site of the process.

    Args:
        cache: where features are kept.
        device: `cpu` or `cuda`.
    """

    def __init__(self, cache: Path, device: str) -> None:
        self.cache = cache
        self.device = device
        self._benches: dict[tuple[object, ...], Bench] = {}
        self._spare: tuple[str, Built] | None = None

    def lend(self, fingerprint: str, built: Built) -> None:
        """Offer a model of the right structure, so that a process that has one need not build another."""
        self._spare = (fingerprint, built)

    def bench(self, run: RunConfig, sha256: str, content: bytes | None, cohort: Cohort) -> Bench | None:
        """Return the run's model, built from a trunk's content if this process has not seen it yet.

        Raises:
            CheckpointError: the content does not fit the run's backbone.
            CacheError: the feature cache cannot be written.
        """
        key = _what_decides_the_model(run, sha256, cohort)
        if key not in self._benches and content is not None:
            self._benches[key] = self._build(run, sha256, content, cohort)
        return self._benches.get(key)

    def _build(self, run: RunConfig, sha256: str, content: bytes, cohort: Cohort) -> Bench:
        spare, self._spare = self._spare, None
        built = spare[1] if spare and spare[0] == run.fingerprint() else model.skeleton(run)
        model.load_frozen(built, content)
        extractor = Extractor.open(
            built.trunk,
            built.spec,
            sha256=sha256,
            cohort=cohort,
            cache=self.cache,
            augmentation=Augmentation.of(PRESETS[run.data.preset]),
            device=self.device,
        )
        upper = built.upper.to(self.device).to(memory_format=torch.channels_last)
        return Bench(extractor, upper, codec.shapes_of(model.trainable_values(upper)))


def _what_decides_the_model(run: RunConfig, sha256: str, cohort: Cohort) -> tuple[object, ...]:
    """Return what two runs must share to share a model; the trunk's hash covers backbone, cut and input."""
    return sha256, len(run.task.labels), run.model.dropout, run.model.scaling, run.data.preset, cohort.preprocessing


def choose_device(wish: str) -> str:
    """Return `cpu` or `cuda`; `auto` takes the GPU if there is one.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if wish == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wish == "auto" else wish


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Use this many CPU threads inside torch, all cores by default.

    A head alone is faster on one thread: its layers are smaller than the cost of sharing them out.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trunk_matches(content: bytes, sha256: str) -> bool:
    """Return whether a trunk's content is the one that was named."""
    return checkpoint.sha256(content) == sha256
