"""What is known of every file of a folder, and the pixels of those that are images; each file is read once.

Below the cache folder, in a folder named by the preprocessing: `records` holds one row a file, found by a keyed
digest of its path, size and time of change; `grey` and `colour` hold the preprocessed images, found by the digest of
the image, so copies of a file share one. Pixels are on disk before the record that counts on them: a process killed
at any point goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from client.identity import Identity
from client.image import Header, Kind
from client.pool import Pool, Read
from client.records import RECORD, Entry, pack, unpack
from client.rowstore import RowStore
from client.worker import Task
from common.presets import Preset, preprocessing_id

VERSION = 1
"""Raise it whenever a record gets another meaning."""

CHANNELS: Mapping[Kind, int] = {"grey": 1, "colour": 3}

Progress = Callable[[int, int], None]
"""Called with the number of files done and of files in all."""

FLUSH = 128
"""Files between two writes to disk: what a killed process can lose."""

PASSING = frozenset({"missing", "no_access"})
"""Codes that say more of the moment than of the file: they are not kept."""

_GONE = bytes(32)
_COLOUR = 2**40  # rows from here on are those of colour images

T = TypeVar("T")


@dataclass(frozen=True)
class CachedPixels:
    """The pixel source over the row stores of grey and of colour images.

    A grey image among colour ones has three equal channels, which is what a backbone is shown of it anyway.
    """

    grey: RowStore
    colour: RowStore
    channels: int  # of every image: 1 where all are grey, else 3

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images in these rows: (n,) -> (n, C, S, S).

        Raises:
            IndexError: a row of no image; -1 would be the last one.
        """
        if (rows < 0).any():
            raise IndexError("rows: got -1, the row of an image that is not in the cache")
        images = np.empty((len(rows), self.channels, *self.grey.row.shape[1:]), np.uint8)
        coloured = rows >= _COLOUR
        images[~coloured] = self.grey.take(rows[~coloured])
        if coloured.any():
            images[coloured] = self.colour.take(rows[coloured] - _COLOUR)
        return images


class Catalogue:
    """The records and pixels of one cache folder, for one preprocessing.

    Args:
        cache: the folder; made if absent.
        identity: makes the digests; another secret finds nothing.
        preset: how images are shown.
        size: S, pixels a side.
        workers: processes that decode; None: one a core.
        opted_out: `Identity.person` of patients whose images are not decoded.

    Raises:
        CacheError: the folder cannot be written.
    """

    def __init__(
        self,
        cache: Path,
        identity: Identity,
        preset: Preset,
        size: int,
        workers: int | None = None,
        opted_out: frozenset[bytes] = frozenset(),
    ) -> None:
        self.preprocessing = preprocessing_id(preset, size)
        self._identity, self._workers = identity, workers
        self._task = Task(identity, preset, size, opted_out)
        folder = cache / "images" / self.preprocessing
        self._records = RowStore(folder / f"records-{VERSION}", RECORD)
        self._pixels = {
            kind: RowStore(folder / kind, np.dtype(("u1", (channels, size, size))), verify=False)
            for kind, channels in CHANNELS.items()
        }

    def source(self, kind: Kind) -> CachedPixels:
        """Return the pixel source of grey images alone, or of colour images with grey ones among them."""
        return CachedPixels(self._pixels["grey"], self._pixels["colour"], CHANNELS[kind])

    def rows(self, entries: Sequence[Entry]) -> NDArray[np.int64]:
        """Return the rows of these files' images, as `source` takes them: (n,); what is not there has none."""
        digests = np.frombuffer(b"".join(entry.digest for entry in entries), "V32")
        coloured = np.array([entry.kind == "colour" for entry in entries], bool)
        grey, colour = (self._pixels[kind].find(digests) for kind in ("grey", "colour"))
        return np.where(coloured, np.where(colour < 0, -1, colour + _COLOUR), grey)

    def known(self, paths: Sequence[Path]) -> list[Entry | None]:
        """Return what the records say of these files as they are now; None for those that were not read yet."""
        return self._known(self.keys(paths))

    def read(
        self, paths: Sequence[Path], progress: Progress | None = None, known: Sequence[Entry | None] | None = None
    ) -> list[Entry]:
        """Return what is known of these files, reading those that were not read yet.

        Args:
            paths: the files.
            progress: told how far it is.
            known: what `known` has just said of them, if it was asked.

        Raises:
            CacheError: the cache cannot be written.
            ConsiliumError: decoding processes cannot be started.
        """
        report = progress or _silent
        keys = self.keys(paths)
        entries = self._known(keys) if known is None else list(known)
        todo = [place for place, entry in enumerate(entries) if entry is None]
        done = len(paths) - len(todo)
        report(done, len(paths))
        for part in _batched(self._read([paths[place] for place in todo]), FLUSH):
            self._keep([(keys[todo[read.number]], read) for read in part])
            for read in part:
                entries[todo[read.number]] = read.entry
            done += len(part)
            report(done, len(paths))
        return [entry for entry in entries if entry is not None]

    def exclude(self, paths: Sequence[Path], persons: Sequence[bytes]) -> None:
        """Record of files that they are of persons who were taken out, so that they are not decoded again."""
        keys = self.keys(paths)
        self._records.remove(keys)
        rows = [pack(Entry("opted_out", Header(person=person))) for person in persons]
        self._records.append(keys, np.stack(rows))

    def _known(self, keys: NDArray[np.void]) -> list[Entry | None]:
        found = self._records.find(keys)
        entries: list[Entry | None] = [None] * len(keys)
        for part in _batched(np.flatnonzero(found >= 0).tolist(), 4096):
            for place, row in zip(part, self._records.take(found[list(part)]), strict=True):
                entry = unpack(row)
                entries[place] = entry if self._holds(entry) else None
        return entries

    def _holds(self, entry: Entry) -> bool:
        """Return whether a record is still true: its pixels are there, and its patient is where it says."""
        out = entry.header.person in self._task.opted_out
        if out or entry.code == "opted_out":
            return out and entry.code == "opted_out"
        return bool(entry.code) or self._has(entry)

    def _has(self, entry: Entry) -> bool:
        return bool(self._pixels[entry.kind].find(np.frombuffer(entry.digest, "V32"))[0] >= 0)

    def keys(self, paths: Sequence[Path]) -> NDArray[np.void]:
        """Return what names these files as they are now: (n,) of 32 bytes."""
        return np.frombuffer(b"".join(self._key(path) for path in paths), "V32")

    def _key(self, path: Path) -> bytes:
        """Return the key of a file as it is now; one that has gone has a key that is never stored."""
        try:
            status = path.stat()
        except OSError:
            return _GONE
        return self._identity.file(os.fspath(path), status.st_size, status.st_mtime_ns)

    def _read(self, paths: Sequence[Path]) -> Iterator[Read]:
        if paths:
            with Pool(self._task, self._workers) as pool:
                yield from pool.read(paths)

    def _keep(self, part: Sequence[tuple[np.void, Read]]) -> None:
        for kind, store in self._pixels.items():
            images = {
                read.entry.digest: read.pixels
                for _, read in part
                if read.pixels is not None and read.entry.kind == kind
            }
            if images:
                store.append(np.frombuffer(b"".join(images), "V32"), np.stack(list(images.values())))
        lasting = {
            key.tobytes(): pack(read.entry)
            for key, read in part
            if read.entry.code not in PASSING and key.tobytes() != _GONE
        }
        if lasting:
            self._records.append(np.frombuffer(b"".join(lasting), "V32"), np.stack(list(lasting.values())))


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`, the last one shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _silent(done: int, total: int) -> None:
    """Nobody is listening."""
