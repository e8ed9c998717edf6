"""DICOM file -> `Decoded`: header policy first, then one frame, modality LUT, VOI, polarity.

The order is that of the standard's greyscale pipeline (PS3.4, N.2): stored values -> modality LUT or rescale ->
VOI LUT or window -> polarity. A linear window is not applied here but handed on, because a CT preset has its own.
Beside the values goes their nominal range, which follows from BitsStored and never from what the image happens to
hold: MONOCHROME1 is inverted on it, so that images of one device stay comparable.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000TransferSyntaxes, JPEGExtended12Bit

from client.image import MAX_BYTES, MAX_VALUE, Decoded, Unreadable, checked, without_colour

logging.getLogger("pydicom").disabled = True  # its messages quote header values and paths

PLACEHOLDER_PATIENTS = frozenset({"", "0", "ANON", "ANONYMOUS", "ANONYMIZED", "NONE", "UNKNOWN", "NA", "N/A"})
"""PatientIDs that stand for nobody; taken at their word they would make one patient of a whole hospital."""

_NOT_PICTURES = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "PR", "SR", "KO", "REG", "FID"})
_GREY = frozenset({"MONOCHROME1", "MONOCHROME2"})
_COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
_PALETTE = "PALETTE COLOR"
_JP2 = b"\x00\x00\x00\x0cjP  "  # how a JPEG 2000 stream begins that is wrapped as a file

_TAGS: list[Any] = [
    *("SpecificCharacterSet", "Modality", "PatientID", "IssuerOfPatientID"),
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
]


@dataclass(frozen=True)
class _Layout:
    """What the header says about the stored values, checked."""

    frames: int
    samples: int
    allocated: int  # bits
    stored: int  # bits, the lowest ones
    signed: bool
    photometric: str

    @property
    def nominal(self) -> tuple[float, float]:
        """Return the lowest and highest value that the stored bits can hold."""
        half = 2.0 ** (self.stored - 1)
        return (-half, half - 1) if self.signed else (0.0, 2 * half - 1)


@dataclass(frozen=True)
class _Grey:
    """Values (H, W) float32 on their way through the pipeline, with the range they could take."""

    values: NDArray[np.float32]
    low: float
    high: float


def read_dicom(path: Path) -> Decoded:
    """Read the middle frame of a DICOM file; the header is judged before any pixel is decoded.

    Raises:
        Unreadable: the header policy refuses the file.
        BaseException: whatever pydicom and its decoders raise on a damaged file; `decoding.decode` maps it.
    """
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:  # inflated whole even to read the header: 1 MB becomes 2 GB
        raise Unreadable("unsupported_syntax")
    header = dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
    layout = _layout(header)
    _require_decoder(syntax, layout)
    stored = _frame(path, syntax, layout)
    patient = patient_key(header)
    if layout.photometric in _GREY:
        return _grey(stored, header, layout, patient)
    return Decoded(_colour(stored, header, layout), patient=patient)


def patient_key(header: Dataset) -> bytes | None:
    """Return the SHA-256 of `issuer|PatientID`, or None for a blank or a placeholder."""
    patient = str(header.get("PatientID") or "").strip()
    if patient.upper() in PLACEHOLDER_PATIENTS:
        return None
    issuer = str(header.get("IssuerOfPatientID") or "").strip()
    return hashlib.sha256(f"{issuer}|{patient}".encode()).digest()


def _layout(header: Dataset) -> _Layout:
    if str(header.get("Modality") or "") in _NOT_PICTURES:
        raise Unreadable("unsupported_image")
    if not header.get("Rows") and not header.get("BitsAllocated"):
        raise Unreadable("no_pixels")  # a report, a directory, a plan
    allocated = _integer(header, "BitsAllocated")
    layout = _Layout(
        frames=max(1, _integer(header, "NumberOfFrames", 1)),
        samples=_integer(header, "SamplesPerPixel", 1),
        allocated=allocated,
        stored=_integer(header, "BitsStored", allocated),
        signed=_integer(header, "PixelRepresentation", 0) == 1,
        photometric=str(header.get("PhotometricInterpretation") or ""),
    )
    area = _integer(header, "Rows") * _integer(header, "Columns")
    if area <= 0 or not 1 <= layout.stored <= layout.allocated:
        raise Unreadable("damaged")
    if not _is_supported(layout, _integer(header, "HighBit", layout.stored - 1)):
        raise Unreadable("unsupported_image")
    if area * layout.frames * layout.samples * layout.allocated // 8 > MAX_BYTES:
        raise Unreadable("too_large")
    return layout


def _integer(header: Dataset, keyword: str, default: int | None = None) -> int:
    """Return an integer element; blank or absent is the default, or damage where there is none."""
    value = header.get(keyword)
    if value is None or value == "":
        value = default
    try:
        return int(value)  # None lands in the except
    except (TypeError, ValueError):
        raise Unreadable("damaged") from None


def _is_supported(layout: _Layout, high_bit: int) -> bool:
    samples = 3 if layout.photometric in _COLOUR else 1
    return (
        layout.photometric in _GREY | _COLOUR | {_PALETTE}
        and layout.samples == samples
        and layout.allocated in (8, 16)
        and high_bit == layout.stored - 1
    )


def _require_decoder(syntax: Any, layout: _Layout) -> None:
    """Refuse a transfer syntax for which nothing is installed (Pillow reads JPEG Extended at 8 bits only)."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available or (syntax == JPEGExtended12Bit and layout.stored > 8):
        raise Unreadable("unsupported_syntax")


