"""What a site should know of its data before a run, each with its numbers: from decided data to `findings.Warned`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from client.cohort import SPLITS
from client.confounding import NOTABLE, STRONG
from client.decided import Intake
from client.findings import Factor, Warned
from client.image import Header
from client.vocabulary import PICTURE_FORMATS

FEW = 10
RARE = 20.0
"""Times as many images of one label as of another from which that is said."""

MANY = 0.2
"""Share of files in quarantine from which that is said."""

SLOW_S = 1.0
"""Seconds a file from which a transfer syntax is called slow."""

_OFTEN_WITH_TEXT = frozenset({"US", "XC", "ES", "OT", "SC", "OP"})

Confounded = Sequence[tuple[str, Factor, float, int]]
Present = Mapping[str, NDArray[np.bool_]]


def cautions(intake: Intake, headers: Sequence[Header], present: Present, confounded: Confounded) -> tuple[Warned, ...]:
    """Return everything that should be known, the gravest first.

    Args:
        intake: the decided data.
        headers: of the examples.
        present: label -> which examples have it.
        confounded: label, factor, strength, images.
    """
    found = [
        *_patients(intake),
        *_splits(intake, present),
        *_labels(intake, present),
        *_images(intake, headers),
        *_shortcuts(confounded, len(headers)),
    ]
    return tuple(Warned(code, message) for code, message in found)


Said = Iterator[tuple[str, str]]


def _patients(intake: Intake) -> Said:
    codes = Counter(intake.codes)
    nobody, out = codes["placeholder_patient"], codes["opted_out"]
    if nobody:
        yield "placeholder_patients", f"{nobody} images have a PatientID that is blank or stands for nobody: left out"
    unknown = sum(not intake.gathered.patients[place] for place in intake.places.tolist())
    if unknown:
        message = f"{unknown} images name no patient, so each is taken for a patient of its own"
        yield "no_patient", f"{message}; name a column that tells patients apart ([data] patient)"
    if out:
        yield "opted_out", f"{out} images belong to patients who were taken out"
    if intake.moved:
        message = f"the given splits put {intake.moved} patients into several; all their images went to the one"
        yield "patient_in_splits", f"{message} that has precedence (test, then validation)"


def _splits(intake: Intake, present: Present) -> Said:
    for code, split in (("no_validation", "validation"), ("no_test", "test")):
        if len(intake.places) and not (intake.splits == SPLITS.index(split)).any():
            yield code, f"no image is in {split}"
    for number, split in enumerate(SPLITS):
        absent = [label for label, column in present.items() if not column[intake.splits == number].any()]
        if absent and (intake.splits == number).any():
            yield "label_absent", f"no image in {split} has {', '.join(map(repr, absent))}"
    if intake.near:
        yield "near_duplicates", f"{intake.near} images nearly equal one of another patient and split: left out"


def _labels(intake: Intake, present: Present) -> Said:
    codes, labelled = Counter(intake.codes), intake.gathered.labelled
    if codes["label_conflict"]:
        yield "label_conflict", f"{codes['label_conflict']} images are labelled in two ways: left out"
    if codes["no_label"]:
        yield "files_without_label", f"{codes['no_label']} images have no label"
    if labelled and labelled.unmatched_rows:
        yield "rows_without_file", f"{labelled.unmatched_rows} of {labelled.rows} rows of the label table match no file"
    counts = {label: int(column.sum()) for label, column in present.items()}
    few = [f"{label!r} ({n})" for label, n in counts.items() if 0 < n < FEW]
    if few:
        yield "few_examples", f"few images of {', '.join(few)}: figures about them mean little"
    known = {label: n for label, n in counts.items() if n}
    if len(known) > 1 and max(known.values()) >= RARE * min(known.values()):
        most, least = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
        yield "imbalanced", f"{known[most]} images of {most!r}, {known[least]} of {least!r}"
    yield from labelled.warnings if labelled else ()


def _images(intake: Intake, headers: Sequence[Header]) -> Said:
    quarantine = intake.gathered.counts(intake.codes)[0].total()
    files = quarantine + len(headers)
    if files and quarantine >= MANY * files:
        yield "many_quarantined", f"{quarantine} of {files} files are in quarantine"
    kinds = Counter(entry.kind for entry in intake.gathered.entries_of(intake.places))
    if len(kinds) > 1:
        message = f"{kinds['grey']} grey and {kinds['colour']} colour images together: what tells them apart is easily"
        yield "mixed_kinds", f"{message} learnt in place of the disease; a preset can turn all into one kind"
    modalities = sorted({header.modality for header in headers if header.modality})
    if len(modalities) > 1:
        yield "mixed_modalities", f"images of {len(modalities)} modalities: {', '.join(modalities)}"
    if len({header.intent for header in headers} - {""}) > 1:
        message = 'images "for presentation" and "for processing" differ in contrast; keep one kind'
        yield "mixed_intent", message
    yield from _text(headers)
    yield from _slow(intake)


def _text(headers: Sequence[Header]) -> Said:
    burnt = sum(header.burned_in == "yes" for header in headers)
    if burnt:
        yield "burned_in", f"{burnt} images say that text is burned into them: it may name the patient, or the label"
    unknown = sum(
        header.burned_in == "" and (header.modality in _OFTEN_WITH_TEXT or header.syntax in PICTURE_FORMATS)
        for header in headers
    )
    if unknown:
        message = f"{unknown} images are of a kind that often has text burned in, and do not say whether they do"
        yield "burned_in", f"{message}; look at the contact sheet"


def _slow(intake: Intake) -> Said:
    spent: dict[str, list[float]] = {}
    for entry in intake.gathered.entries:
        if not entry.code:
            spent.setdefault(entry.header.syntax, []).append(entry.seconds)
    for syntax, seconds in sorted(spent.items()):
        mean = sum(seconds) / len(seconds)
        if mean >= SLOW_S:
            yield "slow_decoding", f"{syntax}: {mean:.1f} s a file; it is decoded once"


def _shortcuts(confounded: Confounded, images: int) -> Said:
    for label, factor, strength, n in confounded:
        if strength >= NOTABLE:
            grade = "almost" if strength >= STRONG else "in part"
            message = f"{label!r} is {grade} told by the {factor} (strength {strength:.2f}, {n} of {images} images)"
            yield "confounding", f"{message}: a model may learn that instead"
