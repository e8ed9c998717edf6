"""DICOM file -> `Decoded` and `Header`: header policy first, then one frame, then what its values stand for.

Deflated files are inflated up to a limit before they are parsed; files without the 128-byte preamble are read if they
begin as a data set does. What the header says beyond pixels leaves as closed words and keyed digests alone.
"""

from __future__ import annotations

import io
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut
from pydicom.uid import UID

from client import vocabulary
from client.display import Elements, Stored, shown
from client.frames import NATIVE, PLUGINS, Element, Frame, Layout, fits, locate, read_frame
from client.identity import Identity, is_placeholder, tidy
from client.image import (
    KEY_KINDS,
    MAX_FRAME_BYTES,
    MAX_INFLATED_BYTES,
    Decoded,
    Header,
    Ignored,
    Unreadable,
    checked,
    identity_of,
    values_digest,
    without_colour,
)
from common.presets import Frame as FrameChoice

logging.getLogger("pydicom").disabled = True  # its messages quote header values and paths

_GREY = frozenset({"MONOCHROME1", "MONOCHROME2"})
_COLOUR = frozenset({
    "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT",
})  # fmt: skip
_PALETTE = "PALETTE COLOR"
_PIXEL_KEYWORDS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}

_META_BYTES = 2**16  # of file meta information that are looked at

_TAGS: list[Any] = [
    *("SpecificCharacterSet", "SOPClassUID", "Modality", "PatientID", "IssuerOfPatientID", *KEY_KINDS, "StudyDate"),
    *("Manufacturer", "ManufacturerModelName", "StationName", "DeviceSerialNumber", "ViewPosition"),
    *("BurnedInAnnotation", "PresentationIntentType", "SequenceOfUltrasoundRegions"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
]

_KEYWORDS: dict[int, str] = {tag_for_keyword(word): word for word in _TAGS}
_BROKEN = object()

Announce = Callable[[int], None]
"""Told how many bytes a file asks for, before they are decoded."""


@dataclass(frozen=True)
class Opened:
    """A DICOM file whose header was read."""

    dataset: Dataset
    data: Elements  # by keyword, those that are read and present
    file: BinaryIO  # at the pixel data element
    syntax: UID
    little: bool


@dataclass(frozen=True)
class _Enhanced:
    """The elements of one frame of an enhanced object, laid over those of the object (PS3.3, C.7.6.16)."""

    data: Elements
    groups: tuple[Dataset, ...]

    def get(self, keyword: str) -> Any:
        """Return an element's value, the frame's own before that of all frames."""
        found = (item.get(keyword) for item in self.groups)
        return next((value for value in found if value is not None), self.data.get(keyword))


def has_preamble(beginning: bytes) -> bool:
    """Return whether a file begins as DICOM does (PS3.10, 7.1)."""
    return beginning[128:132] == b"DICM"


def is_bare(beginning: bytes) -> bool:
    """Return whether a file may be a data set without preamble: an early group and a small element, in either order.

    Examples:
        >>> is_bare(bytes.fromhex("0800050043530a00")), is_bare(b"%PDF-1.7")
        (True, False)
    """
    if len(beginning) < 8:
        return False
    groups = {int.from_bytes(beginning[:2], order) for order in ("little", "big")}
    elements = {int.from_bytes(beginning[2:4], order) for order in ("little", "big")}
    return bool(groups & {0x0002, 0x0008}) and min(elements) <= 0x0018


def open_dicom(file: BinaryIO, beginning: bytes) -> Opened:
    """Read the header of a DICOM file.

    Args:
        file: at its start.
        beginning: its first bytes, 132 or more.

    Raises:
        Unreadable: a data set that inflates beyond the limit.
        BaseException: whatever pydicom raises on a damaged file.
    """
    declared, end = _meta(file, 132 if has_preamble(beginning) else 0)
    if declared == uid.DeflatedExplicitVRLittleEndian:
        file = io.BytesIO(_inflated(file, end))
    dataset = dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=True)
    implicit, little = (bool(part) for part in dataset.original_encoding)
    found = declared or dataset.file_meta.get("TransferSyntaxUID") or _syntax_of(implicit, little)
    return Opened(dataset, _elements(dataset), file, UID(found), little)


