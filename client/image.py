"""One decoded image, whatever file it came from, and the closed list of reasons why there is none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConsiliumError

Kind = Literal["grey", "colour"]

CODES = {
    "missing": "no regular file of that name",
    "outside_root": "the path leads out of the data folder",
    "no_label": "no label is given for it",
    "label_conflict": "labelled in two ways",
    "no_access": "the file may not be read",
    "empty": "the file has no bytes",
    "not_an_image": "neither PNG, JPEG, TIFF nor DICOM",
    "no_pixels": "an image object whose pixel data are absent",
    "unsupported_syntax": "a DICOM compression that no installed decoder reads",
    "unsupported_image": "a pixel format that is not read",
    "too_large": "larger than the limits on a file, a frame or the memory of a decoder",
    "damaged": "cut short, or its content contradicts itself",
    "bad_values": "pixel values that are not finite, or beyond MAX_VALUE",
    "timeout": "its decoder did not end in time",
    "crashed": "its decoder died",
    "kind_differs": "grey among colour images, or the reverse",
    "placeholder_patient": "a PatientID that is blank or stands for nobody",
    "duplicate_in_other_split": "the same image, or nearly, is in the split that has precedence",
}
"""Why a file is in quarantine: code -> meaning. Closed: counts of these are all that is told of unusable files."""

IGNORED = {
    "hidden": "its name, or its folder's, begins with a dot",
    "other_suffix": "neither its name nor its content is that of an image",
    "directory": "a DICOMDIR",
    "report": "a structured report",
    "key_objects": "a key object selection",
    "presentation_state": "a presentation state",
    "radiotherapy": "a radiotherapy object: structure set, plan, dose, record",
    "segmentation": "a segmentation or a surface",
    "waveform": "a waveform, such as an ECG or a sound",
    "document": "an encapsulated document",
    "registration": "a registration, fiducials or a measurement",
    "raw_data": "raw data or spectroscopy",
    "other_object": "another DICOM object that is no image",
    "opted_out": "of a patient who was taken out",
}
"""Why a file is passed over: code -> meaning. Nothing is wrong with it."""

MAX_BYTES = 512 * 2**20  # all frames, decoded; judged by the header, before anything is decoded
MAX_VALUE = 1e12  # pictures are far below it, and float32 arithmetic on it cannot overflow
GREY_SPREAD = 8.0  # mean of max - min over the channels, in levels of 255, below which colour is a tint


class Unreadable(ConsiliumError):
    """A file gives no usable image.

    Args:
        code: a key of `CODES`; the message is the code and nothing else.
    """

    def __init__(self, code: str) -> None:
        if code not in CODES:
            raise ValueError(f"code {code!r} is not in CODES")
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Decoded:
    """The pixel values of one image, and what is needed to show them.

    Dark is low in every image: MONOCHROME1 has been inverted.
    """

    pixels: NDArray[np.uint8] | NDArray[np.float32]  # (H, W) or (H, W, 3); uint8, or deeper as float32, NaN = padding
    window: tuple[float, float] | None = None  # the file's own display range, in units of `pixels`
    hounsfield: bool = False  # `pixels` are Hounsfield units
    patient: bytes | None = None  # SHA-256 of issuer|PatientID, 32 bytes; None where unknown

    @property
    def kind(self) -> Kind:
        """Return whether the image is grey or colour."""
        return "grey" if self.pixels.ndim == 2 else "colour"

    @property
    def sha256(self) -> bytes:
        """Return the 32-byte digest that, with a preprocessing id, decides the preprocessed image.

        It covers dtype, shape, window, unit and values: equal for the same picture in PNG, TIFF and DICOM.
        """
        return image_digest(self.pixels, self.window, self.hounsfield)


def image_digest(
    pixels: NDArray[np.uint8] | NDArray[np.float32],
    window: tuple[float, float] | None = None,
    hounsfield: bool = False,
) -> bytes:
    """Return the SHA-256 of a decoded image: one header line, then the values, C order, little endian.

    Examples:
        >>> image_digest(np.zeros((2, 2), np.uint8)).hex()[:8]
        '79be3147'
    """
    little = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    header = f"{little.dtype.str}|{little.shape}|{window}|{hounsfield}\n"
    digest = hashlib.sha256(header.encode())
    digest.update(little.data)
    return digest.digest()


def without_colour(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the luma (H, W) of an image whose channels hardly differ, else the image (H, W, 3) itself."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    highest = np.maximum(np.maximum(red, green), blue)
    spread = highest - np.minimum(np.minimum(red, green), blue)
    return luma(pixels) if spread.mean() < GREY_SPREAD else pixels


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the grey version of a colour image, ITU-R 601 weights; equal channels give that channel exactly."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))


def checked(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the values if all are finite and at most `MAX_VALUE` in size.

    Raises:
        Unreadable: `bad_values`.
    """
    if not np.all(np.abs(values) <= MAX_VALUE):  # false for NaN as well
        raise Unreadable("bad_values")
    return values
