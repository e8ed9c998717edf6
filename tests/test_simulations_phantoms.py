"""The drawn hospitals: valid files, equal bytes, honest patients, and findings that raw pixels do not give away."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import config
from pydicom.pixels import apply_modality_lut
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from common.errors import DataError, UsageError
from simulations import phantoms

pytestmark = pytest.mark.slow  # drawing takes seconds

SITES, IMAGES, SEED = 5, 260, 0
REQUIRED = {
    "CR": "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
    "ReferringPhysicianName Manufacturer BodyPartExamined ViewPosition SeriesNumber InstanceNumber PatientOrientation",
    "DX": "PresentationIntentType PresentationLUTShape AnatomicRegionSequence ImageLaterality ImageType "
    "PixelIntensityRelationship PixelIntensityRelationshipSign RescaleSlope RescaleIntercept RescaleType "
    "LossyImageCompression BurnedInAnnotation DetectorType ImagerPixelSpacing AcquisitionContextSequence",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "phantoms"
    phantoms.write(path, SITES, IMAGES, SEED)
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def datasets(folder: Path, rows: list[dict[str, str]]) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(folder / row["path"]) for row in rows]


@pytest.fixture(scope="module")
def pixels(datasets: list[pydicom.Dataset]) -> np.ndarray:
    """Every image as a reader shows it, padded to a square and reduced to 32 x 32, shape (N, 1024)."""
    return np.stack([_thumbnail(_shown(dataset)) for dataset in datasets])


def _shown(dataset: pydicom.Dataset) -> np.ndarray:
    """Window to 0..1 (Part 3, C.11.2.1.2.1) and undo MONOCHROME1."""
    values = apply_modality_lut(dataset.pixel_array, dataset).astype(float)
    centre, width = float(dataset.WindowCenter), float(dataset.WindowWidth)
    shown = np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def _thumbnail(shown: np.ndarray) -> np.ndarray:
    side = max(shown.shape)
    square = np.zeros((side, side), np.float32)
    top, left = (side - shown.shape[0]) // 2, (side - shown.shape[1]) // 2
    square[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    return np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BOX)).ravel()


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Files ----------------------------------------------------------------------------------------------------------------


def test_the_manifest_names_every_file_once_and_no_other(folder: Path, rows: list[dict[str, str]]) -> None:
    assert list(rows[0]) == ["path", "label", "patient", "site"]
    assert len(rows) == IMAGES
    assert sorted(row["path"] for row in rows) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.dcm"))


def test_files_read_strictly_and_hold_what_their_modules_require(
    folder: Path, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.settings, "reading_validation_mode", config.RAISE)
    for row in rows[::7]:
        dataset = pydicom.dcmread(folder / row["path"])
        for element in dataset.iterall():  # reads, hence validates, each value
            assert element.VR != "UN"
        wanted = REQUIRED["CR"] + (" " + REQUIRED["DX"] if dataset.Modality == "DX" else "")
        assert [keyword for keyword in wanted.split() if keyword not in dataset] == []
        assert dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset.SOPClassUID.name.startswith(
            {"CR": "Computed Radiography", "DX": "Digital X-Ray"}[dataset.Modality]
        )


def test_uids_are_valid_and_instances_unique(datasets: list[pydicom.Dataset]) -> None:
    uids = [uid for d in datasets for uid in (d.SOPInstanceUID, d.SeriesInstanceUID, d.StudyInstanceUID)]
    assert all(uid.is_valid for uid in uids)
    assert len(set(uids)) == len(uids)


def test_pixel_data_has_the_length_and_range_that_the_header_says(datasets: list[pydicom.Dataset]) -> None:
    for dataset in datasets:
        assert len(dataset.PixelData) == dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8
        assert dataset.HighBit == dataset.BitsStored - 1
        assert dataset.pixel_array.max() < 2**dataset.BitsStored


def test_equal_arguments_give_equal_bytes_and_another_seed_other_images(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        phantoms.write(tmp_path / name, 2, 20, seed)
    first, again, other = (_digests(tmp_path / name) for name in "abc")
    assert first == again
    assert not set(first.values()) & set(other.values())


def test_no_name_or_date_could_be_a_person_s(datasets: list[pydicom.Dataset]) -> None:
    for dataset in datasets:
        assert dataset.BurnedInAnnotation == "NO"
        assert dataset.PatientName == f"PHANTOM^{dataset.PatientID}"
        assert [str(e.value) for e in dataset.iterall() if e.VR in ("DA", "TM", "DT", "AS") and e.value] == []
        named = [e.keyword for e in dataset.iterall() if e.VR == "PN" and e.value]
        assert named == ["PatientName"]


def test_no_attribute_gives_the_label_away(datasets: list[pydicom.Dataset]) -> None:
    for dataset in datasets:
        text = dataset.to_json(bulk_data_threshold=64, bulk_data_element_handler=lambda _: "").lower()
        assert not any(label in text for label in phantoms.LABELS)


# Hospitals ------------------------------------------------------------------------------------------------------------


def test_each_patient_has_one_site_one_label_and_the_id_of_its_files(
    rows: list[dict[str, str]], datasets: list[pydicom.Dataset]
) -> None:
    facts = defaultdict(set)
    for row, dataset in zip(rows, datasets, strict=True):
        assert dataset.PatientID == row["patient"]
        facts[row["patient"]].add((row["site"], row["label"]))
    assert all(len(seen) == 1 for seen in facts.values())


def test_a_patient_s_images_differ(rows: list[dict[str, str]], pixels: np.ndarray) -> None:
    by_patient = defaultdict(list)
    for row, image in zip(rows, pixels, strict=True):
        by_patient[row["patient"]].append(image)
    several = [images for images in by_patient.values() if len(images) > 1]
    assert 0.2 < len(several) / len(by_patient) < 0.4
    assert all(np.abs(images[0] - images[1]).mean() > 0.005 for images in several)


def test_sites_differ_as_scanners_do(rows: list[dict[str, str]], datasets: list[pydicom.Dataset]) -> None:
    keywords = (
        "Modality",
        "Rows",
        "Columns",
        "BitsStored",
        "PhotometricInterpretation",
        "RescaleSlope",
        "PixelSpacing",
    )
    scanners = defaultdict(set)
    for row, dataset in zip(rows, datasets, strict=True):
        scanners[row["site"]].add(tuple(str(dataset[keyword].value) for keyword in keywords))
    assert sorted(scanners) == [f"site-{n}" for n in range(1, 6)]
    (one,), *others = scanners.values()
    profiles = [one, *(profile for (profile,) in others)]  # fails unless each site has a single profile
    assert len(set(profiles)) == SITES
    assert sorted(profile[3] for profile in profiles) == ["10", "12", "14", "16", "8"]
    assert [profile[4] for profile in profiles].count("MONOCHROME1") == 1
    assert [float(profile[5]) for profile in profiles].count(1.0) == SITES - 1


def test_the_window_shows_the_body_bright_and_the_surroundings_dark(datasets: list[pydicom.Dataset]) -> None:
    for dataset in datasets:
        shown = _shown(dataset)
        assert np.median(shown[-20:, shown.shape[1] // 2]) > 0.5  # the spine; dark were MONOCHROME1 not undone
        assert shown.min() < 0.1
        assert 0.15 < shown.mean() < 0.85
        stored = dataset.pixel_array
        window = float(dataset.WindowWidth) / float(dataset.RescaleSlope)
        assert window < 0.9 * 2**dataset.BitsStored
        assert stored.max() > stored.min()


def test_site_names_are_padded_when_there_are_ten(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "ten", 10, 80, 1)
    assert sorted(path.name for path in (tmp_path / "ten").glob("site-*")) == [f"site-{n:02d}" for n in range(1, 11)]


@settings(deadline=None, max_examples=40)
@given(sites=st.integers(1, 14), per_site=st.integers(8, 130), seed=st.integers(0, 2**31))
def test_every_plan_is_complete_and_balanced_enough(sites: int, per_site: int, seed: int) -> None:
    images = sites * per_site + seed % sites
    plan = phantoms._plan(sites, images, seed)
    sizes = [sum(patient.images for patient in site) for site in plan]
    assert sum(sizes) == images
    assert min(sizes) >= max(phantoms.MIN_IMAGES_PER_SITE, 0.5 * images / sites)
    total: Counter[str] = Counter()
    for site in plan:
        labels = Counter[str]()
        for patient in site:
            assert 1 <= patient.images <= 3
            labels[patient.label] += patient.images
        assert len(labels) >= 2
        total += labels
    assert set(total) == set(phantoms.LABELS)
    assert min(total.values()) >= 0.1 * images


def test_sites_of_the_demonstration_are_skewed_and_unequal() -> None:
    plan = phantoms._plan(5, 600, 0)
    sizes = [sum(patient.images for patient in site) for site in plan]
    shares = np.array([[phantoms._share(site, label) for label in phantoms.LABELS] for site in plan])
    assert max(sizes) > 1.5 * min(sizes)
    assert np.ptp(shares, axis=0).max() > 0.15


# Pictures -------------------------------------------------------------------------------------------------------------


def _auc(pixels: np.ndarray, labels: np.ndarray, patients: list[str], penalty: float) -> list[float]:
    """Macro AUC, one against rest, then each finding against normal, of a linear model in three folds by patient."""
    scaled = (pixels - pixels.mean(axis=0)) / (pixels.std(axis=0) + 1e-6)
    model = Ridge(penalty, solver="cholesky")
    scores = cross_val_predict(model, scaled, np.eye(4)[labels], groups=patients, cv=GroupKFold(3))
    macro = np.mean([roc_auc_score(labels == k, scores[:, k]) for k in range(4)])
    against_normal = []
    for k in (1, 2, 3):
        pair = (labels == k) | (labels == 0)
        against_normal.append(roc_auc_score(labels[pair] == k, (scores[:, k] - scores[:, 0])[pair]))
    return [float(macro), *map(float, against_normal)]


@pytest.mark.parametrize("penalty", [1e2, 1e3, 1e4])
def test_a_linear_model_of_pixels_does_not_suffice(
    rows: list[dict[str, str]], pixels: np.ndarray, penalty: float
) -> None:
    labels = np.array([phantoms.LABELS.index(row["label"]) for row in rows])
    patients = [row["patient"] for row in rows]
    assert max(_auc(pixels, labels, patients, penalty)) < 0.8
    marked = pixels.copy()
    marked[:, :256] += labels[:, None] == np.arange(4).repeat(64)  # the probe sees a mark of fixed place
    assert min(_auc(marked, labels, patients, penalty)) > 0.95


@pytest.mark.parametrize("finding", phantoms.LABELS[1:])
def test_a_finding_is_visible_and_takes_the_place_of_air(finding: str) -> None:
    scanner = phantoms.SCANNERS[0]
    seen = 0
    for number in range(1, 21):
        with_it, without = (
            phantoms._display(phantoms.Patient(1, number, label, 1), scanner, 0, seed=0)
            for label in (finding, "normal")
        )
        change = with_it - without
        seen += np.count_nonzero(change > 0.08) > 250  # of 65,536 pixels: a disc of 18 pixels across
        assert change.min() > -0.02  # a finding takes the place of air, which is dark
        assert np.mean(change != 0) < 0.3  # what lies outside the lungs is bit by bit the same
    assert seen >= 17


# Folder ---------------------------------------------------------------------------------------------------------------


def test_a_complete_folder_is_kept_and_an_empty_one_filled(tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    folder.mkdir()
    calls: list[int] = []
    phantoms.write(folder, 1, 8, 0, calls.append)
    assert calls == list(range(1, 9))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    phantoms.write(folder, 1, 8, 0, calls.append)
    assert calls == list(range(1, 9))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_an_interrupted_call_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantoms.write(tmp_path / "phantoms", 1, 8, 0, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_race_between_two_writers_ends_with_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"

    def overtake(done: int) -> None:
        if done == 8:
            phantoms.write(folder, 1, 8, 0)

    phantoms.write(folder, 1, 8, 0, overtake)
    assert list(tmp_path.iterdir()) == [folder]
    assert json.loads((folder / "phantoms.json").read_text())["images"] == 8


@pytest.mark.parametrize("seed, images", [(1, 8), (0, 9)])
def test_a_folder_drawn_otherwise_is_refused(tmp_path: Path, seed: int, images: int) -> None:
    phantoms.write(tmp_path / "phantoms", 1, 8, 0)
    with pytest.raises(DataError, match="same sites, images, seed and version"):
        phantoms.write(tmp_path / "phantoms", 1, images, seed)


def test_a_foreign_folder_or_file_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for name in ("notes", "notes/mine.txt"):
        with pytest.raises(DataError):
            phantoms.write(tmp_path / name, 1, 8, 0)
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "mine.txt"]


@pytest.mark.parametrize("sites, images", [(0, 100), (-1, 100), (5, 39), (1, 0)])
def test_too_few_sites_or_images_are_refused_before_anything_is_written(
    tmp_path: Path, sites: int, images: int
) -> None:
    with pytest.raises(UsageError, match="expected at least 1 site and 8 images a site"):
        phantoms.write(tmp_path / "phantoms", sites, images, 0)
    assert list(tmp_path.iterdir()) == []
