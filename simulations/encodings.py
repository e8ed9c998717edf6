"""One image as DICOM files of every transfer syntax that can be written here: what tests and measurements read back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import UID

LOSSLESS: dict[str, UID] = {
    "implicit": uid.ImplicitVRLittleEndian,
    "raw": uid.ExplicitVRLittleEndian,
    "big-endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg-lossless": uid.JPEGLosslessSV1,
    "jpeg-ls": uid.JPEGLSLossless,
    "jpeg-2000": uid.JPEG2000Lossless,
}
"""Syntaxes that give back the very values, by a short name."""

LOSSY: dict[str, UID] = {"jpeg": uid.JPEGBaseline8Bit, "jpeg-2000-lossy": uid.JPEG2000}

SYNTAXES: dict[str, UID] = {**LOSSLESS, **LOSSY}

_ENCODERS = {uid.RLELossless: "pylibjpeg", uid.JPEGLSLossless: "pyjpegls", uid.JPEG2000Lossless: "pylibjpeg"}


def film(rows: int, columns: int, bits: int, seed: int = 0) -> NDArray[Any]:
    """Return a grey image with the statistics of a radiograph: smooth shapes and noise, (rows, columns)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    shapes = 0.5 + 0.25 * np.sin(7 * x + rng.uniform(0, 6)) * np.cos(5 * y + rng.uniform(0, 6)) - 0.6 * (x - 0.5) ** 2
    noisy = shapes + rng.normal(0, 0.01, (rows, columns))
    top = 2**bits - 1
    return np.asarray(np.clip(noisy * top, 0, top), np.uint8 if bits <= 8 else np.uint16)


def dataset(pixels: NDArray[Any], bits: int, **elements: Any) -> Dataset:
    """Return an uncompressed image object.

    Args:
        pixels: (rows, columns), grey, or (rows, columns, 3), colour; with frames before them, a clip.
        bits: stored.
        elements: replace what follows from the pixels; None takes out.
    """
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    name = uid.generate_uid(entropy_srcs=[pixels.tobytes().hex()[:4096], repr(sorted(elements))])
    data.SOPClassUID, data.SOPInstanceUID = uid.DigitalXRayImageStorageForPresentation, name
    data.StudyInstanceUID, data.SeriesInstanceUID = f"{name[:50]}.1", f"{name[:50]}.2"
    data.PatientID, data.Modality = "PHANTOM-1", "DX"
    colour = pixels.shape[-1] == 3
    data.Rows, data.Columns = pixels.shape[:-1][-2:] if colour else pixels.shape[-2:]
    if pixels.ndim == (4 if colour else 3):
        data.NumberOfFrames = len(pixels)
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated, data.BitsStored = pixels.dtype.itemsize * 8, bits
    data.HighBit, data.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    if "PixelData" in data:
        data["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    return data


def write(path: Path, pixels: NDArray[Any], bits: int, syntax: UID, **elements: Any) -> Path:
    """Write an image as one DICOM file.

    Args:
        path: of the file.
        pixels: (rows, columns) or (rows, columns, 3); with frames before them, a clip, but not for lossy syntaxes.
        bits: stored.
        syntax: a value of `SYNTAXES`.
        elements: further or other elements of the header.
    """
    if syntax == uid.JPEGLosslessSV1:
        return transcode(write(path, pixels, bits, uid.ExplicitVRLittleEndian, **elements), path, syntax)
    data = dataset(pixels, bits, **elements)
    if syntax == uid.JPEGBaseline8Bit:
        data.PixelData = encapsulate([jpeg(pixels)])
        if pixels.ndim == 3:
            data.PhotometricInterpretation = "YBR_FULL_422"
    elif syntax == uid.JPEG2000:
        data.compress(syntax, j2k_cr=[10], encoding_plugin="pylibjpeg")
    elif syntax.is_encapsulated:
        data.compress(syntax, encoding_plugin=_ENCODERS[syntax])
    elif syntax == uid.ExplicitVRBigEndian and pixels.dtype.itemsize > 1:
        data.PixelData = pixels.byteswap().tobytes()
        data["PixelData"].VR = "OW"
    data.file_meta.TransferSyntaxUID = syntax
    if syntax.is_encapsulated:
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.save_as(
        path, enforce_file_format=True, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian
    )
    return path


def transcode(source: Path, path: Path, syntax: UID) -> Path:
    """Write a file anew in another syntax, by GDCM: a second opinion on how files are written.

    Raises:
        ValueError: GDCM cannot.
    """
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    known = reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    if not known or not change.Change():
        raise ValueError(f"GDCM does not write such an image as {syntax.keyword}")
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    if not writer.Write():
        raise ValueError(f"GDCM does not write {syntax.keyword}")
    return path


def jpeg(pixels: NDArray[np.uint8], quality: int = 90) -> bytes:
    """Return an image as baseline JPEG."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return content.getvalue()


BEST: dict[UID, str] = {
    uid.RLELossless: "pylibjpeg",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pillow",
}
"""The fastest of pydicom's decoders for a syntax; none is needed for uncompressed files."""


def bare_reading(path: Path, syntax: UID) -> NDArray[Any]:
    """Return the stored values as the best decoder alone gives them: what the intake of a file is measured against."""
    plugin = BEST.get(syntax)
    return np.asarray(pixel_array(path, raw=True, **({"decoding_plugin": plugin} if plugin else {})))
