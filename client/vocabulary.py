"""Closed words for what headers say: a value outside these lists is told as `other`, never as it stands.

Whatever a report, a cache or a log says about a file is a word from here or a keyed digest, so that no text that
somebody typed into a scanner can travel further than the process that read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

OTHER = "other"

PICTURE_FORMATS = ("PNG", "JPEG", "TIFF")

SYNTAXES: Mapping[str, str] = {
    "1.2.840.10008.1.2": "ImplicitVRLittleEndian",
    "1.2.840.10008.1.2.1": "ExplicitVRLittleEndian",
    "1.2.840.10008.1.2.1.98": "EncapsulatedUncompressedExplicitVRLittleEndian",
    "1.2.840.10008.1.2.1.99": "DeflatedExplicitVRLittleEndian",
    "1.2.840.10008.1.2.2": "ExplicitVRBigEndian",
    "1.2.840.10008.1.2.4.50": "JPEGBaseline8Bit",
    "1.2.840.10008.1.2.4.51": "JPEGExtended12Bit",
    "1.2.840.10008.1.2.4.57": "JPEGLossless",
    "1.2.840.10008.1.2.4.70": "JPEGLosslessSV1",
    "1.2.840.10008.1.2.4.80": "JPEGLSLossless",
    "1.2.840.10008.1.2.4.81": "JPEGLSNearLossless",
    "1.2.840.10008.1.2.4.90": "JPEG2000Lossless",
    "1.2.840.10008.1.2.4.91": "JPEG2000",
    "1.2.840.10008.1.2.4.92": "JPEG2000MCLossless",
    "1.2.840.10008.1.2.4.93": "JPEG2000MC",
    "1.2.840.10008.1.2.4.100": "MPEG2MPML",
    "1.2.840.10008.1.2.4.101": "MPEG2MPHL",
    "1.2.840.10008.1.2.4.102": "MPEG4HP41",
    "1.2.840.10008.1.2.4.103": "MPEG4HP41BD",
    "1.2.840.10008.1.2.4.201": "HTJ2KLossless",
    "1.2.840.10008.1.2.4.202": "HTJ2KLosslessRPCL",
    "1.2.840.10008.1.2.4.203": "HTJ2K",
    "1.2.840.10008.1.2.5": "RLELossless",
    "1.2.840.10008.1.2.8.1": "DeflatedImageFrameCompression",
}
"""Transfer syntax -> its keyword (PS3.6, table A-1)."""

MODALITIES = frozenset({
    "CR", "DX", "MG", "IO", "PX", "CT", "MR", "US", "XC", "OP", "OPT", "XA", "RF", "NM", "PT", "ES", "GM", "SM", "SC",
    "OT", "RG", "RTIMAGE", "IVUS", "IVOCT", "BI", "DG", "TG", "OAM", "OCT", "AR",
})  # fmt: skip
"""Values of Modality that make images (PS3.3, C.7.3.1.1.1)."""

VIEWS = frozenset({
    "PA", "AP", "LL", "RL", "LATERAL", "LLD", "RLD", "LLO", "RLO", "CC", "MLO", "ML", "LM", "LMO", "FB", "SIO", "XCCL",
    "XCCM", "CV", "AT",
})  # fmt: skip
"""Values of ViewPosition (PS3.3, C.8.1.2 and C.8.11.7)."""

VENDORS: Mapping[str, str] = {
    "siemens": "Siemens", "ge": "GE", "philips": "Philips", "canon": "Canon", "toshiba": "Toshiba",
    "hologic": "Hologic", "lorad": "Hologic", "fuji": "Fujifilm", "fujifilm": "Fujifilm", "agfa": "Agfa",
    "carestream": "Carestream", "kodak": "Kodak", "konica": "Konica", "samsung": "Samsung", "mindray": "Mindray",
    "hitachi": "Hitachi", "shimadzu": "Shimadzu", "esaote": "Esaote", "planmed": "Planmed", "varian": "Varian",
    "zeiss": "Zeiss", "topcon": "Topcon", "heidelberg": "Heidelberg", "acuson": "Acuson", "aloka": "Aloka",
    "sonosite": "SonoSite", "imi": "Imi", "swissray": "Swissray", "sectra": "Sectra", "bruker": "Bruker",
}  # fmt: skip
"""First known word of Manufacturer, in lower case -> the maker's name."""

