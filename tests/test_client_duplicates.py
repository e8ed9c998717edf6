"""Near copies are found across splits, and different images are not taken for them."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from client.duplicates import SIDE, dhash, near_copies, thumb
from client.preprocessing import letterbox
from simulations.encodings import film

Pixels = np.ndarray


def jpeg(pixels: Pixels) -> Pixels:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=50)
    return np.asarray(Image.open(content))


def noisy(pixels: Pixels) -> Pixels:
    return np.clip(pixels + np.random.default_rng(1).normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "same": lambda pixels: pixels,
    "jpeg": jpeg,
    "noise": noisy,
    "brighter": lambda pixels: np.clip(pixels * 1.1 + 6, 0, 255).astype(np.uint8),
    "resized": lambda pixels: np.asarray(Image.fromarray(pixels).resize((83, 90))),
}


def described(images: list[Pixels]) -> tuple[Pixels, Pixels]:
    boxed = [letterbox(image, 96) for image in images]
    thumbs = np.frombuffer(b"".join(map(thumb, boxed)), np.uint8).reshape(len(boxed), -1)
    return np.array([dhash(image) for image in boxed], np.uint64), thumbs


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_changed_copy_in_another_split_is_found(change: str) -> None:
    images = [film(120, 110, 8, seed) for seed in range(6)]
    hashes, thumbs = described([*images, CHANGES[change](images[2])])
    splits = np.array([0, 0, 0, 1, 1, 2, 2], np.int8)
    assert near_copies(hashes, thumbs, splits).tolist() == [[2, 6]]
    assert near_copies(hashes, thumbs, np.zeros(7, np.int8)).tolist() == []


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_empty_images_are_no_copies(shade: int) -> None:
    hashes, thumbs = described([np.full((30, 30), shade, np.uint8) for _ in range(4)])
    assert not len(near_copies(hashes, thumbs, np.array([0, 1, 2, 0], np.int8)))


def test_the_two_ways_of_comparing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 256, (60, SIDE * SIDE), dtype=np.uint8)
    thumbs[40:50] = thumbs[:10]
    hashes, splits = np.zeros(60, np.uint64), rng.integers(0, 3, 60).astype(np.int8)
    by_product = near_copies(hashes, thumbs, splits)
    monkeypatch.setattr("client.duplicates.DENSE", 1.0)
    assert sorted(by_product.tolist()) == sorted(near_copies(hashes, thumbs, splits).tolist())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images_are_compared(count: int) -> None:
    hashes, thumbs = np.zeros(count, np.uint64), np.zeros((count, SIDE * SIDE), np.uint8)
    assert near_copies(hashes, thumbs, np.zeros(count, np.int8)).shape == (0, 2)
