"""What an examination of a site's own data found: counts, closed words and keyed digests, to be shown on its screen.

Nothing here is sent. Names of labels are the hospital's own text and so are paths of files: whoever prints them
escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.image import CODES, IGNORED
from client.labels import WARNINGS as LABEL_WARNINGS

WARNINGS = {
    "no_validation": "no image is in validation, so rounds cannot be compared",
    "no_test": "no image is in test, so nothing can be measured here",
    "label_absent": "a split has no image of a label",
    "few_examples": "so few images of a label that figures about it mean little",
    "imbalanced": "one label is far rarer than another",
    "no_patient": "files without a PatientID: each is taken for a patient of its own",
    "placeholder_patients": "PatientIDs that are blank or stand for nobody",
    "patient_in_splits": "the given splits put a patient into two of them",
    "label_conflict": "images labelled in two ways",
    "rows_without_file": "rows of the label table that match no file",
    "files_without_label": "images that no row of the label table names",
    "burned_in": "images that say of themselves that text is burned into them",
    "confounding": "a label goes with a device, a view or a modality: a model may learn that instead",
    "near_duplicates": "images that are nearly the same",
    "mixed_modalities": "images of several modalities",
    "mixed_kinds": "grey images among colour images, or the reverse",
    "many_quarantined": "a large share of the files is in quarantine",
    "slow_decoding": "a transfer syntax that takes long to decode",
    "opted_out": "images of patients who were taken out",
    "mixed_intent": "images for presentation among images for processing",
    **LABEL_WARNINGS,
}
"""What one should know before a run: code -> meaning."""

Status = Literal["accepted", "quarantined", "ignored"]
Factor = Literal["device", "view", "modality"]
Counts = Mapping[str, int]


def _no_images() -> NDArray[np.uint8]:
    return np.zeros((0, 1, 1, 1), np.uint8)


@dataclass(frozen=True)
class Warned:
    """One thing that one should know before a run.

    Args:
        code: a key of `WARNINGS`.
        message: a sentence with its numbers; may name labels, never patients or files.
    """

    code: str
    message: str

    def __post_init__(self) -> None:
        if self.code not in WARNINGS:
            raise ValueError(f"code {self.code!r} is not in WARNINGS")


@dataclass(frozen=True)
class FileFinding:
    """What became of one file."""

    path: str  # below the images' folder, POSIX
    status: Status
    code: str = ""  # of CODES where quarantined, of IGNORED where ignored
    pixel_sha256: str = ""  # of the decoded stored values of frame 0


@dataclass(frozen=True)
class Findings:
    """All that an examination found."""

    site: str
    examples: Counts  # split -> images
    patients: int
    labels: Mapping[str, Counts]  # split -> label -> images
    quarantine: Counts  # code -> files
    ignored: Counts  # code -> files
    manifest_sha256: str  # names the data set
    preprocessing_id: str
    preset: str
    image_size: int  # S, pixels a side
    modalities: Counts = field(default_factory=dict)
    views: Counts = field(default_factory=dict)
    devices: Counts = field(default_factory=dict)
    transfer_syntaxes: Counts = field(default_factory=dict)
    months: tuple[int, int] | None = None  # YYYYMM of the first and the last study
    burned_in: Counts = field(default_factory=dict)  # yes, no, unknown -> images
    files_without_label: int = 0
    rows_without_file: int = 0
    rows: int = 0  # of the label table
    key: str = ""  # how rows and files were matched
    decode: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # transfer syntax -> files, seconds
    confounding: tuple[tuple[str, Factor, float, int], ...] = ()  # label, by, strength 0..1, images
    near_duplicates: int = 0
    duplicates: int = 0
    warnings: tuple[Warned, ...] = ()
    seconds: float = 0.0
    from_cache: int = 0  # files that were not read again
    sheet: NDArray[np.uint8] = field(default_factory=_no_images, compare=False)  # (m, C, S, S), m <= 24
    sheet_labels: tuple[str, ...] = ()
    files: tuple[FileFinding, ...] = ()
    stop: str = ""  # why the data may not be used as they are; empty: they may

    def __post_init__(self) -> None:
        for codes, known, name in ((self.quarantine, CODES, "CODES"), (self.ignored, IGNORED, "IGNORED")):
            for code in codes:
                if code not in known:
                    raise ValueError(f"code {code!r} is not in {name}")
