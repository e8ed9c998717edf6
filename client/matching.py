"""Which rows of a table speak of which files: by path, or by the keyed digests of what the headers of the files say.

The key column is found by trying every column that can be one. Headers are known here as digests only
(`client.identity`), so cells are digested and compared, and nothing read from a header can reach a message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from client.identity import Identity
from client.keys import (
    ACCESSION,
    AUTO,
    KEY_KINDS,
    KINDS,
    NO_KEYS,
    could_be_a_count,
    kind_named,
    number_notes,
    plain,
    read_key,
)
from client.pathmatching import PathMatcher
from client.table import Note, Table
from common.errors import DataError


@dataclass(frozen=True, repr=False)
class Named:
    """What a file can be looked up by."""

    path: str  # POSIX, relative to the data root
    keys: Mapping[str, bytes]  # kind of KEY_KINDS -> Identity.key(kind, value), 16 bytes; kinds without a value missing
    loose: bytes = b""  # Identity.loose_key("AccessionNumber", value); empty: none
    usable: bool = True  # whether it gives an image; else that it names nothing says nothing


@dataclass(frozen=True, repr=False)
class Match:
    """Rows and files joined by K different keys of one column."""

    column: int
    kind: str  # of KINDS
    row_keys: NDArray[np.int64]  # (rows,) which key a row has, -1 for none
    file_keys: NDArray[np.int64]  # (n,) which key a file is found by, -1 for none
    keys: int
    notes: tuple[Note, ...] = ()

    @property
    def matched(self) -> NDArray[np.bool_]:
        """Return which keys have a file: (K,)."""
        found = np.zeros(self.keys, bool)
        found[self.file_keys[self.file_keys >= 0]] = True
        return found

    @property
    def row_matched(self) -> NDArray[np.bool_]:
        """Return which rows have a file: (rows,)."""
        return np.append(self.matched, False)[self.row_keys]


@dataclass(frozen=True, repr=False)
class _Files:
    """The files, by everything that a cell can say."""

    count: int
    paths: PathMatcher
    digests: Mapping[str, Mapping[bytes, list[int]]]  # kind -> digest -> files
    loose: Mapping[bytes, list[int]]
    accessions: tuple[bytes | None, ...]  # digest of each file

    @staticmethod
    def of(files: Sequence[Named]) -> _Files:
        digests: dict[str, dict[bytes, list[int]]] = {kind: defaultdict(list) for kind in KEY_KINDS}
        loose: dict[bytes, list[int]] = defaultdict(list)
        for number, file in enumerate(files):
            for kind, digest in file.keys.items():
                digests[kind][digest].append(number)
            if file.loose:
                loose[file.loose].append(number)
        accessions = tuple(file.keys.get(ACCESSION) for file in files)
        return _Files(len(files), PathMatcher.of([file.path for file in files]), digests, loose, accessions)


@dataclass(frozen=True)
class _Trial:
    """A column taken as one kind of key."""

    column: int
    kind: str
    loosely: bool = False  # leading zeros and case may differ
    guessed: bool = False  # neither the rules nor its name say that it is one


def find_match(
    table: Table, files: Sequence[Named], key: str, identity: Identity, never: Collection[int] = ()
) -> Match:
    """Return rows and files joined by the column that names the most different things, then the most files.

    A table of images has more matching SOPInstanceUIDs than StudyInstanceUIDs, a table of studies has not: so the most
    different keys, not the most files, tell what a row of the table is about.

    Args:
        table: the labels.
        files: to be labelled.
        key: a column, a kind of `KINDS`, or auto.
        identity: made the digests of `files`.
        never: columns that are no key, unless `key` names them.

    Raises:
        DataError: no such column, or no row matches a file.
    """
    known = _Files.of(files)
    trials = [trial for trial in _trials(table, key, never) if trial.kind == "path" or known.digests[trial.kind]]
    best = _best(table, known, trials, identity)
    if best is None:
        loosely = [replace(trial, loosely=True) for trial in trials if trial.kind == ACCESSION]
        best = _best(table, known, loosely, identity)
    if best is None:
        raise DataError(_nothing_matches(table, trials, key))
    numbers = number_notes(table, best.column) if best.kind == ACCESSION else ()
    return replace(best, notes=numbers + best.notes)


def _trials(table: Table, key: str, never: Collection[int]) -> list[_Trial]:
    kind = next((kind for kind in KINDS if kind.casefold() == key.casefold()), None)
    column = None if key == AUTO else table.find(key)
    if column is not None:
        kinds = dict.fromkeys([kind, "path"]) if kind else KINDS
        return [_Trial(column, str(one), loosely=one == ACCESSION) for one in kinds]
    if kind is None and key != AUTO:
        table.required(key, "key")
    columns = [c for c, name in enumerate(table.names) if c not in never and plain(name) not in NO_KEYS]
    return [trial for c in columns for trial in _possible(c, table.names[c]) if kind in (None, trial.kind)]


def _possible(column: int, name: str) -> list[_Trial]:
    """Return what a column can be tried as, going by its name."""
    promised = kind_named(name)
    if promised in (None, "path"):
        return [_Trial(column, kind, guessed=kind != promised) for kind in KINDS]
    return [_Trial(column, "path"), _Trial(column, str(promised), loosely=promised == ACCESSION)]


def _best(table: Table, files: _Files, trials: Sequence[_Trial], identity: Identity) -> Match | None:
    """Return the trial with most keys, then most files; of equals one that its name promises, then the finest."""

    def promised(trial: _Trial) -> bool:
        return kind_named(table.names[trial.column]) == trial.kind

    def preference(trial: _Trial) -> tuple[bool, int, str]:
        return not promised(trial), KINDS.index(trial.kind), table.names[trial.column].casefold()

    best: tuple[tuple[int, int], Match] | None = None
    for trial in sorted(trials, key=preference):
        match = _tried(table, files, trial, identity)
        if match is None:
            continue
        rank = (int(match.matched.sum()), int((match.file_keys >= 0).sum()))
        if best is None or rank > best[0]:
            best = rank, match
        if rank[0] == files.count:  # every file has a key of its own: no other trial can have more
            break
    if best is not None:
        table.check_once([best[1].column])
    return None if best is None else best[1]


def _tried(table: Table, files: _Files, trial: _Trial, identity: Identity) -> Match | None:
    """Return rows and files joined by one column; None if no file is found."""
    texts, row_keys = _keys(table.columns[trial.column], trial)
    notes: tuple[Note, ...] = ()
    if trial.kind == "path":
        found, doubtful = files.paths.match(texts)
    else:
        found, doubtful = _by_digest(texts, files.digests[trial.kind], lambda text: identity.key(trial.kind, text)), 0
        if trial.loosely:
            more, doubtful = _loosened(texts, files, found, identity)
            found |= more
            notes += _loose_notes(table, trial.column, len(more))
    if not found:
        return None
    file_keys = np.full(files.count, -1, np.int64)
    file_keys[list(found)] = list(found.values())
    if doubtful:
        message = f"{table.shown(trial.column)}: {doubtful} keys fit several files or rows and were not used"
        notes += (("ambiguous_keys", message),)
    notes += _inherited(trial.kind, file_keys)
    return Match(trial.column, trial.kind, row_keys, file_keys, len(texts), notes)


def _keys(cells: Sequence[str], trial: _Trial) -> tuple[list[str], NDArray[np.int64]]:
    """Return the different keys of a column, and which of them each row has, -1 for none."""
    places: dict[str, int] = {"": -1}
    known: dict[str, int] = {}
    for cell in dict.fromkeys(cells):
        text = read_key(trial.kind, cell) if cell else ""
        if trial.guessed and could_be_a_count(trial.kind, text):
            text = ""
        known[cell] = places.setdefault(text, len(places) - 1)
    return list(places)[1:], np.fromiter(map(known.__getitem__, cells), np.int64, len(cells))


def _by_digest(
    texts: Sequence[str], files: Mapping[bytes, list[int]], digest: Callable[[str], bytes]
) -> dict[int, int]:
    """Return file -> key."""
    return {file: key for key, text in enumerate(texts) for file in files.get(digest(text), ())}


def _loosened(
    texts: Sequence[str], files: _Files, strict: Mapping[int, int], identity: Identity
) -> tuple[dict[int, int], int]:
    """Return file -> key of files that have none yet, and how many keys stay in doubt.

    A key without its leading zeros is taken only if no other key of the table and no other AccessionNumber of the files
    looks the same without them.
    """
    alike: dict[bytes, list[int]] = defaultdict(list)
    for key, text in enumerate(texts):
        alike[identity.loose_key(ACCESSION, text)].append(key)
    found: dict[int, int] = {}
    doubtful = 0
    for digest, keys in alike.items():
        waiting = [file for file in files.loose.get(digest, ()) if file not in strict]
        alone = len(keys) == 1 and len({files.accessions[file] for file in files.loose.get(digest, ())}) == 1
        found |= dict.fromkeys(waiting if alone else (), keys[0])
        doubtful += len(keys) if waiting and not alone else 0
    return found, doubtful


def _loose_notes(table: Table, column: int, loosened: int) -> tuple[Note, ...]:
    if not loosened:
        return ()
    message = f"{table.shown(column)}: {loosened} files match only without leading zeros or case - format it as text"
    return (("leading_zeros", message),)


def _inherited(kind: str, file_keys: NDArray[np.int64]) -> tuple[Note, ...]:
    found = file_keys[file_keys >= 0]
    keys = len(np.unique(found))
    if kind in ("path", "SOPInstanceUID") or keys == len(found):
        return ()
    return (("inherited", f"labels are given by {kind}: {len(found)} files inherit those of {keys}"),)


def _nothing_matches(table: Table, trials: Sequence[_Trial], key: str) -> str:
    columns = list(dict.fromkeys(trial.column for trial in trials))
    shown = ", ".join(table.shown(column) for column in columns[:12]) or "nothing, for no column can be such a key"
    more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    kinds = ", ".join(kind for kind in KINDS if any(trial.kind == kind for trial in trials)) or key
    lost = any(number_notes(table, trial.column) for trial in trials if trial.kind == ACCESSION)
    hint = "; a spreadsheet has changed numbers: format the key as text and export again" if lost else ""
    remedy = "name the right column in [data] key" if key == AUTO else "check [data] key, or leave it at auto"
    return f"{table.where}: no row matches a file; tried {shown}{more} as {kinds}{hint} - {remedy}"
