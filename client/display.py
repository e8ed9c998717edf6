"""The greyscale pipeline on a table: what each stored value stands for, where the window is, what is padding.

Order of the standard (PS3.4, N.2): stored values -> modality LUT or rescale -> VOI LUT or window -> polarity. All of
it maps single values, so it is done once for each value that the stored bits can hold and not for each pixel. A
linear window is not applied but handed on, because a CT preset has its own. The nominal range follows from BitsStored
and never from what an image happens to hold: MONOCHROME1 is inverted on it, so that images of one device stay
comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from client.image import MAX_VALUE, Unreadable

Values = NDArray[np.float32]


class Elements(Protocol):
    """A data set by keyword: pydicom's `Dataset`, or the items of an enhanced object laid over it."""

    def get(self, keyword: str) -> Any:
        """Return the value of an element, None if it is absent."""


@dataclass(frozen=True)
class Stored:
    """What the header says of the stored values."""

    bits: int  # 0: floating point
    signed: bool
    photometric: str
    modality: str

    @property
    def nominal(self) -> tuple[float, float]:
        """Return the lowest and highest value that the stored bits can hold; 0 and 0 for floating point (no bits)."""
        half = 2.0 ** (self.bits - 1)
        return (-half, half - 1) if self.signed else (0.0, 2 * half - 1)


@dataclass(frozen=True)
class Shown:
    """What the stored values stand for."""

    values: Values  # of each stored value, dark low; padding is NaN
    window: tuple[float, float] | None  # shown black and white, in the units of `values`
    hounsfield: bool


@dataclass(frozen=True)
class _Grey:
    """Values on their way through the pipeline, with the range they could take."""

    values: Values
    low: float
    high: float


def shown(stored_values: Values, stored: Stored, header: Elements, *, little: bool) -> Shown:
    """Return what stored values stand for.

    Args:
        stored_values: every value that may occur, or the pixels themselves.
        stored: bits, sign and polarity.
        header: the elements of modality LUT, VOI LUT and padding.
        little: whether tables in the file are little endian.

    Raises:
        Unreadable: `damaged`: a table that contradicts itself.
    """
    image = _modality(_Grey(stored_values, *stored.nominal), header, little)
    hounsfield = _is_hounsfield(image, header, stored)
    image, window = (image, _window(header)) if hounsfield else _voi(image, header, little)
    values = image.values
    if stored.photometric == "MONOCHROME1":
        total = image.low + image.high
        values = np.float32(total) - values
        window = None if window is None else (total - window[1], total - window[0])
    if window is None and (image.low, image.high) == (0.0, 255.0):
        window = (0.0, 255.0)  # eight bits are a display range of their own
    return Shown(_without_padding(values, stored_values, stored, header), window, hounsfield)


def _modality(image: _Grey, header: Elements, little: bool) -> _Grey:
    """Apply the modality LUT or the rescale; a slope that is blank, zero or not finite counts as 1."""
    sequence = header.get("ModalityLUTSequence")
    if sequence:
        return _lookup(image, sequence[0], little)
    slope = next(iter(_numbers(header, "RescaleSlope")), 1.0) or 1.0
    intercept = next(iter(_numbers(header, "RescaleIntercept")), 0.0)
    if abs(slope) > MAX_VALUE or abs(intercept) > MAX_VALUE:
        raise Unreadable("bad_values")
    if (slope, intercept) == (1.0, 0.0):
        return image
    ends = sorted((image.low * slope + intercept, image.high * slope + intercept))
    return _Grey((image.values.astype(np.float64) * slope + intercept).astype(np.float32), *ends)


def _is_hounsfield(image: _Grey, header: Elements, stored: Stored) -> bool:
    """Tell whether the values are Hounsfield units: a CT that says where zero is, and no 8-bit screenshot."""
    return (
        stored.modality == "CT"
        and stored.photometric == "MONOCHROME2"
        and bool(_numbers(header, "RescaleIntercept"))
        and (image.low, image.high) != (0.0, 255.0)
    )


