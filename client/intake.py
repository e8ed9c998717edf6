"""A site's own data: from `site.toml` to a cohort that can be trained on, and to all that the site should know of it.

Every outcome is decided here once: what is used, in which split, what is left out and why. `examine` tells it, `cohort`
uses it, so what a hospital saw is what a federation gets.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client import erasure, splitting
from client.catalogue import Catalogue
from client.cautions import cautions
from client.cohort import SPLITS, Cohort
from client.confounding import NOTABLE, association
from client.decided import Intake
from client.erasure import Erased
from client.findings import FileFinding, Findings
from client.gathering import Folder, Gathered, gather, nothing_usable
from client.identity import Identity
from client.image import IGNORED
from client.optout import optout
from client.records import Entry
from client.secret import read_secret
from client.site_config import SiteConfig
from common.errors import DataError

Progress = Callable[[str, int, int], None]

SHEET = 24
"""Images of a contact sheet."""

STOP_SHARE = 0.1
"""Share of placeholder PatientIDs among otherwise usable images from which a site must decide what they mean."""


def take_in(config: SiteConfig, progress: Progress) -> Intake:
    """Read and decide a site's data.

    Raises:
        ConfigError: the secret is missing or can be read by others.
        DataError: images or labels cannot be taken at their word.
        CacheError: the cache cannot be written.
    """
    identity, opted_out = Identity(read_secret(config.secret)), optout(config)
    if opted_out:
        erasure.erase(config.cache, opted_out)  # what a forgetting that was cut short has left
    catalogue = _catalogue(config, identity, opted_out)
    folder = Folder(config.images, config.labels, config.rules)
    gathered = gather(folder, catalogue, identity, opted_out, lambda done, total: progress("images", done, total))
    _take_out(config, gathered, catalogue)
    return _decided(config, gathered, catalogue, identity)


def _catalogue(config: SiteConfig, identity: Identity, opted_out: frozenset[bytes]) -> Catalogue:
    workers = config.toml.compute.threads
    return Catalogue(config.cache, identity, config.preset, config.image_size, workers, opted_out)


def _take_out(config: SiteConfig, gathered: Gathered, catalogue: Catalogue) -> Erased:
    """Delete what is kept of images whose patients only the label table names."""
    if not gathered.excluded:
        return Erased(0, 0, 0)
    paths = [config.images / gathered.found.paths[place] for place in gathered.excluded]
    gone = erasure.erase(config.cache, files=set(map(bytes, catalogue.keys(paths))))
    catalogue.exclude(paths, list(gathered.excluded.values()))
    return gone


def _decided(config: SiteConfig, gathered: Gathered, catalogue: Catalogue, identity: Identity) -> Intake:
    codes = list(gathered.codes)
    for place in gathered.usable[gathered.nobody[gathered.usable]].tolist():
        codes[place] = "placeholder_patient"
    places = np.flatnonzero([not code for code in codes])
    patients = [gathered.patients[i] or identity.image(gathered.entries[i].digest) for i in places.tolist()]
    given = gathered.said(gathered.labelled.splits, places) if gathered.labelled and len(places) else []
    splits, moved = _splits(given, patients)
    entries = [gathered.entries[place] for place in places.tolist()]
    exact, near = _copies(entries, splits)
    for place in places[exact | near].tolist():
        codes[place] = "duplicate_in_other_split"
    kept = ~(exact | near)
    return Intake(
        config=config,
        gathered=gathered,
        catalogue=catalogue,
        codes=tuple(codes),
        places=places[kept],
        splits=splits[kept],
        patients=tuple(patient for patient, keep in zip(patients, kept.tolist(), strict=True) if keep),
        moved=moved,
        copies=len(entries) - len({entry.digest for entry in entries}),
        near=int((near & ~exact).sum()),
        stop=_stop(config, gathered, codes, len(places)),
    )


def _splits(given: Sequence[str | None], patients: Sequence[bytes]) -> tuple[NDArray[np.int8], int]:
    """Return the split of each example and how many patients the given ones had to be moved for."""
    if not given or None in given:
        return splitting.by_patient(patients), 0
    named = np.array([SPLITS.index(str(split)) for split in given], np.int8)
    numbers = splitting.number(patients)
    whole = splitting.together(named, numbers)
    return whole, len(np.unique(numbers[whole != named]))


def _copies(entries: Sequence[Entry], splits: NDArray[np.int8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which examples have an exact copy, and which a near one, in a split of precedence."""
    if not entries:
        return np.zeros(0, bool), np.zeros(0, bool)
    digests, pixels = (
        np.frombuffer(b"".join(getattr(entry, name) for entry in entries), np.uint8).reshape(-1, 32)
        for name in ("digest", "pixel_sha256")
    )
    hashes = np.array([entry.dhash for entry in entries], np.uint64)
    thumbs = np.frombuffer(b"".join(entry.thumb for entry in entries), np.uint8).reshape(len(entries), -1)
    return splitting.straddling(splits, digests, pixels), splitting.nearly_straddling(splits, hashes, thumbs)


