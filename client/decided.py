"""A site's data once everything is decided: which files are examples, in which split, and why the others are none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.catalogue import Catalogue
from client.gathering import Gathered
from client.site_config import SiteConfig


@dataclass(frozen=True, repr=False)
class Intake:
    """A site's data, decided: n files that could be images, of which N are examples."""

    config: SiteConfig
    gathered: Gathered
    catalogue: Catalogue
    codes: tuple[str, ...]  # n; why a file is no example; empty: it is one
    places: NDArray[np.int64]  # (N,) of the examples among the files
    splits: NDArray[np.int8]  # (N,)
    patients: tuple[bytes, ...]  # N digests
    moved: int  # patients that the given splits put into several
    copies: int  # images whose pixels another image has as well
    near: int  # images left out because they nearly equal one of another split
    stop: str  # why nothing of it may be used; empty: it may
