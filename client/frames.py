"""The stored values of one frame of a DICOM file: which decoder reads it, in which order they are tried, and no more.

The order is a choice for speed and correctness by transfer syntax, measured on what pydicom ships and on drawn films;
the automatic one is that of registration. Pillow reads baseline JPEG here directly, so that the values before the
colour transform are had, and GDCM reads 12-bit JPEG, which pydicom's adapter for it declines.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import gdcm
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from client.codestream import Announced, announced
from client.image import Unreadable

PLUGINS: Mapping[str, tuple[str, ...]] = {
    uid.JPEGBaseline8Bit: ("gdcm",),
    uid.JPEGExtended12Bit: ("gdcm", "pylibjpeg"),
    uid.JPEGLossless: ("gdcm", "pylibjpeg"),
    uid.JPEGLosslessSV1: ("gdcm", "pylibjpeg"),
    uid.JPEGLSLossless: ("pyjpegls", "gdcm"),
    uid.JPEGLSNearLossless: ("pyjpegls", "gdcm"),
    uid.JPEG2000Lossless: ("pillow", "pylibjpeg", "gdcm"),
    uid.JPEG2000: ("pillow", "pylibjpeg", "gdcm"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
    uid.RLELossless: ("pylibjpeg", "pydicom"),
}
"""Transfer syntax -> decoders, the next one tried where the one before fails; those of another licence if installed."""

NATIVE = frozenset(
    (
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    )
)
_CODESTREAMS = frozenset(PLUGINS) - {uid.RLELossless}
_PILLOW_JPEG = frozenset((uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit))
_OWN_PRECISION = frozenset((*uid.JPEGLSTransferSyntaxes, *uid.JPEG2000TransferSyntaxes))


@dataclass(frozen=True)
class Layout:
    """What the header says about the stored values, checked by the policy."""

    rows: int
    columns: int
    frames: int
    samples: int
    allocated: int  # bits
    stored: int  # bits
    high_bit: int
    signed: bool
    photometric: str
    planar: int
    keyword: str = "PixelData"  # or FloatPixelData, DoubleFloatPixelData


@dataclass(frozen=True)
class Element:
    """Where the pixel data lie."""

    file: BinaryIO
    offset: int  # of the value
    length: int  # bytes; -1: encapsulated
    vr: str
    syntax: UID
    offsets: tuple[bytes, bytes] | None = None  # Extended Offset Table and its lengths


@dataclass(frozen=True)
class Frame:
    """One frame, decoded."""

    values: NDArray[Any]  # (rows, columns) or (rows, columns, 3), as stored
    colours: str  # photometric interpretation of `values`; RGB where a decoder undid the transform


def locate(file: BinaryIO, *, implicit: bool, little: bool) -> tuple[int, str, int] | None:
    """Return tag, VR and length of the pixel data element that the file is positioned at; None at its end.

    The position moves to the value. The length is -1 for encapsulated data. Source: PS3.5, 7.1.
    """
    order = "<" if little else ">"
    head = file.read(8)
    if len(head) < 8:
        return None
    group, element = struct.unpack(f"{order}HH", head[:4])
    if implicit:
        vr, length = "OW", struct.unpack(f"{order}L", head[4:])[0]
    else:
        vr = head[4:6].decode("ascii", "replace")
        long = vr in ("OB", "OW", "OF", "OD", "OL", "OV", "UN")
        rest = file.read(4) if long else b""
        if long and len(rest) < 4:
            return None
        length = struct.unpack(f"{order}L", rest)[0] if long else struct.unpack(f"{order}H", head[6:])[0]
    return group << 16 | element, vr, -1 if length == 0xFFFFFFFF else length


def read_frame(element: Element, layout: Layout, index: int) -> Frame:
    """Return the stored values of one frame; bits beyond BitsStored are dropped, the sign is extended.

    Raises:
        Unreadable: no decoder for the syntax, or pixel data that contradict the header.
        BaseException: whatever the decoders raise on damaged data; `decoding.decode` maps it.
    """
    if element.syntax in NATIVE:
        return _native(element, layout, index)
    if element.syntax not in PLUGINS:
        raise Unreadable("unsupported_syntax")
    if element.length != -1:  # as long as an uncompressed image: the syntax in the header is wrong
        raise Unreadable("damaged")
    if element.syntax not in _CODESTREAMS:
        return _decoded(b"", None, element, layout, index)
    element.file.seek(element.offset)
    content = get_frame(element.file, index, number_of_frames=layout.frames, extended_offsets=element.offsets)
    said = announced(content)
    if said and (said.rows, said.columns, said.components) != (layout.rows, layout.columns, layout.samples):
        raise Unreadable("damaged")
    return _decoded(content, said, element, layout, index)


def _native(element: Element, layout: Layout, index: int) -> Frame:
    if element.length == -1:
        raise Unreadable("damaged")
    colours = layout.photometric
    whole = layout.rows * layout.columns * layout.samples * layout.frames
    halved = colours.endswith("_422") and layout.samples == 3
    if halved and element.length >= whole:  # not subsampled, whatever it says
        colours, halved = colours.removesuffix("_422"), False
    reader = get_decoder(element.syntax)
    element.file.seek(element.offset)
    values, _ = reader.as_array(
        element.file,
        index=index,
        raw=True,
        view_only=True,
        correct_unused_bits=False,
        pixel_vr=element.vr,
        **_options(layout, photometric="YBR_FULL_422" if halved else ("RGB" if layout.samples == 3 else None)),
    )
    return Frame(_within_bits(values, layout), colours)


def _options(layout: Layout, photometric: str | None = None) -> dict[str, Any]:
    return {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": layout.frames,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "photometric_interpretation": photometric or layout.photometric,
        "pixel_representation": int(layout.signed),
        "planar_configuration": layout.planar,
        "pixel_keyword": layout.keyword,
    }


def _within_bits(values: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return the values of the stored bits alone; old overlays live above them (PS3.5, 8.1.1)."""
    if layout.keyword != "PixelData" or layout.allocated == 1:
        return values
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    below = layout.high_bit + 1 - layout.stored
    above = layout.allocated - layout.high_bit - 1
    if not above and not below:
        return native
    if not below and fits(native, layout):
        return native
    return (native << above) >> (above + below)


