"""A table as a spreadsheet exports it: encoding, delimiter and quotes found by themselves, every cell a trimmed text.

Messages name lines and columns, a column by its name only if that looks like one; they never show a cell. Cells are
not converted: "01" and "1" are two texts. Time and memory grow with the number of bytes.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from client.identity import tidy
from common.errors import DataError

MAX_BYTES = 256 * 2**20
MAX_CELL = 2**24  # characters; a quote that is never closed makes one cell of the rest of the table
MAX_COLUMNS = 2**17
MAX_BLANKS = 10**7  # cells that rows shorter than the header may leave out, beyond one for each character

Note = tuple[str, str]
"""A code of a closed list, and one line for the site's own screen."""

PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z _]{0,30}")
"""What a column may be called to be shown: a table without a header has a patient's cells in its first line."""

_DELIMITERS = ",;|\t"  # where two do equally well, the first
_SEP_LINE = re.compile(r'[ ]*"?sep=(.)"?[ ]*(?:\r\n|\r|\n|$)', re.IGNORECASE)  # written for Excel, never shown by it
_QUOTED = re.compile(r'"[^"]*"')
_LINE_END = re.compile(r"[\r\n]")
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods are ZIP archives, .xls is an OLE file
_BINARY = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_FILE_NAME = re.compile(r"[\w][\w .-]{0,63}")


