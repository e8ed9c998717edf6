"""Files of every kind -> pixel values or a code: the greyscale pipeline in closed form, and hostile files."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, generate_uid

from client.decoding import read
from client.identity import Identity
from client.image import CODES, IGNORED, Decoded, Ignored, Unreadable
from client.preprocessing import preprocess, shown
from common.presets import PRESETS

SITE = Identity(b"s" * 32)
GENERIC, CT = PRESETS["generic"], PRESETS["ct"]
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def write_dicom(path: Path, stored: np.ndarray, **elements: Any) -> Path:
    """Write a native DICOM file; `elements` replace or, with None, remove what follows from the array."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    colour = stored.shape[-1] == 3
    frames = stored.shape[0] if stored.ndim == (4 if colour else 3) else None
    bits = stored.dtype.itemsize * 8
    values = {
        "PatientID": "P1",
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "Rows": stored.shape[-3 if colour else -2],
        "Columns": stored.shape[-2 if colour else -1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": elements.get("BitsStored", bits) - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelData": stored.tobytes(),
        **({"PlanarConfiguration": 0} if colour else {}),
        **({"NumberOfFrames": frames} if frames else {}),
        **elements,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_png(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def shipped(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert path is not None
    return Path(str(path))


def decode(path: Path) -> Decoded:
    image = read(path, SITE).image
    assert image is not None
    return image


def values(path: Path) -> np.ndarray:
    """What the pixels stand for; padding is NaN."""
    image = decode(path)
    return image.pixels if image.table is None else image.table[image.pixels]


def code_of(path: Path) -> str:
    found = read(path, SITE)
    assert found.image is None
    return found.code


# --- one picture, many containers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_tiff_and_both_polarities_agree(tmp_path: Path, dtype: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (40, 30)).astype(dtype)
    inverted = np.iinfo(dtype).max - pixels
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    paths = [
        write_png(tmp_path / "a.png", pixels),
        tmp_path / "a.tif",
        write_dicom(tmp_path / "2.dcm", pixels),
        write_dicom(tmp_path / "1.dcm", inverted, PhotometricInterpretation="MONOCHROME1"),
    ]
    assert len({read(path, SITE).digest for path in paths[:3]}) == 1
    assert len({preprocess(decode(path), GENERIC, 24).tobytes() for path in paths}) == 1
    np.testing.assert_array_equal(decode(paths[0]).pixels, pixels)


def test_full_window_of_eight_bits_is_no_window(tmp_path: Path) -> None:
    plain = read(write_dicom(tmp_path / "a.dcm", RAMP), SITE)
    windowed = read(write_dicom(tmp_path / "b.dcm", RAMP, WindowCenter="128", WindowWidth="256"), SITE)
    assert windowed.digest == plain.digest


def test_same_values_same_digest_in_every_transfer_syntax() -> None:
    names = ["MR_small", "MR_small_implicit", "MR_small_bigendian", "MR_small_RLE", "MR_small_jp2klossless"]
    assert len({read(shipped(f"{name}.dcm"), SITE).digest for name in names}) == 1


def test_digest_depends_on_values_shape_and_window(tmp_path: Path) -> None:
    files = [
        write_dicom(tmp_path / "a.dcm", RAMP),
        write_dicom(tmp_path / "b.dcm", RAMP.reshape(8, 32)),
        write_dicom(tmp_path / "c.dcm", RAMP[::-1]),
        write_dicom(tmp_path / "d.dcm", RAMP, WindowCenter="100", WindowWidth="50"),
    ]
    assert len({read(file, SITE).digest for file in files}) == len(files)


# --- the greyscale pipeline ---------------------------------------------------------------------------------


def test_linear_window_maps_its_ends_to_black_and_white(tmp_path: Path) -> None:
    stored = np.array([[0, 100, 199, 299, 300, 4095]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, BitsStored=12, WindowCenter="200", WindowWidth="201")
    image = decode(path)
    assert image.window == (99.5, 299.5)
    np.testing.assert_array_equal(shown(image, GENERIC), [[0, 1, 127, 254, 255, 255]])


def test_rescale_then_hounsfield_window_of_the_preset(tmp_path: Path) -> None:
    stored = np.array([[0, 864, 1064, 1264, 4000]], np.uint16)
    elements = {"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "-1024", "BitsStored": 12}
    image = decode(write_dicom(tmp_path / "a.dcm", stored, **elements, WindowCenter="0", WindowWidth="10"))
    assert image.hounsfield
    np.testing.assert_array_equal(image.table[image.pixels], stored.astype(np.float32) - 1024)
    np.testing.assert_array_equal(shown(image, CT), [[0, 0, 128, 255, 255]])  # 40/400: -160, 40, 240 HU
    assert image.window == (-5.0, 4.0)
    np.testing.assert_array_equal(shown(image, GENERIC), [[0, 0, 255, 255, 255]])  # the file's window


@pytest.mark.parametrize("slope", ["", "0", None])
def test_blank_or_zero_slope_counts_as_one(tmp_path: Path, slope: str | None) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleSlope=slope, RescaleIntercept="0")
    np.testing.assert_array_equal(values(path), RAMP)


@pytest.mark.parametrize(
    ("centre", "width", "window"),
    [
        ("100", "0", None),
        ("", "", None),
        (["100", "50"], ["0", "11"], (44.5, 54.5)),  # the first that is possible
        (["100", "50"], ["21", "11"], (89.5, 109.5)),
        ("100", "-5", None),
        ("100", None, None),
    ],
)
def test_windows_that_cannot_be(tmp_path: Path, centre: Any, width: Any, window: Any) -> None:
    assert decode(write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=centre, WindowWidth=width)).window == window


def test_width_one_is_a_step(tmp_path: Path) -> None:
    image = decode(write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter="100", WindowWidth="1"))
    np.testing.assert_array_equal(shown(image, GENERIC), np.where(RAMP > 99, 255, 0))


def test_window_of_monochrome1_is_inverted_with_it(tmp_path: Path) -> None:
    window = {"WindowCenter": "1000", "WindowWidth": "501", "BitsStored": 12}
    stored = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    upright = decode(write_dicom(tmp_path / "2.dcm", stored, **window))
    inverse = decode(write_dicom(tmp_path / "1.dcm", stored, PhotometricInterpretation="MONOCHROME1", **window))
    sums = shown(upright, GENERIC).astype(int) + shown(inverse, GENERIC)
    assert set(np.unique(sums)) <= {255, 256}  # halves round up on both sides


def test_inversion_uses_the_nominal_range_not_the_seen_one(tmp_path: Path) -> None:
    stored = np.array([[1000, 2000]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, BitsStored=12, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(values(path), [[3095, 2095]])


def test_sigmoid_in_closed_form(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter="128", WindowWidth="64", VOILUTFunction="SIGMOID")
    expected = 255 / (1 + np.exp(-4 * (RAMP.astype(float) - 128) / 64))
    np.testing.assert_allclose(shown(decode(path), GENERIC), expected, atol=0.51)


def test_linear_exact(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter="128", WindowWidth="0.5", VOILUTFunction="LINEAR_EXACT")
    assert decode(path).window == (127.75, 128.25)


def lut_item(table: list[int], first: int, bits: int) -> Sequence:
    item = Dataset()
    item.add_new(0x00283002, "US", [len(table), first, bits])
    item.add_new(0x00283006, "US", table)
    return Sequence([item])


def test_modality_and_voi_tables(tmp_path: Path) -> None:
    stored = np.array([[0, 10, 11, 12, 4000]], np.uint16)
    modality = write_dicom(tmp_path / "m.dcm", stored, ModalityLUTSequence=lut_item([5, 7, 60000], 10, 16))
    np.testing.assert_array_equal(values(modality), [[5, 5, 7, 60000, 60000]])
    voi = write_dicom(tmp_path / "v.dcm", stored, VOILUTSequence=lut_item([0, 128, 255], 10, 8))
    np.testing.assert_array_equal(values(voi), [[0, 0, 128, 255, 255]])
    np.testing.assert_array_equal(shown(decode(voi), GENERIC), [[0, 0, 128, 255, 255]])


def test_padding_is_black_and_outside_the_percentiles(tmp_path: Path) -> None:
    stored = np.full((20, 20), 60000, np.uint16)
    stored[5:15, 5:15] = np.arange(100).reshape(10, 10) + 1000
    plain = stored[5:15, 5:15]
    padded = shown(decode(write_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=60000)), GENERIC)
    np.testing.assert_array_equal(padded[5:15, 5:15], shown(decode(write_dicom(tmp_path / "b.dcm", plain)), GENERIC))
    assert padded[:5].max() == 0


def test_padding_of_monochrome1_is_black_after_inversion(tmp_path: Path) -> None:
    elements = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 0, "PixelPaddingRangeLimit": 2}
    image = decode(write_dicom(tmp_path / "a.dcm", np.array([[0, 1, 2, 3, 255]], np.uint8), **elements))
    np.testing.assert_array_equal(shown(image, GENERIC), [[0, 0, 0, 252, 0]])


def test_image_of_nothing_but_padding_is_black(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", np.full((4, 4), 7, np.uint16), PixelPaddingValue=7)
    assert preprocess(decode(path), GENERIC, 8).max() == 0


def test_bits_above_bits_stored_are_dropped_and_the_sign_extended(tmp_path: Path) -> None:
    overlay = np.array([[0xF001, 0x0FFF]], np.uint16)
    np.testing.assert_array_equal(values(write_dicom(tmp_path / "u.dcm", overlay, BitsStored=12)), [[1, 4095]])
    signed = overlay.view(np.int16)
    np.testing.assert_array_equal(values(write_dicom(tmp_path / "s.dcm", signed, BitsStored=12)), [[1, -1]])


# --- colour, frames, patients -------------------------------------------------------------------------------


def test_palette_gives_the_colours_of_its_table() -> None:
    image = decode(shipped("examples_palette.dcm"))
    dataset = dcmread(shipped("examples_palette.dcm"))
    red = np.frombuffer(dataset.RedPaletteColorLookupTableData, "<u2") >> 8
    assert image.kind == "colour"
    np.testing.assert_array_equal(image.pixels[..., 0], red[dataset.pixel_array])


@pytest.mark.parametrize("name", ["SC_rgb_rle.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm"])
def test_every_colour_space_comes_out_as_rgb(name: str) -> None:
    reference = decode(shipped("SC_rgb_gdcm_KY.dcm")).pixels.astype(int)
    pixels = decode(shipped(name)).pixels.astype(int)
    assert np.median(np.abs(pixels - reference)) <= 3


def test_sixteen_bit_colour_is_read_at_eight() -> None:
    deep, plain = decode(shipped("SC_rgb_rle_16bit.dcm")), decode(shipped("SC_rgb_rle.dcm"))
    assert deep.pixels.dtype == np.uint8
    assert np.abs(deep.pixels.astype(int) - plain.pixels).max() <= 1


def test_middle_frame(tmp_path: Path) -> None:
    frames = np.stack([np.full((4, 4), n, np.uint8) for n in range(5)])
    assert set(np.unique(decode(write_dicom(tmp_path / "a.dcm", frames)).pixels)) == {2}


def test_patient_is_hashed_with_its_issuer(tmp_path: Path) -> None:
    keys = [
        read(write_dicom(tmp_path / "a.dcm", RAMP, PatientID=patient, IssuerOfPatientID=issuer), SITE).header.patient
        for patient, issuer in [("17", "A"), ("17", "A"), ("17", "B"), ("18", "A")]
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert keys[0] == SITE.patient("A", "17")


@pytest.mark.parametrize("patient", ["", None, "ANON", " 0 "])
def test_placeholder_patients_are_nobody(tmp_path: Path, patient: str | None) -> None:
    assert read(write_dicom(tmp_path / "a.dcm", RAMP, PatientID=patient), SITE).header.patient == b""


# --- refusals by the header ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"PixelData": None}, "no_pixels"),
        ({"PixelData": None, "Rows": None, "BitsAllocated": None}, "no_pixels"),
        ({"Rows": 65535, "Columns": 65535}, "too_large"),
        ({"NumberOfFrames": 2_000_000_000}, "damaged"),  # more frames than bytes
        ({"Rows": 65535, "Columns": 65535, "syntax": RLELossless, "PixelData": encapsulate([b"\0" * 8])}, "too_large"),
        ({"BitsAllocated": 32}, "damaged"),
        ({"BitsAllocated": 12}, "unsupported_image"),
        ({"PhotometricInterpretation": "CMYK"}, "unsupported_image"),
        ({"HighBit": 3}, "damaged"),
        ({"BitsStored": 9}, "damaged"),
        ({"Rows": 0}, "damaged"),
        ({"Columns": None}, "damaged"),
        ({"PixelData": b"\0\0"}, "damaged"),
        ({"RescaleSlope": "1e300", "RescaleIntercept": "0"}, "bad_values"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, elements: dict[str, Any], code: str) -> None:
    assert code_of(write_dicom(tmp_path / "a.dcm", RAMP, **elements)) == code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("MR_truncated.dcm", "damaged"),
        ("liver_1frame.dcm", "segmentation"),
        ("rtplan.dcm", "radiotherapy"),
        ("rtstruct.dcm", "radiotherapy"),
        ("rtdose.dcm", "radiotherapy"),
        ("reportsi.dcm", "report"),
        ("test-SR.dcm", "report"),
        ("DICOMDIR", "directory"),
        ("waveform_ecg.dcm", "waveform"),
        ("no_meta.dcm", "not_an_image"),
        ("JPEG2000-embedded-sequence-delimiter.dcm", "damaged"),
    ],
)
def test_shipped_files_that_are_refused(name: str, code: str) -> None:
    assert code_of(shipped(name)) == code


# --- pictures that are no DICOM -----------------------------------------------------------------------------


def test_modes_of_pillow(tmp_path: Path) -> None:
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[..., 0] = 200
    colour, grey = Image.fromarray(rgb), Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    cases = [
        (colour, "png", "colour"),
        (colour.convert("P"), "png", "colour"),
        (colour.convert("CMYK"), "tif", "colour"),
        (colour.convert("RGBA"), "png", "colour"),
        (grey.convert("RGB"), "png", "grey"),
        (grey.convert("LA"), "png", "grey"),
        (grey.convert("1"), "png", "grey"),
        (grey.convert("P"), "png", "grey"),
    ]
    for number, (image, suffix, kind) in enumerate(cases):
        image.save(tmp_path / f"{number}.{suffix}")
        decoded = decode(tmp_path / f"{number}.{suffix}")
        assert (number, decoded.kind) == (number, kind)
        assert decoded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(decode(tmp_path / "4.png").pixels, np.asarray(grey))
    np.testing.assert_array_equal(decode(tmp_path / "0.png").pixels, rgb)


def test_transparent_is_black(tmp_path: Path) -> None:
    rgba = np.full((2, 2, 4), 255, np.uint8)
    rgba[0, 0, 3] = 0
    np.testing.assert_array_equal(decode(write_png(tmp_path / "a.png", rgba)).pixels, [[0, 255], [255, 255]])


def test_a_tint_is_grey_and_a_colour_is_not(tmp_path: Path) -> None:
    tint = np.full((4, 4, 3), 100, np.uint8)
    tint[..., 0] = 107
    assert decode(write_png(tmp_path / "a.png", tint)).kind == "grey"
    tint[..., 0] = 108
    assert decode(write_png(tmp_path / "b.png", tint)).kind == "colour"


def test_exif_orientation_is_applied_and_rubbish_in_it_ignored(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 32, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp.save(tmp_path / "a.jpg", exif=exif)
    ramp.save(tmp_path / "b.jpg", exif=b"Exif\0\0rubbish")
    assert decode(tmp_path / "a.jpg").pixels.shape == (64, 32)
    assert decode(tmp_path / "b.jpg").pixels.shape == (32, 64)


def test_deep_tiffs(tmp_path: Path) -> None:
    values = np.array([[0.5, -2.0], [3e6, 1.0]], np.float32)
    Image.fromarray(values).save(tmp_path / "f.tif")
    np.testing.assert_array_equal(decode(tmp_path / "f.tif").pixels, values)
    Image.fromarray(np.array([[0, 1000]], np.uint16)).save(tmp_path / "w.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(tmp_path / "w.tif").pixels, [[65535, 64535]])  # white is zero


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_that_are_no_picture(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[0.0, value]], np.float32)).save(tmp_path / "a.tif")
    assert code_of(tmp_path / "a.tif") == "bad_values"


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))


def test_hostile_files(tmp_path: Path) -> None:
    whole = write_png(tmp_path / "whole.png", np.random.default_rng(1).integers(0, 256, (99, 99), np.uint8))
    content = whole.read_bytes()
    Image.fromarray(RAMP).save(tmp_path / "whole.jpg")
    cases = {
        "empty.png": (b"", "empty"),
        "text.png": (b"not an image, whatever its name", "not_an_image"),
        "cut.png": (content[: len(content) // 2], "damaged"),
        "head.png": (content[:12], "not_an_image"),
        "cut.jpg": ((tmp_path / "whole.jpg").read_bytes()[:-30], "damaged"),
        "bomb.png": (png_bomb(60000, 60000), "too_large"),
        "warned.png": (png_bomb(13000, 13000), "too_large"),  # under Pillow's error, over its warning and our cap
        "gif.png": (b"GIF89a" + bytes(200), "not_an_image"),
        "preamble.dcm": (bytes(128) + b"DICM", "damaged"),
        "rubbish.dcm": (bytes(128) + b"DICM" + b"\xff" * 500, "damaged"),
    }
    for name, (data, code) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert (name, code_of(tmp_path / name)) == (name, code)
    assert code_of(tmp_path / "nothing.png") == "missing"
    assert code_of(tmp_path) == "missing"
    os.mkfifo(tmp_path / "pipe.png")
    assert code_of(tmp_path / "pipe.png") == "missing"  # and does not wait for a writer


FUZZED = ["MR_small_RLE.dcm", "examples_palette.dcm", "SC_rgb_jpeg_dcmtk.dcm", "MR_small_jp2klossless.dcm"]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FUZZED),
    hits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    cut=st.floats(0.05, 1),
)
def test_a_mutated_file_gives_an_image_or_a_code(
    tmp_path: Path, name: str, hits: list[tuple[float, int]], cut: float
) -> None:
    content = bytearray(shipped(name).read_bytes())
    for place, value in hits:
        content[int(place**3 * len(content))] = value  # mostly in the header
    (tmp_path / "a.dcm").write_bytes(content[: int(cut * len(content))])
    found = read(tmp_path / "a.dcm", SITE)
    assert (found.image is None) == (found.code in {**CODES, **IGNORED})
    if found.image is not None:
        assert preprocess(found.image, GENERIC, 16).shape[1:] == (16, 16)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_jpeg2000_boxes_that_lead_nowhere_end(tmp_path: Path, length: int) -> None:
    content = bytearray(shipped("GDCMJ2K_TextGBR.dcm").read_bytes())
    box = content.index(b"\x00\x00\x00\x0cjP  ") + 12
    content[box : box + 4] = length.to_bytes(4, "big")  # zero made pydicom loop for ever
    (tmp_path / "a.dcm").write_bytes(content)
    assert code_of(tmp_path / "a.dcm") == "damaged"


def test_codes_are_closed() -> None:
    with pytest.raises(ValueError, match="CODES"):
        Unreadable("no_such_code")
    with pytest.raises(ValueError, match="IGNORED"):
        Ignored("no_such_code")
    assert not CODES.keys() & IGNORED.keys()


def test_neither_header_values_nor_paths_reach_a_log_or_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_dicom(tmp_path / "ZZPHI-CANARY.dcm", RAMP, PatientID="ZZPHI-CANARY", WindowCenter="1")
    content = path.read_bytes().replace(b"ZZPHI-CANARY", b"ZZPHI-\xff\xfe\x00ARY")
    path.write_bytes(content[:-200])
    caplog.set_level(0)
    assert code_of(path) == "damaged"
    path.write_bytes(bytes(128) + b"DICM" + b"\xff" * 500)  # pydicom warns of it, path and all
    assert code_of(path) == "damaged"
    assert "ZZPHI" not in caplog.text + "".join(capfd.readouterr())
