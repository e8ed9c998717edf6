"""Patients who are not to be used: a list of names in a CSV file, made at once into keyed digests, and their list.

The list holds one hex digest a line (`Identity.person`: PatientID without issuer, case and leading zeros), so it errs
towards taking out too much. It is only ever added to.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import re
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

from client.identity import Identity, is_placeholder, tidy
from client.site_config import SiteConfig
from common.errors import CheckpointError, ConsiliumError, DataError
from common.files import write_atomic

COLUMNS = ("patientid", "patient")
"""Headings that name the patients' column, without case, blanks, '_' and '-'; the first that is there is taken."""

MAX_BYTES = 64 * 2**20

_Rows = Sequence[tuple[int, list[str]]]
_LINE = re.compile(rb"[0-9a-f]{32}")
_ROUNDED = re.compile(r"[0-9][.,][0-9]+E\+[0-9]+", re.IGNORECASE)


def persons(path: Path, identity: Identity, column: str | None = None) -> frozenset[bytes]:
    """Return the 16-byte digests of the patients that a CSV file names.

    Args:
        path: the file: UTF-8 (or UTF-16 with its mark), separated by comma, semicolon or tab.
        identity: the site's.
        column: heading of the patients' column; None: PatientID, or patient, or the only column there is.

    Raises:
        DataError: it cannot be read, names no patient, or has a line that does not name one. No message holds a cell.
    """
    rows = _rows(_text(path), path.name)
    place, body = _column(rows, column, path.name)
    found = frozenset(identity.person(_patient(row, place, number, path.name)) for number, row in body)
    if not found:
        raise DataError(f"{path.name}: names no patient")
    return found


def optout(config: SiteConfig) -> frozenset[bytes]:
    """Return the 16-byte digests of all patients who were taken out.

    Raises:
        CheckpointError: the list cannot be read or is damaged; it is never taken for empty then.
    """
    try:
        content = config.optout.read_bytes()
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise CheckpointError(f"{config.optout}: the opt-out list cannot be read ({error.strerror})") from None
    lines = content.split(b"\n")
    if lines.pop() or not all(_LINE.fullmatch(line) for line in lines):
        raise CheckpointError(f"{config.optout}: the opt-out list is damaged; bring it back from your backup")
    return frozenset(bytes.fromhex(line.decode()) for line in lines)


def take_out(config: SiteConfig, added: Set[bytes]) -> int:
    """Add patients to the list, and return how many of them are new.

    Raises:
        CheckpointError: the list cannot be read or is damaged.
        ConsiliumError: it cannot be written.
    """
    try:
        with _alone(config.state):
            held = optout(config)
            lines = sorted(digest.hex() for digest in held | added)
            write_atomic(config.optout, "".join(f"{line}\n" for line in lines).encode(), mode=0o600)
            return len(added - held)
    except OSError as error:
        raise ConsiliumError(f"{config.optout}: the opt-out list cannot be written ({error.strerror})") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process change the list meanwhile."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: more than {MAX_BYTES // 2**20} MiB, expected a CSV file of PatientIDs")
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: not UTF-8 text; save it as CSV UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path.name}: holds NUL characters, expected a CSV file of PatientIDs")
    return text


def _rows(text: str, name: str) -> list[tuple[int, list[str]]]:
    """Return the rows that are not blank, each with its line number."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(",;\t", key=first.count)
    if separator not in first:
        separator = "\x1f"  # one column, so that a comma is part of what it holds
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        return [(reader.line_num, row) for row in reader if any(tidy(cell) for cell in row)]
    except csv.Error:
        raise DataError(f"{name}: line {reader.line_num} is not CSV; look for a lone quotation mark") from None


def _column(rows: _Rows, wanted: str | None, name: str) -> tuple[int, _Rows]:
    """Return the place of the patients' column, and the rows below the heading."""
    if not rows:
        raise DataError(f"{name}: empty, expected one PatientID a line")
    heading = [_plain(cell) for cell in rows[0][1]]
    for known in COLUMNS if wanted is None else (_plain(wanted),):
        if heading.count(known) > 1:
            raise DataError(f"{name}: several columns are called {wanted or known}; name another with --column")
        if known in heading:
            return heading.index(known), _within(rows, len(heading), name)[1:]
    if wanted is not None or len(heading) > 1:
        expected = f"a column called {wanted}" if wanted else "a column called PatientID or patient, or a single column"
        raise DataError(f"{name}: expected {expected}; name the right one with --column")
    return 0, rows


def _within(rows: _Rows, width: int, name: str) -> _Rows:
    """Return the rows, none of which is wider than the heading: a stray separator would move the PatientID."""
    for number, row in rows:
        if any(tidy(cell) for cell in row[width:]):
            raise DataError(f"{name}: line {number} has more cells than the heading")
    return rows


def _plain(heading: str) -> str:
    return re.sub(r"[\s_-]", "", heading).casefold()


def _patient(row: Sequence[str], place: int, number: int, name: str) -> str:
    patient = tidy(row[place]) if place < len(row) else ""
    if is_placeholder(patient):
        raise DataError(f"{name}: line {number} names nobody (blank, or a placeholder); correct it or take it out")
    if _ROUNDED.fullmatch(patient):
        raise DataError(f"{name}: line {number} holds a number that a spreadsheet has rounded; export it as text")
    return patient
