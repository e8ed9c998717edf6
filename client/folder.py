"""A folder of image files -> preprocessed pixels on disk and one record an example; bad files only cost themselves.

Each file is decoded once. Its preprocessed image goes into a row store below the cache folder, found again by path,
size and time of change, so a second run reads no image and an interrupted one goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.cohort import PixelSource
from client.decoding import decode
from client.image import Kind, Unreadable
from client.listing import Entry, Listing, list_folder
from client.preprocessing import kind_shown, preprocess, preprocessing_id
from client.presets import Preset
from client.rowstore import RowStore
from common.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the number of files done and of files in all."""

CHANNELS: Mapping[Kind, int] = {"grey": 1, "colour": 3}

_CHUNK = 64  # images decoded between two writes to the cache, hence lost at most by a kill
_NOBODY = bytes(32)  # the patient of a cached image whose patient is unknown


@dataclass(frozen=True)
class FolderIndex:
    """The usable examples of a folder, N of them, in the order of the manifest, else of their paths."""

    source: PixelSource
    rows: NDArray[np.int64]  # (N,) row numbers that `source` takes
    digests: NDArray[np.uint8]  # (N, 32) SHA-256 of the decoded image, before resizing
    labels: tuple[str, ...]  # N
    patients: tuple[str | bytes | None, ...]  # N; the manifest's word, else DICOM's hashed PatientID, else None
    sites: tuple[str, ...] | None  # N
    splits: tuple[str, ...] | None  # N, of cohort.SPLITS
    kind: Kind
    preprocessing: str
    quarantine: Mapping[str, int]  # image.CODES -> files
    ignored: Mapping[str, int]  # listing.IGNORED -> files

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)