def _elements(dataset: Dataset) -> dict[str, Any]:
    """Return the elements that are present, by keyword: looking up what is absent in a data set is slow.

    One that cannot be decoded is kept as such, so that it is damage where it is needed.
    """
    found: dict[str, Any] = {}
    for tag in dataset.keys():  # noqa: SIM118 - iterating a data set itself decodes its elements
        keyword = _KEYWORDS.get(tag)
        if keyword:
            try:
                found[keyword] = dataset[tag].value
            except Exception:  # noqa: BLE001 - whatever pydicom raises on a value that cannot be
                found[keyword] = _BROKEN
    return found


def _meta(file: BinaryIO, start: int) -> tuple[str, int]:
    """Return the transfer syntax that the file meta information names, and where it ends (PS3.10, 7.1).

    Walked here, because pydicom inflates a deflated data set whole before it says that it is one.
    """
    content = file.read(_META_BYTES)
    file.seek(0)
    offset, syntax = start, ""
    while content[offset : offset + 2] == b"\x02\0" and offset + 12 <= len(content):
        vr = content[offset + 4 : offset + 6]
        head, width = (12, 4) if vr in (b"OB", b"UN") else (8, 2) if vr.isalpha() else (8, 4)
        length = int.from_bytes(content[offset + head - width : offset + head], "little")
        if content[offset + 2 : offset + 4] == b"\x10\0":
            syntax = content[offset + head : offset + head + length].decode("ascii", "replace").strip(" \0")
        offset += head + length
    return syntax, offset


def _syntax_of(implicit: bool, little: bool) -> str:
    if implicit:
        return str(uid.ImplicitVRLittleEndian)
    return str(uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian)


