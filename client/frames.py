"""The stored values of one frame of a DICOM file: which decoder reads it, in which order they are tried, and no more.

The order is a choice for speed and correctness by transfer syntax, measured on what pydicom ships and on drawn films;
the automatic one is that of registration. Some decoders are called here without pydicom's adapters: Pillow's of JPEG,
so that the values before the colour transform are had, GDCM's of 12-bit JPEG, which the adapter declines, and those of
RLE and JPEG-LS, around which the adapters copy an image four times.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import gdcm
import numpy as np
from jpeg_ls import decode_pixel_data as decode_jpeg_ls
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate, generate_fragments, get_frame, parse_basic_offsets
from pydicom.pixels import get_decoder
from pydicom.uid import UID
from rle.utils import decode_pixel_data as decode_rle

from client.codestream import Announced, Coding, announced
from client.image import Unreadable

PLUGINS: Mapping[str, tuple[str, ...]] = {
    uid.JPEGBaseline8Bit: ("pylibjpeg",),
    uid.JPEGExtended12Bit: ("pylibjpeg",),
    uid.JPEGLossless: ("gdcm", "pylibjpeg"),
    uid.JPEGLosslessSV1: ("gdcm", "pylibjpeg"),
    uid.JPEGLSLossless: ("gdcm",),
    uid.JPEGLSNearLossless: ("gdcm",),
    uid.JPEG2000Lossless: ("pillow", "pylibjpeg", "gdcm"),
    uid.JPEG2000: ("pillow", "pylibjpeg", "gdcm"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
    uid.RLELossless: ("pydicom",),
}
"""Transfer syntax -> decoders, the next one tried where the one before fails; those of another licence if installed.

