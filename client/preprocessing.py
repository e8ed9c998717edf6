"""Decoded image -> uint8 at training size, by a preset: the one function that every site must share.

`preprocessing_id` names everything that decides a pixel. It travels in the run's configuration, and a site whose id
differs is refused. Augmentation is no part of it: presets only carry its numbers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.image import Decoded, Kind, luma
from common.errors import DataError

VERSION = 1
"""Raise it whenever `client.decoding`, `client.dicom` or this module gives any image another pixel."""

ColourPolicy = Literal["keep", "grey", "colour"]


@dataclass(frozen=True)
class Preset:
    """How one kind of image is shown to the network.

    The fields down to `colour` decide pixels; those below are for augmentation, which happens later.
    """

    image_size: int = 224  # pixels a side, unless the run says otherwise
    hu_window: tuple[float, float] | None = None  # centre and width, Hounsfield units; for CT in place of the file's
    percentiles: tuple[float, float] = (0.5, 99.5)  # shown black and white; deeper than 8 bits and no window
    colour: ColourPolicy = "keep"  # keep: as most images of the data set are
    flip: bool = False  # whether the mirror image is a possible patient
    rotate_degrees: float = 10.0  # at most, either way
    translate: float = 0.05  # at most, as a share of the side
    scale: float = 0.1  # at most, either way from 1
    brightness: float = 0.2  # at most, either way from 1; contrast likewise
    views: int = 4  # cached augmented views of a training image; 1 = none


PRESETS: dict[str, Preset] = {
    "generic": Preset(flip=True),
    "chest-xray": Preset(rotate_degrees=7.0),  # no flip: heart side, markers
    "ct": Preset(hu_window=(40.0, 400.0), rotate_degrees=5.0, brightness=0.0),  # grey values mean density
    "mammography": Preset(image_size=512, flip=True),  # small lesions vanish at 224
    "brain-mri": Preset(percentiles=(1.0, 99.0), flip=True),
    "dermoscopy": Preset(colour="colour", flip=True, rotate_degrees=180.0),  # no up or down on skin
    "ultrasound": Preset(colour="grey", rotate_degrees=5.0),  # the views of the heart have sides
    "phantom": Preset(image_size=128, rotate_degrees=7.0),
}
"""The presets by name; a new modality is one line."""


def preprocessing_id(preset: Preset, size: int) -> str:
    """Return 16 hex digits that stand for every pixel-deciding choice: preset fields, size and code version.

    Examples:
        >>> preprocessing_id(PRESETS["generic"], 224) == preprocessing_id(PRESETS["generic"], 128)
        False
        >>> preprocessing_id(PRESETS["generic"], 224) == preprocessing_id(PRESETS["chest-xray"], 224)
        True
    """
    choices: dict[str, Any] = {
        "colour": preset.colour,
        "hu_window": preset.hu_window,
        "percentiles": preset.percentiles,
        "size": size,
        "version": VERSION,
    }
    canonical = json.dumps(choices, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def kind_shown(image: Decoded, preset: Preset) -> Kind:
    """Return the kind that an image has after preprocessing."""
    return image.kind if preset.colour == "keep" else preset.colour


def preprocess(image: Decoded, preset: Preset, size: int) -> NDArray[np.uint8]:
    """Return the image at training size: intensity window, colour policy, letterbox on black.

    Args:
        image: what `decoding.decode` returned.
        preset: one of `PRESETS`, or another.
        size: S, pixels a side.

    Returns:
        (C, S, S), C 1 for grey and 3 for colour.
    """
    return letterbox(_as_kind(shown(image, preset), kind_shown(image, preset)), size)


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


def shown(image: Decoded, preset: Preset) -> NDArray[np.uint8]:
    """Return the image as a screen would show it: 0 black, 255 white, at its own size; padding is black.

    The window is the preset's for CT, else the file's, else none for 8-bit images and percentiles for deeper ones.
    """
    window = image.window
    if image.hounsfield and preset.hu_window is not None:
        centre, width = preset.hu_window
        window = (centre - width / 2, centre + width / 2)
    if image.pixels.dtype == np.uint8 and window is None:
        return image.pixels.astype(np.uint8, copy=False)
    values = image.pixels.astype(np.float32)
    low, high = _percentiles(values, preset.percentiles) if window is None else window
    return _stretch(values, low, high)


def letterbox(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Fit (H, W) or (H, W, 3) into a black square of `size`, centred, its shape kept: (C, S, S).

    Bicubic when enlarging; when shrinking the kernel widens with the step, so nothing aliases.
    """
    height, width = pixels.shape[:2]
    longest = max(height, width)
    fitted_height, fitted_width = (max(1, (2 * n * size + longest) // (2 * longest)) for n in (height, width))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    fitted = np.asarray(image.resize((fitted_width, fitted_height), Image.Resampling.BICUBIC))
    square = np.zeros((size, size, *pixels.shape[2:]), np.uint8)
    top, left = (size - fitted_height) // 2, (size - fitted_width) // 2
    square[top : top + fitted_height, left : left + fitted_width] = fitted
    return square[None] if square.ndim == 2 else np.ascontiguousarray(square.transpose(2, 0, 1))


def _as_kind(pixels: NDArray[np.uint8], kind: Kind) -> NDArray[np.uint8]:
    if kind == "grey":
        return pixels if pixels.ndim == 2 else luma(pixels)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _percentiles(values: NDArray[np.float32], percentiles: tuple[float, float]) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not known.size:
        return 0.0, 0.0
    low, high = np.percentile(known, percentiles)
    return float(low), float(high)


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