def _frame(path: Path, syntax: Any, layout: _Layout) -> NDArray[Any]:
    """Decode the middle frame; bits above BitsStored (old overlays live there) are dropped, the sign extended."""
    middle = layout.frames // 2
    try:
        if syntax in JPEG2000TransferSyntaxes:
            content = dcmread(path, specific_tags=["PixelData"]).PixelData
            _check_boxes(get_frame(content, middle, number_of_frames=layout.frames))
        stored: NDArray[Any] = pixel_array(path, index=middle)
    except AttributeError:  # "no Pixel Data": a file cut short before its pixels reads fine up to here
        raise Unreadable("no_pixels") from None
    spare = stored.dtype.itemsize * 8 - layout.stored
    return (stored << spare) >> spare if spare else stored


def _check_boxes(frame: bytes) -> None:
    """Refuse a JP2 wrapper with a box of no length (ISO 15444-1, I.4): pydicom 3.0 walks it for ever."""
    offset = 12
    while frame.startswith(_JP2) and offset < len(frame) and frame[offset + 4 : offset + 8] != b"jp2c":
        length = int.from_bytes(frame[offset : offset + 4], "big")
        if length < 8:
            raise Unreadable("damaged")
        offset += length


def _colour(stored: NDArray[Any], header: Dataset, layout: _Layout) -> NDArray[np.uint8]:
    """Return RGB at 8 bits, or grey where there is no colour in it. pydicom has undone YBR."""
    if layout.photometric == _PALETTE:
        rgb, bits = apply_color_lut(stored, header)[..., :3], 8
        if rgb.dtype != np.uint8 and rgb.max() > 255:  # 16-bit tables; some hold 8-bit values
            bits = 16
    else:
        rgb, bits = stored, layout.stored
    return without_colour((rgb >> max(0, bits - 8)).astype(np.uint8))


def _grey(stored: NDArray[Any], header: Dataset, layout: _Layout, patient: bytes | None) -> Decoded:
    image = _modality(_Grey(stored.astype(np.float32), *layout.nominal), header)
    hounsfield = _is_hounsfield(image, header, layout)
    image, window = (image, _window(header)) if hounsfield else _voi(image, header)
    values = image.values
    if layout.photometric == "MONOCHROME1":
        total = image.low + image.high
        values = np.float32(total) - values
        window = None if window is None else (total - window[1], total - window[0])
    values, padding = checked(values), _padding(stored, header, layout)
    if (image.low, image.high) != (0.0, 255.0):
        return Decoded(np.where(padding, np.float32("nan"), values), window, hounsfield, patient)
    pixels = np.where(padding, 0, np.rint(values)).astype(np.uint8)
    return Decoded(pixels, None if window == (0.0, 255.0) else window, False, patient)


