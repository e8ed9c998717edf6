"""What surrounds the pixels: preambles, meta information, encodings, sequences, and files cut short."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence

from client.decoding import read
from client.identity import Identity
from client.image import CODES, IGNORED, Decoded
from simulations.encodings import LOSSLESS, SYNTAXES, dataset, film, write

pytestmark = pytest.mark.slow

SITE = Identity(b"s" * 32)
RAW = uid.ExplicitVRLittleEndian
STORED = film(20, 30, 12)


def image_of(path: Path, frame: Any = "first") -> Decoded:
    found = read(path, SITE, frame)
    assert found.code == ""
    assert found.image is not None
    return found.image


def is_read(path: Path) -> None:
    np.testing.assert_array_equal(image_of(path).pixels, STORED)


def code_of(path: Path) -> str:
    found = read(path, SITE)
    assert found.image is None
    return found.code


def element(tag: int, vr: str, value: bytes, *, implicit: bool = False) -> bytes:
    """One element by hand, little endian."""
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<L", len(value)) + value
    if vr in ("OB", "OW", "SQ", "UN"):
        return head + vr.encode() + b"\0\0" + struct.pack("<L", len(value)) + value
    return head + vr.encode() + struct.pack("<H", len(value)) + value


def body(*, implicit: bool = False, **changes: bytes) -> bytes:
    """A data set by hand; `changes` replace an element's encoding by its name."""
    number = lambda n: struct.pack("<H", n)  # noqa: E731
    parts = {
        "klass": element(
            0x00080016, "UI", uid.DigitalXRayImageStorageForPresentation.encode() + b"\0", implicit=implicit
        ),
        "modality": element(0x00080060, "CS", b"DX", implicit=implicit),
        "patient": element(0x00100020, "LO", b"PHANTOM ", implicit=implicit),
        "samples": element(0x00280002, "US", number(1), implicit=implicit),
        "photometric": element(0x00280004, "CS", b"MONOCHROME2 ", implicit=implicit),
        "frames": b"",
        "rows": element(0x00280010, "US", number(20), implicit=implicit),
        "columns": element(0x00280011, "US", number(30), implicit=implicit),
        "allocated": element(0x00280100, "US", number(16), implicit=implicit),
        "stored": element(0x00280101, "US", number(12), implicit=implicit),
        "high": element(0x00280102, "US", number(11), implicit=implicit),
        "sign": element(0x00280103, "US", number(0), implicit=implicit),
        "before": b"",
        "pixels": element(0x7FE00010, "OW", STORED.tobytes(), implicit=implicit),
        "after": b"",
    }
    assert not set(changes) - set(parts)
    return b"".join({**parts, **changes}.values())


def meta(syntax: str) -> bytes:
    name = syntax.encode()
    syntax_element = element(0x00020010, "UI", name + b"\0" * (len(name) % 2))
    return element(0x00020000, "UL", struct.pack("<L", len(syntax_element))) + syntax_element


