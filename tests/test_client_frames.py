"""Stored values: one image in every encoding gives the same bytes, whoever wrote the file."""

from __future__ import annotations

import hashlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread, uid
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import pixel_array

from client.decoding import Reading, read
from client.identity import Identity
from client.preprocessing import preprocess
from common.presets import PRESETS
from simulations.encodings import LOSSLESS, dataset, jpeg, transcode, write

SITE = Identity(b"s" * 32)
RAW = uid.ExplicitVRLittleEndian
RANDOM = np.random.default_rng(0)


def noise(bits: int, *shape: int, signed: bool = False) -> np.ndarray:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    width = 1 if bits <= 8 else 2 if bits <= 16 else 4
    return RANDOM.integers(low, high, shape).astype(f"{'i' if signed else 'u'}{width}")


def digest(stored: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")).tobytes()).digest()


def decoded(path: Path, frame: Any = "first") -> Reading:
    found = read(path, SITE, frame)
    assert found.code == ""
    return found


def pixels_of(path: Path) -> bytes:
    image = decoded(path).image
    assert image is not None
    return preprocess(image, PRESETS["generic"], 24).tobytes()


def sha256_of(path: Path, frame: Any = "first") -> bytes:
    image = decoded(path, frame).image
    assert image is not None
    return image.pixel_sha256


def same_everywhere(paths: list[Path], stored: np.ndarray) -> None:
    assert {sha256_of(path) for path in paths} == {digest(stored)}
    assert len({pixels_of(path) for path in paths}) == 1
    assert len({decoded(path).digest for path in paths}) == 1


def save(data: Any, path: Path, syntax: uid.UID = RAW) -> Path:
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(
        path, enforce_file_format=True, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian
    )
    return path


def encapsulated(pixels: np.ndarray, bits: int, syntax: uid.UID, content: bytes, **elements: Any) -> Any:
    data = dataset(pixels, bits, **elements)
    data.PixelData = content
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.file_meta.TransferSyntaxUID = syntax
    return data


# --- every lossless syntax ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_grey_in_every_lossless_syntax(tmp_path: Path, bits: int, signed: bool) -> None:
    stored = noise(bits, 35, 44, signed=signed)
    paths = [write(tmp_path / name, stored, bits, syntax) for name, syntax in LOSSLESS.items()]
    same_everywhere(paths, stored)
    for path in paths[:3] + paths[4:]:  # pydicom reads no deflated file by its path
        assert digest(pixel_array(path, index=0, raw=True)) == digest(stored)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_grey_as_another_library_writes_it(tmp_path: Path, bits: int, signed: bool) -> None:
    stored = noise(bits, 34, 42, signed=signed)
    raw = write(tmp_path / "raw", stored, bits, RAW)
    syntaxes = [syntax for syntax in (*LOSSLESS.values(), uid.JPEGLossless) if syntax != uid.ImplicitVRLittleEndian]
    same_everywhere([raw, *(transcode(raw, tmp_path / syntax.name, syntax) for syntax in syntaxes)], stored)


@pytest.mark.parametrize("planar", [0, 1])
def test_colour_in_every_lossless_syntax(tmp_path: Path, planar: int) -> None:
    stored = noise(8, 34, 42, 3)
    planes = np.ascontiguousarray(stored.transpose(2, 0, 1)) if planar else stored
    arranged = {"PlanarConfiguration": planar, "PixelData": planes.tobytes()}
    raw = write(tmp_path / "raw", stored, 8, RAW, **arranged)
    native = [write(tmp_path / name, stored, 8, syntax, **arranged) for name, syntax in list(LOSSLESS.items())[:4]]
    others = [transcode(raw, tmp_path / f"{name}2", LOSSLESS[name]) for name in list(LOSSLESS)[4:]]
    same_everywhere([raw, *native, *others], stored)


def test_deep_colour(tmp_path: Path) -> None:
    stored = noise(16, 34, 42, 3)
    names = [name for name in LOSSLESS if name != "jpeg-lossless"]
    same_everywhere([write(tmp_path / name, stored, 16, LOSSLESS[name]) for name in names], stored)


@pytest.mark.parametrize("signed", [False, True])
def test_thirty_two_bits(tmp_path: Path, signed: bool) -> None:
    stored = noise(24, 9, 7, signed=signed).astype("i4" if signed else "u4")
    same_everywhere([write(tmp_path / name, stored, 32, LOSSLESS[name]) for name in list(LOSSLESS)[:4]], stored)


@pytest.mark.parametrize("frame", ["first", "middle"])
@pytest.mark.parametrize("shape", [(3, 35, 43), (4, 34, 42)])
def test_clips(tmp_path: Path, frame: str, shape: tuple[int, ...]) -> None:
    """The digest is of the first frame, whichever is shown; odd frames do not begin on even bytes."""
    stored = noise(8, *shape)
    found = [decoded(write(tmp_path / name, stored, 8, syntax), frame) for name, syntax in LOSSLESS.items()]
    images = [reading.image for reading in found if reading.image is not None]
    assert {image.pixel_sha256 for image in images} == {digest(stored[0])}
    for image in images:
        np.testing.assert_array_equal(image.pixels, stored[len(stored) // 2 if frame == "middle" else 0])
    assert len({reading.digest for reading in found}) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(4, 9), st.integers(1, 6), st.booleans())
def test_one_bit_frames_begin_anywhere(tmp_path_factory: Any, rows: int, columns: int, frames: int, big: bool) -> None:
    bits = RANDOM.integers(0, 2, (frames, rows, columns)).astype(np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little")
    packed = np.pad(packed, (0, len(packed) % 2))
    syntax = uid.ExplicitVRBigEndian if big else RAW
    data = dataset(bits[0], 1, BitsAllocated=1, NumberOfFrames=frames)
    data.PixelData = (packed.view("u2").byteswap() if big else packed).tobytes()
    data["PixelData"].VR = "OW"
    path = save(data, tmp_path_factory.mktemp("bits") / "a.dcm", syntax)
    assert sha256_of(path) == digest(bits[0])
    image = decoded(path, "middle").image
    assert image is not None
    np.testing.assert_array_equal(image.pixels, bits[frames // 2])


@pytest.mark.parametrize("vr", ["OB", "OW"])
def test_eight_bits_big_endian(tmp_path: Path, vr: str) -> None:
    """Bytes in words are swapped (PS3.5, 8.1.1); frames of an odd size begin inside a word."""
    stored = noise(8, 3, 5, 7)
    content = stored.tobytes() + b"\0"
    data = dataset(stored, 8)
    data.PixelData = np.frombuffer(content, "u2").byteswap().tobytes() if vr == "OW" else content
    data["PixelData"].VR = vr
    path = save(data, tmp_path / "a.dcm", uid.ExplicitVRBigEndian)
    assert sha256_of(path) == digest(stored[0])
    image = decoded(path, "middle").image
    assert image is not None
    np.testing.assert_array_equal(image.pixels, stored[1])


def test_overlays_above_the_stored_bits(tmp_path: Path) -> None:
    stored = noise(12, 35, 43)
    overlaid = stored | (noise(4, 35, 43).astype(np.uint16) << 12)
    for name in ("implicit", "raw", "big-endian", "deflated", "rle"):
        assert sha256_of(write(tmp_path / name, overlaid, 12, LOSSLESS[name])) == digest(stored)


@pytest.mark.parametrize("signed", [False, True])
def test_values_that_do_not_begin_at_the_lowest_bit(tmp_path: Path, signed: bool) -> None:
    stored = noise(12, 6, 5, signed=signed)
    path = write(tmp_path / "a.dcm", stored << 2 | 1, 12, RAW, HighBit=13)
    assert sha256_of(path) == digest(stored)


# --- colour spaces --------------------------------------------------------------------------------------------


def shown_rgb(path: Path) -> np.ndarray:
    image = decoded(path).image
    assert image is not None
    return image.pixels.astype(int)


def ybr_of(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


@pytest.fixture
def rgb() -> np.ndarray:
    """Smooth colours, equal in pairs of columns, so that halving the colour loses nothing."""
    y, x = np.mgrid[0:1:32j, 0:1:20j]
    colours = np.stack([200 * x, 200 * y, 120 + 100 * np.sin(5 * x)], axis=-1).astype(np.uint8)
    return np.repeat(colours, 2, axis=1)


def test_native_ybr(tmp_path: Path, rgb: np.ndarray) -> None:
    ybr = ybr_of(rgb)
    paths = [
        write(tmp_path / "full", ybr, 8, RAW, PhotometricInterpretation="YBR_FULL"),
        write(tmp_path / "mislabelled", ybr, 8, RAW, PhotometricInterpretation="YBR_FULL_422"),
        write(
            tmp_path / "halved",
            ybr,
            8,
            RAW,
            PhotometricInterpretation="YBR_FULL_422",
            PixelData=ybr.reshape(-1, 6)[:, [0, 3, 1, 2]].tobytes(),
        ),
    ]
    same_everywhere(paths, ybr)
    assert np.abs(shown_rgb(paths[0]) - rgb).max() <= 3


def test_native_partial_ybr(tmp_path: Path, rgb: np.ndarray) -> None:
    ybr = ybr_of(rgb).astype(float)
    partial = np.rint(np.concatenate([16 + ybr[..., :1] * 219 / 255, 128 + (ybr[..., 1:] - 128) * 224 / 255], axis=-1))
    stored = partial.astype(np.uint8)
    halved = stored.reshape(-1, 6)[:, [0, 3, 1, 2]].tobytes()
    path = write(tmp_path / "a", stored, 8, RAW, PhotometricInterpretation="YBR_PARTIAL_422", PixelData=halved)
    assert sha256_of(path) == digest(stored)
    assert np.abs(shown_rgb(path) - rgb).max() <= 4


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL", "YBR_RCT", "YBR_ICT", "YBR_FULL_422"])
def test_jpeg_2000_that_transforms_its_components_is_rgb_whatever_is_said(
    tmp_path: Path, rgb: np.ndarray, said: str
) -> None:
    data = dcmread(write(tmp_path / "a", rgb, 8, uid.JPEG2000Lossless))
    data.PhotometricInterpretation = said
    transformed = data.PixelData[data.PixelData.index(b"\xff\x52") + 8] == 1
    path = save(data, tmp_path / "b", uid.JPEG2000Lossless)
    assert sha256_of(path) == digest(rgb)
    if transformed or "FULL" not in said:
        np.testing.assert_array_equal(shown_rgb(path), rgb)


def test_jpeg_2000_without_a_transform_holds_what_is_said(tmp_path: Path, rgb: np.ndarray) -> None:
    content = io.BytesIO()
    ybr = ybr_of(rgb)
    Image.fromarray(ybr).save(content, "JPEG2000", irreversible=False, mct=0, no_jp2=True)
    data = encapsulated(
        ybr, 8, uid.JPEG2000Lossless, encapsulate([content.getvalue()]), PhotometricInterpretation="YBR_FULL"
    )
    path = save(data, tmp_path / "a", uid.JPEG2000Lossless)
    assert sha256_of(path) == digest(ybr)
    assert np.abs(shown_rgb(path) - rgb).max() <= 3


ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


def frame_of(pixels: np.ndarray, names: bytes, markers: bytes) -> bytes:
    """A JPEG whose three components are stored as they are given, under these names, behind these markers."""
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=100, keep_rgb=True)
    content = stored.getvalue()
    adobe = content.index(ADOBE[:4])
    content = content[:adobe] + markers + content[adobe + 16 :]
    for marker, step in ((b"\xff\xc0", 10), (b"\xff\xda", 5)):
        width = 3 if step == 10 else 2
        at = content.index(marker) + step
        for number in range(3):
            assert content[at + width * number] == b"RGB"[number]
            place = at + width * number
            content = content[:place] + names[number : number + 1] + content[place + 1 :]
    return content


@pytest.mark.parametrize(
    ("markers", "names", "said", "stored_as"),
    [
        (JFIF, b"\1\2\3", "YBR_FULL_422", "ybr"),
        (JFIF, b"\1\2\3", "RGB", "ybr"),  # JFIF means YBR, whatever the header says
        (ADOBE + b"\1", b"\1\2\3", "RGB", "ybr"),
        (ADOBE + b"\1", b"RGB", "YBR_FULL", "ybr"),
        (b"", b"\1\2\3", "YBR_FULL_422", "ybr"),
        (b"", b"\1\2\3", "YBR_FULL", "ybr"),
        (ADOBE + b"\0", b"\1\2\3", "RGB", "rgb"),
        (ADOBE + b"\0", b"RGB", "YBR_FULL_422", "rgb"),  # Adobe says that nothing was transformed
        (JFIF + ADOBE + b"\0", b"\1\2\3", "RGB", "rgb"),
        (b"", b"\1\2\3", "RGB", "rgb"),  # nothing but the header says
        (b"", b"\0\1\2", "RGB", "rgb"),
        (b"", b"RGB", "RGB", "rgb"),
        (b"", b"RGB", "YBR_FULL_422", "rgb"),
        (b"", b"rgb", "YBR_FULL_422", "rgb"),
        (JFIF, b"RGB", "YBR_FULL_422", "rgb"),
    ],
)
def test_jpeg_colours(tmp_path: Path, rgb: np.ndarray, markers: bytes, names: bytes, said: str, stored_as: str) -> None:
    stored = rgb if stored_as == "rgb" else ybr_of(rgb)
    content = encapsulate([frame_of(stored, names, markers)])
    data = encapsulated(rgb, 8, uid.JPEGBaseline8Bit, content, PhotometricInterpretation=said)
    path = save(data, tmp_path / "a", uid.JPEGBaseline8Bit)
    assert np.abs(shown_rgb(path) - rgb).max() <= 8
    whole = encapsulate([frame_of(stored, b"RGB", ADOBE + b"\0")])  # the values before any transform
    plain = encapsulated(rgb, 8, uid.JPEGBaseline8Bit, whole, PhotometricInterpretation="RGB")
    assert sha256_of(path) == sha256_of(save(plain, tmp_path / "b", uid.JPEGBaseline8Bit))


def test_jpeg_with_halved_colour(tmp_path: Path, rgb: np.ndarray) -> None:
    data = encapsulated(
        rgb, 8, uid.JPEGBaseline8Bit, encapsulate([jpeg(rgb, 95)]), PhotometricInterpretation="YBR_FULL_422"
    )
    assert np.abs(shown_rgb(save(data, tmp_path / "a", uid.JPEGBaseline8Bit)) - rgb).mean() <= 3


# --- palettes -------------------------------------------------------------------------------------------------


def _palette(bits: int, entries: np.ndarray, *, segmented: bool = False, first: int = 0) -> dict[str, Any]:
    elements: dict[str, Any] = {}
    for number, colour in enumerate(("Red", "Green", "Blue")):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [len(entries) % 2**16, first, bits]
        table = entries[:, number].astype("u1" if bits == 8 else "<u2")
        if segmented:  # one discrete segment (PS3.3, C.7.9.2.1)
            head = np.array([0, len(table)], table.dtype)
            elements[f"Segmented{colour}PaletteColorLookupTableData"] = np.concatenate([head, table]).tobytes()
        else:
            elements[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    return {"PhotometricInterpretation": "PALETTE COLOR", **elements}


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_palettes(tmp_path: Path, bits: int, segmented: bool) -> None:
    colours = noise(8, 250, 3)
    entries = colours if bits == 8 else colours.astype(np.uint16) << 8
    stored = RANDOM.integers(0, 250, (9, 11)).astype(np.uint8)
    path = write(tmp_path / "a", stored, 8, RAW, **_palette(bits, entries, segmented=segmented))
    assert sha256_of(path) == digest(stored)
    np.testing.assert_array_equal(shown_rgb(path), colours[stored])


def test_a_palette_without_its_table_is_damage(tmp_path: Path) -> None:
    elements = _palette(16, np.zeros((256, 3), np.uint16))
    del elements["GreenPaletteColorLookupTableData"]
    assert read(write(tmp_path / "a", noise(8, 4, 4), 8, RAW, **elements), SITE).code == "damaged"


# --- encapsulation --------------------------------------------------------------------------------------------


def _rle_frames(tmp_path: Path, stored: np.ndarray) -> list[bytes]:
    data = dcmread(write(tmp_path / "rle", stored, 8, uid.RLELossless))
    from pydicom.encaps import generate_frames

    return list(generate_frames(data.PixelData, number_of_frames=len(stored)))


def test_tables_of_offsets(tmp_path: Path) -> None:
    stored = noise(8, 3, 34, 42)
    frames = _rle_frames(tmp_path, stored)
    extended, offsets, lengths = encapsulate_extended(frames)
    tables = {"ExtendedOffsetTable": offsets, "ExtendedOffsetTableLengths": lengths}
    for name, content, elements in [
        ("empty", encapsulate(frames, has_bot=False), {}),
        ("basic", encapsulate(frames, has_bot=True), {}),
        ("extended", extended, tables),
        ("fragments", encapsulate(frames, fragments_per_frame=3, has_bot=True), {}),
    ]:
        path = save(encapsulated(stored, 8, uid.RLELossless, content, **elements), tmp_path / name, uid.RLELossless)
        image = decoded(path, "middle").image
        assert image is not None
        np.testing.assert_array_equal(image.pixels, stored[1])
        assert image.pixel_sha256 == digest(stored[0])


@pytest.mark.parametrize("table", [b"", b"\0\0\0\0", b"\x07\0\0\0", b"\xff\xff\xff\xff" * 2])
def test_a_single_frame_needs_no_table_of_offsets(tmp_path: Path, table: bytes) -> None:
    stored = noise(12, 34, 42)
    frame = dcmread(write(tmp_path / "a", stored, 12, uid.JPEGLSLossless)).PixelData
    content = encapsulate([_only(frame)], fragments_per_frame=4, has_bot=False)
    table_item = b"\xfe\xff\x00\xe0" + len(table).to_bytes(4, "little") + table
    data = encapsulated(stored, 12, uid.JPEGLSLossless, table_item + content[8:])
    assert sha256_of(save(data, tmp_path / "b", uid.JPEGLSLossless)) == digest(stored)


def _only(content: bytes) -> bytes:
    from pydicom.encaps import get_frame

    return get_frame(content, 0, number_of_frames=1)


@pytest.mark.parametrize("true", ["jpeg-lossless", "jpeg-ls", "jpeg-2000"])
@pytest.mark.parametrize(
    "declared", [uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000, uid.JPEGLossless]
)
def test_a_codestream_is_read_as_what_it_is(tmp_path: Path, true: str, declared: uid.UID) -> None:
    stored = noise(12, 34, 42)
    data = dcmread(write(tmp_path / "a", stored, 12, LOSSLESS[true]))
    assert sha256_of(save(data, tmp_path / "b", declared)) == digest(stored)


@pytest.mark.parametrize("declared", [RAW, uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000])
@pytest.mark.parametrize("true", ["raw", "rle", "jpeg-ls"])
def test_a_syntax_that_is_not_the_declared_one_is_damage_or_right(tmp_path: Path, true: str, declared: uid.UID) -> None:
    stored = noise(12, 34, 42)
    path = write(tmp_path / "a", stored, 12, LOSSLESS[true])
    content, old = path.read_bytes(), str(LOSSLESS[true]).encode()
    field = old + b"\0" * (len(old) % 2)
    new = str(declared).encode()
    assert len(new) + len(new) % 2 <= 64
    swapped = content.replace(
        b"UI" + len(field).to_bytes(2, "little") + field,
        b"UI" + (len(new) + len(new) % 2).to_bytes(2, "little") + new + b"\0" * (len(new) % 2),
        1,
    )
    path.write_bytes(swapped)
    found = read(path, SITE, "first")
    if LOSSLESS[true] == declared or true != "rle":
        if found.image is None:
            assert (true, declared, found.code) == ("jpeg-ls", uid.RLELossless, "damaged")
            return
        assert sha256_of(path) == digest(stored)
    else:
        assert found.code == "damaged"


def test_a_frame_beyond_its_element_is_not_read_from_what_lies_behind(tmp_path: Path) -> None:
    data = dataset(noise(8, 8, 8), 8, Rows=16)
    data.DataSetTrailingPadding = bytes(4096)
    assert read(save(data, tmp_path / "a"), SITE).code == "damaged"


def test_a_codestream_deeper_than_its_container_is_damage(tmp_path: Path) -> None:
    data = dcmread(write(tmp_path / "a", noise(12, 34, 42), 12, uid.JPEG2000Lossless))
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    assert read(save(data, tmp_path / "b", uid.JPEG2000Lossless), SITE).code == "damaged"


def test_jpeg_ls_without_its_end(tmp_path: Path) -> None:
    """The marker alone may be missing; where more is, the decoder must not search for seconds."""
    length = 1
    while length % 2:  # else the padding of the item would be taken for data
        stored = noise(8, 34, 42)
        frame = _only(dcmread(write(tmp_path / "a", stored, 8, uid.JPEGLSLossless)).PixelData).rstrip(b"\0")
        length = len(frame)
    assert frame.endswith(b"\xff\xd9")
    unended = encapsulated(stored, 8, uid.JPEGLSLossless, encapsulate([frame[:-2]]))
    assert sha256_of(save(unended, tmp_path / "b", uid.JPEGLSLossless)) == digest(stored)
    begin = time.process_time()
    cut = encapsulated(stored, 8, uid.JPEGLSLossless, encapsulate([frame[:-20]]))
    assert read(save(cut, tmp_path / "c", uid.JPEGLSLossless), SITE).code == "damaged"
    assert time.process_time() - begin < 1
