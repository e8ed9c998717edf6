"""Images that are the same, or nearly, under different patients: none of them may be on both sides of a split.

Exact copies share a digest. Near copies (another compression, a crop line, a changed brightness) are found in two
steps: candidates share most bits of a perceptual hash, and of these only pairs whose small images correlate almost
perfectly are kept, because radiographs of different people are alike enough to share hashes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLOSE = 6
"""Bits of 64 that the hashes of near copies may differ in."""

ALIKE = 0.95
"""Correlation of two images at 24 x 24 pixels, mean of their whole and their detail, from which they count as copies.

Measured on 5,332 chest X-rays of children: of 228,000 pairs with close hashes none but exact copies reaches 0.90. A
JPEG copy of quality 50 has 0.99, one with noise of 5 levels 0.99, one cropped by 2 per cent 0.93.
"""

SIDE = 24
"""Pixels a side of the small image that is kept for the comparison."""

DENSE = 0.02
"""Share of a block's pairs with close hashes from which all of them are compared: faster than picking them out."""

Described = NDArray[np.float32] | NDArray[np.float16]

_MANY = 2**15
_BLOCK = 2**22  # hashes compared at a time
_WIDE = 2**13  # images on one side of a block
_PAIRS = 2**13  # small images compared one by one at a time


def dhash(pixels: NDArray[np.uint8]) -> int:
    """Return the difference hash of an image (C, S, S): 64 bits, whether each cell is brighter than its left neighbour.

    Source: Krawetz, "Kind of like that", hackerfactor.com, 2013. Differences under two levels count as none, so that
    flat background does not flip bits.
    """
    small = _small(pixels, (9, 8)).astype(np.int16)
    bits = small[:, 1:] > small[:, :-1] + 1
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")


def thumb(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image (C, S, S) as `SIDE` x `SIDE` grey pixels."""
    return _small(pixels, (SIDE, SIDE)).tobytes()


def _small(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    grey = pixels[0] if len(pixels) == 1 else pixels.mean(axis=0).astype(np.uint8)
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))


def near_copies(hashes: NDArray[np.uint64], thumbs: NDArray[np.uint8], splits: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the pairs of images in different splits that are copies of each other, or nearly: (P, 2).

    Args:
        hashes: (N,) of `dhash`.
        thumbs: (N, SIDE * SIDE) of `thumb`.
        splits: (N,) split of each.
    """
    found = [np.zeros((0, 2), np.int64)]
    described = _described(thumbs)
    for own, others in _blocks(splits):
        near = np.bitwise_count(hashes[own][:, None] ^ hashes[others][None, :]) <= CLOSE
        dense = np.count_nonzero(near) > DENSE * near.size
        alike = _all_alike(described, own, others) & near if dense else _alike(described, own, others, near)
        one, other = np.nonzero(alike)
        found.append(np.stack([own[one], others[other]], axis=1))
    return np.concatenate(found)


def _blocks(splits: NDArray[np.int8]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield images of one split and images of the splits behind it, at most `_BLOCK` pairs at a time."""
    values = np.unique(splits)
    for number, value in enumerate(values):
        own, others = np.flatnonzero(splits == value), np.flatnonzero(np.isin(splits, values[number + 1 :]))
        for start in range(0, len(others), _WIDE):
            wide = others[start : start + _WIDE]
            step = _BLOCK // len(wide)
            for at in range(0, len(own), step):
                yield own[at : at + step], wide


def _all_alike(described: Described, own: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which pairs of a block are alike, by one product of matrices: where hashes tell little apart."""
    return np.asarray(
        described[own].astype(np.float32, copy=False) @ described[others].astype(np.float32, copy=False).T >= ALIKE
    )


def _alike(
    described: Described, own: NDArray[np.int64], others: NDArray[np.int64], near: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return which of the few near pairs of a block are alike, pair by pair."""
    alike = np.zeros_like(near)
    one, other = np.nonzero(near)
    for at in range(0, len(one), _PAIRS):
        first, second = one[at : at + _PAIRS], other[at : at + _PAIRS]
        pairs = (described[part].astype(np.float32, copy=False) for part in (own[first], others[second]))
        alike[first, second] = np.einsum("pd,pd->p", *pairs) >= ALIKE
    return alike


def _described(thumbs: NDArray[np.uint8]) -> Described:
    """Return each small image and its difference to its blurred self, each centred and of norm 1/sqrt(2), joined."""
    stack = thumbs.reshape(-1, SIDE, SIDE).astype(np.float32)
    padded = np.pad(stack, ((0, 0), (1, 1), (1, 1)), mode="edge")
    blurred = sum(padded[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)) / np.float32(9)
    exact = len(thumbs) <= _MANY  # half precision beyond it, for memory
    joined = np.concatenate([_normed(stack), _normed(stack - blurred)], axis=1)
    return joined if exact else joined.astype(np.float16)


def _normed(stack: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = stack.reshape(len(stack), SIDE * SIDE)
    centred = flat - flat.mean(axis=1, keepdims=True)
    norm = np.sqrt(2) * np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(norm, 1e-6), np.float32)
