"""The contact sheet: up to 24 preprocessed images side by side in one PNG, so that a person sees what a model would."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConsiliumError

MOST = 24
SIDE = 160  # pixels of one image, at most
COLUMNS = 6


def contact_sheet(images: NDArray[np.uint8]) -> bytes:
    """Return the PNG of images (m, C, S, S), row by row, `COLUMNS` in a row; no bytes where there is no image.

    Raises:
        ConsiliumError: more than `MOST` images, or of another shape or type.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != np.uint8 or len(images) > MOST:
        raise ConsiliumError(
            f"contact sheet: got {images.dtype} {images.shape}, expected uint8 (0..{MOST}, 1 or 3, S, S)"
        )
    if not len(images):
        return b""
    side = min(SIDE, images.shape[-1])
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", (side * min(COLUMNS, len(images)), side * rows))
    for place, image in enumerate(images):
        row, column = divmod(place, COLUMNS)
        sheet.paste(_thumbnail(image, side), (column * side, row * side))
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    return content.getvalue()


def size(images: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Return the side of one image on the sheet, the columns and the rows."""
    return min(SIDE, images.shape[-1]), min(COLUMNS, len(images)), -(-len(images) // COLUMNS)


def _thumbnail(image: NDArray[np.uint8], side: int) -> Image.Image:
    pixels = image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
    whole = Image.fromarray(np.ascontiguousarray(pixels))
    return whole if whole.size == (side, side) else whole.resize((side, side), Image.Resampling.BOX)