def _stop(config: SiteConfig, gathered: Gathered, codes: Sequence[str], usable: int) -> str:
    """Return why the data may not be used as they are."""
    nobody = sum(code == "placeholder_patient" for code in codes)
    wait = config.toml.data.placeholder_patients == "stop"
    if nobody and (not usable or (wait and nobody >= STOP_SHARE * (usable + nobody))):
        other = ', or leave these images out ([data] placeholder_patients = "quarantine")' if usable else ""
        return (
            f"{nobody} of {usable + nobody} images have a PatientID that is blank or stands for nobody (such as ANON)."
            " Taken at their word they would be one patient, and patients decide the splits. Name the column of the"
            f" label table that tells patients apart ([data] patient){other}"
        )
    return "" if usable else nothing_usable(gathered, config.images, codes)


def cohort(config: SiteConfig, progress: Progress) -> Cohort:
    """Return the site's examples.

    Raises:
        DataError: there are none, or the data may not be used as they are.
    """
    return cohort_of(take_in(config, progress))


def cohort_of(intake: Intake) -> Cohort:
    """Return the examples of decided data.

    Raises:
        DataError: the data may not be used as they are.
    """
    if intake.stop:
        raise DataError(intake.stop)
    gathered, places = intake.gathered, intake.places
    assert gathered.labelled is not None  # noqa: S101  there are usable files
    digests = gathered.digests(places)
    return Cohort(
        source=intake.catalogue.source(gathered.kind),
        rows=intake.catalogue.rows(gathered.entries_of(places)),
        digests=digests,
        labels=gathered.labels(places),
        splits=intake.splits,
        patients=splitting.number(intake.patients),
        label_names=gathered.labelled.label_names,
        preprocessing=intake.catalogue.preprocessing,
        quarantine=dict(gathered.counts(intake.codes)[0]),
    )


