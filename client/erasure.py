"""Deleting what is kept of patients who were taken out: images, features made from them, and what is known of files.

Everything below the cache folder is looked at, whatever preprocessing, size, trunk or view it was made for, and an
image stays only where the record of another file counts on it: so neither a copy of a file that was changed since, nor
what a killed process left without a record, is a refuge. Features go first and the records of files, by which a
patient is found, last: an erasure that was cut short is finished by running it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.augmentation import MOST_VIEWS, Augmentation, keys
from client.catalogue import CHANNELS, VERSION
from client.records import RECORD
from client.rowstore import RowStore, open_as_bytes
from common.errors import CacheError
from common.files import write_atomic
from common.presets import PRESETS

_MARK = "erased"
_NO_IMAGE = bytes(32)
_PART = 1024  # images whose keys of features are made at a time


@dataclass(frozen=True)
class Erased:
    """What was deleted."""

    images: int  # preprocessed images
    features: int  # rows of features
    files: int  # records of files

    def __add__(self, other: Erased) -> Erased:
        """Return what both deleted."""
        return Erased(self.images + other.images, self.features + other.features, self.files + other.files)


def erase(
    cache: Path,
    persons: Set[bytes] = frozenset(),
    files: Set[bytes] = frozenset(),
    present: Set[bytes] | None = None,
) -> Erased:
    """Delete what is kept of these persons and files, and what no record counts on.

    Nobody else may write the cache meanwhile: an image whose record is still to come would be deleted.

    Args:
        cache: the site's cache folder; one that is absent holds nothing.
        persons: digests of `Identity.person`.
        files: digests of `Identity.file`.
        present: `Identity.file` of all files that are there, to forget all others; None: none is forgotten for that.

    Raises:
        CacheError: the cache cannot be written.
    """
    found = [(store, *_theirs(store, persons, files, present)) for store in _record_stores(cache)]
    others = set().union(*(kept for *_, kept in found))
    images = [(store, _not_of(store, others)) for kind in CHANNELS for store in _stores(cache / "images", kind)]
    gone = set().union(*(theirs for _, _, theirs, _ in found), *(map(bytes, lost) for _, lost in images)) - others
    features = [(store, _features_of(store, sorted(gone))) for store in _stores(cache / "features")]
    records = [(store, theirs) for store, theirs, *_ in found]
    if any(len(rows) for _, rows in (*features, *images, *records)):
        _renew_mark(cache)
    return Erased(
        features=sum(store.remove(rows) for store, rows in features),
        images=sum(store.remove(rows) for store, rows in images),
        files=sum(store.remove(rows) for store, rows in records),
    )


def mark(cache: Path) -> bytes:
    """Return what changes whenever rows are deleted: whoever has the caches open must open them anew then."""
    try:
        return (cache / _MARK).read_bytes()
    except FileNotFoundError:
        return b""


def _renew_mark(cache: Path) -> None:
    """Change the mark before the first row is deleted, so that a crash in between costs no more than a second look."""
    try:
        write_atomic(cache / _MARK, os.urandom(16), mode=0o600)
    except OSError as error:
        raise CacheError(f"the cache folder {cache} cannot be written ({error.strerror})") from None


def _theirs(
    store: RowStore, persons: Set[bytes], files: Set[bytes], present: Set[bytes] | None
) -> tuple[NDArray[np.void], set[bytes], set[bytes]]:
    """Return the keys of the records that go, the digests of their images, and those of all other records.

    That a file is of somebody who was taken out is all that is known of it in a record that says so: it stays.
    """
    known = store.keys()
    rows = store.take(store.find(known))
    names, digests = ([value.tobytes() for value in column] for column in (known, rows["digest"]))
    told = rows["code"] == b"opted_out"
    theirs = np.array(
        [
            name in files or (person.tobytes() in persons and not out) or (present is not None and name not in present)
            for name, person, out in zip(names, rows["person"], told.tolist(), strict=True)
        ],
        bool,
    )
    gone = {digest for digest, mine in zip(digests, theirs.tolist(), strict=True) if mine}
    others = {digest for digest, mine in zip(digests, theirs.tolist(), strict=True) if not mine}
    return known[theirs], gone - {_NO_IMAGE}, others - {_NO_IMAGE}


def _record_stores(cache: Path) -> list[RowStore]:
    return [RowStore(folder, RECORD) for folder in sorted((cache / "images").glob(f"*/records-{VERSION}"))]


def _stores(root: Path, kind: str = "") -> Iterator[RowStore]:
    for folder in sorted(root.glob(f"*/{kind}" if kind else "*")):
        store = open_as_bytes(folder)
        if store is not None:
            yield store


def _not_of(store: RowStore, digests: Set[bytes]) -> NDArray[np.void]:
    return _as_keys([key for key in map(bytes, store.keys()) if key not in digests])


def _as_keys(digests: Sequence[bytes]) -> NDArray[np.void]:
    return np.frombuffer(b"".join(digests), "V32")


def _features_of(store: RowStore, digests: Sequence[bytes]) -> NDArray[np.void]:
    """Return the keys in a store of every view of these images that any preset can have made."""
    drawn = {Augmentation.of(preset) for preset in PRESETS.values()}
    views = [(0, Augmentation.of(PRESETS["generic"]))]
    views += [(view, one) for one in drawn for view in range(1, MOST_VIEWS)]
    found = [np.zeros(0, "V32")]
    for begin in range(0, len(digests), _PART):
        rows = _as_keys(digests[begin : begin + _PART]).view(np.uint8).reshape(-1, 32)
        for view, one in views:
            made = keys(rows, view, one)
            found.append(made[store.find(made) >= 0])
    return np.concatenate(found)
