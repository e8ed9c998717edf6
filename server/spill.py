"""Updates of a round that wait for the others on disk, so that memory does not grow with the number of sites."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.codec import shapes_of
from common.parameters import Parameters

RESIDENT_BYTES = 64 * 2**20
"""Updates of a round that together are smaller than this stay in memory."""


class Kept(Mapping[str, NDArray[np.float32]]):
    """An update on disk, read one array at a time."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._path = path
        self._shapes = dict(shapes)
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self._shapes.values()]
        starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(int).tolist()
        self._places = dict(zip(self._shapes, zip(starts, sizes, strict=True), strict=True))

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        start, size = self._places[name]
        return np.fromfile(self._path, "<f4", size, offset=4 * start).reshape(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._shapes)


class Spill:
    """Where the updates of a round wait: in memory if they are small, else in a folder.

    Args:
        folder: made when it is needed, emptied with each round; None keeps everything in memory.
        expected_bytes: of all updates of a round.
    """

    def __init__(self, folder: Path | None, expected_bytes: int) -> None:
        self._folder = folder if expected_bytes > RESIDENT_BYTES else None

    def clear(self) -> None:
        """Throw away what is left of another round."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)

    def keep(self, site: str, update: Parameters) -> Parameters:
        """Return the update as it will be read again.

        Raises:
            OSError: the disk is full.
        """
        if self._folder is None:
            return update
        path = self._folder / f"{site}.f4"
        with path.open("wb") as file:
            for value in update.values():
                np.ascontiguousarray(value, "<f4").tofile(file)
        return Kept(path, shapes_of(update))