def _modality(image: _Grey, header: Dataset) -> _Grey:
    """Apply the modality LUT or the rescale; a blank or zero slope counts as 1."""
    if header.get("ModalityLUTSequence"):
        return _lookup(image, header.ModalityLUTSequence[0], header)
    slope = next(iter(_numbers(header, "RescaleSlope")), 1.0) or 1.0
    intercept = next(iter(_numbers(header, "RescaleIntercept")), 0.0)
    if (slope, intercept) == (1.0, 0.0):
        return image
    ends = sorted((image.low * slope + intercept, image.high * slope + intercept))
    return _Grey((image.values.astype(np.float64) * slope + intercept).astype(np.float32), *ends)


def _is_hounsfield(image: _Grey, header: Dataset, layout: _Layout) -> bool:
    """Tell whether the values are Hounsfield units: a CT that says where zero is, and no 8-bit screenshot."""
    return (
        header.get("Modality") == "CT"
        and layout.photometric == "MONOCHROME2"
        and bool(_numbers(header, "RescaleIntercept"))
        and (image.low, image.high) != (0.0, 255.0)
    )


def _voi(image: _Grey, header: Dataset) -> tuple[_Grey, tuple[float, float] | None]:
    """Return the image and its display range; curves (VOI LUT, sigmoid) are applied, linear windows are not."""
    if header.get("VOILUTSequence"):
        curved = _lookup(image, header.VOILUTSequence[0], header)
        return curved, (curved.low, curved.high)
    pair = _centre_and_width(header)
    if pair is None or header.get("VOILUTFunction") != "SIGMOID":
        return image, _window(header)
    centre, width = pair  # PS3.3, C.11.2.1.3.1, written with tanh, which cannot overflow
    curve = 127.5 * (1 + np.tanh(2 * (image.values.astype(np.float64) - centre) / width))
    return _Grey(curve.astype(np.float32), 0.0, 255.0), (0.0, 255.0)


def _window(header: Dataset) -> tuple[float, float] | None:
    """Return the values shown black and white (PS3.3, C.11.2.1.2 and C.11.2.1.3.2)."""
    pair = _centre_and_width(header)
    if pair is None:
        return None
    centre, width = pair
    if header.get("VOILUTFunction") != "LINEAR_EXACT":
        centre, width = centre - 0.5, width - 1
    return centre - width / 2, centre + width / 2


def _centre_and_width(header: Dataset) -> tuple[float, float] | None:
    """Return the first usable window of those the file offers; impossible widths are passed over."""
    narrowest = 1e-6 if header.get("VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID") else 1.0
    pairs = zip(_numbers(header, "WindowCenter"), _numbers(header, "WindowWidth"), strict=False)
    return next((pair for pair in pairs if narrowest <= pair[1] <= MAX_VALUE >= abs(pair[0])), None)


def _numbers(header: Dataset, keyword: str) -> list[float]:
    """Return the values of a decimal element, none if it is absent or blank, without those that are not finite."""
    value = header.get(keyword)
    if value is None or value == "":
        return []
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return [float(v) for v in values if v not in (None, "") and math.isfinite(float(v))]


def _lookup(image: _Grey, item: Dataset, header: Dataset) -> _Grey:
    """Map values through a table; those beyond its ends take the end's entry (PS3.3, C.11.1.1.1)."""
    entries, first, bits = (int(n) for n in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if header.original_encoding[1] else ">"
        data = np.frombuffer(data, "u1" if len(data) == entries else f"{order}u2")
    table = np.asarray(data, np.float32)[: entries or 2**16]
    index = np.clip(np.rint(image.values).astype(np.int64) - first, 0, len(table) - 1)
    return _Grey(table[index], 0.0, 2.0**bits - 1)


def _padding(stored: NDArray[Any], header: Dataset, layout: _Layout) -> NDArray[np.bool_] | np.bool_:
    """Return where the stored values are padding: one value, or a range of them (PS3.3, C.7.5.1.1.2)."""
    if header.get("PixelPaddingValue") in (None, ""):
        return np.bool_(False)
    value = _integer(header, "PixelPaddingValue")
    ends = [value, _integer(header, "PixelPaddingRangeLimit", value)]
    if layout.signed:  # often written as if unsigned
        ends = [end - 2**layout.allocated if end >= 2 ** (layout.allocated - 1) else end for end in ends]
    wide = stored.astype(np.int32)
    return (wide >= min(ends)) & (wide <= max(ends))