def examine(config: SiteConfig, progress: Progress) -> Findings:
    """Return all that a site should know of its data before anything joins a federation.

    Raises:
        ConfigError: the secret is missing or can be read by others.
        DataError: images or labels cannot be taken at their word.
        CacheError: the cache cannot be written.
    """
    begin = time.monotonic()
    intake = take_in(config, progress)
    gathered = intake.gathered
    entries = [gathered.entries[place] for place in intake.places.tolist()]
    quarantine, ignored = gathered.counts(intake.codes)
    labelled = gathered.labelled
    present = _present(intake)
    sheet, titles = _sheet(intake, present)
    headers = [entry.header for entry in entries]
    months = [header.month for header in headers if header.month]
    confounded = _confounding(headers, present, _annotated(intake))
    return Findings(
        site=config.name,
        examples={split: int((intake.splits == n).sum()) for n, split in enumerate(SPLITS)},
        patients=len(set(intake.patients)),
        labels={
            split: {label: int(column[intake.splits == n].sum()) for label, column in present.items()}
            for n, split in enumerate(SPLITS)
        },
        quarantine=dict(sorted(quarantine.items())),
        ignored=dict(sorted(ignored.items())),
        manifest_sha256=manifest(intake),
        preprocessing_id=intake.catalogue.preprocessing,
        preset=config.toml.data.preset,
        image_size=config.image_size,
        modalities=_counted(header.modality for header in headers),
        views=_counted(header.view for header in headers),
        devices=_counted(_device(header.vendor, header.device) for header in headers),
        transfer_syntaxes=_counted(header.syntax for header in headers),
        months=(min(months), max(months)) if months else None,
        burned_in=_counted((header.burned_in or "unknown" for header in headers), ""),
        files_without_label=sum(code == "no_label" for code in intake.codes),
        rows_without_file=labelled.unmatched_rows if labelled else 0,
        rows=labelled.rows if labelled else 0,
        key=labelled.key if labelled else "",
        decode=_decode_speed(gathered.entries),
        confounding=tuple(item for item in confounded if item[2] >= NOTABLE),
        near_duplicates=intake.near,
        duplicates=intake.copies,
        warnings=cautions(intake, headers, present, confounded),
        seconds=time.monotonic() - begin,
        from_cache=gathered.from_cache,
        sheet=sheet,
        sheet_labels=titles,
        files=_files(intake),
        stop=intake.stop,
    )


def manifest(intake: Intake) -> str:
    """Return the SHA-256 that names the data set: every example's image, split, patient and labels, in no order.

    Names and places of files do not matter.
    """
    labels: Sequence[Any] = intake.gathered.labels(intake.places).tolist() if len(intake.places) else ()
    names = intake.gathered.labelled.label_names if intake.gathered.labelled else ()
    lines = sorted(
        f"{intake.gathered.entries[place].digest.hex()} {split} {patient.hex()} {label}"
        for place, split, patient, label in zip(
            intake.places.tolist(), intake.splits.tolist(), intake.patients, labels, strict=True
        )
    )
    return hashlib.sha256("\n".join([repr(names), *lines]).encode()).hexdigest()


def _present(intake: Intake) -> Mapping[str, NDArray[np.bool_]]:
    """Return, by label, which examples have it."""
    labelled = intake.gathered.labelled
    if labelled is None or not len(intake.places):
        return {}
    labels = intake.gathered.labels(intake.places)
    if labels.ndim == 1:
        return {name: labels == n for n, name in enumerate(labelled.label_names)}
    return {name: labels[:, n] == 1 for n, name in enumerate(labelled.label_names)}


def _annotated(intake: Intake) -> Mapping[str, NDArray[np.bool_]]:
    """Return, by label, of which examples it is known."""
    labelled = intake.gathered.labelled
    if labelled is None or not len(intake.places):
        return {}
    labels = intake.gathered.labels(intake.places)
    known = np.ones((len(labels), len(labelled.label_names)), bool) if labels.ndim == 1 else ~np.isnan(labels)
    return dict(zip(labelled.label_names, known.T, strict=True))


def _counted(words: Iterable[str], blank: str = "none given") -> dict[str, int]:
    return dict(sorted(Counter(word or blank for word in words).items(), key=lambda item: (-item[1], item[0])))


def _device(vendor: str, device: bytes) -> str:
    """Return a name for a device that tells it from others and names nobody."""
    return f"{vendor or 'unknown maker'} {device.hex()[:4]}" if device else ""


def _decode_speed(entries: Sequence[Entry]) -> dict[str, tuple[int, float]]:
    """Return files and seconds by transfer syntax, of the files that gave an image."""
    found: dict[str, tuple[int, float]] = {}
    for entry in entries:
        if not entry.code:
            files, seconds = found.get(entry.header.syntax, (0, 0.0))
            found[entry.header.syntax] = (files + 1, seconds + entry.seconds)
    return dict(sorted(found.items()))