def fits(values: NDArray[Any], layout: Layout) -> bool:
    """Return whether the values are within BitsStored."""
    half = 2 ** (layout.stored - 1)
    low, high = (-half, half - 1) if layout.signed else (0, 2 * half - 1)
    return bool(values.max(initial=low) <= high and values.min(initial=high) >= low)


def _decoded(content: bytes, said: Announced | None, element: Element, layout: Layout, index: int) -> Frame:
    """Try the decoders of a syntax in their order; the first one's failure is what is raised."""
    failure: BaseException | None = None
    for attempt in _attempts(content, said, element, layout, index):
        try:
            return attempt()
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - decoders written in Rust panic with a bare BaseException
            failure = failure or error
    raise failure or Unreadable("unsupported_syntax")


def _attempts(
    content: bytes, said: Announced | None, element: Element, layout: Layout, index: int
) -> list[Callable[[], Frame]]:
    syntax, bits = element.syntax, said.bits if said else layout.stored
    attempts: list[Callable[[], Frame]] = []
    if syntax in _PILLOW_JPEG and bits <= 8:
        attempts.append(partial(_jpeg, content, layout))
    if syntax == uid.JPEGExtended12Bit and bits > 8:
        attempts.append(partial(_gdcm, content, syntax, layout))
    plugins = get_decoder(syntax).available_plugins
    return attempts + [
        partial(_plugin, name, said, element, layout, index) for name in PLUGINS[syntax] if name in plugins
    ]


def _plugin(name: str, said: Announced | None, element: Element, layout: Layout, index: int) -> Frame:
    element.file.seek(element.offset)
    own_precision = element.syntax in _OWN_PRECISION
    values, properties = get_decoder(element.syntax).as_array(
        element.file,
        index=index,
        raw=True,
        decoding_plugin=name,
        **({} if own_precision else {"correct_unused_bits": False}),
        **({"extended_offsets": element.offsets} if element.offsets else {}),
        **_options(layout),
    )
    colours = str(properties["photometric_interpretation"])
    if element.syntax in uid.JPEG2000TransferSyntaxes and layout.samples == 3 and said and said.transformed:
        colours = "RGB"
    return Frame(values if own_precision else _within_bits(values, layout), colours)


def _jpeg(content: bytes, layout: Layout) -> Frame:
    """Decode 8-bit JPEG with Pillow, before its colour transform where there was one.

    An Adobe marker says whether components were transformed; else a JFIF marker or the header does.
    """
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        if image.mode not in ("L", "RGB"):
            raise Unreadable("unsupported_image")
        colours = layout.photometric
        if image.mode == "RGB":
            transform = image.info.get("adobe_transform")
            if transform == 0:
                colours = "RGB"
            else:
                image.draft("YCbCr", image.size)
                if "jfif" in image.info or transform:
                    colours = "YBR_FULL"
        values = np.asarray(image)
    if layout.signed:
        values = values.view(np.int8)
    return Frame(values.astype(f"{'i' if layout.signed else 'u'}{layout.allocated // 8}", copy=False), colours)


def _gdcm(content: bytes, syntax: UID, layout: Layout) -> Frame:
    """Decode one frame with GDCM; at 12 bits its inverse DCT agrees with libjpeg's to 1 in 4,095."""
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(content)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((layout.columns, layout.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(layout.photometric)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    bits = (layout.allocated, layout.stored, layout.stored - 1, int(layout.signed))
    image.SetPixelFormat(gdcm.PixelFormat(layout.samples, *bits))
    content = image.GetBuffer().encode("utf-8", "surrogateescape")
    dtype = np.dtype(f"{'i' if layout.signed else 'u'}{layout.allocated // 8}")
    if len(content) != layout.rows * layout.columns * layout.samples * dtype.itemsize:
        raise Unreadable("damaged")
    shape = (layout.rows, layout.columns, *([layout.samples] if layout.samples > 1 else []))
    return Frame(_within_bits(np.frombuffer(content, dtype).reshape(shape), layout), layout.photometric)
