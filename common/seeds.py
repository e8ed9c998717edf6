"""Random streams: each is derived from the run's seed and a scope, so no stream depends on the order of use.

Nobody seeds globally, and privacy noise never comes from here.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *scope: str | int) -> int:
    """Return the 63-bit seed of one stream: the first bytes of SHA-256 over the run's seed and the scope.

    Args:
        seed: the run's seed.
        scope: what the stream is for, e.g. `("train", "site-2", 4)` for that site's fourth round.

    Examples:
        >>> derive(0, "train", "site-1", 1) == derive(0, "train", "site-1", 1)
        True
        >>> derive(0, "train", "site-1", 1) == derive(0, "train", "site-1", 2)
        False
    """
    text = "\x1f".join([str(seed), *(str(part) for part in scope)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_stream(seed: int, *scope: str | int) -> np.random.Generator:
    """Return NumPy's generator for one stream."""
    return np.random.default_rng(derive(seed, *scope))