def put(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


PREAMBLE = bytes(128) + b"DICM"


# --- preamble and meta information ----------------------------------------------------------------------------


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("declared", [RAW, uid.ImplicitVRLittleEndian, None])
@pytest.mark.parametrize("preamble", [PREAMBLE, b""])
def test_the_encoding_is_what_it_is_whatever_is_declared(
    tmp_path: Path, implicit: bool, declared: str | None, preamble: bytes
) -> None:
    head = meta(declared) if declared else b""
    is_read(put(tmp_path / "a", preamble, head, body(implicit=implicit)))


def test_meta_information_without_a_transfer_syntax(tmp_path: Path) -> None:
    version = element(0x00020001, "OB", b"\0\1")
    is_read(put(tmp_path / "a", PREAMBLE, version, body()))
    is_read(put(tmp_path / "b", PREAMBLE, version, body(implicit=True)))


@pytest.mark.parametrize("length", [0, 1, 10, 10_000, 0xFFFFFFFF])
def test_a_group_length_that_is_wrong(tmp_path: Path, length: int) -> None:
    wrong = element(0x00020000, "UL", struct.pack("<L", length)) + element(0x00020010, "UI", RAW.encode() + b"\0")
    is_read(put(tmp_path / "a", PREAMBLE, wrong, body()))


@pytest.mark.parametrize("length", [0, 7, 0xFFFFFFFF])
def test_group_lengths_in_the_data_set(tmp_path: Path, length: int) -> None:
    lengths = element(0x00280000, "UL", struct.pack("<L", length))
    samples = element(0x00280002, "US", b"\1\0")
    is_read(put(tmp_path / "a", PREAMBLE, meta(RAW), body(samples=lengths + samples)))


def test_compressed_pixels_in_a_file_that_says_they_are_not(tmp_path: Path) -> None:
    frame = dcmread(write(tmp_path / "ls", STORED, 12, uid.JPEGLSLossless)).PixelData
    pixels = element(0x7FE00010, "OB", frame + b"\xfe\xff\xdd\xe0\0\0\0\0")
    pixels = pixels[:8] + b"\xff\xff\xff\xff" + pixels[12:]
    is_read(put(tmp_path / "a", PREAMBLE, meta(RAW), body(pixels=pixels)))
    is_read(put(tmp_path / "b", body(pixels=pixels)))


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.RLELossless, uid.JPEGBaseline8Bit])
def test_plain_pixels_in_a_file_that_says_they_are_compressed(tmp_path: Path, syntax: str) -> None:
    is_read(put(tmp_path / "a", PREAMBLE, meta(syntax), body()))
    short = element(0x7FE00010, "OW", STORED.tobytes()[:-2])
    assert code_of(put(tmp_path / "b", PREAMBLE, meta(syntax), body(pixels=short))) == "damaged"


# --- elements -------------------------------------------------------------------------------------------------


def _sequence(tag: int, *items: bytes, defined: bool) -> bytes:
    if defined:
        content = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<L", len(item)) + item for item in items)
        return element(tag, "SQ", content)
    content = b"".join(b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + item + b"\xfe\xff\x0d\xe0\0\0\0\0" for item in items)
    head = element(tag, "SQ", b"")[:8] + b"\xff\xff\xff\xff"
    return head + content + b"\xfe\xff\xdd\xe0\0\0\0\0"


@pytest.mark.parametrize("defined", [True, False])
def test_sequences_before_the_pixels(tmp_path: Path, defined: bool) -> None:
    inner = _sequence(0x00081140, element(0x00081155, "UI", b"1.2.3.4\0"), defined=defined)
    private = element(0x00290010, "LO", b"ACME") + element(0x00291001, "UN", b"\xfe\xff\xdd\xe0\0\0\0\0odd")
    icon = _sequence(
        0x00880200,
        element(0x00280010, "US", b"\2\0")
        + element(0x00280011, "US", b"\2\0")
        + element(0x7FE00010, "OW", b"\1\2\3\4"),
        defined=defined,
    )
    is_read(put(tmp_path / "a", PREAMBLE, meta(RAW), body(before=inner + private + icon)))
    assert code_of(put(tmp_path / "b", PREAMBLE, meta(RAW), body(before=icon, pixels=b""))) == "no_pixels"


def test_what_follows_the_pixels(tmp_path: Path) -> None:
    trailing = element(0xFFFCFFFC, "OB", bytes(1000))
    is_read(put(tmp_path / "a", PREAMBLE, meta(RAW), body(after=trailing)))
    is_read(put(tmp_path / "b", PREAMBLE, meta(RAW), body(after=b"not an element at all")))


def test_values_of_odd_length(tmp_path: Path) -> None:
    odd = element(0x00100020, "LO", b"ODD")
    is_read(put(tmp_path / "a", PREAMBLE, meta(RAW), body(patient=odd)))


