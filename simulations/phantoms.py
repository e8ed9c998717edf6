"""Synthetic hospitals that we draw ourselves: radiograph-like images as real DICOM files, for a first run offline.

A patient has an anatomy (thorax, lungs, heart, ribs, vessels) and one label; an image of that patient adds a pose,
an exposure and noise; a site adds its scanner (size, bits, window, tone curve, noise, polarity). Nobody was imaged.

Findings differ in size, side and place, so a model of raw pixels hardly sees them while one of shapes and textures
does. Area under the ROC curve, five sites, 128 px, 70/30 by patient, macro one against rest, best penalty of a few:

    model                                                               600 images       1200 images
                                                                        (seeds 0 to 4)   (seeds 0, 1)
    ridge on pooled stages 4-7 of EfficientNet-Lite0 (ImageNet)         0.935 to 0.945   0.949 to 0.952
    logistic regression on pixels                                       0.56 to 0.68     0.65 to 0.66
    the same, worst finding against normal                              0.79             0.74

These pictures show that the software works; they say nothing about radiographs of people.
"""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from common.errors import DataError, UsageError
from common.seeds import numpy_stream

VERSION = 1
"""Part of the name of the folder that callers choose; raise it when the drawings change."""

LABELS = ("normal", "nodule", "effusion", "consolidation")

CONCENTRATIONS = (5.0, 3.0, 3.0, 3.0)
"""Of the Dirichlet distribution that each site draws its frequencies of `LABELS` from."""

MIN_IMAGES_PER_SITE = 8

Plane = npt.NDArray[np.floating[Any]]
"""One map over the image, shape (Rows, Columns)."""


@dataclass(frozen=True)
class Scanner:
    """What one site's device does to every image.

    Window bounds are modality values (after RescaleSlope and RescaleIntercept) at which the display is black and white;
    noise is a standard deviation in display units, 0..1.
    """

    rows: int
    columns: int
    spacing_mm: float
    bits: int
    black: float
    white: float
    gamma: float
    noise: float
    modality: str = "DX"
    slope: float = 1.0
    intercept: float = 0.0
    inverted: bool = False


SCANNERS = (
    Scanner(256, 256, 1.40, bits=12, black=700, white=2900, gamma=1.0, noise=0.030),
    Scanner(320, 264, 1.20, bits=10, black=180, white=760, gamma=0.8, noise=0.040, modality="CR", inverted=True),
    Scanner(224, 224, 1.60, bits=8, black=35, white=210, gamma=1.15, noise=0.025),
    Scanner(192, 240, 1.75, bits=14, black=3200, white=11000, gamma=0.9, noise=0.050),
    Scanner(
        288,
        256,
        1.30,
        bits=16,
        black=-400,
        white=900,
        gamma=1.25,
        noise=0.035,
        modality="CR",
        slope=0.05,
        intercept=-1200,
    ),
)
"""Sites take these in turn. DX requires RescaleSlope 1 (Part 3, C.8.11.3), so the rescaled device is a CR."""


@dataclass(frozen=True)
class Patient:
    """One synthetic patient: where, who, what is to be seen, and how many images."""

    site: int
    number: int
    label: str
    images: int


@dataclass(frozen=True)
class Scope:
    """What names one file."""

    seed: int
    site: str
    patient: str
    image: int


@dataclass(frozen=True)
class Anatomy:
    """Lengths of one thorax; half the shorter image side is 1, u points right and v down, 0 is the middle."""

    torso: float
    lung_width: float
    lung_height: float
    lung_offset: float
    diaphragm: tuple[float, float]
    dome: float
    heart_width: float
    heart_height: float
    heart_offset: float
    mediastinum: float
    rib_spacing: float
    rib_phase: float
    rib_tilt: float
    rib_contrast: float
    vessel_contrast: float
    air: float


@dataclass(frozen=True)
class View:
    """The patient's coordinates at each pixel under one pose, and along the image's axes (without its rotation)."""

    u: Plane
    v: Plane
    columns: Plane
    rows: Plane


