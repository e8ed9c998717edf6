"""Features once: every image and view passes the trunk a single time, and its activations stay on disk.

A row is one flat float16 vector. Its key is the image's digest and the view; its folder is named by trunk and
preprocessing; so a second run, another partition, strategy or head finds it again, and in a simulation the whole
data set is passed once. Batches have one size, the last one padded, so a row does not depend on its neighbours.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client import views
from client.augmentation import Augmentation
from client.augmentation import keys as keys_of
from client.cohort import Cohort
from client.folding import folded
from client.rowstore import RowStore
from common.backbone import InputSpec, Trunk
from common.errors import CacheError

BATCH = {"cpu": 16, "cuda": 256}
"""Images a forward pass: on a CPU, sixteen keep the activations of a layer in the cache and run fastest."""

FLUSH_ROWS = 1024
"""Rows between two writes to disk: what a killed process can lose."""

RESIDENT_BYTES = 512 * 2**20
"""Features up to this size are held in memory (on the GPU, where there is one); larger ones stay mapped."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extractor:
    """What turns an image into features: the trunk, its input, the views, and where the results are kept."""

    trunk: Trunk
    spec: InputSpec
    store: RowStore
    augmentation: Augmentation
    device: torch.device

    @staticmethod
    def open(
        trunk: Trunk,
        spec: InputSpec,
        *,
        sha256: str,
        cohort: Cohort,
        cache: Path,
        augmentation: Augmentation,
        device: str,
    ) -> Extractor:
        """Return an extractor over the store of this trunk and preprocessing below `cache`.

        Raises:
            CacheError: the folder cannot be written.
        """
        folder = cache / "features" / f"{sha256[:32]}-{cohort.preprocessing}"
        row = np.dtype(("<f2", (trunk.layout.width,)))
        return Extractor(trunk, spec, RowStore(folder, row), augmentation, torch.device(device))

    def missing(self, cohort: Cohort, view: int) -> NDArray[np.int64]:
        """Return the indices of the examples whose features of one view are not on disk, one for each digest."""
        keys = keys_of(cohort.digests, view, self.augmentation)
        absent = np.flatnonzero(self.store.find(keys) < 0)
        first = {key.tobytes(): index for index, key in zip(absent[::-1], keys[absent][::-1], strict=True)}
        return np.sort(np.fromiter(first.values(), np.int64, len(first)))

    def fill(self, cohort: Cohort, count: int, progress: Progress | None = None) -> int:
        """Pass every image and view that is not on disk through the trunk; return how many that were.

        Args:
            cohort: the examples.
            count: views an image.
            progress: called with rows done and rows to do.

        Raises:
            CacheError: the disk is full, or an activation does not fit float16.
        """
        work = [(view, self.missing(cohort, view)) for view in range(count)]
        total = sum(len(indices) for _, indices in work)
        if not total:
            return 0
        done = 0
        trunk = self._ready_trunk()
        with _workers(self.device) as pool:
            for view, indices in work:
                for part in _parts(indices, FLUSH_ROWS):
                    rows = self._extract(pool, trunk, cohort, part, view)
                    self.store.append(keys_of(cohort.digests[part], view, self.augmentation), rows)
                    done += len(part)
                    if progress:
                        progress(done, total)
        return total

    def _ready_trunk(self) -> Trunk:
        quick = folded(self.trunk, self.spec.image_size)
        return copy.deepcopy(quick).to(self.device).to(memory_format=torch.channels_last)

    def _extract(
        self, pool: Executor, trunk: Trunk, cohort: Cohort, indices: NDArray[np.int64], view: int
    ) -> NDArray[np.float16]:
        parts = _parts(indices, BATCH[self.device.type])
        rows = list(pool.map(lambda part: self._forward(trunk, cohort, part, view), parts))
        joined = np.concatenate(rows)
        if not np.isfinite(joined).all():
            raise CacheError("an activation of the trunk is beyond float16; choose another --trainable or backbone")
        return joined

    @torch.inference_mode()
    def _forward(self, trunk: Trunk, cohort: Cohort, indices: NDArray[np.int64], view: int) -> NDArray[np.float16]:
        size = BATCH[self.device.type]
        padded = np.resize(indices, size)  # repeats: every batch has one shape, so one kernel computes every row
        images = torch.from_numpy(cohort.pixels(padded)).float() / 255
        images = views.augment(images, cohort.digests[padded], view, self.augmentation).to(self.device)
        batch = views.normalise(images, self.spec).contiguous(memory_format=torch.channels_last)
        rows = trunk(batch)[: len(indices)].float().cpu().numpy()
        with np.errstate(over="ignore"):
            return np.asarray(rows, np.float16)

    def features(self, cohort: Cohort, count: int) -> Features:
        """Return the cached features of a cohort.

        Raises:
            CacheError: `fill` was not run for this cohort, or a row was damaged since.
        """
        places = np.stack([self.store.find(keys_of(cohort.digests, v, self.augmentation)) for v in range(count)])
        if (places < 0).any():
            raise CacheError("features are missing from the cache; run again to complete it")
        return Features.of(self.store, places, self.device)


@dataclass(frozen=True)
class Features:
    """The features of N examples in K views: (K, N, D), in memory if they are few, else mapped from disk."""

    resident: Tensor | None
    store: RowStore
    places: NDArray[np.int64]  # (K, N)
    device: torch.device

    @staticmethod
    def of(store: RowStore, places: NDArray[np.int64], device: torch.device) -> Features:
        """Return features, resident if they fit."""
        small = places.size * store.row.itemsize <= RESIDENT_BYTES
        if not small:
            return Features(None, store, places, device)
        rows = store.take(places.reshape(-1)).reshape(*places.shape, *store.row.shape)
        return Features(torch.from_numpy(rows).to(device), store, places, device)

    @property
    def views(self) -> int:
        """K."""
        return len(self.places)

    def batch(self, view: Tensor, index: Tensor) -> Tensor:
        """Return the features of these examples in these views: two (B,) of int64 to (B, D) float32."""
        if self.resident is not None:
            return self.resident[view, index].float()
        rows = torch.from_numpy(self.store.take(self.places[view.cpu().numpy(), index.cpu().numpy()]))
        if self.device.type == "cuda":
            return rows.pin_memory().to(self.device, non_blocking=True).float()
        return rows.float()

    def chunks(self, indices: NDArray[np.int64], size: int) -> Iterator[Tensor]:
        """Yield the features of these examples in all views, (K, b, D) float32, b at most `size`."""
        for part in _parts(indices, size):
            index = torch.from_numpy(part).to(self.device)
            yield torch.stack([self.batch(torch.full_like(index, view), index) for view in range(self.views)])


@contextmanager
def _workers(device: torch.device) -> Iterator[Executor]:
    """Yield workers that each pass whole batches through the trunk: on a CPU one for each core, with one thread each.

    Measured on two cores, EfficientNet-Lite0 at 128 pixels: 1.5 to 1.9 times as many images a second as one batch
    spread over both cores, and 3 times as many where another process takes a core; the same bits either way.
    """
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _parts(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
