"""One image file -> its pixel values and what its header says, or one code of a closed list that says why not.

Nothing a file holds can raise anything here, and no text of a decoder's exception gets out: such texts quote paths
and header values. PNG, JPEG and TIFF are read by Pillow, DICOM by `client.dicom`; what a file is decides its content,
not its name.

What counts as the image, where a format leaves a choice: the first page of a TIFF, the frame that the preset names of
a DICOM clip; upright, as a viewer shows it (the EXIF orientation is applied, as Pillow does for TIFF by itself);
transparent pixels over black; a colour file without colour (mean spread of the three channels under 8 levels) as
grey, by its luma. Grey keeps its full depth; 16-bit colour is read at 8 bits.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from client.identity import Identity
from client.image import (
    MAX_FILE_BYTES,
    MAX_FRAME_BYTES,
    Decoded,
    Header,
    Ignored,
    Unreadable,
    checked,
    identity_of,
    values_digest,
    without_colour,
)
from common.presets import Frame

Image.MAX_IMAGE_PIXELS = None  # the limit on bytes below is ours, and says a code

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
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Reading:
    """What became of one file."""

    code: str  # of `client.image.CODES` or IGNORED; empty: it gave an image
    header: Header
    image: Decoded | None = None
    digest: bytes = b""  # `client.image.identity_of`


Announce = Callable[[int], None]


def read(
    path: Path,
    identity: Identity,
    frame: Frame = "middle",
    announce: Announce = lambda _size: None,
    opted_out: frozenset[bytes] = frozenset(),
) -> Reading:
    """Read one image file.

    Not for several threads at once: warning filters belong to the process. Use processes.

    Args:
        path: the file.
        identity: makes the digests of what the header names.
        frame: which one of a clip.
        announce: told how many bytes will be decoded, before they are.
        opted_out: `Identity.person` of patients whose images are not decoded.
    """
    header = [Header()]
    try:
        with _quiet():
            image, digest = _read(path, identity, frame, announce, opted_out, header)
    except (Unreadable, Ignored) as error:
        return Reading(error.code, header[0])
    except (KeyboardInterrupt, SystemExit):
        raise
    except (MemoryError, Image.DecompressionBombError):
        return Reading("too_large", header[0])
    except FileNotFoundError:
        return Reading("missing", header[0])
    except PermissionError:
        return Reading("no_access", header[0])
    except BaseException:  # noqa: BLE001 - decoders written in Rust panic with a bare BaseException
        return Reading("damaged", header[0])
    return Reading("", header[0], image, digest)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings: decoders quote header values in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(
    path: Path,
    identity: Identity,
    frame: Frame,
    announce: Announce,
    opted_out: frozenset[bytes],
    header: list[Header],
) -> tuple[Decoded, bytes]:
    """Read a file; what its header says is left in `header`, also if the pixels then fail."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("missing")
    if status.st_size == 0:
        raise Unreadable("empty")
    if status.st_size > MAX_FILE_BYTES:
        raise Unreadable("too_large")
    with path.open("rb") as file:
        beginning = file.read(132)
        file.seek(0)
        if beginning.startswith(_PICTURES) and beginning[128:] != b"DICM":
            return _picture(file, announce, header)
        from client import dicom  # here, so that folders without DICOM never load pydicom

        if not dicom.has_preamble(beginning) and not dicom.is_bare(beginning):
            raise Unreadable("not_an_image")
        opened = dicom.open_dicom(file, beginning)
        header[0] = dicom.header_of(opened, identity)
        if header[0].person in opted_out:
            header[0] = Header(person=header[0].person)
            raise Ignored("opted_out")
        size = opened.file.getbuffer().nbytes if isinstance(opened.file, io.BytesIO) else status.st_size
        return dicom.read_pixels(opened, size, frame, announce)


def _picture(file: BinaryIO, announce: Announce, header: list[Header]) -> tuple[Decoded, bytes]:
    try:
        opened = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise Unreadable("not_an_image") from None
    with opened as image:
        header[0] = Header(syntax=str(image.format), rows=image.height, columns=image.width)
        size = image.width * image.height * _DEEP_MODES.get(image.mode, len(image.getbands()))
        if size > MAX_FRAME_BYTES:
            raise Unreadable("too_large")
        announce(size)
        image.load()
        stored = values_digest(np.asarray(image))
        pixels = _values(_upright(image))
    decoded = Decoded(pixels, pixel_sha256=stored)
    return decoded, identity_of(decoded, values_digest(pixels))


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF block says; a block that cannot be read says nothing."""
    if image.format == "TIFF":
        return image
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - a broken side block does not spoil the picture
        return image
    return image if turn is None else image.transpose(turn)


def _values(image: Image.Image) -> NDArray[Any]:
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint16)
        return 65535 - deep if _white_is_zero(image) else deep
    if image.mode in _DEEP_MODES:
        return _deep(np.asarray(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode not in _COLOUR_MODES:
        raise Unreadable("unsupported_image")
    return without_colour(np.asarray(image.convert("RGB")))


def _deep(values: NDArray[Any]) -> NDArray[Any]:
    """Return 32-bit values: as 16 bits where they fit, for Pillow reads some 16-bit files so."""
    floats = checked(values.astype(np.float32))
    whole = values.dtype.kind == "i" and values.min(initial=0) >= 0 and values.max(initial=0) < 2**16
    return values.astype(np.uint16) if whole else floats


def _white_is_zero(image: Image.Image) -> bool:
    """Tell whether 16-bit grey is stored inverted; Pillow undoes that for 8 bits only."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0