def write(folder: Path, sites: int, images: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Write `images` DICOM files of `sites` hospitals below `folder`, and `manifest.csv` (path, label, patient, site).

    The folder appears complete or not at all, and one that is already there is kept. Equal arguments give equal bytes.

    Args:
        folder: absent, empty, or written by an earlier call with the same arguments.
        sites: number of hospitals, at least 1; they differ in size, scanner and frequency of labels.
        images: total number of files, at least 8 a site.
        seed: the run's seed.
        progress: called with the number of files written so far.

    Raises:
        UsageError: too few sites or images.
        DataError: `folder` holds something else.
    """
    if sites < 1 or images < MIN_IMAGES_PER_SITE * sites:
        expected = f"at least 1 site and {MIN_IMAGES_PER_SITE} images a site"
        raise UsageError(f"phantoms: got {sites} sites and {images} images, expected {expected}")
    recipe = json.dumps({"version": VERSION, "sites": sites, "images": images, "seed": seed}) + "\n"
    if _is_complete(folder, recipe):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        _write_files(draft, sites, images, seed, progress)
        (draft / "phantoms.json").write_text(recipe)
        _publish(draft, folder, recipe)


def _is_complete(folder: Path, recipe: str) -> bool:
    """Whether an earlier call wrote this folder; anything else in its place is an error, for it is not ours."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = folder / "phantoms.json"
    if marker.is_file() and marker.read_text() == recipe:
        return True
    raise DataError(
        f"phantoms: expected {folder} to be absent, empty or drawn with the same sites, images, seed and version; "
        "it holds something else - remove it or choose another folder"
    )


def _publish(draft: Path, folder: Path, recipe: str) -> None:
    """Rename the draft; when another process was faster, its folder is as good as ours."""
    try:
        draft.rename(folder)
    except OSError:
        if not _is_complete(folder, recipe):
            raise


def _write_files(folder: Path, sites: int, images: int, seed: int, progress: Callable[[int], None] | None) -> None:
    rows = []
    for number, patients in enumerate(_plan(sites, images, seed), start=1):
        site = f"site-{number:0{len(str(sites))}d}"
        scanner = SCANNERS[(number - 1) % len(SCANNERS)]
        (folder / site).mkdir()
        for patient, image in ((one, image) for one in patients for image in range(one.images)):
            scope = Scope(seed, site, f"{site.replace('site-', 'PH')}-{patient.number:05d}", image)
            path = f"{site}/{scope.patient}-{image + 1}.dcm"
            stored, window = _expose(patient, image, scanner, seed)
            _dataset(stored, window, scanner, scope).save_as(folder / path, enforce_file_format=True)
            rows.append([path, patient.label, scope.patient, site])
            if progress is not None:
                progress(len(rows))
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["path", "label", "patient", "site"], *rows])


# Who is where -------------------------------------------------------------------------------------------------------


def _plan(sites: int, images: int, seed: int) -> list[list[Patient]]:
    """Patients of each site, redrawn until each label has at least 10 % of all images."""
    rng = numpy_stream(seed, "phantoms", VERSION, "plan")
    while True:
        plan = [_site_patients(site, size, rng) for site, size in enumerate(_sizes(sites, images, rng), start=1)]
        everyone = [patient for site in plan for patient in site]
        if min(_share(everyone, label) for label in LABELS) >= 0.1:
            return plan


def _sizes(sites: int, images: int, rng: np.random.Generator) -> list[int]:
    """Split `images` over sites; the largest site has about twice the images of the smallest."""
    weights = rng.permutation(np.linspace(1.0, 2.0, sites))
    spare = images - MIN_IMAGES_PER_SITE * sites
    bounds = np.floor(np.cumsum(weights) / weights.sum() * spare + 1e-9).astype(int)
    return [MIN_IMAGES_PER_SITE + int(size) for size in np.diff(bounds, prepend=0)]


def _site_patients(site: int, size: int, rng: np.random.Generator) -> list[Patient]:
    """Patients of one site, redrawn until a quarter to a half of the images are normal.

    Otherwise a site's scanner alone would give its labels away.
    """
    while True:
        patients = _admit(site, size, rng.dirichlet(CONCENTRATIONS), rng)
        if 0.25 <= _share(patients, "normal") <= 0.5:
            return patients


