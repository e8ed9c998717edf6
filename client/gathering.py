"""A folder of files and a table of labels -> what is known of every file, and which of them can be examples.

The one way from files to a cohort: a hospital's examination, its training, and a simulation over a folder all come
through here. Every file that is listed has exactly one outcome: usable, or a code of `client.image.CODES` or IGNORED.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.catalogue import Catalogue
from client.identity import Identity, is_placeholder
from client.image import IGNORED, Kind
from client.labels import Labelled, Named, Rules, class_folders, read_labels
from client.listing import MANIFEST, Found, list_files
from client.records import Entry
from client.vocabulary import PICTURE_FORMATS

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Folder:
    """Where images and labels are."""

    root: Path
    labels: Path | None = None  # None: manifest.csv in the folder, or one subfolder a class
    rules: Rules = field(default_factory=Rules)

    @property
    def table(self) -> Path | None:
        """The table of labels, if there is one."""
        manifest = self.root / MANIFEST
        return self.labels or (manifest if manifest.is_file() else None)


@dataclass(frozen=True, repr=False)
class Gathered:
    """What became of the n files of a folder that could be images, in the order of their paths."""

    found: Found  # the files, and those that were passed over unopened
    entries: tuple[Entry, ...]  # n
    codes: tuple[str, ...]  # n; why a file is not used; empty: it is
    labelled: Labelled | None  # about the `members`; None where there are none
    members: NDArray[np.int64]  # (m,) places of the files that the labels speak of
    patients: tuple[bytes, ...]  # n; Identity.patient, 32 bytes; empty: unknown
    nobody: NDArray[np.bool_]  # (n,) a PatientID is expected, and blank or a placeholder
    kind: Kind  # of the usable images together
    from_cache: int  # files that were not read again
    excluded: Mapping[int, bytes] = field(default_factory=dict)  # place -> person, where images were kept of them

    @property
    def usable(self) -> NDArray[np.int64]:
        """The places of the files that can be examples."""
        return np.flatnonzero([not code for code in self.codes])

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in `labelled` files stand: usable ones always do."""
        where = np.full(len(self.entries), -1, np.int64)
        where[self.members] = np.arange(len(self.members))
        return np.asarray(where[places])

    def labels(self, places: NDArray[np.int64]) -> NDArray[np.int64] | NDArray[np.float32]:
        """Return the labels of these files."""
        assert self.labelled is not None  # noqa: S101  there are usable files, so there are labels
        return self.labelled.labels[self.rows(places)]

    def digests(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return what names these images: (n, 32)."""
        joined = b"".join(self.entries[place].digest for place in places.tolist())
        return np.frombuffer(joined, np.uint8).reshape(-1, 32)

    def entries_of(self, places: NDArray[np.int64]) -> list[Entry]:
        """Return what is known of these files."""
        return [self.entries[place] for place in places.tolist()]

    def said(self, column: Sequence[str | None], places: NDArray[np.int64]) -> list[str | None]:
        """Return what a column of `labelled` says of these files."""
        return [column[row] for row in self.rows(places).tolist()]

    def counts(self, codes: Sequence[str] | None = None) -> tuple[Counter[str], Counter[str]]:
        """Return the files in quarantine and those that are ignored, by code; `codes` in place of the own ones."""
        every = Counter(code for code in codes or self.codes if code)
        ignored = Counter({code: n for code, n in every.items() if code in IGNORED})
        return every - ignored + Counter(self.found.quarantine.values()), ignored + Counter(self.found.ignored.values())


def gather(
    folder: Folder,
    catalogue: Catalogue,
    identity: Identity,
    opted_out: frozenset[bytes] = frozenset(),
    progress: Progress | None = None,
    *,
    unread: bool = True,
) -> Gathered:
    """Read a folder: every file listed, read once, labelled, and judged.

    Args:
        folder: images and labels.
        catalogue: keeps what is read.
        identity: the one that the catalogue uses.
        opted_out: `Identity.person` of patients who were taken out.
        progress: told how far the reading is.
        unread: whether files that were not read yet are read; else they count as missing.

    Raises:
        DataError: no such folder, or labels that cannot be taken at their word.
        CacheError: the cache cannot be written.
    """
    found = list_files(folder.root)
    paths = [folder.root / path for path in found.paths]
    known = catalogue.known(paths)
    entries = catalogue.read(paths, progress, known) if unread else [entry or Entry("missing") for entry in known]
    members, labelled = _labelled(folder, found.paths, entries, identity)
    patients, persons = _patients(entries, members, labelled, identity)
    excluded = _excluded(entries, persons, opted_out)
    codes = _codes(entries, members, labelled, persons, opted_out)
    entries = [Entry(e.code or "opted_out") if place in excluded else e for place, e in enumerate(entries)]
    return Gathered(
        found=found,
        entries=tuple(entries),
        codes=tuple(codes),
        labelled=labelled,
        members=members,
        patients=tuple(patients),
        nobody=_nobody(entries, members, labelled, patients),
        kind=_kind(entries, codes),
        from_cache=sum(entry is not None for entry in known),
        excluded=excluded,
    )


def _labelled(
    folder: Folder, paths: Sequence[str], entries: Sequence[Entry], identity: Identity
) -> tuple[NDArray[np.int64], Labelled | None]:
    """Return the files that labels are asked about, and what is said of them: for a table, all that may be images."""
    table = folder.table
    asked = [not e.code if table is None else e.code not in IGNORED for e in entries]
    members = np.flatnonzero(asked)
    if not len(members):
        return members, None
    files = [_named(paths[place], entries[place]) for place in members.tolist()]
    if table is None:
        return members, class_folders(files, folder.rules)
    return members, read_labels(table, files, folder.rules, identity)


def _named(path: str, entry: Entry) -> Named:
    return Named(path, entry.header.keys, entry.header.loose_accession, usable=not entry.code)


def _patients(
    entries: Sequence[Entry], members: NDArray[np.int64], labelled: Labelled | None, identity: Identity
) -> tuple[list[bytes], list[bytes]]:
    """Return the patient and the person of each file: the table's word, else the header's; empty where unknown."""
    patients = [entry.header.patient for entry in entries]
    persons = [entry.header.person for entry in entries]
    said = labelled.patients if labelled else ()
    for place, name in zip(members.tolist(), said, strict=True):
        if name is not None:
            nobody = is_placeholder(name)
            patients[place] = b"" if nobody else identity.patient("", name)
            persons[place] = b"" if nobody else identity.person(name)
    return patients, persons


def _excluded(entries: Sequence[Entry], persons: Sequence[bytes], opted_out: frozenset[bytes]) -> dict[int, bytes]:
    """Return the images that belong to persons whom only the table names: they were read, and should not have been."""
    return {
        place: person
        for place, (entry, person) in enumerate(zip(entries, persons, strict=True))
        if person in opted_out and not entry.code
    }


def _codes(
    entries: Sequence[Entry],
    members: NDArray[np.int64],
    labelled: Labelled | None,
    persons: Sequence[bytes],
    opted_out: frozenset[bytes],
) -> list[str]:
    codes = [entry.code for entry in entries]
    for place, code in zip(members.tolist(), labelled.codes if labelled else (), strict=True):
        codes[place] = codes[place] or code
    for place, person in enumerate(persons):
        if person and person in opted_out:
            codes[place] = "opted_out"
    return codes


def _nobody(
    entries: Sequence[Entry], members: NDArray[np.int64], labelled: Labelled | None, patients: Sequence[bytes]
) -> NDArray[np.bool_]:
    """Return which files should name a patient, by header or by table, and name nobody."""
    expected = np.array([entry.header.syntax not in (*PICTURE_FORMATS, "") for entry in entries], bool)
    expected[members[[name is not None for name in labelled.patients]] if labelled else []] = True
    return np.asarray(expected & ~np.array([bool(patient) for patient in patients], bool))


def _kind(entries: Sequence[Entry], codes: Sequence[str]) -> Kind:
    """Return the kind of the usable images: colour if one of them is, for grey can be shown in colour."""
    return "colour" if any(e.kind == "colour" for e, code in zip(entries, codes, strict=True) if not code) else "grey"


def nothing_usable(gathered: Gathered, root: Path, codes: Sequence[str] | None = None) -> str:
    """Return what to tell where no file can be used; `codes` in place of the own ones."""
    quarantine, ignored = gathered.counts(codes)
    reasons = ", ".join(f"{code} {n}" for code, n in sorted(quarantine.items())) or "none"
    return (
        f"{root}: no usable image (in quarantine: {reasons}; ignored: {ignored.total()})"
        " - expected PNG, JPEG, TIFF or DICOM files, and labels: a table, or one subfolder a class"
    )