@dataclass(frozen=True, repr=False)
class Table:
    """The cells of a table, by column."""

    where: str  # what messages call it
    names: tuple[str, ...]  # of the columns, tidied; empty where the header is blank
    columns: tuple[Sequence[str], ...]  # one text a row in each, trimmed
    lines: tuple[int, ...]  # where each row begins
    notes: tuple[Note, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows that are not blank."""
        return len(self.lines)

    def find(self, name: str) -> int | None:
        """Return the column of that name, upper and lower case being equal; None if there is none.

        Raises:
            DataError: two columns have that name.
        """
        wanted = tidy(name).casefold()
        places = [place for place, known in enumerate(self.names) if known.casefold() == wanted]
        if len(places) > 1:
            raise DataError(
                f"{self.where}: expected each column once, {self.shown(places[0])} comes {len(places)} times"
            )
        return places[0] if places else None

    def check_once(self, columns: Collection[int]) -> None:
        """Refuse columns whose name another column has as well.

        Raises:
            DataError: there is one.
        """
        times = Counter(name.casefold() for name in self.names)
        for column in columns:
            if self.names[column] and times[self.names[column].casefold()] > 1:
                raise DataError(f"{self.where}: expected each column once, {self.shown(column)} comes again")

    def required(self, name: str, setting: str) -> int:
        """Return the column that a setting names.

        Raises:
            DataError: there is no such column, or there are two.
        """
        place = self.find(name)
        if place is None:
            known = {known.casefold(): known for known in self.names if PLAIN_NAME.fullmatch(known)}
            near = get_close_matches(tidy(name).casefold(), known, n=1)
            hint = f"did you mean {known[near[0]]!r}?" if near else f"found {self.header()}"
            raise DataError(
                f"{self.where}: [data] {setting} names column {name!r}, which is not in the header ({hint})"
            )
        return place

    def shown(self, column: int) -> str:
        """Return how a message calls a column."""
        name = self.names[column]
        return f"column {name!r}" if PLAIN_NAME.fullmatch(name) else f"column {column + 1}"

    def header(self, limit: int = 12) -> str:
        """Return the names of the columns for a message, the first ones of many."""
        shown = [name if PLAIN_NAME.fullmatch(name) else "(another)" for name in self.names[:limit]]
        return ", ".join(shown) + (f" and {len(self.names) - limit} more" if len(self.names) > limit else "")


def read_table(path: Path) -> Table:
    """Read a delimited text file.

    Raises:
        DataError: it cannot be read, is no text, or its quotes or rows contradict its header.
    """
    where = path.name if _FILE_NAME.fullmatch(path.name) else "the label table"
    text, notes = _decode(where, _content(where, path))
    delimiter, start = _delimiter(where, text)
    records = _records(where, text[start:], delimiter, 1 if start else 0)
    if not records:
        raise DataError(f"{where}: expected a header and one row a file, found nothing")
    names = _trimmed([tidy(name) for name in records[0][1]])
    rows = records[1:]
    if len(rows) * len(names) > len(text) + MAX_BLANKS:
        raise DataError(f"{where}: most rows are shorter than the header of {len(names)} columns - check the header")
    cells = [_fitted(where, line, row, len(names)) for line, row in rows]
    columns = tuple(zip(*cells, strict=True)) if cells else tuple(() for _ in names)
    return Table(where, tuple(names), columns, tuple(line for line, _ in rows), notes)


def _content(where: str, path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{where}: larger than {MAX_BYTES >> 20} MiB - export the columns that are needed")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from None
    if content.startswith(_WORKBOOKS):
        raise DataError(f"{where}: a workbook, expected text - save it as 'CSV UTF-8'")
    return content


def _decode(where: str, content: bytes) -> tuple[str, tuple[Note, ...]]:
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    notes: tuple[Note, ...] = ()
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0" if wide or content.startswith(codecs.BOM_UTF8) else content.decode("cp1252", errors="replace")
        notes = (("encoding", f"{where} is not UTF-8 and was read as Windows-1252 - save it as 'CSV UTF-8'"),)
        if "\ufffd" in text or _BINARY.search(text):
            text = "\0"
    if "\0" in text:
        raise DataError(f"{where}: not a text - save it as 'CSV UTF-8'")
    return text, notes


def _delimiter(where: str, text: str) -> tuple[str, int]:
    """Return the delimiter and where the header begins: what `sep=` says, else what makes most of the first lines."""
    said = _SEP_LINE.match(text)
    if said and said[1] not in _DELIMITERS:
        raise DataError(f"{where} line 1: sep= must name a comma, a semicolon, a tab or a bar")
    start = said.end() if said else 0
    head = _QUOTED.sub("x", text[start : start + 2**22])
    lines = [line for line in _LINE_END.split(head, maxsplit=16) if line.strip()][:2] or [""]
    delimiter = said[1] if said else max(_DELIMITERS, key=lambda letter: _fields(lines, letter))
    if lines[0].count(delimiter) >= MAX_COLUMNS:
        raise DataError(f"{where}: more than {MAX_COLUMNS} columns")
    return delimiter, start


def _fields(lines: list[str], delimiter: str) -> tuple[bool, int]:
    """Return whether header and first row agree on a delimiter, and how many columns it gives a name."""
    agreed = len({line.count(delimiter) for line in lines}) == 1 and delimiter in lines[0]
    return agreed, sum(name.strip(_DELIMITERS + " ") != "" for name in lines[0].split(delimiter))


def _records(where: str, text: str, delimiter: str, line: int) -> list[tuple[int, list[str]]]:
    """Return the records that are not blank, their cells trimmed, each with the line where it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    guarded = '="' in text  # ="00123" is how a text of digits survives Excel
    records = []
    before = csv.field_size_limit(MAX_CELL)
    end = 0
    try:
        for cells in reader:
            begin, end = end + 1, reader.line_num
            trimmed = [cell.strip() for cell in cells]
            if any(trimmed):
                records.append((line + begin, [_unguarded(cell) for cell in trimmed] if guarded else trimmed))
    except csv.Error:
        raise DataError(f"{where} line {line + end + 1}: not CSV - check the quotes") from None
    finally:
        csv.field_size_limit(before)
    return records


def _unguarded(cell: str) -> str:
    return cell[2:-1].strip() if len(cell) > 2 and cell.startswith('="') and cell.endswith('"') else cell


def _trimmed(names: list[str]) -> list[str]:
    while names and not names[-1]:
        names.pop()
    return names


def _fitted(where: str, line: int, cells: list[str], width: int) -> list[str]:
    if len(cells) > width and any(cells[width:]):
        raise DataError(f"{where} line {line}: {len(cells)} cells, expected {width} - quote cells with delimiters")
    return cells[:width] + [""] * (width - len(cells))