Before them some are called directly, below: of pylibjpeg-rle, of pyjpegls, Pillow for 8-bit JPEG, GDCM for a deeper
one. GDCM is no second opinion on 8-bit JPEG, for there it ends the process where Pillow says that a frame is damaged.
"""

NATIVE = frozenset(
    (
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    )
)
_SYNTAXES: Mapping[Coding, tuple[UID, ...]] = {
    "jpeg": (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit),
    "jpeg-lossless": (uid.JPEGLosslessSV1, uid.JPEGLossless),
    "jpeg-ls": (uid.JPEGLSLossless, uid.JPEGLSNearLossless),
    "jpeg-2000": (uid.JPEG2000Lossless, *uid.JPEG2000TransferSyntaxes),
}
"""What a codestream turns out to be -> the syntaxes that may name it, the first of which reads all of them."""

_END = b"\xff\xd9"
_VRS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN")
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


def locate(file: BinaryIO, *, little: bool) -> tuple[int, str, int] | None:
    """Return tag, VR and length of the pixel data element that the file is positioned at; None at its end.

    Whether the element names its VR is seen from the element, for files do not always keep to what they declare: as a
    length, the VRs of pixel data would be odd. The position moves to the value, the length is -1 for encapsulated data.
    Source: PS3.5, 7.1.
    """
    order = "<" if little else ">"
    head = file.read(8)
    if len(head) < 8:
        return None
    group, element = struct.unpack(f"{order}HH", head[:4])
    vr = "OW"
    if head[4:6] in _VRS:
        vr, head = head[4:6].decode(), head[4:] + file.read(4)
    if len(head) < 8:
        return None
    length = struct.unpack(f"{order}L", head[4:])[0]
    return group << 16 | element, vr, -1 if length == 0xFFFFFFFF else length


def read_frame(element: Element, layout: Layout, index: int) -> Frame:
    """Return the stored values of one frame; bits beyond BitsStored are dropped, the sign is extended.

    Raises:
        Unreadable: no decoder for the syntax, or pixel data that contradict the header.
        BaseException: whatever the decoders raise on damaged data; `decoding.decode` maps it.
    """
    if element.syntax not in PLUGINS and element.syntax not in NATIVE:
        raise Unreadable("unsupported_syntax")
    if element.length != -1:  # not compressed, whatever the syntax says
        return _native(element, layout, index)
    content = _content(element, layout, index)
    if element.syntax == uid.RLELossless:
        return _decoded(content, None, element.syntax, layout)
    said = announced(content)
    if said is None or said.bits > layout.allocated:
        raise Unreadable("damaged")
    if (said.rows, said.columns, said.components) != (layout.rows, layout.columns, layout.samples):
        raise Unreadable("damaged")
    content = _ended(content) if said.coding == "jpeg-ls" else content
    return _decoded(content, said, _true_syntax(element.syntax, said), layout)


def _content(element: Element, layout: Layout, index: int) -> bytes:
    """Return one frame as it is compressed; of a single one all fragments, whatever tables of offsets say."""
    element.file.seek(element.offset)
    if layout.frames > 1:
        return bytes(get_frame(element.file, index, number_of_frames=layout.frames, extended_offsets=element.offsets))
    parse_basic_offsets(element.file)
    return b"".join(generate_fragments(element.file))


def _ended(content: bytes) -> bytes:
    """Return a codestream with an end-of-image marker: CharLS searches for seconds where there is none."""
    return content if content.rstrip(b"\0").endswith(_END) else content + _END


def _true_syntax(declared: UID, said: Announced) -> UID:
    """Return the syntax of a codestream, which is not always the declared one."""
    known = _SYNTAXES[said.coding]
    if said.coding == "jpeg" and said.bits > 8:
        return uid.JPEGExtended12Bit
    return declared if declared in known else known[0]


def _native(element: Element, layout: Layout, index: int) -> Frame:
    """Read an uncompressed frame; other frames and what lies behind the element are not touched.

    A file that names a compression and holds none is read if its length is exactly that of its frames.
    """
    if element.syntax not in NATIVE and element.length - _bytes_of(layout) not in (0, 1):
        raise Unreadable("damaged")
    little = element.syntax != uid.ExplicitVRBigEndian
    if layout.allocated == 1:
        return Frame(_packed(element, layout, index), layout.photometric)
    colours = layout.photometric
    dtype = np.dtype(f"{'<' if little else '>'}{_letter(layout)}{layout.allocated // 8}")
    samples = layout.rows * layout.columns * layout.samples
    halved = colours.endswith("_422") and layout.samples == 3
    if halved and element.length >= samples * dtype.itemsize * layout.frames:  # not subsampled, whatever it says
        colours, halved = colours.removesuffix("_422"), False
    if halved:
        samples = samples // 3 * 2
    length = samples * dtype.itemsize
    swapped = not little and dtype.itemsize == 1 and element.vr == "OW"  # bytes in words (PS3.5, 8.1.1)
    values = np.frombuffer(_bytes(element, index * length, length, swapped), dtype)
    return Frame(_within_bits(_whole(values, layout) if halved else _shaped(values, layout), layout), colours)


def _bytes_of(layout: Layout) -> int:
    return -(-layout.rows * layout.columns * layout.samples * layout.frames * layout.allocated // 8)


def _letter(layout: Layout) -> str:
    return "f" if layout.keyword != "PixelData" else "i" if layout.signed else "u"


def _bytes(element: Element, start: int, length: int, swapped: bool = False) -> bytes:
    """Return part of the pixel data.

    Raises:
        Unreadable: `damaged`: the element, or the file, ends before.
    """
    first, last = (start - start % 2, start + length + (start + length) % 2) if swapped else (start, start + length)
    if last > element.length:
        raise Unreadable("damaged")
    element.file.seek(element.offset + first)
    content = element.file.read(last - first)
    if swapped:
        content = np.frombuffer(content, "u2").byteswap().tobytes()[start - first :][:length]
    if len(content) != length:
        raise Unreadable("damaged")
    return content


def _packed(element: Element, layout: Layout, index: int) -> NDArray[np.uint8]:
    """Return a frame of one bit a pixel, the first in the lowest bit; frames need not begin with a byte."""
    pixels = layout.rows * layout.columns
    start, end = index * pixels // 8, -(-(index + 1) * pixels // 8)
    swapped = element.syntax == uid.ExplicitVRBigEndian and element.vr == "OW"
    bits = np.unpackbits(np.frombuffer(_bytes(element, start, end - start, swapped), np.uint8), bitorder="little")
    skipped = index * pixels - 8 * start
    return bits[skipped : skipped + pixels].reshape(layout.rows, layout.columns)


def _shaped(values: NDArray[Any], layout: Layout) -> NDArray[Any]:
    if layout.samples == 1:
        return values.reshape(layout.rows, layout.columns)
    if layout.planar:
        return values.reshape(layout.samples, layout.rows, layout.columns).transpose(1, 2, 0)
    return values.reshape(layout.rows, layout.columns, layout.samples)


def _whole(values: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return each pixel's Y B R of pairs that are stored as Y Y B R (PS3.3, C.7.6.3.1.2)."""
    pairs = values.reshape(-1, 4)[:, [0, 2, 3, 1, 2, 3]]
    return pairs.reshape(layout.rows, layout.columns, 3)


