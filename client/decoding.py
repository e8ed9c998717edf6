"""One image file -> its pixel values, or one code of a closed list that says why there are none.

Nothing a file holds can raise anything else here, and no text of a decoder's exception gets out: such texts quote
paths and header values. PNG, JPEG and TIFF are read by Pillow, DICOM by `client.dicom`.

What counts as the image, where a format leaves a choice: the first page of a TIFF, the middle frame of a DICOM clip;
upright, as a viewer shows it (the EXIF orientation is applied, as Pillow does for TIFF by itself); transparent pixels
over black; a colour file without colour (mean spread of the three channels under 8 levels) as grey, by its luma.
Grey keeps its full depth; 16-bit colour is read at 8 bits.
"""

from __future__ import annotations

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from client.image import MAX_BYTES, Decoded, Unreadable, checked, without_colour

_FORMATS = ("PNG", "JPEG", "TIFF")
_DEEP_MODES = {"I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2, "I": 4, "F": 4}  # Pillow mode -> bytes a pixel
_COLOUR_MODES = ("RGB", "P", "CMYK", "YCbCr")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.3, 4.6.4 A, Orientation


def decode(path: Path) -> Decoded:
    """Read one image file.

    Not for several threads at once: warning filters belong to the process. Use processes.

    Raises:
        Unreadable: whatever was wrong with the file, as a code.
    """
    try:
        with _quiet():
            return _decode(path)
    except (Unreadable, KeyboardInterrupt, SystemExit):
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise Unreadable("too_large") from None
    except FileNotFoundError:
        raise Unreadable("missing") from None
    except PermissionError:
        raise Unreadable("no_access") from None
    except BaseException:  # noqa: BLE001 - decoders written in Rust panic with a bare BaseException
        raise Unreadable("damaged") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings: decoders quote header values in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(path: Path) -> Decoded:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("missing")
    if status.st_size == 0:
        raise Unreadable("empty")
    with path.open("rb") as file:
        preamble = file.read(132)
    if preamble[128:] == b"DICM":
        from client.dicom import read_dicom  # here, so that folders without DICOM never load pydicom

        return read_dicom(path)
    return Decoded(_read_picture(path))


def _read_picture(path: Path) -> NDArray[np.uint8] | NDArray[np.float32]:
    try:
        opened = Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError:
        raise Unreadable("not_an_image") from None
    with opened as image:
        pixel_bytes = _DEEP_MODES.get(image.mode, len(image.getbands()))
        if image.width * image.height * pixel_bytes > MAX_BYTES:
            raise Unreadable("too_large")
        image.load()
        return _values(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF block says; a block that cannot be read says nothing."""
    if image.format == "TIFF":
        return image
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - a broken side block does not spoil the picture
        return image
    return image if turn is None else image.transpose(turn)


def _values(image: Image.Image) -> NDArray[np.uint8] | NDArray[np.float32]:
    if image.mode in _DEEP_MODES:
        values = np.asarray(image).astype(np.float32)
        return checked(65535 - values if _white_is_zero(image) else values)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode not in _COLOUR_MODES:
        raise Unreadable("unsupported_image")
    return without_colour(np.asarray(image.convert("RGB")))


def _white_is_zero(image: Image.Image) -> bool:
    """Tell whether 16-bit grey is stored inverted; Pillow undoes that for 8 bits only."""
    return isinstance(image, TiffImageFile) and image.mode.startswith("I;16") and image.tag_v2.get(262) == 0