_STORAGE = "1.2.840.10008.5.1.4.1.1."

_NO_IMAGES: tuple[tuple[str, str], ...] = (
    ("1.2.840.10008.1.3.10", "directory"),
    (_STORAGE + "88.59", "key_objects"),
    (_STORAGE + "88", "report"),
    (_STORAGE + "11", "presentation_state"),
    (_STORAGE + "66.4", "segmentation"),
    (_STORAGE + "66.5", "segmentation"),
    (_STORAGE + "66.7", "segmentation"),
    (_STORAGE + "68", "segmentation"),
    (_STORAGE + "66", "registration"),
    (_STORAGE + "67", "registration"),
    (_STORAGE + "78", "registration"),
    (_STORAGE + "79", "registration"),
    (_STORAGE + "80", "registration"),
    (_STORAGE + "9", "waveform"),
    (_STORAGE + "104", "document"),
    (_STORAGE + "4.2", "raw_data"),
    (_STORAGE + "481", "radiotherapy"),
    ("1.2.840.10008.5.1.4.34", "radiotherapy"),
)
"""SOP classes that make no image, by the beginning of their UID -> a code of `client.image.IGNORED`; first match."""

_IMAGES: tuple[str, ...] = tuple(
    _STORAGE + part
    for part in ("1", "2", "3", "4", "5", "6", "7", "12", "13", "14", "20", "30", "77", "128", "130", "481.1")
)

_NO_IMAGE_MODALITIES: Mapping[str, str] = {
    "SR": "report", "KO": "key_objects", "PR": "presentation_state", "SEG": "segmentation", "REG": "registration",
    "FID": "registration", "RWV": "registration", "RTSTRUCT": "radiotherapy", "RTPLAN": "radiotherapy",
    "RTDOSE": "radiotherapy", "RTRECORD": "radiotherapy", "ECG": "waveform", "EPS": "waveform", "HD": "waveform",
    "AU": "waveform", "RESP": "waveform", "DOC": "document", "M3D": "document", "HC": "document",
    "PLAN": "radiotherapy", "SMR": "registration", "KER": "registration", "LEN": "registration",
}  # fmt: skip


def _is_below(uid: str, root: str) -> bool:
    return uid == root or uid.startswith(root + ".")


def is_image_class(sop_class: str) -> bool:
    """Return whether a SOP class stores images.

    Examples:
        >>> is_image_class("1.2.840.10008.5.1.4.1.1.2"), is_image_class("1.2.840.10008.5.1.4.1.1.88.11")
        (True, False)
    """
    return any(_is_below(sop_class, root) for root in _IMAGES) and not _no_image_class(sop_class)


def _no_image_class(sop_class: str) -> str:
    if sop_class == _STORAGE + "481.1":  # RT Image: a projection radiograph
        return ""
    if sop_class == _STORAGE + "66":
        return "raw_data"
    return next((code for root, code in _NO_IMAGES if _is_below(sop_class, root)), "")


def no_image(sop_class: str, modality: str) -> str:
    """Return why an object is no image, as a code of `client.image.IGNORED`; empty if it may be one.

    Examples:
        >>> no_image("1.2.840.10008.5.1.4.1.1.88.59", ""), no_image("", "SR"), no_image("", "CT")
        ('key_objects', 'report', '')
    """
    return _no_image_class(sop_class) or ("" if is_image_class(sop_class) else _NO_IMAGE_MODALITIES.get(modality, ""))


def syntax(uid: str) -> str:
    """Return the keyword of a transfer syntax."""
    return SYNTAXES.get(uid, OTHER)


def modality(text: str) -> str:
    """Return a modality as a closed word; empty where none is given."""
    return _closed(text, MODALITIES)


def view(text: str) -> str:
    """Return a view as a closed word; empty where none is given."""
    return _closed(text, VIEWS)


def _closed(text: str, words: frozenset[str]) -> str:
    known = text.strip().upper()
    return known if known in words or not known else OTHER


def vendor(text: str) -> str:
    """Return the maker of a device; empty where none is given.

    Examples:
        >>> vendor("GE MEDICAL SYSTEMS"), vendor("Acme <b>"), vendor("")
        ('GE', 'other', '')
    """
    words = re.findall("[a-z]+", text.lower())
    found = next((VENDORS[word] for word in words if word in VENDORS), "")
    return found or (OTHER if text.strip() else "")
