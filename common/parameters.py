"""Named arrays and their algebra: weights are parameters, a change of weights is an update.

Everything here is a value: no function changes its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

Parameters = Mapping[str, NDArray[np.float32]]


def subtract(new: Parameters, old: Parameters) -> dict[str, NDArray[np.float32]]:
    """Return the update that leads from `old` to `new`.

    Examples:
        >>> subtract({"w": np.float32([3])}, {"w": np.float32([1])})
        {'w': array([2.], dtype=float32)}
    """
    return {name: new[name] - old[name] for name in old}


def add(old: Parameters, update: Parameters) -> dict[str, NDArray[np.float32]]:
    """Return the weights after an update."""
    return {name: (old[name] + update[name]).astype(np.float32) for name in old}


def norm(update: Parameters) -> float:
    """Return the L2 norm over all arrays as if concatenated: sqrt(Σ_k ‖u_k‖²).

    Examples:
        >>> norm({"a": np.float32([3]), "b": np.float32([4])})
        5.0
    """
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in update.values()))


def count(parameters: Parameters) -> int:
    """Return the number of values."""
    return sum(value.size for value in parameters.values())


def head_alone(names: Iterable[str]) -> bool:
    """Return whether parameters of these names are those of a head, with nothing trained below it.

    Examples:
        >>> head_alone(["head.linear.weight", "head.linear.bias"]), head_alone(["body.block.weight"])
        (True, False)
    """
    return all(name.startswith("head.") for name in names)
