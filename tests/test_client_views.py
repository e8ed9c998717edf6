"""Cached views: decided by digest and number alone, within the bounds of the preset."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.augmentation import Augmentation, keys
from client.views import augment, normalise
from common.backbone import InputSpec
from common.presets import PRESETS

torch.set_num_threads(1)

STILL = Augmentation(flip=False, rotate_degrees=0.0, translate=0.0, scale=0.0, brightness=0.0)
LIVELY = Augmentation(flip=True, rotate_degrees=30.0, translate=0.1, scale=0.2, brightness=0.3)
SIZE = 64


def digests_of(count: int, seed: int = 0) -> np.ndarray:
    joined = b"".join(hashlib.sha256(f"{seed}/{number}".encode()).digest() for number in range(count))
    return np.frombuffer(joined, np.uint8).reshape(count, 32)


def spots(count: int, x: float, y: float) -> torch.Tensor:
    """The same soft spot in every image, centred at x, y pixels from the middle."""
    grid = torch.arange(SIZE) - (SIZE - 1) / 2
    spot = torch.exp(-((grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2) / 18)
    return spot.expand(count, 1, SIZE, SIZE).clone()


def centres(images: torch.Tensor) -> torch.Tensor:
    """(B, 2) of x, y from the middle, pixels."""
    grid = torch.arange(SIZE) - (SIZE - 1) / 2
    weights = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    return torch.stack([(weights * grid[None, None, :]).sum((1, 2)), (weights * grid[None, :, None]).sum((1, 2))], 1)


@pytest.mark.parametrize("augmentation", [STILL, LIVELY])
def test_the_first_view_is_the_image_itself(augmentation: Augmentation) -> None:
    images = torch.rand(3, 3, 8, 8)
    assert augment(images, digests_of(3), 0, augmentation) is images


def test_without_bounds_every_view_is_the_image() -> None:
    images = torch.rand(3, 3, 16, 16)
    for view in (1, 2):
        torch.testing.assert_close(augment(images, digests_of(3), view, STILL), images, atol=1e-5, rtol=0)


def test_mirrors_odd_views_where_allowed_and_only_there() -> None:
    images, digests = torch.rand(3, 3, 16, 16), digests_of(3)
    allowed = replace(STILL, flip=True)
    torch.testing.assert_close(augment(images, digests, 1, allowed), images.flip(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(augment(images, digests, 2, allowed), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(augment(images, digests, 3, allowed), images.flip(3), atol=1e-5, rtol=0)


def test_mirroring_is_the_same_view_seen_in_a_mirror() -> None:
    images, digests = torch.rand(20, 1, 16, 16), digests_of(20)
    plain = augment(images, digests, 1, replace(LIVELY, flip=False))
    torch.testing.assert_close(augment(images, digests, 1, LIVELY), plain.flip(3), atol=1e-4, rtol=0)


def test_shifts_stay_within_the_share_of_the_side() -> None:
    moved = centres(augment(spots(200, 0, 0), digests_of(200), 1, replace(STILL, translate=0.1))) / SIZE
    assert 0.095 < moved.abs().max() <= 0.1 + 1e-3
    assert moved.min() < -0.09
    assert moved.mean(0).abs().max() < 0.02


def test_turns_stay_within_the_degrees() -> None:
    moved = centres(augment(spots(200, 20, 0), digests_of(200), 2, replace(STILL, rotate_degrees=30.0)))
    degrees = torch.rad2deg(torch.atan2(moved[:, 1], moved[:, 0]))
    assert 28 < degrees.max() <= 30.2
    assert -30.2 <= degrees.min() < -28
    torch.testing.assert_close(moved.norm(dim=1), torch.full((200,), 20.0), atol=0.1, rtol=0)  # no shear, no scaling


def test_scales_stay_within_the_share() -> None:
    moved = centres(augment(spots(200, 15, 0), digests_of(200), 1, replace(STILL, scale=0.2)))[:, 0] / 15
    assert 0.8 - 0.01 <= moved.min() < 0.82
    assert 1.18 < moved.max() <= 1.2 + 0.01


def test_brightness_stays_within_the_share_and_in_range() -> None:
    images, digests = torch.full((200, 1, 4, 4), 0.5), digests_of(200)
    moved = augment(images, digests, 1, replace(STILL, brightness=0.3))[:, 0, 0, 0] / 0.5
    assert 0.7 - 1e-5 <= moved.min() < 0.72
    assert 1.28 < moved.max() <= 1.3 + 1e-5
    assert augment(images * 2, digests, 1, replace(STILL, brightness=0.3)).max() == 1.0


def test_the_border_is_continued_not_black() -> None:
    """A shift must not paint black bars that no image has."""
    shifted = augment(torch.ones(50, 1, 32, 32), digests_of(50), 1, replace(LIVELY, brightness=0.0))
    torch.testing.assert_close(shifted, torch.ones_like(shifted))


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(8)), view=st.integers(1, 15), channels=st.sampled_from([1, 3]))
def test_a_view_depends_on_digest_and_number_alone(order: list[int], view: int, channels: int) -> None:
    images = torch.rand(8, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    digests = digests_of(8)
    straight = augment(images, digests, view, LIVELY)
    torch.testing.assert_close(augment(images[order], digests[order], view, LIVELY), straight[order])
    alone = augment(images[:1], digests[:1], view, LIVELY)
    torch.testing.assert_close(alone, straight[:1], atol=1e-5, rtol=0)


def test_other_digests_and_other_numbers_give_other_views() -> None:
    image = torch.rand(1, 1, 16, 16)
    shown = [augment(image, digests_of(1, seed), view, LIVELY) for seed in (0, 1) for view in (1, 2, 3)]
    distances = [float((a - b).abs().max()) for n, a in enumerate(shown) for b in shown[:n]]
    assert min(distances) > 0.05


def test_views_are_pinned() -> None:
    """Change these numbers only together with `views.VERSION`: caches hold features of such views."""
    image = torch.linspace(0, 1, 16).reshape(1, 1, 4, 4)
    expected = [0.2323, 0.2754, 0.3606, 0.4037, 0.4468, 0.4899]
    shown = augment(image, digests_of(1), 1, LIVELY)[0, 0].flatten()[2:8]
    torch.testing.assert_close(shown, torch.tensor(expected), atol=2e-4, rtol=0)
    assert keys(digests_of(1), 0, LIVELY)[0].tobytes().hex()[:16] == "e7e079311ddc30a2"
    assert keys(digests_of(1), 1, LIVELY)[0].tobytes().hex()[:16] == "595a2da5b1ec3fdf"


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)), view=st.integers(0, 15))
def test_keys_follow_their_digests(order: list[int], view: int) -> None:
    found = keys(digests_of(6), view, LIVELY)
    assert (found.dtype, found.shape) == (np.dtype("V32"), (6,))
    assert keys(digests_of(6)[order], view, LIVELY).tobytes() == found[order].tobytes()


def test_keys_are_all_different_and_the_image_has_one_whatever_the_preset() -> None:
    digests = digests_of(5)
    every = [key.tobytes() for view in range(16) for key in keys(digests, view, LIVELY)]
    assert len(set(every)) == 5 * 16
    assert keys(digests, 0, LIVELY).tobytes() == keys(digests, 0, STILL).tobytes()
    assert keys(digests, 1, LIVELY).tobytes() != keys(digests, 1, STILL).tobytes()


@pytest.mark.parametrize("name", [field.name for field in fields(Augmentation)])
def test_every_bound_is_part_of_the_identity(name: str) -> None:
    other = replace(LIVELY, **{name: False if name == "flip" else getattr(LIVELY, name) / 2})
    assert other.identity() != LIVELY.identity()
    assert len(other.identity()) == 16


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_give_their_own_bounds(name: str) -> None:
    preset, augmentation = PRESETS[name], Augmentation.of(PRESETS[name])
    for field in fields(Augmentation):
        assert getattr(augmentation, field.name) == getattr(preset, field.name)


def test_no_digests_have_no_keys() -> None:
    assert keys(digests_of(0), 1, LIVELY).shape == (0,)


def test_normalising_is_minus_mean_over_std_in_three_channels() -> None:
    spec = InputSpec(4, (0.5, 0.4, 0.3), (0.5, 0.25, 0.1), "bicubic")
    grey = torch.rand(2, 1, 4, 4)
    shown = normalise(grey, spec)
    assert shown.shape == (2, 3, 4, 4)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        torch.testing.assert_close(shown[:, channel], (grey[:, 0] - mean) / std)
    torch.testing.assert_close(normalise(grey.expand(-1, 3, -1, -1), spec), shown)
