"""Labels as hospitals keep them: a table beside the files, or one subfolder a class -> one answer for each file.

Nothing here opens an image. Headers are known as keyed digests only; messages name lines and columns, never a path
below the data root and never a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.columns import LabelColumns, Roles, check_strays, find_label_columns, find_roles, no_keys
from client.identity import Identity, tidy
from client.listing import SPLIT_WORDS, check_class_names
from client.marks import read_marks
from client.matching import Match, Named, find_match
from client.rules import Rules, Said
from client.table import Note, Table, read_table
from client.words import label_words, read_words
from common.errors import DataError

__all__ = ["WARNINGS", "Labelled", "Named", "Rules", "class_folders", "read_labels"]

WARNINGS = {
    "encoding": "the table is not UTF-8",
    "leading_zeros": "keys match only without leading zeros or case",
    "number_format": "a spreadsheet took keys for numbers",
    "ambiguous_keys": "keys that fit several files or rows",
    "inherited": "several files have the label of their study, series or order",
    "duplicate_rows": "several rows speak of one key",
    "rows_without_key": "rows whose key is blank",
    "ignored_rows": "rows left out by the site's rules",
    "uncertain": "-1 among the labels, and what it is taken for",
    "masked_label": "a label that is unknown for all files",
    "column_left_out": "a column that is a label but for a few cells",
    "similar_words": "labels that differ only in case, leading zeros or decimals",
    "unknown_words": "words of the site's rules that do not occur",
    "patient_unread": "a column of patients that is not read, where the files name none",
}
"""What a label table can be warned of: code -> meaning. The messages are for the site's own screen."""


@dataclass(frozen=True, repr=False)
class Labelled:
    """What is said about each of n files, in their order."""

    kind: Literal["single-label", "multi-label"]
    label_names: tuple[str, ...]  # K; in text order for one label, in the order of the columns for several
    labels: NDArray[np.int64] | NDArray[np.float32]  # (n,) -1 where none; or (n, K) 1, 0, 0.5 (soft), NaN (unknown)
    codes: tuple[str, ...]  # n; empty, or no_label, label_conflict of image.CODES
    patients: tuple[str | None, ...]
    sites: tuple[str | None, ...]
    splits: tuple[str | None, ...]  # of cohort.SPLITS
    key: str  # of matching.KINDS; "folder" for class folders
    column: str  # how a message calls the key's column; empty for class folders
    unmatched_rows: int  # rows of the table that match no file
    rows: int
    warnings: tuple[Note, ...] = ()  # code of WARNINGS, message


def read_labels(table: Path, files: Sequence[Named], rules: Rules, identity: Identity) -> Labelled:
    """Return what a table says about each file.

    Args:
        table: a delimited text; several rows of one key must agree, or the files of that key are in conflict.
        files: n files, by path and by the digests of their headers.
        rules: how the site wants the table to be read.
        identity: the one that made the digests of the files.

    Raises:
        DataError: the table cannot be taken at its word; the message says in which line and column, and what to do.
    """
    if not files:
        raise DataError("expected files to label, found none in the data folder")
    read = read_table(table)
    roles = find_roles(read, rules)
    match = find_match(read, files, rules.key, identity, no_keys(read, rules, roles))
    columns = find_label_columns(read, rules, roles.taken() | {match.column})
    notes = read.notes + match.notes + columns.notes
    notes += check_strays(read, rules, roles.taken() | columns.taken() | {match.column}, files)
    said = _said(read, columns, rules, match)
    patients, sites, splits = _others(read, roles, match)
    return Labelled(
        kind="multi-label" if columns.kind == "marks" else "single-label",
        label_names=said.names,
        labels=_by_file(said, match),
        codes=_codes(said, match),
        patients=patients,
        sites=sites,
        splits=splits,
        key=match.kind,
        column=read.shown(match.column),
        unmatched_rows=int((~match.row_matched).sum()),
        rows=len(read),
        warnings=(*notes, *said.notes, *_row_notes(match)),
    )


