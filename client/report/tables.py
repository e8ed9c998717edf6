"""What the terminal and the page both show of the findings, as rows of texts; each escapes them in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from client.findings import WARNINGS, Counts, Findings
from client.image import CODES, IGNORED
from client.remedies import REMEDIES
from client.report.wording import DASH, duration, encodable, grouped, month, percent, plural, rate

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Left:
    """Files left out for one reason."""

    code: str
    n: int
    meaning: str
    remedy: str


def splits(found: Findings) -> tuple[str, ...]:
    """Return the splits, in the order in which they are used."""
    others = sorted((set(found.examples) | set(found.labels)) - set(SPLITS))
    return (*SPLITS, *others)


def labels(found: Findings) -> list[tuple[str, list[int], int]]:
    """Return each label with its images by split, and in all; in the order of the cohort."""
    names = dict.fromkeys(name for counts in found.labels.values() for name in counts)
    rows = []
    for name in names:
        counts = [found.labels.get(split, {}).get(name, 0) for split in splits(found)]
        rows.append((name, counts, sum(counts)))
    return rows


def totals(found: Findings) -> tuple[list[int], int]:
    """Return the images by split, and in all."""
    counts = [found.examples.get(split, 0) for split in splits(found)]
    return counts, sum(counts)


def quarantine(found: Findings) -> list[Left]:
    """Return why files are in quarantine, the most frequent reason first."""
    return _left(found.quarantine, CODES)


def ignored(found: Findings) -> list[Left]:
    """Return why files were passed over, the most frequent reason first."""
    return _left(found.ignored, IGNORED)


def kinds(found: Findings) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what the images are: a title, and rows of a word and its count."""
    groups = [("Modality", found.modalities), ("View", found.views), ("Device", found.devices)]
    shown = [(title, [(name or DASH, grouped(n)) for name, n in ranked(counts)]) for title, counts in groups]
    return [(title, rows) for title, rows in shown if rows]


def syntaxes(found: Findings) -> list[tuple[str, str, str]]:
    """Return each transfer syntax with its images and the speed of its decoder."""
    names = dict.fromkeys([*(name for name, _ in ranked(found.transfer_syntaxes)), *found.decode])
    return [
        (name or DASH, grouped(found.transfer_syntaxes.get(name, 0)), rate(*found.decode.get(name, (0, 0.0))))
        for name in names
    ]


def facts(found: Findings) -> list[tuple[str, str]]:
    """Return the single figures."""
    first, last = (month(number) for number in found.months) if found.months else (DASH, DASH)
    burned = ", ".join(f"{word} {grouped(n)}" for word, n in found.burned_in.items()) or DASH
    return [
        ("Patients", grouped(found.patients)),
        ("Studies from", first if first == last else f"{first} to {last}"),
        ("Text burned in", burned),
        ("Copies of an image", grouped(found.duplicates)),
        ("Nearly the same image", grouped(found.near_duplicates)),
        ("Preset", f"{found.preset}, {found.image_size} pixels a side"),
        ("Time", f"{duration(found.seconds)}, {plural(found.from_cache, 'file')} known from before"),
    ]


def matching(found: Findings) -> list[tuple[str, str]]:
    """Return how files and rows of the label table found each other."""
    return [
        ("Matched by", found.key or DASH),
        ("Rows of the label table", grouped(found.rows)),
        ("Rows without a file", grouped(found.rows_without_file)),
        ("Files without a label", grouped(found.files_without_label)),
    ]


def confounding(found: Findings) -> list[tuple[str, str, str, str]]:
    """Return each label that something else tells, the strongest first."""
    ordered = sorted(found.confounding, key=lambda row: -row[2])
    return [(label, by, percent(strength), grouped(n)) for label, by, strength, n in ordered]


def warnings(found: Findings) -> list[tuple[str, str]]:
    """Return code and sentence of each warning."""
    return [(warned.code, warned.message or WARNINGS[warned.code]) for warned in found.warnings]


def identity(found: Findings) -> list[tuple[str, str]]:
    """Return what names the data set and its preprocessing."""
    return [("manifest_sha256", found.manifest_sha256), ("preprocessing_id", found.preprocessing_id)]


def files(found: Findings) -> list[tuple[str, str, str]]:
    """Return path, status and code of every file that is not accepted."""
    return [(encodable(file.path), file.status, file.code) for file in found.files if file.status != "accepted"]


def ranked(counts: Counts) -> list[tuple[str, int]]:
    """Return counts, the largest first, equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _left(counts: Counts, meanings: Mapping[str, str]) -> list[Left]:
    return [Left(code, n, meanings[code], REMEDIES[code]) for code, n in ranked(counts) if n]