def test_elements_given_twice(tmp_path: Path) -> None:
    rows = element(0x00280010, "US", struct.pack("<H", 5)) + element(0x00280010, "US", struct.pack("<H", 20))
    is_read(put(tmp_path / "a", PREAMBLE, meta(RAW), body(rows=rows)))


@pytest.mark.parametrize("text", [b"0 ", b"", b"1 ", b" 1", b"1\0", b"01"])
def test_numbers_of_frames_that_mean_one(tmp_path: Path, text: bytes) -> None:
    is_read(put(tmp_path / "a", PREAMBLE, meta(RAW), body(frames=element(0x00280008, "IS", text))))


@pytest.mark.parametrize("text", [b"3 ", b"-1", b"x ", b"1e9 ", b"2147483648"])
def test_numbers_of_frames_that_cannot_be(tmp_path: Path, text: bytes) -> None:
    path = put(tmp_path / "a", PREAMBLE, meta(RAW), body(frames=element(0x00280008, "IS", text)))
    found = read(path, SITE)
    assert found.code == "damaged" or (text == b"-1" and found.code == "")


def test_big_endian_words(tmp_path: Path) -> None:
    is_read(write(tmp_path / "a", STORED, 12, uid.ExplicitVRBigEndian))


@pytest.mark.parametrize("value", [b"NaN ", b"inf ", b"", b"0", b"x", b"1e999 ", b"1\\x", b"-inf"])
@pytest.mark.parametrize("tag", [0x00281053, 0x00281052, 0x00281050, 0x00281051])
def test_decimals_that_are_no_numbers(tmp_path: Path, value: bytes, tag: int) -> None:
    both = element(0x00281050, "DS", b"100 ") + element(0x00281051, "DS", b"50")
    others = both if tag < 0x00281052 else both + element(0x00281052, "DS", b"0 ")
    given = element(tag, "DS", value)
    content = others.replace(element(tag, "DS", b"100 "), given).replace(element(tag, "DS", b"50"), given)
    content = content if given in content else content.replace(element(0x00281052, "DS", b"0 "), b"") + given
    image = image_of(put(tmp_path / "a", PREAMBLE, meta(RAW), body(before=content)))
    np.testing.assert_array_equal(image.pixels, STORED)
    assert image.table is None or np.isfinite(image.table).all()


# --- enhanced objects -----------------------------------------------------------------------------------------


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, Sequence([value]) if isinstance(value, Dataset) else value)
    return item


def test_each_frame_has_its_own_rescale_and_window(tmp_path: Path) -> None:
    stored = np.stack([film(8, 9, 12, seed) for seed in range(3)])
    frames = Sequence(
        _item(
            PixelValueTransformationSequence=_item(RescaleSlope=slope, RescaleIntercept=-1000),
            FrameVOILUTSequence=_item(WindowCenter=100 * slope, WindowWidth=51),
        )
        for slope in (1, 2, 3)
    )
    shared = Sequence([_item(FrameVOILUTSequence=_item(WindowCenter=7, WindowWidth=8))])
    kinds = {"SOPClassUID": uid.EnhancedCTImageStorage, "Modality": "CT"}
    groups = {"PerFrameFunctionalGroupsSequence": frames, "SharedFunctionalGroupsSequence": shared}
    path = write(tmp_path / "a", stored, 12, RAW, **kinds, **groups)
    for choice, index in (("first", 0), ("middle", 1)):
        image = image_of(path, choice)
        slope = index + 1
        assert image.hounsfield
        assert image.table is not None
        np.testing.assert_array_equal(image.table[image.pixels], stored[index].astype(np.float32) * slope - 1000)
        assert image.window == (100 * slope - 0.5 - 25, 100 * slope - 0.5 + 25)
    del frames[1].FrameVOILUTSequence
    middle = image_of(write(tmp_path / "b", stored, 12, RAW, **kinds, **groups), "middle")
    assert middle.window == (3.0, 10.0)  # that of all frames


# --- deflated -------------------------------------------------------------------------------------------------


