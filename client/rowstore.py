"""Rows of one fixed size on disk, found by a 32-byte key: the ground under the image cache and the feature cache.

Three files make a store. `rows.bin` holds the rows, one behind the other. `index.bin` holds one record a row: its key,
the CRC-32 of the row, and the CRC-32 of the record itself. `width` says how many bytes a row has. A row counts only
once its record is on disk, and rows reach the disk before their records do, so a process killed at any point leaves a
store that is shorter than it could be and never wrong. A row whose bytes no longer match its CRC is left out when the
store is opened and is written anew by whoever asks for it.

Readers map `rows.bin`; a row is never changed in place, but rows of patients who were taken out are overwritten with
zeros, and then their records. One writer at a time, held by a lock on `index.bin`.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CacheError
from common.files import write_atomic

KEY_BYTES = 32
_RECORD = np.dtype([("key", f"V{KEY_BYTES}"), ("row_crc", "<u4"), ("record_crc", "<u4")])
_CHECKED_BYTES = KEY_BYTES + 4
_WIDTH = "width"


class RowStore:
    """An append-only store of rows of one dtype.

    Args:
        folder: where the files are, made if absent.
        row: the dtype of one row (a structured or sub-array dtype); a store holds one dtype for life, so the
            folder's name must depend on everything that decides it.
        verify: whether rows are checked when the store is opened; else their records alone are, and large stores open
            fast.

    Raises:
        CacheError: the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> store = RowStore(Path(tempfile.mkdtemp()), np.dtype(("<f2", (3,))))
        >>> key = np.frombuffer(bytes(range(32)), dtype="V32")
        >>> store.append(key, np.array([[1, 2, 3]], dtype="<f2"))
        >>> store.find(key), store.take(np.array([0]))
        (array([0]), array([[1., 2., 3.]], dtype=float16))
    """

    def __init__(self, folder: Path, row: np.dtype[Any], *, verify: bool = True) -> None:
        self.folder = folder
        self.row = row
        self._verify = verify
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("rows.bin", "index.bin"):
                (folder / name).touch()
            if not (folder / _WIDTH).exists():
                write_atomic(folder / _WIDTH, f"{row.itemsize}\n".encode())
        except OSError as error:
            raise CacheError(f"the cache folder {folder} cannot be written ({error.strerror})") from None
        self._places: dict[bytes, int] = {}
        self.damaged = 0
        self._records = 0
        self._refresh()

    def __len__(self) -> int:
        """Return how many keys can be found."""
        return len(self._places)

    def find(self, keys: NDArray[np.void]) -> NDArray[np.int64]:
        """Return the place of each key, -1 for a key the store does not hold. Shapes: (N,) -> (N,)."""
        places = self._places
        return np.fromiter((places.get(key.tobytes(), -1) for key in keys), np.int64, len(keys))

    def take(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Return copies of the rows at these places, in this order. Shapes: (N,) -> (N, *row)."""
        rows = self._map()[places]
        return rows if self.row.subdtype is None else rows.reshape(len(places), *self.row.shape)

    def append(self, keys: NDArray[np.void], rows: NDArray[Any]) -> None:
        """Add rows under their keys; a key that another writer added meanwhile is left as it is.

        Args:
            keys: (N,) of 32 bytes each, without repeats.
            rows: (N, *row).

        Raises:
            CacheError: the disk is full or not writable.
        """
        try:
            with self._writing() as (row_file, index_file):
                self._refresh()
                new = np.flatnonzero(self.find(keys) < 0)
                self._write(row_file, index_file, keys[new], rows[new])
        except OSError as error:
            raise CacheError(f"the cache in {self.folder} cannot be written ({error.strerror})") from None

    def remove(self, keys: NDArray[np.void]) -> int:
        """Overwrite the rows under these keys with zeros, and then their records; return how many there were.

        A process killed in between leaves keys that can still be found, so the call can be made again.

        Raises:
            CacheError: the disk is not writable.
        """
        try:
            with self._writing() as (row_file, index_file):
                self._refresh()
                places = [place for place in self.find(keys).tolist() if place >= 0]
                _overwrite(row_file, places, self.row.itemsize)
                _overwrite(index_file, places, _RECORD.itemsize)
        except OSError as error:
            raise CacheError(f"the cache in {self.folder} cannot be written ({error.strerror})") from None
        for key in keys:
            self._places.pop(key.tobytes(), None)
        return len(places)

    def keys(self) -> NDArray[np.void]:
        """Return the keys that can be found, in the order of their rows."""
        by_place = sorted((place, key) for key, place in self._places.items())
        return np.frombuffer(b"".join(key for _, key in by_place), f"V{KEY_BYTES}")

    def _write(self, row_file: IO[bytes], index_file: IO[bytes], keys: NDArray[np.void], rows: NDArray[Any]) -> None:
        size = self.row.itemsize
        payload = np.ascontiguousarray(rows, dtype=self.row.base).view(np.uint8).reshape(len(rows), size)
        row_file.seek(self._records * size)
        row_file.write(payload.tobytes())
        row_file.truncate()
        row_file.flush()
        os.fsync(row_file.fileno())
        records = np.zeros(len(keys), _RECORD)
        records["key"] = keys
        records["row_crc"] = [zlib.crc32(row.tobytes()) for row in payload]
        records["record_crc"] = [zlib.crc32(record[:_CHECKED_BYTES].tobytes()) for record in _record_bytes(records)]
        index_file.seek(self._records * _RECORD.itemsize)
        index_file.write(records.tobytes())
        index_file.truncate()
        index_file.flush()
        os.fsync(index_file.fileno())
        for offset, key in enumerate(keys):
            self._places[key.tobytes()] = self._records + offset
        self._records += len(keys)

    @contextmanager
    def _writing(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        with (self.folder / "index.bin").open("r+b") as index, (self.folder / "rows.bin").open("r+b") as rows:
            fcntl.flock(index, fcntl.LOCK_EX)
            yield rows, index

    def _refresh(self) -> None:
        """Take in the records that are new since the last look, checking each row that they name."""
        content = (self.folder / "index.bin").read_bytes()[self._records * _RECORD.itemsize :]
        records = np.frombuffer(content[: len(content) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
        held = (self.folder / "rows.bin").stat().st_size // self.row.itemsize
        records = records[: max(0, held - self._records)]
        rows = self._bytes()
        for offset, (record, raw) in enumerate(zip(records, _record_bytes(records), strict=True)):
            place = self._records + offset
            if zlib.crc32(raw[:_CHECKED_BYTES].tobytes()) == record["record_crc"] and (
                not self._verify or zlib.crc32(rows[place].tobytes()) == record["row_crc"]
            ):
                self._places[record["key"].tobytes()] = place
            elif raw.any():  # zeros: taken out
                self.damaged += 1
        self._records += len(records)

    def _bytes(self) -> NDArray[np.uint8]:
        held = (self.folder / "rows.bin").stat().st_size // self.row.itemsize
        if not held:
            return np.zeros((0, self.row.itemsize), np.uint8)
        return np.memmap(self.folder / "rows.bin", np.uint8, "r", shape=(held, self.row.itemsize))

    def _map(self) -> NDArray[Any]:
        content = self._bytes()
        return content.reshape(-1).view(self.row.base).reshape(len(content), *self.row.shape)


def _record_bytes(records: NDArray[np.void]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(records).view(np.uint8).reshape(len(records), _RECORD.itemsize)


def _overwrite(file: IO[bytes], places: list[int], size: int) -> None:
    for place in places:
        file.seek(place * size)
        file.write(bytes(size))
    file.flush()
    os.fsync(file.fileno())


def open_as_bytes(folder: Path) -> RowStore | None:
    """Return a store whose kind of row is not known, its rows as bytes; None where there is none.

    The width is not guessed from the sizes of the files: a killed writer leaves rows that have no record.

    Raises:
        CacheError: what should be the width is no number.
    """
    try:
        width = int((folder / _WIDTH).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise CacheError(f"the cache in {folder} is damaged; delete that folder, it is made again") from None
    return RowStore(folder, np.dtype(("u1", (width,))), verify=False)
