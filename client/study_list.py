"""The list of studies that a hospital wants pulled: StudyInstanceUIDs and AccessionNumbers, from a text or CSV file.

Messages name line numbers, never the content of a line: an AccessionNumber leads to a patient.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client.identity import tidy
from common.errors import DataError

Kind = Literal["StudyInstanceUID", "AccessionNumber"]

UID = re.compile(r"[0-9]+(?:\.[0-9]+)+")
"""What a UID may be before it becomes part of an address; servers do send zeros in front (Part 5, 9.1 forbids them)."""

UID_LENGTH = 64
_COLUMNS: dict[str, Kind] = {"studyinstanceuid": "StudyInstanceUID", "accessionnumber": "AccessionNumber"}
_LIKE_A_UID = re.compile(r"[012](?:\.[0-9]+){3,}")
_WILDCARDS = frozenset("*?\\")  # Part 4, C.2.2.2.4; a backslash makes a list of values
_DELIMITERS = ",;\t"
_ACCESSION_LENGTH = 64  # the standard says 16, not every hospital does


@dataclass(frozen=True, repr=False)
class Wanted:
    """One study, or the studies of one order."""

    kind: Kind
    value: str
    line: int


def studies_in(path: Path) -> tuple[Wanted, ...]:
    """Return the entries of a list in their order, each once.

    A line that looks like a UID (`1.2.840.…`) is a StudyInstanceUID, any other an AccessionNumber; a heading with one
    of these names decides for its column. Where a row has both, the StudyInstanceUID counts.

    Raises:
        DataError: the file cannot be read, names no study, or holds an entry that is none.
    """
    entries: dict[tuple[Kind, str], Wanted] = {}
    for entry in _entries(_lines(path), path):
        entries.setdefault((entry.kind, entry.value), entry)
    if not entries:
        raise DataError(f"{path}: expected a StudyInstanceUID or AccessionNumber a line, found none")
    return tuple(entries.values())


def is_uid(text: str) -> bool:
    """Return whether a text is digits and dots, at most 64, as a UID must be."""
    return len(text) <= UID_LENGTH and UID.fullmatch(text) is not None


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return number and text of the lines that are neither blank nor comments."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8 text - save it as 'CSV UTF-8'") from None
    numbered = enumerate(re.split(r"\r\n|\n|\r", text), start=1)
    return [(number, line) for number, line in numbered if line.strip() and not line.lstrip().startswith("#")]


def _entries(lines: list[tuple[int, str]], path: Path) -> Iterator[Wanted]:
    first = lines[0][1] if lines else ""
    delimiter = max(_DELIMITERS, key=first.count)
    rows = [_Row(path, number, _cells(line, delimiter)) for number, line in lines]
    columns = [_COLUMNS.get(re.sub(r"[\s_]", "", cell).lower()) for cell in _cells(first, delimiter)]
    if any(columns):
        places = [(kind, columns.index(kind)) for kind in _COLUMNS.values() if kind in columns]
        return (entry for row in rows[1:] for entry in row.under(places, len(columns)))
    return (row.alone() for row in rows)


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:  # a cell of more than 128 kB
        return ["", ""]
    return [tidy(cell) for cell in cells] or [""]


@dataclass(frozen=True, repr=False)
class _Row:
    path: Path
    line: int
    cells: list[str]

    def alone(self) -> Wanted:
        """Return the one entry of a row without heading."""
        if len(self.cells) > 1:
            raise self._error(
                "more than one cell - expected one study a line, or a heading with StudyInstanceUID or AccessionNumber"
            )
        kind: Kind = "StudyInstanceUID" if _LIKE_A_UID.fullmatch(self.cells[0]) else "AccessionNumber"
        return self._entry(kind, self.cells[0])

    def under(self, places: list[tuple[Kind, int]], width: int) -> Iterator[Wanted]:
        """Yield the entry of a row under a heading, none for a row of blanks."""
        if any(self.cells[width:]):
            raise self._error(f"{len(self.cells)} cells, expected {width} - quote cells that hold the delimiter")
        filled = [
            (kind, self.cells[place]) for kind, place in places if self.cells[place : place + 1] not in ([], [""])
        ]
        if filled:
            yield self._entry(*filled[0])
        elif any(self.cells):
            raise self._error("neither a StudyInstanceUID nor an AccessionNumber")

    def _entry(self, kind: Kind, value: str) -> Wanted:
        if _WILDCARDS & set(value):
            raise self._error("`*`, `?` and backslash ask for more than one study - name each study")
        if kind == "StudyInstanceUID" and not is_uid(value):
            raise self._error(f"not a StudyInstanceUID - expected digits and dots, at most {UID_LENGTH}")
        if not value or not value.isprintable() or len(value) > _ACCESSION_LENGTH:
            raise self._error(f"not an AccessionNumber - expected printable characters, at most {_ACCESSION_LENGTH}")
        return Wanted(kind, value, self.line)

    def _error(self, what: str) -> DataError:
        return DataError(f"{self.path} line {self.line}: {what}")
