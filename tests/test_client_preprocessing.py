"""Presets, intensity and geometry of the preprocessed image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client.image import Decoded
from client.preprocessing import (
    PRESETS,
    Preset,
    kind_shown,
    letterbox,
    preprocess,
    preprocess_array,
    preprocessing_id,
    shown,
)
from common.errors import DataError

GENERIC = PRESETS["generic"]


def test_presets_are_the_promised_ones() -> None:
    assert set(PRESETS) == {
        *("generic", "chest-xray", "ct", "mammography", "brain-mri", "dermoscopy", "ultrasound", "phantom")
    }
    assert not PRESETS["chest-xray"].flip
    assert (GENERIC.image_size, PRESETS["phantom"].image_size, PRESETS["mammography"].image_size) == (224, 128, 512)
    assert (GENERIC.flip, GENERIC.rotate_degrees, GENERIC.views) == (True, 10.0, 4)


def test_id_names_pixel_deciding_fields_and_no_others() -> None:
    base = preprocessing_id(GENERIC, 224)
    same = replace(GENERIC, flip=False, rotate_degrees=1.0, translate=0.0, scale=0.0, brightness=0.0, views=1)
    assert preprocessing_id(replace(same, image_size=99), 224) == base
    others = [
        preprocessing_id(GENERIC, 128),
        preprocessing_id(replace(GENERIC, hu_window=(40.0, 400.0)), 224),
        preprocessing_id(replace(GENERIC, percentiles=(1.0, 99.0)), 224),
        preprocessing_id(replace(GENERIC, colour="grey"), 224),
    ]
    assert len({base, *others}) == 5


def test_id_is_pinned() -> None:
    """Change it only with VERSION: sites compare it, and caches are named after it."""
    assert preprocessing_id(GENERIC, 224) == "58b62feb8d3e8ea0"


images = hnp.arrays(
    np.uint8,
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)),
    ),
)


@settings(max_examples=60, deadline=None)
@given(pixels=images, size=st.integers(1, 33))
def test_letterbox_keeps_shape_and_black_border(pixels: np.ndarray, size: int) -> None:
    out = letterbox(pixels, size)
    assert out.shape == (1 if pixels.ndim == 2 else 3, size, size)
    height, width = pixels.shape[:2]
    covered = letterbox(np.full(pixels.shape, 255, np.uint8), size)
    assert not out[covered == 0].any()
    filled = covered[0] == 255
    rows, columns = filled.any(axis=1).sum(), filled.any(axis=0).sum()
    assert max(rows, columns) == size
    longest = max(height, width)
    assert abs(rows - max(1, height * size / longest)) <= 0.5
    assert abs(columns - max(1, width * size / longest)) <= 0.5


def test_same_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (17, 17), np.uint8)
    np.testing.assert_array_equal(letterbox(pixels, 17)[0], pixels)


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    assert np.abs(letterbox(stripes, 16)[0][:, 2:-2].astype(int) - 128).max() <= 4


@settings(max_examples=30, deadline=None)
@given(
    pixels=hnp.arrays(np.uint8, st.sampled_from([(1, 9, 7), (3, 12, 12), (2, 28, 28), (2, 9, 7, 3), (3, 16, 16, 3)])),
    size=st.integers(1, 40),
)
def test_stacked_is_one_by_one(pixels: np.ndarray, size: int) -> None:
    together = preprocess_array(pixels, size)
    alone = np.stack([preprocess(Decoded(image), GENERIC, size) for image in pixels])
    np.testing.assert_array_equal(together, alone)


def test_colour_policies_of_stacks() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    as_colour = preprocess_array(grey, 12, "colour")
    assert as_colour.shape == (3, 3, 12, 12)
    np.testing.assert_array_equal(as_colour[:, :1], preprocess_array(grey, 12))
    np.testing.assert_array_equal(
        preprocess_array(np.repeat(grey[..., None], 3, axis=3), 12, "grey"), preprocess_array(grey, 12)
    )


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 1), (2, 4, 4, 4), (1, 2, 4, 4, 3)])
def test_stacks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected uint8"):
        preprocess_array(np.zeros(shape, np.uint8), 8)


def test_stacks_of_another_dtype_are_refused() -> None:
    with pytest.raises(DataError, match="float32"):
        preprocess_array(np.zeros((2, 4, 4), np.float32), 8)  # type: ignore[arg-type]


def test_percentiles_clip_both_tails() -> None:
    values = np.arange(1001, dtype=np.float32).reshape(7, 143)
    out = shown(Decoded(values), Preset(percentiles=(10.0, 90.0)))
    expected = np.clip(np.floor((values - 100) * (255 / 800) + 0.5), 0, 255)
    assert np.abs(out - expected).max() <= 1
    assert ((out == 0).sum() >= 100, (out == 255).sum() >= 100) == (True, True)


@pytest.mark.parametrize("value", [0.0, -7.5, 1e12])
def test_flat_images_are_black(value: float) -> None:
    assert not shown(Decoded(np.full((5, 5), value, np.float32)), GENERIC).any()


def test_extreme_ranges_do_not_overflow() -> None:
    values = np.array([[0.0, 2e-31, 1e12, np.nan]], np.float32)
    np.testing.assert_array_equal(shown(Decoded(values, window=(0.0, 1e-30)), GENERIC)[0, 1:], [51, 255, 0])


@settings(max_examples=50, deadline=None)
@given(
    values=hnp.arrays(np.float32, (6, 5), elements=st.floats(-(2**20), 2**20, width=32)),
    low=st.floats(-1000, 1000),
    width=st.floats(0.01, 5000),
)
def test_window_is_monotone_and_leaves_its_input_alone(values: np.ndarray, low: float, width: float) -> None:
    before = values.copy()
    out = shown(Decoded(values, window=(low, low + width)), GENERIC)
    np.testing.assert_array_equal(values, before)
    order = np.argsort(values, axis=None)
    assert (np.diff(out.ravel()[order].astype(int)) >= 0).all()
    assert (out[values >= low + width * 1.01] == 255).all()
    assert (out[values <= low] == 0).all()


def test_eight_bits_without_window_are_left_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(90, 110, (9, 9), np.uint8)
    np.testing.assert_array_equal(shown(Decoded(pixels), GENERIC), pixels)


def test_kinds() -> None:
    grey, colour = Decoded(np.zeros((2, 2), np.uint8)), Decoded(np.zeros((2, 2, 3), np.uint8))
    assert [kind_shown(image, GENERIC) for image in (grey, colour)] == ["grey", "colour"]
    assert [kind_shown(image, PRESETS["ultrasound"]) for image in (grey, colour)] == ["grey", "grey"]
    assert preprocess(grey, PRESETS["dermoscopy"], 4).shape == (3, 4, 4)
