"""Tensors and their facts on disk and on the wire: safetensors bytes, hashed, never a pickle.

The bytes of `safetensors.save` depend on names, dtypes, shapes and values alone (it sorts its entries), so their
SHA-256 names the content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import CheckpointError
from common.files import write_atomic

Tensors = Mapping[str, NDArray[np.generic]]


def to_bytes(tensors: Tensors) -> bytes:
    """Return the safetensors encoding.

    Examples:
        >>> to_bytes({"a": np.zeros(1, np.float32)}) == to_bytes({"a": np.zeros(1, np.float32)})
        True
    """
    # np.ascontiguousarray would give a scalar a dimension
    return bytes(save({name: np.asarray(value, order="C") for name, value in sorted(tensors.items())}))


def from_bytes(content: bytes) -> dict[str, NDArray[np.generic]]:
    """Return the tensors of a safetensors encoding, in the order of their names: the reader has none of its own.

    Raises:
        CheckpointError: the bytes are no safetensors.
    """
    try:
        return dict(sorted(load(content).items()))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"not a readable safetensors content ({error})") from None


def sha256(content: bytes) -> str:
    """Return the SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Write tensors atomically and return the SHA-256 of the file."""
    content = to_bytes(tensors)
    write_atomic(path, content)
    return sha256(content)


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, NDArray[np.generic]]:
    """Read tensors.

    Raises:
        CheckpointError: the file is missing, damaged, or not the one that was hashed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if expected_sha256 is not None and sha256(content) != expected_sha256:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one recorded; start the run anew")
    return from_bytes(content)
