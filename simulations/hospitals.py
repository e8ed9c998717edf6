"""The sites of a simulation: cohorts cut from one pool, in this process or opened by Ray's workers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.app import Handle, OpenSite
from client.cohort import Cohort
from client.guard import Guard
from client.ledger import Ledger
from client.memory import Memory
from client.outbox import Outbox
from client.site import Site
from client.workshop import Workshop

_ARRAYS = ("rows", "digests", "labels", "splits", "patients")


def cohorts(pool: Cohort, parts: Mapping[str, NDArray[np.int64]]) -> dict[str, Cohort]:
    """Return each site's cohort, by name in text order."""
    return {name: pool.subset(parts[name]) for name in sorted(parts)}


LEDGERS = "ledgers"
"""Folder of a run's folder with the ledger of each site, if the run is private."""


def guard_of(ledgers: Path, memory: Memory, name: str) -> Guard:
    """Return what private runs answer to at a simulated site: a ledger of its own, and no limits."""
    owner = hashlib.sha256(f"simulated site {name}".encode()).hexdigest()
    path = ledgers / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:40]}-{owner[:8]}.jsonl"  # any text may be a name

    def open_ledger() -> Ledger:
        ledgers.mkdir(parents=True, exist_ok=True)
        return Ledger.open(path, owner)

    return Guard(open_ledger, Outbox(memory.folder / "outbox"))


def open_in_process(
    sites: Mapping[str, Cohort], workshop: Workshop, memory: Path, ledgers: Path | None = None
) -> OpenSite:
    """Return what finds a node's site among sites that live as long as the process.

    Args:
        sites: their examples, by name.
        workshop: that they share.
        memory: folder of what they remember of the run.
        ledgers: folder of their ledgers; None: beside that.
    """
    place = memory / LEDGERS if ledgers is None else ledgers
    memories = {name: Memory.at(memory, name) for name in sites}
    hospitals = [
        Site(name, cohort, workshop, memories[name], guard=guard_of(place, memories[name], name))
        for name, cohort in sites.items()
    ]

    def open_site(node: Mapping[str, Any]) -> Handle:
        return hospitals[int(node["partition-id"])].handle

    return open_site


@dataclass(frozen=True)
class OpenFromDisk:
    """Finds a node's site from files: what Ray's workers are given, for they share no memory with this process."""

    folder: Path
    cache: Path
    device: str

    @staticmethod
    def write(folder: Path, sites: Mapping[str, Cohort], cache: Path, device: str) -> OpenFromDisk:
        """Write the cohorts; pixels stay where they are, for the features are in the cache already."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, cohort) in enumerate(sites.items()):
            arrays: dict[str, Any] = {key: getattr(cohort, key) for key in _ARRAYS}
            facts = {"names": np.array(cohort.label_names), "preprocessing": np.array(cohort.preprocessing)}
            np.savez(folder / f"{number}.npz", allow_pickle=False, site=np.array(name), **facts, **arrays)
        return OpenFromDisk(folder, cache, device)

    def __call__(self, node: Mapping[str, Any]) -> Handle:
        """Return the site's function."""
        return _site(self, int(node["partition-id"])).handle


@lru_cache(maxsize=1)
def _workshop(cache: Path, device: str) -> Workshop:
    return Workshop(cache, device)


def _site(opener: OpenFromDisk, number: int) -> Site:
    """Return a site as its memory left it; each message may come to another worker."""
    with np.load(opener.folder / f"{number}.npz", allow_pickle=False) as held:
        cohort = Cohort(
            source=_no_pixels,
            **{key: held[key] for key in _ARRAYS},
            label_names=tuple(str(name) for name in held["names"]),
            preprocessing=str(held["preprocessing"]),
        )
        name = str(held["site"])
    memory = Memory.at(opener.folder, name)
    guard = guard_of(opener.folder.parent / LEDGERS, memory, name)
    return Site(name, cohort, _workshop(opener.cache, opener.device), memory, guard=guard)


def _no_pixels(_rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    raise RuntimeError("a worker found no cached features")