def class_folders(files: Sequence[Named], rules: Rules) -> Labelled:
    """Return the first folder of each file's path as its label.

    Raises:
        DataError: the folders look like splits, or cannot be names of labels.
    """
    folders = [file.path.partition("/")[0] if "/" in file.path else "" for file in files]
    check_class_names(set(folders) - {""})
    said = label_words(folders, rules, "a subfolder of the data folder")
    return Labelled(
        kind="single-label",
        label_names=said.names,
        labels=said.values,
        codes=tuple("no_label" if value < 0 else "" for value in said.values.tolist()),
        patients=(None,) * len(files),
        sites=(None,) * len(files),
        splits=(None,) * len(files),
        key="folder",
        column="",
        unmatched_rows=0,
        rows=0,
        warnings=said.notes,
    )


def _said(table: Table, columns: LabelColumns, rules: Rules, match: Match) -> Said:
    if columns.kind == "marks":
        return read_marks(table, columns.named, rules, match)
    place = columns.named[0][1]
    if place is None:
        raise ValueError("a single label column is always in the table")
    return read_words(table, place, rules, match, marks=columns.kind == "mark")


def _by_file(said: Said, match: Match) -> NDArray[np.int64] | NDArray[np.float32]:
    """Return the values of the files: none for those without a key, and for those in conflict."""
    nothing = np.full_like(said.values[:1], np.nan if said.values.ndim == 2 else -1, shape=(1, *said.values.shape[1:]))
    values = np.where(said.conflicts.reshape(-1, *[1] * (said.values.ndim - 1)), nothing, said.values)
    return np.concatenate([values, nothing])[match.file_keys]


def _codes(said: Said, match: Match) -> tuple[str, ...]:
    none = np.isnan(said.values).all(axis=1) if said.values.ndim == 2 else said.values < 0
    by_key = np.where(said.conflicts, "label_conflict", np.where(none, "no_label", ""))
    return tuple(np.append(by_key, "no_label")[match.file_keys].tolist())


def _others(
    table: Table, roles: Roles, match: Match
) -> tuple[tuple[str | None, ...], tuple[str | None, ...], tuple[str | None, ...]]:
    for place, what in ((roles.site, "site"), (roles.split, "split")):
        _check_filled(table, place, what)
    _check_splits(table, roles.split)
    return (
        _by_key(table, roles.patient, match, tidy),
        _by_key(table, roles.site, match, tidy),
        _by_key(table, roles.split, match, lambda word: SPLIT_WORDS[word.lower()]),
    )


def _by_key(table: Table, place: int | None, match: Match, read: Callable[[str], str]) -> tuple[str | None, ...]:
    """Return what a column says of each file, None for nothing.

    Raises:
        DataError: two rows of one key, with a file, say different things.
    """
    if place is None:
        return (None,) * len(match.file_keys)
    said: dict[int, tuple[str, int]] = {}
    rows = np.flatnonzero(match.row_matched).tolist()
    for row in rows:
        key, line, cell = int(match.row_keys[row]), table.lines[row], table.columns[place][row]
        if not cell:
            continue
        known, first = said.setdefault(key, (read(cell), line))
        if known != read(cell):
            raise DataError(
                f"{table.where} lines {first} and {line}: one file with two patients, sites or splits"
                f" ({table.shown(place)})"
            )
    return tuple(said[key][0] if key in said else None for key in match.file_keys.tolist())


def _check_filled(table: Table, place: int | None, what: str) -> None:
    blank = [] if place is None else [n for n, cell in enumerate(table.columns[place]) if not cell]
    if blank and len(blank) < len(table):
        raise DataError(
            f"{table.where}: column {what} is blank in {len(blank)} of {len(table)} rows,"
            f" first in line {table.lines[blank[0]]} - fill it everywhere or nowhere"
        )


def _check_splits(table: Table, place: int | None) -> None:
    for line, cell in zip(table.lines, table.columns[place] if place is not None else (), strict=place is not None):
        if cell and cell.lower() not in SPLIT_WORDS:
            raise DataError(f"{table.where} line {line}: split must be train, val, validation or test")


def _row_notes(match: Match) -> tuple[Note, ...]:
    times = np.bincount(match.row_keys[match.row_keys >= 0], minlength=match.keys)
    repeated = int((times[match.matched] > 1).sum())
    without = int((match.row_keys < 0).sum())
    found = [
        ("duplicate_rows", repeated, f"{repeated} keys stand in several rows each"),
        ("rows_without_key", without, f"{without} rows have no key that can be read"),
    ]
    return tuple((code, message) for code, count, message in found if count)
