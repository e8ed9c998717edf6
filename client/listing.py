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
    "other_suffix": "its name ends like something else than an image, or it is a DICOMDIR",
}
"""Why a file is passed over without being opened: code -> meaning."""

_OTHER_SUFFIXES = frozenset(
    {
        *("csv", "tsv", "txt", "md", "rst", "log", "json", "jsonl", "xml", "html", "htm", "css", "js", "ipynb"),
        *("yaml", "yml", "toml", "ini", "cfg", "conf", "inf", "lock", "py", "pyc", "java", "jar", "sh"),
        *("pdf", "doc", "docx", "odt", "rtf", "xls", "xlsx", "xlsm", "ods", "ppt", "pptx", "odp", "tex", "bib"),
        *("zip", "gz", "tgz", "tar", "bz2", "xz", "zst", "7z", "rar", "iso", "dmg", "exe", "dll", "bat", "cmd", "msi"),
        *("npz", "npy", "nii", "nrrd", "mha", "mhd", "h5", "hdf5", "mat", "parquet", "feather", "arrow"),
        *("pkl", "pickle", "pt", "pth", "onnx", "safetensors", "so"),
        *("mp4", "avi", "mov", "mkv", "wmv", "mpg", "mpeg", "webm", "mp3", "wav", "svg"),
        *("db", "sqlite", "sqlite3", "bak", "tmp", "part", "swp", "lnk", "url"),
    }
)
"""Endings of what is certainly neither DICOM nor a picture; any other file is judged by its content."""
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


@dataclass(frozen=True, repr=False)
class Found:
    """The files of a folder, paths relative to it, POSIX, ordered by their components.

    A name that is not UTF-8 has its odd bytes as surrogates (PEP 383), so `os.fsencode` gives the very name.
    """

    paths: tuple[str, ...]  # could be images
    quarantine: Mapping[str, str]  # path -> image.CODES: outside_root, missing, no_access
    ignored: Mapping[str, str]  # path -> IGNORED


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
    found = list_files(root)
    rows = [
        _Row(number, {"path": name, "label": name.partition("/")[0] if "/" in name else ""})
        for number, name in enumerate(found.paths)
    ]
    entries, quarantine = _judge(root, rows)
    check_class_names({entry.label for entry in entries})
    counted = Counter(quarantine) + Counter(found.quarantine.values())
    return Listing(entries, counted, Counter(found.ignored.values()))


def check_class_names(names: set[str]) -> None:
    """Refuse class folders that are splits.

    Raises:
        DataError: every one of several folders is called like a split.
    """
    if len(names) > 1 and all(name.lower() in SPLIT_WORDS for name in names):
        raise DataError(
            f"subfolders {', '.join(sorted(names))} look like splits, expected one subfolder a class"
            f" - describe the files in {MANIFEST} with path,label,split"
        )


def list_files(root: Path) -> Found:
    """Return every file below a folder that could be an image, without opening any.

    What has no known ending may be DICOM and stays; the reader decides by content. Links to folders are not followed,
    links to files only where they end inside the folder.

    Raises:
        DataError: there is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of images")
    top = os.path.realpath(root)
    paths: list[str] = []
    quarantine: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for path, entry in _walk(top):
        if entry is None:
            quarantine[path] = "no_access"
        elif reason := _ignored(path):
            ignored[path] = reason
        elif code := _refused(top, entry):
            quarantine[path] = code
        else:
            paths.append(path)
    return Found(tuple(sorted(paths, key=_parts)), _ordered(quarantine), _ordered(ignored))


def _walk(top: str) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
    """Yield whatever is no folder, and no link to one, with its path below the top; None for folders kept shut."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(f"{top}/{folder}") as entries:
                listed = list(entries)
        except OSError:
            yield folder.rstrip("/"), None
            continue
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}{entry.name}/")
            elif not (entry.is_symlink() and _leads_to_folder(entry)):
                yield f"{folder}{entry.name}", entry


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a loop of links
        return False


def _ignored(path: str) -> str | None:
    if path.startswith(".") or "/." in path:
        return "hidden"
    name = path.rpartition("/")[2]
    stem, _, suffix = name.rpartition(".")
    is_other = (stem and suffix.lower() in _OTHER_SUFFIXES) or name.upper() == "DICOMDIR"
    return "other_suffix" if is_other else None


def _refused(top: str, entry: os.DirEntry[str]) -> str | None:
    """Return why an entry that is no folder cannot be read: sockets, pipes and devices would never end."""
    try:
        if entry.is_symlink() and not os.path.realpath(entry.path).startswith(top.rstrip("/") + "/"):
            return "outside_root"
        return None if entry.is_file() else "missing"
    except OSError:
        return "missing"


def _parts(path: str) -> list[str]:
    return path.split("/")


def _ordered(codes: Mapping[str, str]) -> dict[str, str]:
    return {path: codes[path] for path in sorted(codes, key=_parts)}
