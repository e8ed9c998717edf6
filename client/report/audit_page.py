"""The audit trail as one HTML page for a data protection officer: no script, no request, and every text on it escaped.

It is written generically over the facts of an entry, whatever their names, so that it shows what later versions record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from client import audit, chain
from client.report.template import template
from client.report.wording import DASH, grouped, plural

LEFT = ("reply", "sent")
"""Events that say that something left the hospital, or was made to."""

ASKED = ("run", "request", "decision", "refused", "approval", "approved", "rejected", "released", "policy")
"""Events that say what was asked, and what was answered."""

TALL = 20  # a longer table scrolls in its own area on a screen (never in print)
_DIGEST = 16  # characters from which a text is a digest rather than a word


def render(
    site: str, entries: Sequence[chain.Entry], wrong: str, spent: Mapping[str, Any] | None, unread: str = ""
) -> str:
    """Return the page as a complete HTML document.

    Args:
        site: its name.
        entries: those that hold.
        wrong: what is wrong after them; empty: nothing.
        spent: the ledger's statement; None: it cannot be read.
        unread: why not.
    """
    rows = [_row(number, entry) for number, entry in enumerate(entries, 1)]
    text = template("audit.html.j2").render(
        site=site,
        wrong=wrong,
        rows=rows,
        left=[row for row in rows if row["event"] in LEFT],
        asked=[row for row in rows if row["event"] in ASKED],
        span=_span(entries),
        bytes_left=sum(row["bytes"] for row in rows if row["event"] in LEFT),
        last=entries[-1].sha256 if entries else chain.START,
        spent=spent,
        unread=unread,
        tall=TALL,
        dash=DASH,
        grouped=grouped,
        plural=plural,
        figure=figure,
    )
    return text.lstrip()


def figure(value: Any) -> str:
    """Return a number of the ledger as one reads it; a dash where there is none.

    Examples:
        >>> figure(2.34567), figure(1e-05), figure(None)
        ('2.346', '1e-05', '–')
    """
    if value is None:
        return DASH
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_words(value: Any) -> str:
    """Return a fact in words: a name that is counted once is that word, as `kind` and `code` are.

    Examples:
        >>> in_words({"train": 1}), in_words({"damaged": 2, "empty": 1})
        ('train', 'damaged 2, empty 1')
    """
    if isinstance(value, Mapping):
        if len(value) == 1 and next(iter(value.values())) == 1:
            return str(next(iter(value)))
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items()) or DASH
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value)) or DASH
    return grouped(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _row(number: int, entry: chain.Entry) -> dict[str, Any]:
    nbytes = entry.facts.get("bytes")
    return {
        "number": number,
        "time": entry.time.replace("T", " ").removesuffix("Z"),
        "event": entry.event,
        "meaning": audit.EVENTS.get(entry.event, ""),
        "facts": [(name, in_words(value), _is_digest(value)) for name, value in entry.facts.items()],
        "what": in_words(entry.facts.get("kind", "")),
        "bytes": nbytes if isinstance(nbytes, int) else 0,
        "content": str(entry.facts.get("sha256", "")),
        "sha256": entry.sha256,
    }


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= _DIGEST


def _span(entries: Sequence[chain.Entry]) -> str:
    return f"{entries[0].time[:10]} to {entries[-1].time[:10]}" if entries else "no time"
