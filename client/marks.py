"""Label columns of marks: 1, 0, -1 and blank, one column a label.

The form is CheXpert's (Irvin et al., AAAI 2019, section 2): 1 positive, 0 negative, -1 uncertain, blank not mentioned.
What the last two count as is the site's decision (`Rules`). A label that a site does not annotate is unknown there, not
negative: else the federation's model learns to tell the sites apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from client.identity import tidy
from client.matching import Match
from client.rules import LEFT_OUT, Rules, Said, check_count, check_name, fold, unknown_words
from client.table import Note, Table
from common.errors import DataError

NO, YES, UNCERTAIN = 1, 2, 4  # bits, so that what several rows say of one file can be joined

_MARKS = {
    "": 0,
    **dict.fromkeys(["0", "0.0", "0,0", "no", "false", "n", "falsch", "faux", "falso"], NO),
    **dict.fromkeys(["1", "1.0", "1,0", "yes", "true", "y", "wahr", "vrai", "vero", "verdadero"], YES),
    **dict.fromkeys(["-1", "-1.0", "-1,0", "\u22121", "uncertain"], UNCERTAIN),
}
"""What a mark means, whatever its case; a spreadsheet writes truth values in the language of its user."""

_UNCERTAIN_AS: Mapping[str, float] = {"ignore": np.nan, "zeros": 0.0, "ones": 1.0, "soft": 0.5}
_LONGEST = 16  # characters of a mark
_MOSTLY = 0.9  # a column with this share of marks was probably meant to be a label


def mark(cell: str) -> int | None:
    """Return the bit of a mark, 0 for a blank, None for anything else.

    Examples:
        >>> mark("1.0") == YES, mark("FALSE") == NO, mark(""), mark("2")
        (True, True, 0, None)
    """
    return _MARKS.get(cell.casefold()) if len(cell) <= _LONGEST else None


def marks_only(cells: Sequence[str]) -> bool:
    """Return whether a column holds nothing but marks and blanks, and not only blanks."""
    found = {mark(cell) for cell in dict.fromkeys(cells)}
    return None not in found and bool(found - {0})


def nearly_marks(table: Table, place: int) -> tuple[Note, ...]:
    """Return a warning if a column holds marks but for a few cells."""
    filled = [(line, mark(cell)) for line, cell in zip(table.lines, table.columns[place], strict=True) if cell]
    others = [line for line, found in filled if found is None]
    if not others or len(others) > (1 - _MOSTLY) * len(filled):
        return ()
    message = f"{table.shown(place)} holds 1 and 0, but not in {len(others)} rows, first in line {others[0]}"
    return (("column_left_out", f"{message}; it is not read as a label"),)


def read_marks(table: Table, columns: Sequence[tuple[str, int | None]], rules: Rules, match: Match) -> Said:
    """Return what several columns say of each key, in their order; columns with one label are joined by the maximum.

    Rows of one key are joined: a blank gives way to a mark, two different marks are a conflict.

    Args:
        table: the cells.
        columns: their names, and their places; None for one that the table does not have.
        rules: what -1 and blanks mean, and what the labels are called.
        match: the keys.

    Raises:
        DataError: a cell that is no mark, or a label that cannot be named.
    """
    renamed = rules.renamed()
    wanted = [(renamed.get(fold(name), tidy(name)), place) for name, place in columns]
    wanted = [(label, place) for label, place in wanted if label != LEFT_OUT]
    if not wanted:
        raise DataError(f"{table.where}: [data] words leaves out every label")
    check_count(len(dict(wanted)), table.where)
    values: dict[str, NDArray[np.float32]] = {}
    conflicts = np.zeros(match.keys, bool)
    notes: tuple[Note, ...] = ()
    for label, place in wanted:
        check_name(label, table.where if place is None else f"{table.where}, {table.shown(place)}")
        marks = None if place is None else _marks(table, place)
        joined = np.zeros(match.keys, np.uint8) if marks is None else _joined(marks, match)
        known = marks is not None and bool(marks.any())
        column = _valued(joined, rules) if known else np.full(match.keys, np.nan, np.float32)
        values[label] = np.fmax(values[label], column) if label in values else column
        conflicts |= np.bitwise_count(joined) > 1
        notes += _masked(table, label, place, known) + uncertain_notes(table, place, rules)
    notes += unknown_words(rules, {fold(name): "the header" for name, _ in columns})
    return Said(tuple(values), np.stack(list(values.values()), axis=1), conflicts, notes)


def uncertain_notes(table: Table, place: int | None, rules: Rules) -> tuple[Note, ...]:
    """Return how often -1 stands in a column, and what it is taken for."""
    if place is None:
        return ()
    count = sum(cell != "" and mark(cell) == UNCERTAIN for cell in table.columns[place])
    message = f"{table.shown(place)}: -1 in {count} of {len(table)} rows, by [data] uncertain = {rules.uncertain!r}"
    return (("uncertain", message),) if count else ()


def _marks(table: Table, place: int) -> NDArray[np.uint8]:
    """Return the bit of each row: (rows,)."""
    cells = table.columns[place]
    known = {cell: mark(cell) for cell in dict.fromkeys(cells)}
    if None in known.values():
        line = next(line for line, cell in zip(table.lines, cells, strict=True) if known[cell] is None)
        raise DataError(
            f"{table.where} line {line}, {table.shown(place)}: expected 1, 0, -1 or blank"
            " (or yes, no, true, false, uncertain)"
        )
    return np.array([known[cell] for cell in cells], np.uint8)


def _joined(marks: NDArray[np.uint8], match: Match) -> NDArray[np.uint8]:
    """Return the bits that the rows of each key set: (rows,) -> (K,)."""
    joined = np.zeros(match.keys, np.uint8)
    has_key = match.row_keys >= 0
    np.bitwise_or.at(joined, match.row_keys[has_key], marks[has_key])
    return joined


def _valued(marks: NDArray[np.uint8], rules: Rules) -> NDArray[np.float32]:
    meaning = np.full(8, np.nan, np.float32)  # what two bits mean is decided by `conflicts`
    meaning[0] = 0.0 if rules.blank == "zeros" else np.nan
    meaning[[NO, YES, UNCERTAIN]] = 0.0, 1.0, _UNCERTAIN_AS[rules.uncertain]
    return meaning[marks]


def _masked(table: Table, label: str, place: int | None, known: bool) -> tuple[Note, ...]:
    if known:
        return ()
    what = f"column {label!r} is not in the table" if place is None else f"{table.shown(place)} is blank"
    return (("masked_label", f"{table.where}: {what}, so this label is unknown for all files"),)
