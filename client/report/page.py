"""The findings as one HTML page: no script, no request, and every name on it escaped.

It shows images of patients, so it belongs to the site and nowhere else: written for its owner's eyes only (mode 0600),
and taken away by `consilium site forget`.
"""

from __future__ import annotations

from base64 import b64encode

from client.findings import Findings
from client.report import sheet, tables
from client.report.template import template
from client.report.wording import grouped, plural

TALL = 20  # a longer table scrolls in its own area on a screen (never in print)


def render(found: Findings) -> str:
    """Return the page as a complete HTML document; the list of files is not on it."""
    side, columns, rows = sheet.size(found.sheet)
    labels = (*found.sheet_labels, *[""] * len(found.sheet))
    shots = [
        {"x": (place % sheet.COLUMNS) * side, "y": (place // sheet.COLUMNS) * side, "label": labels[place]}
        for place in range(len(found.sheet))
    ]
    return (
        template("check.html.j2")
        .render(
            found=found,
            tables=tables,
            png=b64encode(sheet.contact_sheet(found.sheet)).decode(),
            shots=shots,
            side=side,
            width=side * columns,
            height=side * rows,
            tall=TALL,
            grouped=grouped,
            plural=plural,
        )
        .lstrip()
    )