def _confounding(
    headers: Sequence[Any], present: Mapping[str, NDArray[np.bool_]], annotated: Mapping[str, NDArray[np.bool_]]
) -> list[tuple[str, Any, float, int]]:
    """Return label, factor, strength and images of every association that can be told, the strongest first."""
    factors = {
        "device": [header.device for header in headers],
        "view": [header.view for header in headers],
        "modality": [header.modality for header in headers],
    }
    found: list[tuple[str, Any, float, int]] = []
    for factor, values in factors.items():
        levels = np.unique(np.array([str(value) for value in values]), return_inverse=True)[1]
        for label, column in present.items():
            strength = association(column[annotated[label]], levels[annotated[label]])
            if strength is not None:
                found.append((label, factor, strength, int(annotated[label].sum())))
    return sorted(found, key=lambda item: -item[2])


def _sheet(intake: Intake, present: Mapping[str, NDArray[np.bool_]]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return up to `SHEET` preprocessed images, taken from the labels in turn, and their labels."""
    size = intake.config.image_size
    if not present:
        return np.zeros((0, 1, size, size), np.uint8), ()
    digests = intake.gathered.digests(intake.places)
    order = np.lexsort(digests.T[::-1])  # by digest: any sample does, as long as it is the same the next time
    queues = [[place for place in order.tolist() if column[place]] for column in present.values()]
    queues.append([place for place in order.tolist() if not any(column[place] for column in present.values())])
    chosen: list[int] = []
    while len(chosen) < SHEET and any(queues):
        for queue in queues:
            place = next((place for place in queue if place not in chosen), None)
            queue[:] = [] if place is None else queue[queue.index(place) + 1 :]
            if place is not None and len(chosen) < SHEET:
                chosen.append(place)
    entries = intake.gathered.entries_of(intake.places[chosen])
    images = intake.catalogue.source(intake.gathered.kind)(intake.catalogue.rows(entries))
    titles = tuple(", ".join(name for name, column in present.items() if column[place]) for place in chosen)
    return images, titles


def _files(intake: Intake) -> tuple[FileFinding, ...]:
    """Return what became of every file below the folder."""
    found = intake.gathered.found
    findings = [FileFinding(path, "ignored", code) for path, code in found.ignored.items()]
    findings += [FileFinding(path, "quarantined", code) for path, code in found.quarantine.items()]
    for path, entry, code in zip(found.paths, intake.gathered.entries, intake.codes, strict=True):
        status: Any = "accepted" if not code else "ignored" if code in IGNORED else "quarantined"
        pixels = entry.pixel_sha256.hex() if any(entry.pixel_sha256) else ""
        findings.append(FileFinding(path, status, code, pixels))
    return tuple(sorted(findings, key=lambda finding: finding.path))


def forget(config: SiteConfig, persons: set[bytes]) -> Erased:
    """Delete what is kept of the images of these persons, whatever preprocessing or trunk it was made for.

    What is kept of files that are changed or gone goes as well, for it could be theirs; and so does everything if the
    label table, which may name them, cannot be taken at its word. All of it can be made again.

    Args:
        config: the site; the persons are on its opt-out list already.
        persons: digests of `Identity.person`.

    Raises:
        CacheError: the cache cannot be written.
    """
    gone = erasure.erase(config.cache, persons)
    identity = Identity(read_secret(config.secret))
    catalogue = _catalogue(config, identity, frozenset(persons))
    folder = Folder(config.images, config.labels, config.rules)
    try:
        gathered = gather(folder, catalogue, identity, frozenset(persons), unread=False)
    except DataError:
        return gone + erasure.erase(config.cache, present=set())
    gone += _take_out(config, gathered, catalogue)
    paths = [config.images / path for path in gathered.found.paths]
    return gone + erasure.erase(config.cache, present=set(map(bytes, catalogue.keys(paths))))
