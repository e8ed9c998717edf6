"""Which column of a label table says what: patient, site, split, and the label or labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from client.keys import KEY_KINDS, PATIENT_NAMES, kind_named, plain
from client.marks import marks_only, nearly_marks
from client.matching import Named
from client.rules import Rules
from client.table import Note, Table
from common.errors import DataError

COLUMNS = ("path", "label", "patient", "site", "split")
"""Names that mean something wherever they stand; a name close to one of them is taken for a slip."""

_LABEL_NAMES = ("label", "class", "diagnosis", "target")
_NO_LABELS = PATIENT_NAMES | {
    *("sex", "patientsex", "gender", "age", "patientage", "frontallateral", "appa", "paap", "view", "viewposition"),
    *("laterality", "side", "projection", "portable", "orientation", "modality", "manufacturer", "device", "bodypart"),
    *("split", "site", "fold", "id", "index", "unnamed0", "nr", "no", "number", "row", "year", "date", "priority"),
    *("followup", "burnedinannotation", "inpatient", "instancenumber", "seriesnumber", "birthdate", "studydate"),
}
"""Columns that may hold 1 and 0 and are still no label."""

_LONGEST_NEAR = 10  # characters of a name that can be taken for one of COLUMNS


@dataclass(frozen=True)
class Roles:
    """Columns that say something else than a label; None where there is none."""

    patient: int | None
    site: int | None
    split: int | None

    def taken(self) -> set[int]:
        """Return the places of these columns."""
        return {place for place in (self.patient, self.site, self.split) if place is not None}


@dataclass(frozen=True)
class LabelColumns:
    """Where the labels stand."""

    named: tuple[tuple[str, int | None], ...]  # None: the rules name it, the table does not have it
    kind: Literal["words", "mark", "marks"]  # one column of words; one, or several, of 1 and 0
    notes: tuple[Note, ...] = ()

    def taken(self) -> set[int]:
        """Return the places of these columns."""
        return {place for _, place in self.named if place is not None}


def find_roles(table: Table, rules: Rules) -> Roles:
    """Return the columns that the rules name, else those that are called so.

    Raises:
        DataError: a column that is named is not there, or is there twice.
    """
    patient = table.find("patient") if rules.patient is None else table.required(rules.patient, "patient")
    split = table.find("split") if rules.split is None else table.required(rules.split, "split")
    return Roles(patient, table.find("site"), split)


def no_keys(table: Table, rules: Rules, roles: Roles) -> set[int]:
    """Return the columns that have another meaning than a key."""
    named = {table.find(name) for name in rules.label} - {None}
    marks = {place for place, cells in enumerate(table.columns) if marks_only(cells)}
    return {place for place in named if place is not None} | marks | roles.taken()


def find_label_columns(table: Table, rules: Rules, taken: Collection[int]) -> LabelColumns:
    """Return where the labels are: as the rules say, else in a column called label, else in every column of marks.

    Args:
        table: the labels.
        rules: name columns, or leave it open.
        taken: columns that have another meaning.

    Raises:
        DataError: a column that is named is not there, or none can be found.
    """
    if len(rules.label) == 1:
        return _one_column(table, rules.label[0], table.required(rules.label[0], "label"))
    if rules.label:
        named = tuple((name, table.find(name)) for name in rules.label)
        if all(place is None for _, place in named):
            table.required(rules.label[0], "label")
        return LabelColumns(named, "marks")
    called = [(name, place) for name in _LABEL_NAMES if (place := table.find(name)) is not None and place not in taken]
    if len(called) > 1 and called[0][0] != "label":
        shown = " and ".join(name for name, _ in called)
        raise DataError(f"{table.where}: columns {shown} may be the label - name one in [data] label")
    return _one_column(table, *called[0]) if called else _marked_columns(table, taken)


def _one_column(table: Table, name: str, place: int) -> LabelColumns:
    """Return a single column; marks below the name of a finding are yes and no, below a general name they are words."""
    marked = name.casefold() not in _LABEL_NAMES and marks_only(table.columns[place])
    return LabelColumns(((name, place),), "mark" if marked else "words")


def _marked_columns(table: Table, taken: Collection[int]) -> LabelColumns:
    possible = [
        place
        for place, name in enumerate(table.names)
        if name and place not in taken and plain(name) not in _NO_LABELS and kind_named(name) is None
    ]
    places = [place for place in possible if marks_only(table.columns[place])]
    if not places:
        raise DataError(
            f"{table.where}: expected a column label, or columns of 1 and 0, found {table.header()}"
            " - name the label columns in [data] label"
        )
    table.check_once(places)
    notes = tuple(note for place in sorted({*possible} - {*places}) for note in nearly_marks(table, place))
    named = tuple((table.names[place], place) for place in places)
    return LabelColumns(named, "marks" if len(places) > 1 else "mark", notes)


def check_strays(table: Table, rules: Rules, used: Collection[int], files: Sequence[Named]) -> tuple[Note, ...]:
    """Refuse a column that is nearly called as one that is read: a misspelt `patient` would leak test patients.

    A column of PatientIDs is no misspelling: where every file's own header names its patient it is not needed.

    Raises:
        DataError: there is such a column.
    """
    have_headers = all(any(kind in file.keys for kind in KEY_KINDS) for file in files if file.usable)
    settled = {"label": bool(rules.label), "patient": bool(rules.patient), "split": bool(rules.split)}
    present = {name.casefold() for name in table.names}
    expected = [name for name in COLUMNS if name not in present and not settled.get(name, False) and name != "path"]
    notes: tuple[Note, ...] = ()
    for place, name in enumerate(table.names):
        if place in used:
            continue
        is_patient = plain(name) in PATIENT_NAMES
        if is_patient and "patient" in expected and not have_headers:
            notes += (("patient_unread", f"{table.shown(place)} is not read - name it in [data] patient"),)
        near = get_close_matches(name.casefold(), expected, n=1, cutoff=0.8) if len(name) <= _LONGEST_NEAR else []
        if near and not (is_patient and have_headers):
            setting = f"name it in [data] {near[0]}, " if near[0] in settled else ""
            raise DataError(
                f"{table.where}: {table.shown(place)} is not read - {setting}rename it to {near[0]!r}, or remove it"
            )
    return notes
