"""Presets, intensity and geometry of the preprocessed image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client.image import Decoded
from client.preprocessing import letterbox, preprocess, preprocess_array, shown
from common.errors import DataError
from common.presets import CHEST_CT, MAMMOGRAPHY, PRESETS, ULTRASOUND, Preset, preprocessing_id

GENERIC = PRESETS["generic"]


def test_presets_are_the_promised_ones() -> None:
    assert set(PRESETS) == {
        *("generic", "chest-xray", "ct", "chest-ct", "mammography", "brain-mri", "dermoscopy", "ultrasound", "fundus"),
        "phantom",
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
        preprocessing_id(replace(GENERIC, hu_windows=((40.0, 400.0),)), 224),
        preprocessing_id(replace(GENERIC, percentiles=(1.0, 99.0)), 224),
        preprocessing_id(replace(GENERIC, colour="grey"), 224),
        preprocessing_id(replace(GENERIC, crop="region"), 224),
        preprocessing_id(replace(GENERIC, frame="first"), 224),
        preprocessing_id(replace(GENERIC, side=True), 224),
        preprocessing_id(replace(GENERIC, foreground=True), 224),
    ]
    assert len({base, *others}) == 9


def test_id_is_pinned() -> None:
    """Change it only with VERSION: sites compare it, and caches are named after it."""
    assert preprocessing_id(GENERIC, 224) == "6f9bb3cc40c9c3f8"


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
    assert [len(preprocess(image, GENERIC, 4)) for image in (grey, colour)] == [1, 3]
    assert [len(preprocess(image, PRESETS["ultrasound"], 4)) for image in (grey, colour)] == [1, 1]
    assert preprocess(grey, PRESETS["dermoscopy"], 4).shape == (3, 4, 4)


@settings(max_examples=40, deadline=None)
@given(
    pixels=hnp.arrays(np.uint16, (9, 11), elements=st.integers(0, 255)),
    table=hnp.arrays(np.float32, 256, elements=st.floats(-3000, 3000, width=32)),
    low=st.floats(-500, 500),
    width=st.floats(0.5, 900),
)
def test_a_table_shows_what_its_values_show(pixels: np.ndarray, table: np.ndarray, low: float, width: float) -> None:
    by_table = shown(Decoded(pixels, table, (low, low + width)), GENERIC)
    np.testing.assert_array_equal(by_table, shown(Decoded(table[pixels], window=(low, low + width)), GENERIC))


def test_three_windows_are_three_channels_of_hounsfield_units_alone() -> None:
    units = np.array([[-1350.0, -600.0, 0.0, 40.0, 80.0, 240.0]], np.float32)
    out = shown(Decoded(units, hounsfield=True), CHEST_CT)
    np.testing.assert_array_equal(out[0, :, 0], [0, 0, 102, 128, 153, 255])  # 40/400: -160 to 240
    np.testing.assert_array_equal(out[0, :, 1], [0, 128, 230, 236, 243, 255])  # -600/1500: -1350 to 150
    np.testing.assert_array_equal(out[0, :, 2], [0, 0, 0, 128, 255, 255])  # 40/80: 0 to 80
    assert preprocess(Decoded(units, window=(0.0, 80.0)), CHEST_CT, 8).shape == (3, 8, 8)


def test_the_air_around_a_head_does_not_decide_its_contrast() -> None:
    head = np.random.default_rng(0).integers(400, 800, (20, 20)).astype(np.uint16)
    shots = []
    for air in (4, 40):
        picture = np.zeros((20 + 2 * air, 20 + 2 * air), np.uint16)
        picture[air:-air, air:-air] = head
        shots.append(shown(Decoded(picture), PRESETS["brain-mri"])[air:-air, air:-air])
    np.testing.assert_array_equal(*shots)
    assert shots[0].std() > 60


def test_a_breast_is_cropped_and_faces_right_whichever_side_it_is() -> None:
    picture = np.zeros((200, 300), np.uint8)
    y, x = np.ogrid[:200, :300]
    picture[(y - 100) ** 2 + x**2 < 80**2] = 180
    picture[5:12, 260:290] = 255  # a marker
    left = preprocess(Decoded(picture), MAMMOGRAPHY, 64)
    np.testing.assert_array_equal(left, preprocess(Decoded(picture[:, ::-1]), MAMMOGRAPHY, 64))
    assert left.max() < 200  # no marker
    rows = np.flatnonzero(left[0].any(axis=1))
    assert rows[0] <= 3 and rows[-1] >= 60


def test_only_the_region_of_an_ultrasound_image_is_shown() -> None:
    picture = np.full((60, 80), 40, np.uint8)
    picture[:10] = 255  # text
    image = Decoded(picture, region=(10, 0, 60, 80))
    assert preprocess(image, ULTRASOUND, 32).max() == 40
    assert preprocess(image, GENERIC, 32).max() > 200


@settings(max_examples=30, deadline=None)
@given(preset=st.sampled_from(sorted(PRESETS)), pixels=images)
def test_every_preset_takes_every_picture(preset: str, pixels: np.ndarray) -> None:
    out = preprocess(Decoded(pixels), PRESETS[preset], 24)
    assert out.dtype == np.uint8 and out.shape[1:] == (24, 24)
    np.testing.assert_array_equal(out, preprocess(Decoded(pixels.copy()), PRESETS[preset], 24))
