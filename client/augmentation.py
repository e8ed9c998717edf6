"""How far a view may be from its image, and the keys under which views are kept; the views themselves need torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.presets import Preset

VERSION = 1
"""Raise it whenever `client.views.augment` gives any view another pixel."""

MOST_VIEWS = 16
"""Views an image that a run may ask for."""


@dataclass(frozen=True)
class Augmentation:
    """How far a view may be from its image."""

    flip: bool
    rotate_degrees: float  # at most, either way
    translate: float  # at most, as a share of the side
    scale: float  # at most, either way from 1
    brightness: float  # at most, either way from 1

    @staticmethod
    def of(preset: Preset) -> Augmentation:
        """Return the augmentation of a preset."""
        return Augmentation(preset.flip, preset.rotate_degrees, preset.translate, preset.scale, preset.brightness)

    def identity(self) -> str:
        """Return 16 hexadecimal digits that stand for every choice."""
        facts = json.dumps({**self.__dict__, "version": VERSION}, sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def keys(digests: NDArray[np.uint8], view: int, augmentation: Augmentation) -> NDArray[np.void]:
    """Return the cache key of one view of each image: (N, 32) digests to (N,) of 32 bytes."""
    suffix = (f"{augmentation.identity()}:{view}" if view else "image").encode()
    joined = b"".join(hashlib.sha256(digest.tobytes() + suffix).digest() for digest in digests)
    return np.frombuffer(joined, "V32")
