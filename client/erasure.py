"""Deleting what is kept of patients who were taken out: images, features made from them, and what is known of files.

Everything below the cache folder is looked at, whatever preprocessing, size, trunk or view it was made for. The records
of files, by which a patient is found, go last: an erasure that was cut short is finished by running it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.augmentation import MOST_VIEWS, Augmentation, keys
from client.catalogue import CHANNELS, VERSION
from client.presets import PRESETS
from client.records import RECORD
from client.rowstore import RowStore, open_as_bytes

_NO_IMAGE = bytes(32)


@dataclass(frozen=True)
class Erased:
    """What was deleted."""

    images: int  # preprocessed images
    features: int  # rows of features
    files: int  # records of files


def erase(cache: Path, persons: set[bytes], digests: set[bytes]) -> Erased:
    """Delete what is kept of these persons, and of these images.

    Args:
        cache: the site's cache folder; one that is absent holds nothing.
        persons: digests of `Identity.person`.
        digests: of further images, 32 bytes each, that belong to them.

    Raises:
        CacheError: the cache cannot be written.
    """
    found = [_theirs(store, persons) for store in _record_stores(cache)]
    gone = digests.union(*(theirs for _, theirs in found))
    features = sum(store.remove(_feature_keys(gone)) for store in _stores(cache / "features"))
    images = sum(store.remove(_as_keys(gone)) for kind in CHANNELS for store in _stores(cache / "images", kind))
    files = sum(store.remove(rows) for store, (rows, _) in zip(_record_stores(cache), found, strict=True))
    return Erased(images, features, files)


def _theirs(store: RowStore, persons: set[bytes]) -> tuple[NDArray[np.void], set[bytes]]:
    """Return the keys of these persons' files, and the digests of images that belong to nobody else."""
    known = store.keys()
    rows = store.take(store.find(known))
    theirs = np.array([person.tobytes() in persons for person in rows["person"]], bool)
    others = {digest.tobytes() for digest in rows["digest"][~theirs]}
    return known[theirs], {digest.tobytes() for digest in rows["digest"][theirs]} - others - {_NO_IMAGE}


def _record_stores(cache: Path) -> list[RowStore]:
    return [RowStore(folder, RECORD) for folder in sorted((cache / "images").glob(f"*/records-{VERSION}"))]


def _stores(root: Path, kind: str = "") -> Iterator[RowStore]:
    for folder in sorted(root.glob(f"*/{kind}" if kind else "*")):
        store = open_as_bytes(folder)
        if store is not None:
            yield store


def _as_keys(digests: set[bytes]) -> NDArray[np.void]:
    return np.frombuffer(b"".join(sorted(digests)), "V32")


def _feature_keys(digests: set[bytes]) -> NDArray[np.void]:
    """Return the keys of every view of these images that any preset can have made."""
    rows = np.frombuffer(b"".join(sorted(digests)), np.uint8).reshape(-1, 32)
    drawn = {Augmentation.of(preset) for preset in PRESETS.values()}
    every = [keys(rows, 0, Augmentation.of(PRESETS["generic"]))]
    every += [keys(rows, view, one) for one in drawn for view in range(1, MOST_VIEWS)]
    return np.concatenate(every)
