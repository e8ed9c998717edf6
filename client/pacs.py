"""Studies of an explicit list, from the hospital's PACS into a folder of the site.

Nothing is crawled: without a list nothing is pulled. Files are named by keyed digests, never by a UID, so neither a
folder listing nor a message tells whose images these are. What is here stays here: a pull that was killed goes on
where it stopped, and a finished entry of the list is never asked for again. Whoever expects new images in old studies
removes `finished.jsonl`; only images that are not here yet are then fetched.

The folder: `<study>/<instance>.dcm`, `finished.jsonl` (a line for each entry of the list whose images are all here).
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from client.identity import Identity
from client.pacs_answers import Failed, Gone, Missing, Rejected
from client.pacs_config import DicomWeb, read_credentials
from client.study_list import Wanted, is_uid, studies_in
from common.errors import ConsiliumError

if TYPE_CHECKING:
    from client.dicomweb import Server

FINISHED = "finished.jsonl"

Progress = Callable[[int, int], None]
"""Called with the number of entries of the list done and of entries in all."""


@dataclass(frozen=True)
class Pulled:
    """What came of a pull."""

    studies: int  # of the list that the server has, and of which at least one image is here
    instances: int  # files fetched by this pull
    already: int  # files that were here before
    not_found: int  # entries of the list for which the server has no image
    failed: int  # instances, and searches, without a usable answer after all retries; the next pull tries them again
    rejected: int  # instances that are no DICOM file or too large
    seconds: float
    bytes: int  # of the files fetched


def pull(config: DicomWeb, base: Path, folder: Path, identity: Identity, progress: Progress | None = None) -> Pulled:
    """Fetch every image of the listed studies that is not here yet, in the transfer syntax in which it is stored.

    Args:
        config: `[data.dicomweb]`.
        base: the folder of `site.toml`, from which relative paths are seen.
        folder: where the files go; made if need be, closed to all but the owner.
        identity: makes the names of files.
        progress: told how far it is.

    Raises:
        DataError: the list cannot be used.
        ConfigError: credentials or certificate cannot be used.
        ConsiliumError: the extra `pacs` is not installed, another pull is at work, the server refuses or is gone, or
            the folder cannot be written.
    """
    began = time.monotonic()
    wanted = studies_in(base / config.studies)
    credentials = read_credentials(base / config.credentials) if config.credentials else None
    certificate = base / config.ca_certificate if config.ca_certificate else None
    web = _dicomweb()
    try:
        with _alone(folder), web.discreet(), closing(web.Server(config, credentials, certificate)) as server:
            job = _Pull(server, folder, identity)
            job.run(wanted, progress or _no_progress)
    except Gone:
        raise ConsiliumError(
            f"{config.url}: no answer to {web.GONE_AFTER} requests in a row, with {config.retries} retries each;"
            f" {_on_disk(folder)} - check network, url and proxy of [data.dicomweb] if it never answered"
        ) from None
    except OSError as error:
        raise ConsiliumError(f"{folder}: cannot be written ({error.strerror}); {_on_disk(folder)}") from None
    return job.result(time.monotonic() - began)


def _dicomweb() -> ModuleType:
    try:
        from client import dicomweb
    except ModuleNotFoundError:
        raise ConsiliumError("a pull from a PACS needs dicomweb-client - pip install 'consilium[pacs]'") from None
    return dicomweb


def _no_progress(done: int, total: int) -> None:
    """Nobody is listening."""


def _on_disk(folder: Path) -> str:
    files = sum(1 for _ in folder.glob("*/*.dcm"))
    return f"{files} files are here, and the same command goes on where this one stopped"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Own the folder: closed to others, no other pull in it, nothing half-written left of an earlier one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    with os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConsiliumError(f"{folder}: another pull is at work here - wait for it, or stop it") from None
        for rest in folder.glob("*/.*.part"):
            rest.unlink()
        yield


@dataclass(frozen=True)
class _Pull:
    server: Server
    folder: Path
    identity: Identity
    studies: dict[str, frozenset[str] | None] = field(default_factory=dict)  # done here -> names; None: incomplete
    tally: Counter[str] = field(default_factory=Counter)

    def run(self, wanted: tuple[Wanted, ...], progress: Progress) -> None:
        """Fetch what the entries of a list ask for."""
        finished = _read_finished(self.folder / FINISHED)
        for done, entry in enumerate(wanted):
            progress(done, len(wanted))
            key = self.identity.key(entry.kind, entry.value).hex()
            if not self._is_here(finished.get(key)):
                self._entry(key, entry)
        progress(len(wanted), len(wanted))

    def result(self, seconds: float) -> Pulled:
        """Return the tally."""
        counts = {name: self.tally[name] for name in ("instances", "already", "not_found", "failed", "rejected")}
        held = sum(1 for study in self.studies if any((self.folder / study).glob("*.dcm")))
        return Pulled(studies=held, **counts, seconds=seconds, bytes=self.tally["bytes"])

    def _is_here(self, studies: dict[str, list[str]] | None) -> bool:
        """Return whether all images of a finished entry still lie here, and count them."""
        paths = [self.folder / study / name for study, names in (studies or {}).items() for name in names]
        if not studies or not all(path.is_file() for path in paths):
            return False
        for study, names in studies.items():
            if study not in self.studies:
                self.studies[study] = frozenset(names)
                self.tally["already"] += len(names)
        return True

    def _entry(self, key: str, entry: Wanted) -> None:
        try:
            uids = [entry.value] if entry.kind == "StudyInstanceUID" else self.server.studies(entry.value)
        except Missing:
            uids = []
        except Failed:
            self.tally["failed"] += 1
            return
        got = {self._name("StudyInstanceUID", uid): self._study(uid) for uid in uids}
        if all(names is not None and not names for names in got.values()):
            self.tally["not_found"] += 1
            return
        complete = {study: sorted(names) for study, names in got.items() if names}
        if None not in got.values():
            _settle(self.folder / study for study in complete)
            _append(self.folder / FINISHED, {"entry": key, "studies": complete})

    def _study(self, uid: str) -> frozenset[str] | None:
        """Fetch a study and return the names of its files, or None if some could not be had."""
        study = self._name("StudyInstanceUID", uid)
        if study not in self.studies:
            self.studies[study] = self._fetch_study(uid, study)
        return self.studies[study]

    def _fetch_study(self, uid: str, study: str) -> frozenset[str] | None:
        try:
            instances = self._instances(uid)
        except Failed:
            self.tally["failed"] += 1
            return None
        outcomes = {name: self._fetch(study, name, uids) for name, uids in instances.items()}
        self.tally.update(outcomes.values())
        return frozenset(instances) if {"instances", "already"}.issuperset(outcomes.values()) else None

    def _instances(self, study: str) -> dict[str, tuple[str, str, str]]:
        """Return the UIDs of every instance of a study by the name that its file has."""
        found: dict[str, tuple[str, str, str]] = {}
        for series in self._listed(self.server.series, study):
            for instance in self._listed(self.server.instances, study, series):
                found[f"{self._name('SOPInstanceUID', instance)}.dcm"] = (study, series, instance)
        return found

    def _listed(self, search: Callable[..., list[str]], *uids: str) -> list[str]:
        try:
            found = search(*uids)
        except Missing:
            return []
        if not all(is_uid(uid) for uid in (*uids, *found)):  # it would become part of an address
            raise Failed
        return found

    def _fetch(self, study: str, name: str, uids: tuple[str, str, str]) -> str:
        """Fetch one instance unless it is here, and return what it counts as."""
        path = self.folder / study / name
        if path.is_file():
            return "already"
        try:
            self.tally["bytes"] += self.server.retrieve(*uids, partial(_save, path))
        except (Missing, Failed):
            return "failed"
        except Rejected:
            return "rejected"
        return "instances"

    def _name(self, kind: str, uid: str) -> str:
        return self.identity.key(kind, uid).hex()


def _save(path: Path, chunks: Iterator[bytes]) -> int:
    """Write a file under a passing name, then give it its own; return its bytes."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)  # mode 600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            size = sum(file.write(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


def _settle(folders: Iterable[Path]) -> None:
    """Return once the names of files in these folders are on the disk."""
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _append(path: Path, value: dict[str, object]) -> None:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        file.write(b"\n" + json.dumps(value).encode() + b"\n")  # the first ends a line that a kill cut off
        file.flush()
        os.fsync(file.fileno())


def _read_finished(path: Path) -> dict[str, dict[str, list[str]]]:
    """Return the files of each finished entry by study; a line that is cut off counts as not written."""
    finished: dict[str, dict[str, list[str]]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            value = json.loads(line)
            finished[value["entry"]] = value["studies"]
        except (ValueError, TypeError, KeyError):
            continue
    return finished
