"""Numbers in words: three decimals, counts in groups, bytes, seconds, and a dash for whatever is undefined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DASH = "–"
GAP = "\N{NO-BREAK SPACE}"
THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Figure:
    """A number as printed; `why` explains it to whoever points at it."""

    text: str
    why: str = ""


def fixed(value: float | None, digits: int = 3) -> str:
    """Print a figure with three decimals, an undefined one as a dash.

    Examples:
        >>> fixed(0.96149), fixed(None)
        ('0.961', '–')
    """
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def grouped(count: int | None) -> str:
    """Print a count in groups of three, an unknown one as a dash.

    Examples:
        >>> grouped(624), grouped(12480).split(THIN), grouped(None)
        ('624', ['12', '480'], '–')
    """
    return DASH if count is None else f"{count:,}".replace(",", THIN)


def plural(count: int | None, noun: str) -> str:
    """Print a count with its noun.

    Examples:
        >>> plural(1, "site"), plural(5, "site")
        ('1 site', '5 sites')
    """
    return f"{grouped(count)} {noun}{'' if count == 1 else 's'}"


def joined(names: Sequence[str], most: int = 3) -> str:
    """List the first few names.

    Examples:
        >>> joined("abcde")
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {grouped(len(names) - most)} more"


def size(count: float | None) -> str:
    """Print a number of bytes in decimal units.

    Examples:
        >>> [size(count).replace(GAP, " ") for count in (812, 13_500_000, None)]
        ['812 B', '13.5 MB', '–']
    """
    if count is None:
        return DASH
    power = min(4, int(math.log10(count) // 3)) if count >= 1 else 0
    scaled = count / 1000**power
    digits = 0 if power == 0 or scaled >= 100 else 1
    return f"{scaled:.{digits}f}{GAP}{('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float | None) -> str:
    """Print seconds the way one says them.

    Examples:
        >>> [duration(seconds).replace(GAP, " ") for seconds in (0.058, 4.21, 133, 7320)]
        ['58 ms', '4.2 s', '2 min 13 s', '2 h 2 min']
    """
    if seconds is None:
        return DASH
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f}{GAP}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}{GAP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{GAP}min{GAP}{rest}{GAP}s"
    return f"{minutes // 60}{GAP}h{GAP}{minutes % 60}{GAP}min"


def percent(share: float) -> str:
    """Print a share of 1.

    Examples:
        >>> [percent(share).replace(GAP, " ") for share in (0.523, 0.002, 0)]
        ['52 %', '< 1 %', '0 %']
    """
    whole = round(100 * share)
    return ("< 1" if share and not whole else str(whole)) + f"{GAP}%"
