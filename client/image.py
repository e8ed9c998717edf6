"""One decoded image, whatever file it came from, and the closed lists of reasons why there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
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

MAX_FILE_BYTES = 4 * 2**30
MAX_FRAME_BYTES = 256 * 2**20  # decoded; judged by the header, before anything is decoded
MAX_INFLATED_BYTES = 512 * 2**20  # of a deflated data set
MAX_VALUE = 1e12  # pictures are far below it, and float32 arithmetic on it cannot overflow
GREY_SPREAD = 8.0  # mean of max - min over the channels, in levels of 255, below which colour is a tint

KEY_KINDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber")
"""What a DICOM file can be named by; `path` names any file."""


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


class Ignored(ConsiliumError):
    """A file is no image, and nothing is wrong with it.

    Args:
        code: a key of `IGNORED`; the message is the code and nothing else.
    """

    def __init__(self, code: str) -> None:
        if code not in IGNORED:
            raise ValueError(f"code {code!r} is not in IGNORED")
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Header:
    """What a file says of itself, in words of closed lists and keyed digests: it holds no text of the file."""

    syntax: str = ""  # of client.vocabulary.PICTURE_FORMATS, or a value of SYNTAXES
    modality: str = ""  # of client.vocabulary.MODALITIES, `other` for another word; empty: none given
    view: str = ""  # of client.vocabulary.VIEWS, likewise
    vendor: str = ""  # of client.vocabulary.VENDORS, likewise
    device: bytes = b""  # Identity.device of Manufacturer, ManufacturerModelName, StationName, DeviceSerialNumber
    month: int = 0  # YYYYMM of the study; 0: unknown
    burned_in: Literal["", "yes", "no"] = ""  # BurnedInAnnotation
    intent: Literal["", "presentation", "processing"] = ""  # PresentationIntentType
    patient: bytes = b""  # Identity.patient, 32 bytes; empty: no PatientID, or a placeholder
    person: bytes = b""  # Identity.person, 16 bytes, likewise
    keys: Mapping[str, bytes] = field(default_factory=dict)  # of KEY_KINDS -> Identity.key, 16 bytes
    loose_accession: bytes = b""  # Identity.loose_key of AccessionNumber
    rows: int = 0
    columns: int = 0
    frames: int = 1


@dataclass(frozen=True)
class Decoded:
    """The pixel values of one image, and what is needed to show them.

    Grey values of at most 16 bits are kept as stored (signed ones are shifted by half their range, so that none is
    negative), with a table of what each stands for; whatever is done to single values is done to the table. Dark is
    low in what the table says: MONOCHROME1 has been inverted there.
    """

    pixels: NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]  # (H, W), or (H, W, 3) uint8
    table: NDArray[np.float32] | None = None  # (n,), n above every pixel, NaN = padding; None: the values themselves
    window: tuple[float, float] | None = None  # the file's own display range, in units of the table
    hounsfield: bool = False  # the table is in Hounsfield units
    region: tuple[int, int, int, int] | None = None  # top, left, bottom, right of an ultrasound region, exclusive ends
    pixel_sha256: bytes = b""  # of the stored values of frame 0, C order, little endian, before any table

    @property
    def kind(self) -> Kind:
        """Return whether the image is grey or colour."""
        return "grey" if self.pixels.ndim == 2 else "colour"


def identity_of(image: Decoded, pixels_digest: bytes) -> bytes:
    """Return the 32-byte digest that, with a preprocessing id, decides the preprocessed image.

    Args:
        image: what was decoded.
        pixels_digest: SHA-256 of the stored values of the frame that is shown, before they were shifted or converted.
    """
    facts = (image.pixels.dtype.str, image.pixels.shape, image.window, image.hounsfield, image.region)
    digest = hashlib.sha256(pixels_digest + f"{facts}\n".encode())
    if image.table is not None:
        digest.update(np.ascontiguousarray(image.table, "<f4").data)
    return digest.digest()


def values_digest(values: NDArray[np.generic]) -> bytes:
    """Return the SHA-256 of values in C order, little endian.

    Examples:
        >>> big, little = np.array([1, 2], ">u2"), np.array([1, 2], "<u2")
        >>> values_digest(big) == values_digest(little) == hashlib.sha256(bytes([1, 0, 2, 0])).digest()
        True
    """
    return hashlib.sha256(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data).digest()


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
