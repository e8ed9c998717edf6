"""Which files of a data folder are examples, and what is said about each: `manifest.csv`, or one subfolder a class.

Messages name line numbers and column names, never a path below the folder or the content of a cell.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from client.image import Unreadable
from common.errors import DataError

MANIFEST = "manifest.csv"
COLUMNS = ("path", "label", "patient", "site", "split")
SPLIT_WORDS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
IGNORED = {
    "hidden": "its name, or its folder's, begins with a dot",
    "other_suffix": "its name is not that of an image, or it is a DICOMDIR",
}
"""Why a file of a class folder is passed over without being opened: code -> meaning."""

_SUFFIXES = frozenset({"", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".dcm", ".dicom", ".ima"})
_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z _]{0,30}")


@dataclass(frozen=True)
class Entry:
    """One example as the folder describes it."""

    path: Path  # resolved, inside the folder, a regular file
    label: str
    patient: str | None = None
    site: str | None = None
    split: str | None = None  # of cohort.SPLITS


@dataclass(frozen=True)
class Listing:
    """The examples of a folder in their order, and how many files are none."""

    entries: tuple[Entry, ...]
    quarantine: Mapping[str, int]  # image.CODES -> files
    ignored: Mapping[str, int]  # IGNORED -> files


@dataclass(frozen=True)
class _Row:
    line: int
    cells: Mapping[str, str]

    def cell(self, column: str) -> str | None:
        return self.cells.get(column) or None


def list_folder(root: Path) -> Listing:
    """Return what a data folder holds, without opening an image.

    Raises:
        DataError: no such folder, or a manifest that cannot be taken at its word.
    """
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with {MANIFEST}, or with one subfolder a class")
    root = root.resolve()
    if (root / MANIFEST).is_file():
        rows = _read_manifest(root / MANIFEST)
        return Listing(*_judge(root, rows), ignored={})
    return _list_classes(root)


def _read_manifest(path: Path) -> list[_Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{MANIFEST}: expected UTF-8 text - save it as 'CSV UTF-8'") from None
    lines = _cells(text)
    header = [name.lower() for name in next(lines, (0, []))[1]]
    _check_columns(header)
    rows = [_row(line, header, cells) for line, cells in lines if any(cells)]
    for column in ("site", "split"):
        _check_filled(rows, column)
    return rows


def _cells(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and trimmed cells; the delimiter is the commoner of `,` and `;` in the header."""
    first = text.partition("\n")[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in reader:
            yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error:
        raise DataError(f"{MANIFEST} line {reader.line_num}: not CSV - check the quotes") from None


def _check_columns(header: list[str]) -> None:
    found = ", ".join(name if _PLAIN_NAME.fullmatch(name) else "(another)" for name in header) or "nothing"
    if "path" not in header or "label" not in header:
        raise DataError(f"{MANIFEST}: expected columns path,label (and patient,site,split), found {found}")
    if any(header.count(column) > 1 for column in COLUMNS):
        raise DataError(f"{MANIFEST}: expected each column once, found {found}")
    for name in header:
        near = get_close_matches(name, COLUMNS, n=1, cutoff=0.8)
        if near and name not in COLUMNS:  # taken for an extra column, a misspelt 'patient' would leak test patients
            raise DataError(f"{MANIFEST}: column {name!r} is not read - rename it to {near[0]!r}, or remove it")


def _row(line: int, header: list[str], cells: list[str]) -> _Row:
    if any(cells[len(header) :]):
        raise DataError(f"{MANIFEST} line {line}: {len(cells)} cells, expected {len(header)} - quote cells with commas")
    row = _Row(line, {name: cell for name, cell in zip(header, cells, strict=False) if name in COLUMNS})
    row = replace(row, cells={**row.cells, "path": (row.cell("path") or "").replace("\\", "/")})  # from Windows
    split = row.cell("split")
    if split is not None and split.lower() not in SPLIT_WORDS:
        raise DataError(f"{MANIFEST} line {line}: split must be train, val, validation or test")
    return row


def _check_filled(rows: list[_Row], column: str) -> None:
    blank = [row.line for row in rows if row.cell(column) is None]
    if blank and len(blank) < len(rows):
        raise DataError(
            f"{MANIFEST}: column {column} is blank in {len(blank)} of {len(rows)} rows, first in line {blank[0]}"
            " - fill it everywhere or nowhere"
        )


def _judge(root: Path, rows: list[_Row]) -> tuple[tuple[Entry, ...], Mapping[str, int]]:
    """Split rows into examples and quarantine; each file is counted once, however often it is listed."""
    entries: dict[Path, Entry] = {}
    lines: dict[Path, int] = {}
    refused: dict[Path, str] = {}
    nowhere: dict[str, str] = {}  # by the name in the manifest, for there is no file
    for row in rows:
        try:
            entry = _entry(root, row)
        except Unreadable as error:
            nowhere[row.cell("path") or ""] = error.code
            continue
        known = entries.setdefault(entry.path, entry)
        first = lines.setdefault(entry.path, row.line)
        if not entry.label:
            refused[entry.path] = "no_label"
        elif known.label != entry.label:
            refused.setdefault(entry.path, "label_conflict")
        elif known != entry:
            raise DataError(f"{MANIFEST} lines {first} and {row.line}: one file with two patients, sites or splits")
    kept = tuple(entry for path, entry in entries.items() if path not in refused)
    return kept, Counter([*refused.values(), *nowhere.values()])


def _entry(root: Path, row: _Row) -> Entry:
    split = row.cell("split")
    return Entry(
        path=_locate(root, row.cell("path") or ""),
        label=row.cell("label") or "",
        patient=row.cell("patient"),
        site=row.cell("site"),
        split=None if split is None else SPLIT_WORDS[split.lower()],
    )


def _locate(root: Path, name: str) -> Path:
    """Return the file of that name below the root, links followed.

    Raises:
        Unreadable: `outside_root` or `missing`.
    """
    if name.startswith("/"):
        raise Unreadable("outside_root")
    try:
        path = (root / name).resolve()
        inside, is_file = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a loop of links
        raise Unreadable("missing") from None
    if not inside:
        raise Unreadable("outside_root")
    if not is_file:
        raise Unreadable("missing")
    return path


def _list_classes(root: Path) -> Listing:
    names = sorted(_files(root), key=lambda path: path.parts)
    reasons = [_ignored(name) for name in names]
    rows = [
        _Row(number, {"path": name.as_posix(), "label": name.parts[0] if len(name.parts) > 1 else ""})
        for number, (name, reason) in enumerate(zip(names, reasons, strict=True))
        if reason is None
    ]
    entries, quarantine = _judge(root, rows)
    _check_class_names({entry.label for entry in entries})
    return Listing(entries, quarantine, Counter(reason for reason in reasons if reason is not None))


def _files(root: Path) -> Iterator[Path]:
    """Yield every file below the root, relative to it; links to folders are not followed."""
    for folder, _, names in os.walk(root):
        for name in names:
            yield (Path(folder) / name).relative_to(root)


def _ignored(relative: Path) -> str | None:
    if any(part.startswith(".") for part in relative.parts):
        return "hidden"
    suffix = relative.suffix.lower()
    is_image = suffix in _SUFFIXES or suffix[1:].isdigit()  # 1.2.840.113619: a UID for a name
    return None if is_image and relative.name.upper() != "DICOMDIR" else "other_suffix"


def _check_class_names(names: set[str]) -> None:
    if len(names) > 1 and all(name.lower() in SPLIT_WORDS for name in names):
        raise DataError(
            f"subfolders {', '.join(sorted(names))} look like splits, expected one subfolder a class"
            f" - describe the files in {MANIFEST} with path,label,split"
        )