def _voi(image: _Grey, header: Elements, little: bool) -> tuple[_Grey, tuple[float, float] | None]:
    """Return the image and its display range; curves (VOI LUT, sigmoid) are applied, linear windows are not."""
    sequence = header.get("VOILUTSequence")
    if sequence:
        curved = _lookup(image, sequence[0], little)
        return curved, (curved.low, curved.high)
    pair = _centre_and_width(header)
    if pair is None or header.get("VOILUTFunction") != "SIGMOID":
        return image, _window(header)
    centre, width = pair  # PS3.3, C.11.2.1.3.1, written with tanh, which cannot overflow
    curve = 127.5 * (1 + np.tanh(2 * (image.values.astype(np.float64) - centre) / width))
    return _Grey(curve.astype(np.float32), 0.0, 255.0), (0.0, 255.0)


def _window(header: Elements) -> tuple[float, float] | None:
    """Return the values shown black and white (PS3.3, C.11.2.1.2 and C.11.2.1.3.2)."""
    pair = _centre_and_width(header)
    if pair is None:
        return None
    centre, width = pair
    if header.get("VOILUTFunction") != "LINEAR_EXACT":
        centre, width = centre - 0.5, width - 1
    return centre - width / 2, centre + width / 2


def _centre_and_width(header: Elements) -> tuple[float, float] | None:
    """Return the first usable window of those the file offers; impossible widths are passed over."""
    narrowest = 1e-6 if header.get("VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID") else 1.0
    pairs = zip(_all_numbers(header, "WindowCenter"), _all_numbers(header, "WindowWidth"), strict=False)
    return next((pair for pair in pairs if narrowest <= pair[1] <= MAX_VALUE >= abs(pair[0])), None)


def _numbers(header: Elements, keyword: str) -> list[float]:
    """Return the values of a decimal element that are finite."""
    return [value for value in _all_numbers(header, keyword) if math.isfinite(value)]


def _all_numbers(header: Elements, keyword: str) -> list[float]:
    """Return the values of a decimal element, none if it is absent or blank."""
    value = header.get(keyword)
    if value is None or value == "":
        return []
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return [_number(v) for v in values]


def _number(value: Any) -> float:
    """Return a number; what is none is NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _lookup(image: _Grey, item: Any, little: bool) -> _Grey:
    """Map values through a table; those beyond its ends take the end's entry (PS3.3, C.11.1.1.1)."""
    try:
        entries, first, bits = (int(n) for n in item.LUTDescriptor)
        data = item.LUTData
    except (AttributeError, TypeError, ValueError):
        raise Unreadable("damaged") from None
    entries = entries % 2**16 or 2**16  # often written as if signed
    if isinstance(data, bytes):
        data = np.frombuffer(
            data, "u1" if len(data) in (entries, entries + entries % 2) else f"{'<' if little else '>'}u2"
        )
    table = np.atleast_1d(np.asarray(data, np.float32))[:entries]
    if not len(table) or not 0 < bits <= 16:
        raise Unreadable("damaged")
    if image.low < 0 and first >= 2**15:  # the first value mapped, written as if unsigned
        first -= 2**16
    bits = max(bits, int(table.max()).bit_length())  # a table may hold more than it says
    index = np.clip(np.rint(image.values).astype(np.int64) - first, 0, len(table) - 1)
    return _Grey(table[index], 0.0, 2.0**bits - 1)


def _without_padding(values: Values, stored_values: Values, stored: Stored, header: Elements) -> Values:
    """Return the values with NaN for padding: one stored value, or a range of them (PS3.3, C.7.5.1.1.2)."""
    ends = [_number(header.get(word)) for word in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    known = [end for end in ends if math.isfinite(end)]
    if not math.isfinite(ends[0]):
        return values
    if stored.signed and stored.bits <= 16:  # often written as if unsigned
        known = [end - 2**16 if end >= 2**15 else end for end in known]
    padding = (stored_values >= min(known)) & (stored_values <= max(known))
    return np.where(padding, np.float32("nan"), values) if padding.any() else values