@dataclass(frozen=True)
class CachedPixels:
    """The pixel source over a row store of preprocessed images."""

    store: RowStore

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images in these rows: (n,) -> (n, C, S, S)."""
        return np.ascontiguousarray(self.store.take(rows)["pixels"])


@dataclass(frozen=True)
class _Prepared:
    kind: Kind
    row: NDArray[Any]  # one row of the store of that kind


@dataclass(frozen=True)
class _Place:
    kind: Kind
    row: int


def read_folder(root: Path, preset: Preset, size: int, cache: Path, progress: Progress | None = None) -> FolderIndex:
    """Read a data folder: every image decoded, preprocessed and cached, every unusable file counted.

    Where the preset keeps colour as it is, the commoner of grey and colour stays (grey if even) and the other
    goes to quarantine.

    Args:
        root: the folder: `manifest.csv`, or one subfolder a class.
        preset: how images are shown to the network.
        size: S, pixels a side.
        cache: the cache folder; images go to `images/<preprocessing id>-<kind>` below it.
        progress: told how far it is.

    Raises:
        DataError: no such folder, a manifest that cannot be taken at its word, or not one usable image.
        CacheError: the cache cannot be written.
    """
    listing = list_folder(root)
    stores = _open_stores(cache, preset, size)
    found = _cached(listing.entries, stores, preset, size, progress)
    kinds = Counter(place.kind for place in found if isinstance(place, _Place))
    codes = Counter(listing.quarantine) + Counter(place for place in found if isinstance(place, str))
    if not kinds:
        raise DataError(_nothing_usable(root, listing, codes))
    kind: Kind = "colour" if kinds["colour"] > kinds["grey"] else "grey"
    kept = [
        (entry, place.row)
        for entry, place in zip(listing.entries, found, strict=True)
        if isinstance(place, _Place) and place.kind == kind
    ]
    codes += Counter({"kind_differs": kinds.total() - len(kept)})
    return _index(kept, stores[kind], kind, preprocessing_id(preset, size), codes, listing.ignored)


def _nothing_usable(root: Path, listing: Listing, codes: Counter[str]) -> str:
    reasons = ", ".join(f"{code} {n}" for code, n in sorted(codes.items())) or "none"
    return (
        f"{root}: no usable image (in quarantine: {reasons}; ignored: {sum(listing.ignored.values())})"
        " - expected PNG, JPEG, TIFF or DICOM files in one subfolder a class, or a manifest.csv that names them"
    )


def _index(
    kept: list[tuple[Entry, int]],
    store: RowStore,
    kind: Kind,
    preprocessing: str,
    quarantine: Counter[str],
    ignored: Mapping[str, int],
) -> FolderIndex:
    entries = [entry for entry, _ in kept]
    rows = np.array([row for _, row in kept], np.int64)
    digests, patients = _identities(store, rows)
    return FolderIndex(
        source=CachedPixels(store),
        rows=rows,
        digests=digests,
        labels=tuple(entry.label for entry in entries),
        patients=tuple(entry.patient or own for entry, own in zip(entries, patients, strict=True)),
        sites=_column([entry.site for entry in entries]),
        splits=_column([entry.split for entry in entries]),
        kind=kind,
        preprocessing=preprocessing,
        quarantine=dict(sorted(quarantine.items())),
        ignored=dict(sorted(ignored.items())),
    )


def _column(values: list[str | None]) -> tuple[str, ...] | None:
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else None


def _identities(store: RowStore, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[bytes | None]]:
    """Return digests (N, 32) and patients of cached images, a chunk at a time: `take` copies the pixels as well."""
    digests = np.empty((len(rows), 32), np.uint8)
    patients: list[bytes | None] = []
    for start in range(0, len(rows), _CHUNK):
        taken = store.take(rows[start : start + _CHUNK])
        digests[start : start + _CHUNK] = taken["digest"]
        keys = (patient.tobytes() for patient in taken["patient"])
        patients += [None if key == _NOBODY else key for key in keys]
    return digests, patients


def _open_stores(cache: Path, preset: Preset, size: int) -> dict[Kind, RowStore]:
    kinds: tuple[Kind, ...] = ("grey", "colour") if preset.colour == "keep" else (preset.colour,)
    name = preprocessing_id(preset, size)
    return {kind: RowStore(cache / "images" / f"{name}-{kind}", _row_dtype(CHANNELS[kind], size)) for kind in kinds}


def _row_dtype(channels: int, size: int) -> np.dtype[Any]:
    return np.dtype([("digest", "u1", 32), ("patient", "u1", 32), ("pixels", "u1", (channels, size, size))])


def _cached(
    entries: Sequence[Entry],
    stores: Mapping[Kind, RowStore],
    preset: Preset,
    size: int,
    progress: Progress | None,
) -> list[_Place | str]:
    """Return where each image is cached, or the code why it is not; what is not cached yet is decoded."""
    keys = np.array([_key(entry.path) for entry in entries], "V32")
    codes: dict[int, str] = {}
    todo = [i for i, place in enumerate(_find(keys, stores)) if place is None]
    done = len(entries) - len(todo)
    report = progress or _no_progress
    report(done, len(entries))
    for start in range(0, len(todo), _CHUNK):
        chunk = todo[start : start + _CHUNK]
        prepared = [_prepare(entries[i].path, preset, size) for i in chunk]
        codes |= {i: got for i, got in zip(chunk, prepared, strict=True) if isinstance(got, str)}
        _store(keys, chunk, prepared, stores)
        report(done := done + len(chunk), len(entries))
    return [codes[i] if place is None else place for i, place in enumerate(_find(keys, stores))]


def _no_progress(done: int, total: int) -> None:
    """Nobody is listening."""


def _key(path: Path) -> bytes:
    """Return the 32-byte key of a file as it is now; one that has gone meanwhile has a key that is never stored."""
    try:
        status = path.stat()
    except OSError:
        return hashlib.sha256(str(path).encode(errors="surrogateescape")).digest()
    text = f"{path}|{status.st_size}|{status.st_mtime_ns}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _find(keys: NDArray[np.void], stores: Mapping[Kind, RowStore]) -> list[_Place | None]:
    found: list[_Place | None] = [None] * len(keys)
    for kind, store in stores.items():
        for i, row in enumerate(store.find(keys)):
            if row >= 0:
                found[i] = _Place(kind, int(row))
    return found


def _prepare(path: Path, preset: Preset, size: int) -> _Prepared | str:
    try:
        image = decode(path)
        kind = kind_shown(image, preset)
        row = np.zeros((), _row_dtype(CHANNELS[kind], size))
        row["digest"] = np.frombuffer(image.sha256, np.uint8)
        row["patient"] = np.frombuffer(image.patient or _NOBODY, np.uint8)
        row["pixels"] = preprocess(image, preset, size)
    except Unreadable as error:
        return error.code
    except MemoryError:
        return "too_large"
    return _Prepared(kind, row)


def _store(
    keys: NDArray[np.void],
    chunk: list[int],
    prepared: list[_Prepared | str],
    stores: Mapping[Kind, RowStore],
) -> None:
    for kind, store in stores.items():
        mine = [
            (i, got.row)
            for i, got in zip(chunk, prepared, strict=True)
            if isinstance(got, _Prepared) and got.kind == kind
        ]
        if mine:
            store.append(keys[[i for i, _ in mine]], np.stack([row for _, row in mine]))
