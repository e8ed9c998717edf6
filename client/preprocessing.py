"""Decoded image -> uint8 at training size, by a preset: the one function that every site must share.

`common.presets.preprocessing_id` names everything that decides a pixel. It travels in the run's configuration, and a
site whose id differs is refused. Augmentation is no part of it: presets only carry its numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.image import Decoded, Kind, luma
from common.errors import DataError
from common.presets import ColourPolicy, Preset

_SAMPLE = 2**18  # pixels of a regular grid that percentiles are taken of
_BLOCK = 2**17  # pixels looked up at a time, so that they stay in the processor's cache
_GRID = 64  # cells a side in which the foreground is looked for
_DIM = 20  # levels of 255 up to which a cell is background
_SPARSE = 0.04  # share of bright cells up to which a row or column is background
_GAP = 2.0  # Pillow shrinks in two steps beyond this ratio; the difference to one step is below a level

Picture = NDArray[np.uint8]
"""(H, W) grey or (H, W, 3) colour."""


def preprocess(image: Decoded, preset: Preset, size: int) -> NDArray[np.uint8]:
    """Return the image at training size: intensity window, crop, side, colour policy, letterbox on black.

    Args:
        image: what `decoding.read` returned.
        preset: one of `PRESETS`, or another.
        size: S, pixels a side.

    Returns:
        (C, S, S), C 1 for grey and 3 for colour.
    """
    picture = _sided(_cropped(shown(image, preset), image.region, preset), preset)
    kind = _kind(picture) if preset.colour == "keep" else preset.colour
    return letterbox(_as_kind(picture, kind), size)


def preprocess_array(images: NDArray[np.uint8], size: int, colour: ColourPolicy = "keep") -> NDArray[np.uint8]:
    """Return stacked 8-bit images at training size, each pixel as if done one by one.

    Args:
        images: (N, H, W) or (N, H, W, 3).
        size: S, pixels a side.
        colour: the preset's policy.

    Returns:
        (N, C, S, S).

    Raises:
        DataError: another dtype or shape.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise DataError(f"images: got {images.dtype} of shape {images.shape}, expected uint8 (N, H, W) or (N, H, W, 3)")
    own: Kind = "grey" if images.ndim == 3 else "colour"
    kind = own if colour == "keep" else colour
    done = np.empty((len(images), 1 if kind == "grey" else 3, size, size), np.uint8)
    for row, image in zip(done, images, strict=True):
        row[:] = letterbox(_as_kind(image, kind), size)
    return done


# --------------------------------------------------------------------------------------------------------- intensity


def shown(image: Decoded, preset: Preset) -> Picture:
    """Return the image as a screen would show it: 0 black, 255 white, at its own size; padding is black.

    The window is the preset's for CT, else the file's, else none for 8-bit images and percentiles for deeper ones.
    Three windows of a preset become the three channels of a colour image.
    """
    if image.kind == "colour":
        return image.pixels.astype(np.uint8, copy=False)
    if not (image.hounsfield and preset.hu_windows):
        return _plane(image, image.window, preset)
    planes = [_plane(image, (centre - width / 2, centre + width / 2), preset) for centre, width in preset.hu_windows]
    return planes[0] if len(planes) == 1 else np.stack(planes, axis=-1)


def _plane(image: Decoded, window: tuple[float, float] | None, preset: Preset) -> Picture:
    pixels, table = image.pixels, image.table
    if pixels.dtype == np.float32:
        low, high = _limits(*_counted(_grid(pixels)), preset) if window is None else window
        return _stretch(pixels.astype(np.float32), low, high)
    if pixels.dtype == np.uint8 and table is None and window is None:
        return pixels.astype(np.uint8, copy=False)
    if table is None:
        table = np.arange(int(pixels.max(initial=0)) + 1, dtype=np.float32)
    low, high = (
        _limits(table, np.bincount(_grid(pixels).ravel(), minlength=len(table)), preset) if window is None else window
    )
    return _looked_up(_stretch(table.copy(), low, high), pixels)


