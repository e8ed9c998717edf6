"""What weights and updates look like on the wire: one flat vector at the wire precision, in the order of the names.

A receiver that knows names and shapes needs no header, so the payload is the values and nothing else. bfloat16, which
NumPy lacks, travels as the upper halves of float32 values, rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common.parameters import Parameters
from common.run_config import WireType

Shapes = Mapping[str, tuple[int, ...]]

WIRE_DTYPES: dict[WireType, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}


def shapes_of(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array, in order."""
    return {name: value.shape for name, value in parameters.items()}


def encode(parameters: Parameters, wire: WireType) -> NDArray[np.generic]:
    """Return the values as one vector of the wire's dtype.

    Examples:
        >>> encode({"w": np.float32([1.0, -2.0])}, "bfloat16")
        array([16256, 49152], dtype=uint16)
    """
    parts = [np.asarray(value, np.float32).reshape(-1) for value in parameters.values()]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if wire == "bfloat16":
        return _to_bfloat16(flat)
    with np.errstate(over="ignore"):  # a value beyond float16 becomes infinite, and admission refuses it
        return flat.astype(WIRE_DTYPES[wire])


def decode(vector: NDArray[np.generic], shapes: Shapes, wire: WireType) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a vector that `encode` made.

    Raises:
        ValueError: the vector has another dtype or length than the shapes need.
    """
    needed = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    if vector.dtype != WIRE_DTYPES[wire] or vector.shape != (needed,):
        raise ValueError(f"expected {needed} values of {wire}, got {vector.shape} of {vector.dtype}")
    flat = _from_bfloat16(vector) if wire == "bfloat16" else vector.astype(np.float32)
    arrays: dict[str, NDArray[np.float32]] = {}
    start = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64))
        arrays[name] = flat[start : start + size].reshape(shape)
        start += size
    return arrays


def through(parameters: Parameters, wire: WireType) -> dict[str, NDArray[np.float32]]:
    """Return the parameters as the other side will see them."""
    return decode(encode(parameters, wire), shapes_of(parameters), wire)


def _to_bfloat16(flat: NDArray[np.float32]) -> NDArray[np.generic]:
    bits = flat.astype("<f4").view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    # Rounding would carry some NaNs over to infinity or zero: a NaN stays one.
    return np.where(np.isnan(flat), np.uint16(0x7FC0), rounded).astype("<u2")


def _from_bfloat16(vector: NDArray[np.generic]) -> NDArray[np.float32]:
    return (vector.astype("<u4") << 16).view("<f4").astype(np.float32)
