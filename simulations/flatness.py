"""Whether something that was watched over hours grows: a robust line through it, and how sure that line is.

The line is Theil's and Sen's, the median of the slopes between all pairs of points; outliers, such as a sample in the
midst of a large message, do not bend it. Its 95 % limits say what the points can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

FEWEST = 8
"""Points of which a line is drawn."""

Verdict = Literal["flat", "grows", "unclear"]


@dataclass(frozen=True)
class Trend:
    """A line through points."""

    first: float  # where it begins and ends
    last: float
    slope: float  # an hour
    low: float  # its 95 % limits
    high: float


def trend(hours: Sequence[float], values: Sequence[float]) -> Trend | None:
    """Return the line through points in time; None where they are too few.

    Examples:
        >>> trend([0, 1, 2, 3, 4, 5, 6, 7], [5, 6, 7, 8, 99, 10, 11, 12])
        Trend(first=5.0, last=12.0, slope=1.0, low=1.0, high=1.0)
    """
    if len(values) < FEWEST or hours[-1] <= hours[0]:
        return None
    line = stats.theilslopes(np.asarray(values, float), np.asarray(hours, float), 0.95, method="joint")
    slope, offset, low, high = map(float, line)
    return Trend(offset + slope * hours[0], offset + slope * hours[-1], slope, low, high)


def judged(hours: Sequence[float], values: Sequence[float], least: float) -> tuple[Trend | None, Verdict]:
    """Return the line through points, and whether it grows by more than `least` an hour.

    What fills a cache or meets its largest message does so ever more slowly: only what grows over the whole time and
    over its later half alone is said to grow. Where the limits of the line are on both sides of `least`, the time was
    too short to tell.
    """
    whole = trend(hours, values)
    half = len(values) // 2
    later = trend(hours[half:], values[half:])
    if whole is None:
        return None, "unclear"
    if whole.low > least and (later is None or later.low > least):
        return whole, "grows"
    known = whole if later is None else later
    return whole, "flat" if min(whole.high, known.high) <= least else "unclear"