def _looked_up(table: NDArray[np.uint8], pixels: NDArray[Any]) -> Picture:
    """Return `table[pixels]`, some rows at a time."""
    result = np.empty(pixels.shape, np.uint8)
    step = max(1, _BLOCK // max(1, pixels.shape[1]))
    for start in range(0, len(pixels), step):
        np.take(table, pixels[start : start + step], out=result[start : start + step], mode="clip")
    return result


def _grid(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the pixels of a regular grid, all of them if they are few."""
    step = max(1, int(np.ceil(np.sqrt(pixels.size / _SAMPLE))))
    return pixels[::step, ::step]


def _counted(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    found, counts = np.unique(values, return_counts=True)
    return found, counts


def _limits(values: NDArray[np.float32], counts: NDArray[np.int64], preset: Preset) -> tuple[float, float]:
    """Return what is shown black and white: percentiles of the values that occur, padding left out."""
    known = (counts > 0) & ~np.isnan(values)
    values, counts = values[known], counts[known]
    if not len(values):
        return 0.0, 0.0
    order = np.argsort(values, kind="stable")
    values, counts = values[order], counts[order]
    if preset.foreground:
        floor = values[0] + 0.1 * (_quantile(values, counts, 99.5) - values[0])
        inside = values > floor
        if inside.any():
            values, counts = values[inside], counts[inside]
    low, high = (_quantile(values, counts, percent) for percent in preset.percentiles)
    return low, high


def _quantile(values: NDArray[np.float32], counts: NDArray[np.int64], percent: float) -> float:
    """Return the smallest value that at least so many per cent do not exceed; values rise."""
    reached = np.cumsum(counts)
    return float(values[min(np.searchsorted(reached, percent / 100 * reached[-1]), len(values) - 1)])


def _stretch(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Map low..high to 0..255, rounded half up; an empty range is a step (PS3.3, C.11.2.1.2.1: width 1).

    Works in `values`, which the caller gives away: films are large.
    """
    if high <= low:
        return np.where(values > low, 255, 0).astype(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):  # a range near nothing: infinite is white
        values -= np.float32(low)
        values *= np.float32(255.0 / (high - low))
        values += np.float32(0.5)
        np.nan_to_num(values, copy=False, nan=0.0)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- geometry


def _cropped(picture: Picture, region: tuple[int, int, int, int] | None, preset: Preset) -> Picture:
    if preset.crop == "region" and region is not None:
        top, left, bottom, right = region
        return picture[top:bottom, left:right]
    if preset.crop != "foreground":
        return picture
    bright = _bright(picture)
    (top, bottom), (left, right) = _run(bright.mean(axis=1)), _run(bright.mean(axis=0))
    height, width = picture.shape[:2]
    return picture[
        top * height // _GRID : -(-bottom * height // _GRID), left * width // _GRID : -(-right * width // _GRID)
    ]


def _bright(picture: Picture) -> NDArray[np.bool_]:
    """Return which cells of a coarse grid are brighter than the background: (64, 64)."""
    grey = picture if picture.ndim == 2 else luma(picture)
    cells = Image.fromarray(np.ascontiguousarray(grey)).resize((_GRID, _GRID), Image.Resampling.BOX)
    return np.asarray(cells) > _DIM


def _run(shares: NDArray[np.float64]) -> tuple[int, int]:
    """Return start and end of the longest run of cells that are not sparse; all of them if there is none."""
    full = np.concatenate([[False], shares > _SPARSE, [False]])
    starts, ends = np.flatnonzero(~full[:-1] & full[1:]), np.flatnonzero(full[:-1] & ~full[1:])
    if not len(starts):
        return 0, len(shares)
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest])


def _sided(picture: Picture, preset: Preset) -> Picture:
    """Mirror the picture if its right half is the brighter one, where the preset asks for it."""
    if not preset.side:
        return picture
    half = picture.shape[1] // 2
    return (
        picture[:, ::-1] if picture[:, -half:].sum(dtype=np.int64) > picture[:, :half].sum(dtype=np.int64) else picture
    )


def letterbox(pixels: Picture, size: int) -> NDArray[np.uint8]:
    """Fit (H, W) or (H, W, 3) into a black square of `size`, centred, its shape kept: (C, S, S).

    Bicubic when enlarging; when shrinking the kernel widens with the step, so nothing aliases.
    """
    height, width = pixels.shape[:2]
    longest = max(height, width)
    fitted_height, fitted_width = (max(1, (2 * n * size + longest) // (2 * longest)) for n in (height, width))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    fitted = np.asarray(image.resize((fitted_width, fitted_height), Image.Resampling.BICUBIC, reducing_gap=_GAP))
    square = np.zeros((size, size, *pixels.shape[2:]), np.uint8)
    top, left = (size - fitted_height) // 2, (size - fitted_width) // 2
    square[top : top + fitted_height, left : left + fitted_width] = fitted
    return square[None] if square.ndim == 2 else np.ascontiguousarray(square.transpose(2, 0, 1))


def _kind(picture: Picture) -> Kind:
    return "grey" if picture.ndim == 2 else "colour"


def _as_kind(pixels: Picture, kind: Kind) -> Picture:
    if kind == "grey":
        return pixels if pixels.ndim == 2 else luma(pixels)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
