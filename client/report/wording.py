"""Numbers and names in words, for the terminal and for the page alike."""

from __future__ import annotations

import os
import unicodedata

DASH = "–"
THIN = "\N{NARROW NO-BREAK SPACE}"


def visible(text: str) -> str:
    r"""Replace what a name could hide behind or steer a terminal with: control, format and unencodable characters.

    Examples:
        >>> visible("a\x1b[31mb")
        'a�[31mb'
    """
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in hidden else c for c in text)


def encodable(path: str) -> str:
    r"""Return a file's name as Unicode: bytes of it that are no UTF-8 are written as `\xe9`.

    Examples:
        >>> encodable("caf\udce9.png")
        'caf\\xe9.png'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def grouped(count: int) -> str:
    """Print a count in groups of three.

    Examples:
        >>> grouped(624), grouped(12480).split(THIN)
        ('624', ['12', '480'])
    """
    return f"{count:,}".replace(",", THIN)


def plural(count: int, noun: str) -> str:
    """Print a count with its noun.

    Examples:
        >>> plural(1, "patient"), plural(0, "image")
        ('1 patient', '0 images')
    """
    return f"{grouped(count)} {noun}{'' if count == 1 else 's'}"


def month(number: int) -> str:
    """Print a YYYYMM.

    Examples:
        >>> month(202403)
        '2024-03'
    """
    return f"{number // 100:04d}-{number % 100:02d}"


def percent(share: float) -> str:
    """Print a share of 1.

    Examples:
        >>> [percent(share) for share in (0.523, 0.002, 0)]
        ['52 %', '< 1 %', '0 %']
    """
    whole = round(100 * share)
    return ("< 1" if share and not whole else str(whole)) + " %"


def rate(files: int, seconds: float) -> str:
    """Print how many files a second.

    Examples:
        >>> rate(120, 2.5), rate(3, 6), rate(3, 60), rate(3, 0)
        ('48 a second', '0.5 a second', '< 0.1 a second', '–')
    """
    if seconds <= 0:
        return DASH
    speed = files / seconds
    if speed < 0.1:
        return "< 0.1 a second"
    return f"{grouped(round(speed))} a second" if speed >= 10 else f"{speed:.1f} a second"


def duration(seconds: float) -> str:
    """Print seconds the way one says them.

    Examples:
        >>> duration(4.21), duration(133), duration(7320)
        ('4.2 s', '2 min 13 s', '2 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