def _deflated(content: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflater.compress(content) + deflater.flush()


@pytest.mark.parametrize("preamble", [PREAMBLE, b""])
def test_deflated(tmp_path: Path, preamble: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    head = preamble + meta(uid.DeflatedExplicitVRLittleEndian)
    whole = _deflated(body())
    is_read(put(tmp_path / "a", head, whole))
    is_read(put(tmp_path / "b", head, whole, b"\0"))  # padded to an even length
    for cut in range(0, len(whole), 37):
        assert code_of(put(tmp_path / "c", head, whole[:cut])) == "damaged"
    monkeypatch.setattr("client.dicom.MAX_INFLATED_BYTES", 2**20)
    bomb = body(before=element(0x00291001, "OB", bytes(2**22)))
    assert code_of(put(tmp_path / "d", head, _deflated(bomb))) == "too_large"


# --- files cut short, and edited --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SYNTAXES))
def test_every_cut_is_told(tmp_path: Path, name: str) -> None:
    stored = film(34, 42, 8)
    content = write(tmp_path / "a", stored, 8, SYNTAXES[name]).read_bytes()
    cuts = {*range(0, min(len(content), 1200), 23), *np.linspace(0, len(content) - 1, 40).astype(int).tolist()}
    for cut in sorted(cuts):
        found = read(put(tmp_path / "b", content[:cut]), SITE)
        assert (found.code in CODES or found.code in IGNORED) if found.image is None else found.code == ""
        if found.image is not None:
            assert SYNTAXES[name].is_encapsulated or cut >= len(content) - 1


def test_a_codestream_that_asks_for_more_than_the_header_is_not_decoded(tmp_path: Path) -> None:
    for name, syntax in SYNTAXES.items():
        if name in ("rle", "implicit", "raw", "big-endian", "deflated"):
            continue
        small = dcmread(write(tmp_path / "s", film(34, 42, 8), 8, syntax))
        large = dcmread(write(tmp_path / "l", film(340, 420, 8), 8, syntax))
        small.PixelData = large.PixelData
        small["PixelData"].is_undefined_length = True
        small.save_as(tmp_path / "b")
        assert code_of(tmp_path / "b") == "damaged"


@pytest.mark.parametrize("rows", [1, 17, 33, 35, 4000, 65535])
@pytest.mark.parametrize("name", ["rle", "jpeg-ls", "jpeg-2000", "jpeg-lossless", "jpeg"])
def test_headers_that_ask_for_another_size(tmp_path: Path, name: str, rows: int) -> None:
    data = dcmread(write(tmp_path / "a", film(34, 42, 8), 8, SYNTAXES[name]))
    data.Rows = rows
    data.save_as(tmp_path / "b")
    found = read(tmp_path / "b", SITE)
    assert found.code in ("damaged", "too_large") or (name == "rle" and rows < 34)  # RLE tells no size


def test_a_fragment_longer_than_the_file(tmp_path: Path) -> None:
    content = encapsulate([b"\xff\xd8" + bytes(100)], has_bot=False)
    content = content[:12] + b"\xf0\xff\xff\x7f" + content[16:]
    data = dataset(STORED, 12)
    data.PixelData = content
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    data.save_as(tmp_path / "a", enforce_file_format=True)
    assert code_of(tmp_path / "a") == "damaged"


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, syntax in LOSSLESS.items():
        path = write(tmp_path / name, film(34, 42, 12), 12, syntax)
        content = bytearray(path.read_bytes())
        content[-40:] = b"\xff" * 40
        path.write_bytes(bytes(content))
        read(path, SITE)
    assert capfd.readouterr() == ("", "")


def test_a_shared_buffer_is_not_written_to(tmp_path: Path) -> None:
    """Written back by the standard's own library, a file that was read is still what it was."""
    path = write(tmp_path / "a", STORED, 12, RAW)
    before = path.read_bytes()
    is_read(path)
    data = dcmread(path)
    assert isinstance(data, FileDataset)
    again = io.BytesIO()
    dcmwrite(again, data)
    assert path.read_bytes() == before