def _options(layout: Layout) -> dict[str, Any]:
    return {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "photometric_interpretation": layout.photometric,
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
    if not layout.signed:
        return bool(values.max() < 2 * half)
    return bool(values.max() < half and values.min() >= -half)


def _decoded(content: bytes, said: Announced | None, syntax: UID, layout: Layout) -> Frame:
    """Try the decoders of a syntax in their order; the first one's failure is what is raised."""
    failure: BaseException | None = None
    for attempt in _attempts(content, said, syntax, layout):
        try:
            return attempt()
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - decoders written in Rust panic with a bare BaseException
            failure = failure or error
    raise failure or Unreadable("unsupported_syntax")


def _attempts(content: bytes, said: Announced | None, syntax: UID, layout: Layout) -> list[Callable[[], Frame]]:
    attempts: list[Callable[[], Frame]] = []
    if said is None:
        attempts.append(partial(_rle, content, layout))
    elif said.coding == "jpeg-ls":
        attempts.append(partial(_jpeg_ls, content, layout))
    elif said.coding == "jpeg":
        attempts.append(partial(_jpeg, content, layout) if said.bits <= 8 else partial(_gdcm, content, syntax, layout))
    plugins = get_decoder(syntax).available_plugins
    return attempts + [
        partial(_plugin, name, content, said, syntax, layout) for name in PLUGINS[syntax] if name in plugins
    ]


def _plugin(name: str, content: bytes, said: Announced | None, syntax: UID, layout: Layout) -> Frame:
    own_precision = syntax in _OWN_PRECISION
    values, properties = get_decoder(syntax).as_array(
        encapsulate([content], has_bot=False),
        index=0,
        raw=True,
        decoding_plugin=name,
        **({} if own_precision else {"correct_unused_bits": False}),
        **_options(layout),
    )
    colours = str(properties["photometric_interpretation"])
    if said and said.transformed and layout.samples == 3:
        colours = "RGB"
    return Frame(values if own_precision else _within_bits(values, layout), colours)


def _rle(content: bytes, layout: Layout) -> Frame:
    """Decode RLE, whose segments hold one byte of one sample each (PS3.5, G.2)."""
    size = {"rows": layout.rows, "columns": layout.columns, "bits_allocated": layout.allocated}
    decoded = decode_rle(content, version=2, samples_per_pixel=layout.samples, **size)
    values = np.frombuffer(decoded, f"<{_letter(layout)}{max(8, layout.allocated) // 8}")
    return Frame(_within_bits(_shaped(values, replace(layout, planar=1)), layout), layout.photometric)


def _jpeg_ls(content: bytes, layout: Layout) -> Frame:
    """Decode JPEG-LS, which knows no sign: it is extended from the precision of the codestream."""
    decoded, said = decode_jpeg_ls(content)
    precision, width = said["bits_per_sample"], layout.allocated
    values = np.frombuffer(decoded, "u1" if precision <= 8 else "<u2").astype(f"u{width // 8}", copy=False)
    if layout.signed:
        values = (values.view(f"i{width // 8}") << (width - precision)) >> (width - precision)
    planes = int(said["interleave_mode"] == 0)
    return Frame(_shaped(values, replace(layout, planar=planes)), layout.photometric)


def _jpeg(content: bytes, layout: Layout) -> Frame:
    """Decode 8-bit JPEG with Pillow, before its colour transform where there was one."""
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        if image.mode not in ("L", "RGB"):
            raise Unreadable("unsupported_image")
        colours = layout.photometric
        if image.mode == "RGB":
            colours = _jpeg_colours(image, layout)
            if not _is_taken_for_rgb(image):
                image.draft("YCbCr", image.size)
        values = np.asarray(image)
    if layout.signed:
        values = values.view(np.int8)
    return Frame(values.astype(f"{'i' if layout.signed else 'u'}{layout.allocated // 8}", copy=False), colours)


def _jpeg_colours(image: Any, layout: Layout) -> str:
    """Return what the components of a JPEG are: by Adobe marker, else by their names, JFIF marker, or header."""
    transform = image.info.get("adobe_transform")
    if transform == 0 or (transform is None and _names(image) in (b"RGB", b"rgb")):
        return "RGB"
    return "YBR_FULL" if transform or "jfif" in image.info else layout.photometric


def _is_taken_for_rgb(image: Any) -> bool:
    """Return whether libjpeg itself takes the components for RGB (its `default_decompress_parms`)."""
    transform = image.info.get("adobe_transform")
    return "jfif" not in image.info and (transform == 0 or (transform is None and _names(image) == b"RGB"))


def _names(image: Any) -> bytes:
    return bytes(component[0] for component in image.layer)


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