def _inflated(file: BinaryIO, start: int) -> bytes:
    """Return the data set of a deflated file, without preamble and meta information (PS3.5, A.5)."""
    file.seek(start)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(file.read(), MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise Unreadable("too_large")
    if not inflater.eof:
        raise Unreadable("damaged")
    return content


# ------------------------------------------------------------------------------------------------------------ header


def header_of(opened: Opened, identity: Identity) -> Header:
    """Return what the header says, in closed words and keyed digests."""
    data = opened.data
    words = {keyword: text(data, keyword) for keyword in KEY_KINDS}
    patient, issuer = text(data, "PatientID"), text(data, "IssuerOfPatientID")
    device = [
        text(data, word) for word in ("Manufacturer", "ManufacturerModelName", "StationName", "DeviceSerialNumber")
    ]
    nobody = is_placeholder(patient)
    return Header(
        syntax=vocabulary.syntax(opened.syntax),
        modality=vocabulary.modality(text(data, "Modality")),
        view=vocabulary.view(text(data, "ViewPosition")),
        vendor=vocabulary.vendor(device[0]),
        device=identity.device(*device) if any(device) else b"",
        month=_month(text(data, "StudyDate")),
        burned_in={"YES": "yes", "NO": "no"}.get(text(data, "BurnedInAnnotation").upper(), ""),  # type: ignore[arg-type]
        intent=_intent(text(data, "PresentationIntentType")),
        patient=b"" if nobody else identity.patient(issuer, patient),
        person=b"" if nobody else identity.person(patient),
        keys={kind: identity.key(kind, word) for kind, word in words.items() if word},
        loose_accession=identity.loose_key("AccessionNumber", words["AccessionNumber"])
        if words["AccessionNumber"]
        else b"",
        rows=_size(data, "Rows"),
        columns=_size(data, "Columns"),
        frames=max(1, _size(data, "NumberOfFrames")),
    )


def text(data: Elements, keyword: str) -> str:
    """Return an element as tidy text, several values joined as they are stored; empty where there is none."""
    value = data.get(keyword)
    if value is _BROKEN:
        return ""
    if isinstance(value, MultiValue):
        value = "\\".join(str(part) for part in value)
    return "" if value is None else tidy(str(value))


def _month(date: str) -> int:
    digits = date.replace(".", "").replace("-", "")[:6]
    known = digits.isascii() and digits.isdigit() and len(digits) == 6 and 1 <= int(digits[4:]) <= 12
    return int(digits) if known and 1895 <= int(digits[:4]) <= 2100 else 0


def _intent(word: str) -> Any:
    return {"FOR PRESENTATION": "presentation", "FOR PROCESSING": "processing"}.get(word.upper(), "")


def _size(data: Elements, keyword: str) -> int:
    try:
        value = int(data.get(keyword) or 0)
    except Exception:  # noqa: BLE001 - told as unknown here, judged as damage by the layout
        return 0
    return value if 0 <= value < 2**31 else 0


# ------------------------------------------------------------------------------------------------------------ policy


def layout_of(opened: Opened, size: int) -> tuple[Layout, Element]:
    """Judge a header, before anything is decoded.

    Args:
        opened: the file.
        size: of the file, in bytes (of the inflated data set, for a deflated one).

    Raises:
        Ignored: it is no image.
        Unreadable: the header contradicts itself, or asks for what is not read.
    """
    data = opened.data
    sop_class = str(data.get("SOPClassUID") or opened.dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    code = vocabulary.no_image(sop_class.strip("\0 "), text(data, "Modality").upper())
    if code:
        raise Ignored(code)
    found = locate(opened.file, little=opened.little)
    keyword = _PIXEL_KEYWORDS.get(found[0]) if found else None
    if found is None or keyword is None:
        if data.get("Rows") or vocabulary.is_image_class(sop_class):
            raise Unreadable("no_pixels")
        if not sop_class and len(opened.dataset) < 2:
            raise Unreadable("damaged")
        raise Ignored("other_object")
    layout = _layout(data, keyword)
    _judge(layout, opened.syntax, size)
    offsets = (data.get("ExtendedOffsetTable"), data.get("ExtendedOffsetTableLengths"))
    element = Element(
        file=opened.file,
        offset=opened.file.tell(),
        length=found[2],
        vr=found[1],
        syntax=opened.syntax,
        offsets=offsets if all(isinstance(part, bytes) and part for part in offsets) else None,
    )
    return layout, element


def _layout(data: Elements, keyword: str) -> Layout:
    allocated = _integer(data, "BitsAllocated", {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword))
    stored = _integer(data, "BitsStored", allocated)
    samples = _integer(data, "SamplesPerPixel", 1)
    return Layout(
        rows=_integer(data, "Rows"),
        columns=_integer(data, "Columns"),
        frames=max(1, _integer(data, "NumberOfFrames", 1)),
        samples=samples,
        allocated=allocated,
        stored=stored,
        high_bit=_integer(data, "HighBit", stored - 1),
        signed=_integer(data, "PixelRepresentation", 0) == 1 and keyword == "PixelData" and allocated != 1,
        photometric=text(data, "PhotometricInterpretation").upper() or ("RGB" if samples == 3 else "MONOCHROME2"),
        planar=_integer(data, "PlanarConfiguration", 0),
        keyword=keyword,
    )


def _integer(data: Elements, keyword: str, default: int | None = None) -> int:
    """Return an integer element; blank or absent is the default, or damage where there is none."""
    value = data.get(keyword)
    if value is None or value == "":
        value = default
    try:
        return int(value)  # None lands in the except
    except (TypeError, ValueError, OverflowError):
        raise Unreadable("damaged") from None


def _judge(layout: Layout, syntax: UID, size: int) -> None:
    if syntax not in NATIVE and syntax not in PLUGINS:
        raise Unreadable("unsupported_syntax")
    if min(layout.rows, layout.columns) <= 0 or layout.planar not in (0, 1):
        raise Unreadable("damaged")
    if not 1 <= layout.stored <= layout.allocated or not layout.stored - 1 <= layout.high_bit < layout.allocated:
        raise Unreadable("damaged")
    samples = 3 if layout.photometric in _COLOUR else 1
    depths = (1, 8, 16, 32, 64) if layout.samples == 1 else (8, 16, 32)
    known = layout.photometric in _GREY | _COLOUR | {_PALETTE}
    if not known or layout.samples != samples or layout.allocated not in depths:
        raise Unreadable("unsupported_image")
    palette = layout.photometric == _PALETTE and (layout.allocated > 16 or layout.stored > 16)
    if palette or (layout.photometric not in _GREY and layout.keyword != "PixelData"):
        raise Unreadable("unsupported_image")
    if announced_bytes(layout) > MAX_FRAME_BYTES:
        raise Unreadable("too_large")
    if layout.frames > max(1, size):  # a frame takes more than a byte
        raise Unreadable("damaged")


def announced_bytes(layout: Layout) -> int:
    """Return the bytes of one decoded frame."""
    return layout.rows * layout.columns * layout.samples * max(8, layout.allocated) // 8


# ------------------------------------------------------------------------------------------------------------ pixels


def read_pixels(opened: Opened, size: int, choice: FrameChoice, announce: Announce) -> tuple[Decoded, bytes]:
    """Read the frame that a preset chooses, and return it with the digest that names it.

    Raises:
        Ignored: it is no image.
        Unreadable: the policy refuses it, or no decoder reads it.
        BaseException: whatever pydicom and its decoders raise on damaged data.
    """
    layout, element = layout_of(opened, size)
    index = layout.frames // 2 if choice == "middle" else 0
    announce(announced_bytes(layout) * (2 if index else 1))
    first = values_digest(read_frame(element, layout, 0).values) if index else b""
    frame = read_frame(element, layout, index)
    own = values_digest(frame.values)
    header = _enhanced(opened.data, index)
    if layout.photometric in _GREY:
        image = _grey(frame.values, header, layout, opened)
        image = replace(image, pixel_sha256=first or own)
        return image, identity_of(image, own)
    colours = _colours(frame, opened.dataset, layout)
    seen = without_colour(colours)
    image = Decoded(seen, pixel_sha256=first or own, region=_region(opened.data, layout))
    return image, identity_of(image, own if seen is frame.values else values_digest(seen))


def _enhanced(data: Elements, index: int) -> _Enhanced:
    """Return the elements of a frame: its own functional groups, then the shared ones, then the object's."""
    own, shared = data.get("PerFrameFunctionalGroupsSequence"), data.get("SharedFunctionalGroupsSequence")
    groups = [*([own[index]] if own and index < len(own) else []), *([shared[0]] if shared else [])]
    names = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
    items = [group[name][0] for group in groups for name in names if group.get(name)]
    return _Enhanced(data, tuple(items))


def _grey(values: NDArray[Any], header: _Enhanced, layout: Layout, opened: Opened) -> Decoded:
    modality = text(opened.data, "Modality").upper()
    region = _region(opened.data, layout)
    if layout.allocated > 16 or layout.keyword != "PixelData":
        bits = layout.stored if layout.keyword == "PixelData" else 0
        stored = Stored(bits, layout.signed, layout.photometric, modality)
        floats = checked(values.astype(np.float32))
        what = shown(floats, stored, header, little=opened.little)
        _check_range(what.values)
        return Decoded(what.values, None, what.window, what.hounsfield, region)
    bits = layout.stored if fits(values, layout) else layout.allocated  # a codestream may hold more than it should
    stored = Stored(bits, layout.signed, layout.photometric, modality)
    every = np.arange(2**bits, dtype=np.float32) + np.float32(stored.nominal[0])
    what = shown(every, stored, header, little=opened.little)
    _check_range(what.values)
    plain = np.array_equal(what.values, np.arange(2**bits))
    window = None if plain and bits == 8 and what.window == (0.0, 255.0) else what.window
    return Decoded(_index(values, bits, layout), None if plain else what.values, window, what.hounsfield, region)


def _index(values: NDArray[Any], bits: int, layout: Layout) -> Any:
    """Return grey values as places in a table of 2^bits: signed ones moved up by half their range."""
    small = np.uint8 if bits <= 8 else np.uint16
    if not layout.signed:
        return values.astype(small, copy=False)
    return (values.astype(np.int32) + 2 ** (bits - 1)).astype(small)


def _check_range(values: NDArray[np.float32]) -> None:
    checked(values[~np.isnan(values)])


def _colours(frame: Frame, data: Dataset, layout: Layout) -> NDArray[np.uint8]:
    """Return RGB at 8 bits."""
    if layout.photometric == _PALETTE:
        return _palette(frame.values, data, layout)
    deeper = max(0, layout.stored - 8)
    values: NDArray[np.uint8] = np.ascontiguousarray((frame.values >> deeper) if deeper else frame.values, np.uint8)
    if frame.colours.startswith("YBR_PARTIAL"):
        return _partial_to_rgb(values)
    if frame.colours in ("YBR_FULL", "YBR_FULL_422"):
        return np.asarray(Image.fromarray(values, "YCbCr").convert("RGB"))
    return values


def _partial_to_rgb(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert YBR_PARTIAL, whose luminance is 16 to 235 and whose colour is 16 to 240 (PS3.3, C.7.6.3.1.2)."""
    y = (values[..., 0].astype(np.float32) - 16) * np.float32(255 / 219)
    b, r = ((values[..., i].astype(np.float32) - 128) * np.float32(255 / 224) for i in (1, 2))
    rgb: NDArray[np.float32] = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], axis=-1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def _palette(values: NDArray[Any], data: Dataset, layout: Layout) -> NDArray[np.uint8]:
    """Map values through the palette, which is computed once for each value that may occur."""
    lowest = -(2 ** (layout.stored - 1)) if layout.signed else 0
    every = np.arange(2**layout.stored, dtype=np.int64) + lowest
    try:
        table = apply_color_lut(every.astype(values.dtype).reshape(1, -1), data)[0, :, :3]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):  # a palette that is absent, or no palette
        raise Unreadable("damaged") from None
    if table.dtype != np.uint8:
        table = table >> 8 if table.max(initial=0) > 255 else table  # some 16-bit tables hold 8-bit values
    index = values.astype(np.int64) - lowest
    return np.asarray(np.take(table.astype(np.uint8), index, axis=0, mode="clip"))  # a codestream may hold more


def _region(data: Elements, layout: Layout) -> tuple[int, int, int, int] | None:
    """Return the box around the tissue regions that an ultrasound device declares (PS3.3, C.8.5.5.1)."""
    words = ("RegionLocationMinY0", "RegionLocationMinX0", "RegionLocationMaxY1", "RegionLocationMaxX1")
    boxes = []
    for item in data.get("SequenceOfUltrasoundRegions") or []:
        if _size(item, "RegionSpatialFormat") == 1:  # two-dimensional
            top, left, bottom, right = (_size(item, word) for word in words)
            boxes.append((top, left, min(bottom + 1, layout.rows), min(right + 1, layout.columns)))
    boxes = [box for box in boxes if box[0] + 8 <= box[2] and box[1] + 8 <= box[3]]
    if not boxes:
        return None
    ends = list(zip(*boxes, strict=True))
    return min(ends[0]), min(ends[1]), max(ends[2]), max(ends[3])
