"""What can be the key of a label table: the attributes that name an image, their columns, how cells are read.

Cells stay texts; only an AccessionNumber that a spreadsheet took for a number is put back, where no digit can be lost.
"""

from __future__ import annotations

import re

from client.identity import tidy
from client.pathmatching import normal
from client.table import Note, Table

ACCESSION = "AccessionNumber"
KEY_KINDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", ACCESSION)
"""The attributes of a header that can be a key, the finest first (Part 3, C.7 and C.12)."""

KINDS = ("path", *KEY_KINDS)
AUTO = "auto"
PATIENT_NAMES = frozenset({"patient", "patientid", "pid", "mrn", "subject", "subjectid", "patientname"})

_KEY_NAMES = {
    "path": {
        "path",
        "file",
        "filename",
        "filepath",
        "image",
        "imagepath",
        "relativepath",
        "imageid",
        "imagename",
        "id",
    },
    "SOPInstanceUID": {"sopinstanceuid", "sopuid", "instanceuid", "imageuid", "sopinstance"},
    "SeriesInstanceUID": {"seriesinstanceuid", "seriesuid", "seriesinstance"},
    "StudyInstanceUID": {"studyinstanceuid", "studyuid", "studyinstance"},
    ACCESSION: {"accessionnumber", "accession", "accessionno", "accessionnr", "accnr", "accno", "acc"},
}
NO_KEYS = PATIENT_NAMES | {"label", "class", "diagnosis", "target", "split", "site", "sex", "gender", "age"}
_UID = re.compile(r"[0-9][0-9.]{2,63}")
_LONGEST = 64  # characters of an AccessionNumber; SH allows 16 (Part 5, 6.2)
_TELLING = 6  # characters of a key that is believed in a column whose name promises nothing
_WHOLE = re.compile(r"([0-9]+)[.,]0+")
_SCIENTIFIC = re.compile(r"([0-9])(?:[.,]([0-9]+))?[eE]\+?([0-9]{1,2})")


def plain(name: str) -> str:
    """Return a column's name without case, blanks and signs.

    Examples:
        >>> plain("Accession_Number") == plain("AccessionNumber")
        True
    """
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def kind_named(name: str) -> str | None:
    """Return the kind of key that a column's name promises."""
    return next((kind for kind, names in _KEY_NAMES.items() if plain(name) in names), None)


def could_be_a_count(kind: str, text: str) -> bool:
    """Return whether a key is so short that another column, such as row numbers, could hold it by chance."""
    return len(text) < _TELLING and (kind == ACCESSION or (kind == "path" and text.isdigit()))


def read_key(kind: str, cell: str) -> str:
    """Return what a cell says as a key of that kind, empty for nothing."""
    if kind == "path":
        return normal(cell)
    return _accession(cell) if kind == ACCESSION else _uid(cell)


def _uid(cell: str) -> str:
    text = cell.removeprefix("'")  # a spreadsheet's mark of a text
    return text if _UID.fullmatch(text) else ""


def _accession(cell: str) -> str:
    if len(cell) > _LONGEST or "\\" in cell:  # not of an AccessionNumber's characters (Part 5, 6.2)
        return ""
    text = tidy(cell.removeprefix("'"))
    return whole_number(text) or text


def whole_number(text: str) -> str | None:
    """Return the digits of a whole number that a spreadsheet wrote with a point or a power; None if any may be lost.

    Examples:
        >>> whole_number("123.0"), whole_number("1.2345E+04"), whole_number("1.23E+05")
        ('123', '12345', None)
    """
    if whole := _WHOLE.fullmatch(text):
        return whole[1]
    power = _SCIENTIFIC.fullmatch(text)
    decimals = (power[2] or "") if power else ""
    return power[1] + decimals if power and len(decimals) == int(power[3]) else None


def number_notes(table: Table, column: int) -> tuple[Note, ...]:
    """Return how many cells of a column of AccessionNumbers a spreadsheet took for numbers."""
    odd = [
        cell for cell in table.columns[column] if cell[:1].isdigit() and not cell.isdigit() and len(cell) <= _LONGEST
    ]
    whole = sum(whole_number(cell) is not None for cell in odd)
    lost = sum(whole_number(cell) is None and _SCIENTIFIC.fullmatch(cell) is not None for cell in odd)
    shown = table.shown(column)
    found = [(whole, "were read without decimals and powers of ten"), (lost, "have lost digits and match nothing")]
    return tuple(
        ("number_format", f"{shown}: {count} cells that a spreadsheet took for numbers {what} - format it as text")
        for count, what in found
        if count
    )