def _admit(site: int, size: int, frequencies: npt.NDArray[np.float64], rng: np.random.Generator) -> list[Patient]:
    """Fill a site with patients of one to three images; three in ten have more than one."""
    patients: list[Patient] = []
    left = size
    while left:
        images = min(left, int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])))
        label = LABELS[int(rng.choice(len(LABELS), p=frequencies))]
        patients.append(Patient(site, len(patients) + 1, label, images))
        left -= images
    return patients


def _share(patients: list[Patient], label: str) -> float:
    """Share of the images that carry `label`."""
    return sum(p.images for p in patients if p.label == label) / sum(p.images for p in patients)


# What is drawn ------------------------------------------------------------------------------------------------------


def _anatomy(rng: np.random.Generator) -> Anatomy:
    draw = rng.uniform
    level = draw(0.22, 0.52)
    return Anatomy(
        torso=draw(0.80, 0.95),
        lung_width=draw(0.27, 0.36),
        lung_height=draw(0.66, 0.80),
        lung_offset=draw(0.38, 0.45),
        diaphragm=(level - draw(-0.05, 0.18), level + draw(-0.10, 0.05)),
        dome=draw(0.8, 2.2),
        heart_width=draw(0.20, 0.36),
        heart_height=draw(0.24, 0.36),
        heart_offset=draw(0.05, 0.17),
        mediastinum=draw(0.11, 0.18),
        rib_spacing=draw(0.15, 0.21),
        rib_phase=draw(0, 1),
        rib_tilt=draw(0.15, 0.55),
        rib_contrast=draw(0.05, 0.13),
        vessel_contrast=draw(0.05, 0.11),
        air=draw(0.42, 0.58),
    )


def _view(scanner: Scanner, rng: np.random.Generator) -> View:
    """Pose one image: shift, size and a few degrees of rotation."""
    half = min(scanner.rows, scanner.columns) / 2
    size = half * rng.uniform(0.86, 1.10)
    shift_u, shift_v = rng.uniform(-0.10, 0.10, size=2)
    angle = rng.normal(0, 0.05)
    columns = ((np.arange(scanner.columns) + 0.5 - scanner.columns / 2) / size - shift_u).astype(np.float32)
    rows = ((np.arange(scanner.rows) + 0.5 - scanner.rows / 2) / size - shift_v).astype(np.float32)
    cos, sin = math.cos(angle), math.sin(angle)
    u = cos * columns[None, :] + sin * rows[:, None]
    v = cos * rows[:, None] - sin * columns[None, :]
    return View(u, v, columns, rows)


def _soft(distance: Plane, edge: float) -> Plane:
    """Smooth step from 0 to 1 as `distance` goes from -edge to edge: t²(3 - 2t)."""
    t = distance * (0.5 / edge)
    t += 0.5
    np.clip(t, 0, 1, out=t)
    step: Plane = 3 - 2 * t
    step *= t
    step *= t
    return step


def _noise(view: View, cell: float, rng: np.random.Generator) -> Plane:
    """Smooth random field of about unit variance, with knots `cell` apart; it moves with the patient."""
    reach = 1.9  # beyond every image's corner at the smallest size
    knots = int(2 * reach / cell) + 4
    values = rng.standard_normal((knots, knots), dtype=np.float32)
    across = np.ascontiguousarray(_spline(values, (view.columns + reach) / cell).T)
    return _spline(across, (view.rows + reach) / cell)


def _spline(values: Plane, position: Plane) -> Plane:
    """Interpolate along the first axis by quadratic B-splines, scaled so that white noise keeps its variance.

    Three weighted rows and no matrix product: the same bytes for any number of threads.
    """
    first = np.floor(position).astype(np.intp)
    t = position - first - 0.5
    weights = np.stack([0.5 * (0.5 - t) ** 2, 0.75 - t**2, 0.5 * (0.5 + t) ** 2])
    weights /= np.sqrt((weights**2).sum(axis=0))
    before, at, after = (weight[:, None] * values[first + k] for k, weight in enumerate(weights))
    smooth: Plane = before + at + after
    return smooth


def _ridges(field: Plane, width: float) -> Plane:
    """Bright lines where a random field crosses zero: a cheap tree of branching vessels."""
    bright: Plane = np.exp(-((field / width) ** 2))
    return bright


def _lung(view: View, body: Anatomy, side: int) -> tuple[Plane, Plane]:
    """Return how far each pixel lies inside the cavity of one lung, and above its diaphragm (both in lengths)."""
    x = (side * view.u - body.lung_offset) / body.lung_width
    y = (view.v + 0.02) / body.lung_height
    narrowing = 1 + 0.35 * np.clip(-y, 0, 1) ** 2  # the apex is narrower than the base
    cavity = (1 - np.sqrt((x * narrowing) ** 2 + (y * y) ** 2)) * body.lung_width
    level = body.diaphragm[(side + 1) // 2]
    above = level + body.dome * (side * view.u - body.lung_offset + 0.06) ** 2 - view.v
    return cavity, above


def _nodule(view: View, body: Anatomy, side: int, rng: np.random.Generator) -> Plane:
    """Two to four soft round spots inside the lungs."""
    opacity: Plane = np.zeros_like(view.u)
    for number in range(int(rng.integers(2, 5))):
        radius = rng.uniform(0.065, 0.115)
        where = side if number % 2 == 0 else -side
        u = where * (body.lung_offset + rng.uniform(-0.6, 0.6) * body.lung_width)
        v = rng.uniform(-0.45, body.diaphragm[(where + 1) // 2] - 0.12)
        stretch = rng.uniform(0.85, 1.18)
        r = np.sqrt(((view.u - u) * stretch) ** 2 + ((view.v - v) / stretch) ** 2)
        opacity = np.maximum(opacity, rng.uniform(0.7, 0.95) * _soft(radius - r, 0.03))
    return opacity


def _effusion(view: View, body: Anatomy, side: int, rng: np.random.Generator) -> Plane:
    """Fluid at the base of one lung: it hides the dome, and its surface climbs towards the chest wall."""
    level = body.diaphragm[(side + 1) // 2] - rng.uniform(-0.03, 0.16)
    x = side * view.u - body.lung_offset + body.lung_width
    surface = level + 0.10 - rng.uniform(0.4, 0.9) * np.clip(x, 0, None) ** 2
    return _soft(view.v - surface, 0.04) * _soft(side * view.u, 0.02)


def _consolidation(view: View, body: Anatomy, side: int, rng: np.random.Generator) -> Plane:
    """A cloudy patch with ragged edges and dark branching airways in it."""
    u = side * (body.lung_offset + rng.uniform(-0.4, 0.4) * body.lung_width)
    v = rng.uniform(-0.40, body.diaphragm[(side + 1) // 2] - 0.05)
    radius = rng.uniform(0.26, 0.42)
    r = np.sqrt((view.u - u) ** 2 + ((view.v - v) * rng.uniform(0.7, 1.3)) ** 2)
    cloud = _soft(radius - r + 0.07 * _noise(view, 0.12, rng), 0.09)
    mottle = 0.7 + 0.3 * np.tanh(_noise(view, 0.05, rng))
    airways = _ridges(_noise(view, 0.09, rng), 0.22)
    return rng.uniform(0.8, 1.0) * cloud * mottle * (1 - 0.8 * airways)


FINDINGS: dict[str, Callable[[View, Anatomy, int, np.random.Generator], Plane]] = {
    "nodule": _nodule,
    "effusion": _effusion,
    "consolidation": _consolidation,
}
"""Each draws the share of the lung's air that a finding replaces (0..1) on one side (-1 left of the image, 1 right)."""


def _air(view: View, body: Anatomy) -> Plane:
    """Share of air along the ray, 0..1: both lungs above their diaphragms, less the mediastinum."""
    sides = []
    for side in (-1, 1):
        cavity, above = _lung(view, body, side)
        sides.append(_soft(cavity, 0.03) * _soft(above, 0.02))
    return np.maximum(*sides)


def _bones(view: View, body: Anatomy) -> Plane:
    """Ribs behind and in front, clavicles and spine, as added brightness."""
    across = np.abs(view.u)
    back = (view.v - body.rib_tilt * across + 0.7 * across**2) / body.rib_spacing + body.rib_phase
    front = (view.v + 0.9 * body.rib_tilt * across - 1.0 * across**2) / (1.25 * body.rib_spacing) + body.rib_phase
    ribs = _soft(np.cos(2 * np.pi * back) - 0.35, 0.5)
    ribs += 0.6 * _soft(np.cos(2 * np.pi * front) - 0.45, 0.4)
    ribs *= _soft(across - 0.12, 0.08) * _soft(body.torso - 0.08 - across, 0.05)
    ribs *= _soft(0.62 - view.v, 0.15) * _soft(view.v + 0.72, 0.1)
    clavicles = _soft(0.035 - np.abs(view.v + 0.60 + 0.22 * across), 0.02) * _soft(across - 0.08, 0.03)
    spine = _soft(0.085 - across, 0.03)
    disc = np.cos(2 * np.pi / 0.17 * view.v)
    bones: Plane = body.rib_contrast * (ribs + clavicles) + spine * (0.08 + 0.025 * disc)
    return bones


def _soft_tissue(view: View, body: Anatomy) -> tuple[Plane, Plane]:
    """Return the body's thickness (0..1 from the skin inwards) and the brightness of heart and mediastinum."""
    shoulder = np.clip(-view.v - 0.45, 0, None)
    waist = 0.1 * np.clip(view.v, 0, None) ** 2
    width = body.torso + waist + 0.12 * _soft(-view.v - 0.3, 0.4)
    width = np.maximum(width - 3 * shoulder * np.sqrt(shoulder), 0.30)  # shoulders slope to the neck
    thickness = _soft(width - np.abs(view.u), 0.12)
    heart = np.sqrt(
        ((view.u - body.heart_offset) / body.heart_width) ** 2
        + ((view.v - body.diaphragm[1] + 0.20) / body.heart_height) ** 2
    )
    middle = np.maximum(_soft(1 - heart, 0.12), _soft(body.mediastinum - np.abs(view.u), 0.05))
    return thickness, middle


def _display(patient: Patient, scanner: Scanner, index: int, seed: int) -> Plane:
    """Draw one image in display units: 0 is black and 1 white, with some pixels beyond both."""
    own = numpy_stream(seed, "phantoms", VERSION, "patient", patient.site, patient.number)
    pose = numpy_stream(seed, "phantoms", VERSION, "image", patient.site, patient.number, index)
    body = _anatomy(own)
    side = int(own.choice([-1, 1]))
    view = _view(scanner, pose)
    vessels = _ridges(_noise(view, 0.16, own), 0.20) + 0.7 * _ridges(_noise(view, 0.08, own), 0.22)
    clutter = _noise(view, 0.35, own)
    air = _air(view, body)
    thickness, middle = _soft_tissue(view, body)
    hilum = np.exp(-2.5 * ((np.abs(view.u) - 0.2) ** 2 + view.v**2))
    air = air * (1 - 0.3 * _soft(clutter - 0.5, 0.8))  # smooth haze, which is no finding
    air = air * (1 - 0.9 * middle) * (1 - 4 * body.vessel_contrast * vessels * hilum)
    if patient.label in FINDINGS:
        air = air * (1 - FINDINGS[patient.label](view, body, side, own))
    tissue = 0.78 + 0.07 * clutter + 0.06 * middle
    image = thickness * (tissue - body.air * air + _bones(view, body))
    return _detect(image, scanner, pose)


def _detect(image: Plane, scanner: Scanner, rng: np.random.Generator) -> Plane:
    """Apply the tone curve, an exposure that varies, and noise that grows where few photons arrive."""
    tone = np.clip(image, 0, None) ** (scanner.gamma * rng.uniform(0.85, 1.15))
    tone = rng.uniform(0.85, 1.15) * tone + rng.uniform(-0.08, 0.08)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    return tone + scanner.noise * (0.5 + image) * grain


# What is stored -----------------------------------------------------------------------------------------------------


def _expose(
    patient: Patient, index: int, scanner: Scanner, seed: int
) -> tuple[npt.NDArray[np.uint16], tuple[int, int]]:
    """Return one image's stored values and its window bounds, which follow the exposure."""
    rng = numpy_stream(seed, "phantoms", VERSION, "exposure", patient.site, patient.number, index)
    span = scanner.white - scanner.black
    shift = span * float(rng.uniform(-0.08, 0.08))
    black = round(scanner.black + shift)
    white = round(scanner.white + shift + span * float(rng.uniform(-0.05, 0.05)))
    shown = _display(patient, scanner, index, seed)
    shown = 1 - shown if scanner.inverted else shown
    value = (black + shown * (white - black) - scanner.intercept) / scanner.slope
    stored = np.clip(np.rint(value), 0, 2**scanner.bits - 1).astype(np.uint16)
    return stored, (black, white)


def _dataset(stored: npt.NDArray[np.uint16], window: tuple[int, int], scanner: Scanner, scope: Scope) -> Dataset:
    """Build one CR or DX object with the attributes that its modules require (Part 3, A.2 and A.26)."""
    dataset = Dataset()
    _identify(dataset, scope)
    _describe(dataset, scanner)
    if scanner.modality == "DX":
        _describe_dx(dataset)
    _lay_out(dataset, stored, window, scanner)
    dataset.file_meta = _file_meta(dataset)
    return dataset


def _uid(kind: str, *scope: str | int) -> str:
    """Return a UID that depends on the arguments alone."""
    return str(generate_uid(entropy_srcs=["consilium-phantoms", str(VERSION), kind, *map(str, scope)]))


def _file_meta(dataset: Dataset) -> FileMetaDataset:
    """Return the file's header; the writer is named here, so that the bytes do not depend on pydicom's version."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid("implementation")
    meta.ImplementationVersionName = f"PHANTOMS_{VERSION}"
    return meta


def _identify(dataset: Dataset, scope: Scope) -> None:
    """Name patient, study and instance; attributes of type 2 that nobody knows stay empty."""
    site, patient, number = scope.site, scope.patient, scope.image
    dataset.PatientName = f"PHANTOM^{patient}"
    dataset.PatientID = patient
    dataset.IssuerOfPatientID = f"PHANTOM-{site.upper()}"
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.StudyInstanceUID = _uid("study", scope.seed, site, patient, number)
    dataset.SeriesInstanceUID = _uid("series", scope.seed, site, patient, number)
    dataset.SOPInstanceUID = _uid("instance", scope.seed, site, patient, number)
    dataset.StudyDate = dataset.StudyTime = dataset.ReferringPhysicianName = ""
    dataset.StudyID = dataset.AccessionNumber = ""
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.InstitutionName = f"Phantom hospital {site}"


def _describe(dataset: Dataset, scanner: Scanner) -> None:
    """Say what device made the image and how the patient stood."""
    classes = {"CR": ComputedRadiographyImageStorage, "DX": DigitalXRayImageStorageForPresentation}
    dataset.SOPClassUID = classes[scanner.modality]
    dataset.Modality = scanner.modality
    dataset.Manufacturer = "Consilium phantoms"
    dataset.ManufacturerModelName = f"VERSION {VERSION}"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = "PA"
    dataset.PatientOrientation = ["L", "F"]
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"


def _describe_dx(dataset: Dataset) -> None:
    """Add what only DX requires: intent, anatomy, detector and the meaning of pixel values."""
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "51185008", "SCT", "Chest"
    dataset.AnatomicRegionSequence = [region]
    dataset.ImageLaterality = "U"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = -1  # less X-ray at the detector is brighter
    dataset.DetectorType = ""
    dataset.AcquisitionContextSequence = []


def _lay_out(dataset: Dataset, stored: npt.NDArray[np.uint16], window: tuple[int, int], scanner: Scanner) -> None:
    """Store the pixels, their layout, and the window whose bounds map to black and white (Part 3, C.11.2.1.2)."""
    black, white = window
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if scanner.inverted else "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelSpacing = dataset.ImagerPixelSpacing = [scanner.spacing_mm, scanner.spacing_mm]
    dataset.BitsAllocated = 8 if scanner.bits <= 8 else 16
    dataset.BitsStored, dataset.HighBit = scanner.bits, scanner.bits - 1
    dataset.PixelRepresentation = 0
    dataset.RescaleIntercept, dataset.RescaleSlope = scanner.intercept, scanner.slope
    dataset.RescaleType = "US"
    dataset.WindowCenter, dataset.WindowWidth = (black + white + 1) / 2, white - black + 1
    dataset.add_new("PixelData", "OB" if scanner.bits <= 8 else "OW", _bytes(stored, scanner))


def _bytes(stored: npt.NDArray[np.uint16], scanner: Scanner) -> bytes:
    return stored.astype("u1" if scanner.bits <= 8 else "<u2").tobytes()
