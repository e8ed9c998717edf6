"""From site.toml to decided examples: who is in which split, which copies stay, what names the data, when to stop."""

from __future__ import annotations

import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from client import catalogue, intake
from client.augmentation import Augmentation
from client.cohort import SPLITS
from client.features import Extractor
from client.identity import Identity
from client.report.document import document
from client.splitting import split_of
from common import model
from common.errors import ConfigError, DataError
from common.run_config import Data, Model, RunConfig, Task
from simulations import encodings

pytestmark = pytest.mark.slow

SECRET = b"s" * 32


def patients_of(split: str, count: int, secret: bytes = SECRET) -> list[str]:
    """Return PatientIDs that the site's hash puts into a split."""
    who = Identity(secret)
    names = (f"P{number:05d}" for number in range(10_000))
    found = [name for name in names if SPLITS[split_of(who.patient("", name))] == split]
    return found[:count]


@pytest.fixture
def chest(ward: Any) -> Any:
    """Thirty DICOM files of ten patients in three splits, with a table of labels."""
    names = [name for split, count in zip(SPLITS, (6, 2, 2), strict=True) for name in patients_of(split, count)]
    rows = []
    for number in range(30):
        path = f"{number // 10}/{number:02d}.dcm"
        ward.dicom(path, number, PatientID=names[number % 10], Manufacturer="SIEMENS")
        rows.append({"path": path, "label": ("normal", "scar")[number % 2]})
    ward.table(rows)
    return ward


# ------------------------------------------------------------------------------------------------------------- splits


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_patient_stays_in_one_split_whatever_happens_to_the_files(wards: Any, data: st.DataObject) -> None:
    """Files are added, taken away, renamed, in any order: no patient is ever seen in two splits."""
    ward = wards(os.urandom(8).hex())
    where: dict[str, set[str]] = defaultdict(set)
    files: dict[str, str] = {}
    for step in range(3):
        for _ in range(data.draw(st.integers(1, 5))):
            patient, place = f"P{data.draw(st.integers(0, 5))}", f"{data.draw(st.integers(0, 10**6))}-{step}"
            label = data.draw(st.sampled_from(["a", "b"]))
            path = f"{label}/{place}.dcm"
            ward.dicom(path, scan_of(len(files) + 100 * step), bits=8, PatientID=patient)
            files[path] = patient
        for path in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=2, unique=True)):
            (ward.images / path).unlink()
            del files[path]
        for path in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=2, unique=True)) if files else []:
            renamed = path.replace(".dcm", "-renamed")
            (ward.images / path).rename(ward.images / renamed)
            files[renamed] = files.pop(path)
        if not files:
            continue
        for path, split in ward.splits().items():
            where[files[path]].add(split)
    assert all(len(splits) == 1 for splits in where.values())


def scan_of(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.kron(random.integers(0, 255, (6, 6)), np.ones((4, 4))).astype(np.uint8)


def test_another_secret_is_another_split_and_another_manifest(wards: Any) -> None:
    found = {}
    for name, secret in (("one", b"a" * 32), ("two", b"b" * 32), ("three", b"a" * 32)):
        ward = wards(name, secret)
        for number in range(40):
            ward.dicom(f"{'ab'[number % 2]}/{number}.dcm", scan_of(number), bits=8, PatientID=f"P{number}")
        found[name] = ward.splits(), ward.examine().manifest_sha256
    assert found["one"] == found["three"]
    assert found["one"][0] != found["two"][0]
    assert found["one"][1] != found["two"][1]


def test_given_splits_are_honoured_and_patients_moved_whole(ward: Any) -> None:
    rows = []
    for number in range(12):
        ward.picture(f"{number:02d}.png", number)
        split = ["train", "val", "test"][number % 3]
        rows.append({"path": f"{number:02d}.png", "label": "ab"[number % 2], "patient": f"P{number}", "split": split})
    rows[0]["patient"] = rows[1]["patient"] = rows[2]["patient"] = "P0"  # in all three
    rows[3]["patient"] = rows[4]["patient"] = "P3"  # training and validation
    ward.table(rows)
    splits = ward.splits()
    assert [splits[f"{number:02d}.png"] for number in (0, 1, 2)] == ["test"] * 3
    assert [splits[f"{number:02d}.png"] for number in (3, 4)] == ["validation"] * 2
    assert [splits[f"{number:02d}.png"] for number in (6, 7, 8)] == ["train", "validation", "test"]
    (message,) = [w.message for w in ward.examine().warnings if w.code == "patient_in_splits"]
    assert "2 patients" in message


def test_images_without_a_patient_are_patients_of_their_own(ward: Any) -> None:
    for number in range(6):
        ward.picture(f"{'ab'[number % 2]}/{number}.png", number)
    taken = ward.take_in()
    assert len(set(taken.patients)) == 6
    found = ward.examine()
    assert found.patients == 6
    assert "no_patient" in {warned.code for warned in found.warnings}


# ------------------------------------------------------------------------------------------------------------- copies


def altered(pixels: np.ndarray, how: str) -> np.ndarray:
    """Return 8-bit pixels as another export would have them."""
    random = np.random.default_rng(1)
    if how == "jpeg":
        return np.asarray(Image.open(io.BytesIO(encodings.jpeg(pixels, 50))))
    if how == "noise":
        return np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    if how == "brighter":
        return np.clip(pixels * 1.1 + 6, 0, 255).astype(np.uint8)
    if how == "resized":
        return np.asarray(Image.fromarray(pixels).resize((84, 96), Image.Resampling.BICUBIC))
    return pixels


@pytest.mark.parametrize("form", ["png", "dicom"])
@pytest.mark.parametrize("how", ["same", "jpeg", "noise", "brighter", "resized"])
def test_a_copy_under_another_patient_never_straddles_the_splits(how: str, form: str, ward: Any) -> None:
    train, validation, test = (patients_of(split, 3) for split in SPLITS)
    rows = []

    def add(name: str, pixels: np.ndarray, patient: str) -> None:
        path = f"{name}.{form}"
        if form == "png":
            ward.picture(path, pixels, format="PNG")
        else:
            ward.dicom(path, pixels, bits=8)
        rows.append({"path": path, "label": "ab"[len(rows) % 2], "patient": patient})

    for number, patient in enumerate((*train, *validation, *test)):
        add(f"own-{number}", np.asarray(picture(number)), patient)
    for lower, higher, seed in ((train[0], test[0], 50), (train[1], validation[1], 51), (validation[2], test[2], 52)):
        add(f"low-{seed}", picture(seed), lower)
        add(f"high-{seed}", altered(picture(seed), how), higher)
    ward.table(rows)
    outcomes = ward.outcomes()
    left = {path for path, (_, code) in outcomes.items() if code}
    assert left == {f"low-{seed}.{form}" for seed in (50, 51, 52)}
    assert {outcomes[path] for path in left} == {("quarantined", "duplicate_in_other_split")}
    found = ward.examine()
    assert found.near_duplicates == (0 if how == "same" else 3)


def picture(seed: int) -> np.ndarray:
    """Return 8-bit pixels (64, 56) that look like no others."""
    random = np.random.default_rng(seed)
    knots = Image.fromarray(random.uniform(30, 220, (6, 6)).astype(np.float32))
    return np.asarray(knots.resize((56, 64), Image.Resampling.BICUBIC)).astype(np.uint8)


def test_copies_of_one_patient_stay(ward: Any) -> None:
    for number in range(4):
        ward.dicom(f"a/{number}.dcm", 7, PatientID=patients_of("train", 1)[0])
        ward.dicom(f"b/{number}.dcm", 10 + number, PatientID=patients_of("test", 1)[0])
    found = ward.examine()
    assert found.quarantine == {}
    assert sum(found.examples.values()) == 8
    assert found.duplicates == 3


# ----------------------------------------------------------------------------------------------------------- manifest


def test_the_manifest_names_content_and_not_files(chest: Any) -> None:
    first = chest.examine().manifest_sha256
    assert chest.examine().manifest_sha256 == first
    (chest.images / "0").rename(chest.images / "elsewhere")
    text = (chest.folder / "labels.csv").read_text()
    lines = text.replace("0/0", "elsewhere/0").splitlines()
    (chest.folder / "labels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert chest.examine().manifest_sha256 == first


CHANGES: dict[str, Callable[[Any, list[str]], list[str]]] = {
    "label": lambda ward, lines: [lines[0], lines[1].replace("normal", "scar"), *lines[2:]],
    "name of a label": lambda ward, lines: [line.replace("scar", "scars") for line in lines],
    "one less": lambda ward, lines: lines[:-1],
    "split": lambda ward, lines: [f"{lines[0]},split", *(f"{line},train" for line in lines[1:])],
    "patient": lambda ward, lines: [f"{lines[0]},patient", *(f"{line},q{n}" for n, line in enumerate(lines[1:]))],
    "pixel": lambda ward, lines: changed_pixel(ward) or lines,
}


def changed_pixel(ward: Any) -> None:
    path = ward.images / "0" / "00.dcm"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_the_manifest_changes_with_everything_that_counts(change: str, chest: Any) -> None:
    first = chest.examine().manifest_sha256
    lines = (chest.folder / "labels.csv").read_text().splitlines()
    (chest.folder / "labels.csv").write_text("\n".join(CHANGES[change](chest, lines)))
    assert chest.examine().manifest_sha256 != first


# ------------------------------------------------------------------------------------------- one outcome for each file


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            [
                "good",
                "same",
                "cut",
                "text",
                "empty",
                "pdf",
                "hidden",
                "fifo",
                "loop",
                "out",
                "in",
                "dangling",
                "unlabelled",
                "report",
                "anon",
            ]
        ),
        min_size=1,
        max_size=14,
    )
)
def test_every_file_has_one_outcome(wards: Any, kinds: list[str]) -> None:
    ward = wards(os.urandom(8).hex())
    (ward.images / "a" / ".h").mkdir(parents=True)
    (ward.folder / "outside.png").write_bytes(b"x")
    for place, kind in enumerate(kinds):
        made(ward, kind, place)
    found = ward.examine(placeholder_patients="quarantine")
    expected = [p for p in ward.images.rglob("*") if not p.is_dir()]
    assert sorted(file.path for file in found.files) == sorted(str(p.relative_to(ward.images)) for p in expected)
    for status, counts in (("quarantined", found.quarantine), ("ignored", found.ignored)):
        assert Counter(file.code for file in found.files if file.status == status) == Counter(counts)
    accepted = sum(file.status == "accepted" for file in found.files)
    assert accepted == sum(found.examples.values())
    assert all(not file.code for file in found.files if file.status == "accepted")


def made(ward: Any, kind: str, place: int) -> None:
    at = ward.images / "a" / f"{place}"
    if kind in ("good", "same", "cut", "anon", "report"):
        more: dict[str, Any] = {"PatientID": "ANON" if kind == "anon" else f"P{place}"}
        if kind == "report":
            more |= {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Modality": "SR"}
        ward.dicom(f"a/{place}", scan_of(0 if kind == "same" else place), bits=8, **more)
        if kind == "cut":
            at.write_bytes(at.read_bytes()[:-200])
        return
    making: dict[str, Callable[[], Any]] = {
        "text": lambda: at.write_text("hello"),
        "empty": lambda: at.touch(),
        "pdf": lambda: at.with_suffix(".pdf").touch(),
        "hidden": lambda: (at.parent / ".h" / at.name).touch(),
        "fifo": lambda: os.mkfifo(at),
        "loop": lambda: at.symlink_to(at),
        "out": lambda: at.symlink_to(ward.folder / "outside.png"),
        "in": lambda: at.symlink_to(ward.images / "a" / ".h" / "x.png"),
        "dangling": lambda: at.symlink_to("nowhere"),
        "unlabelled": lambda: ward.picture(f"{place}.png", place),
    }
    making[kind]()


# --------------------------------------------------------------------------------------------------- placeholder names


def with_placeholders(ward: Any, known: int, unknown: int) -> None:
    rows = []
    for number in range(known + unknown):
        name = f"P{number}" if number < known else ("ANON", "", "000", "anonymous")[number % 4]
        ward.dicom(f"{number}.dcm", scan_of(number), bits=8, PatientID=name)
        rows.append({"path": f"{number}.dcm", "label": "ab"[number % 2], "who": f"Q{number}"})
    ward.table(rows)


def test_placeholders_stop_from_a_tenth_on(ward: Any) -> None:
    with_placeholders(ward, 18, 2)
    found = ward.examine()
    assert "[data] patient" in found.stop
    assert found.quarantine == {"placeholder_patient": 2}
    with pytest.raises(DataError, match=r"\[data\] patient"):
        intake.cohort(ward.site(), lambda *_: None)


def test_placeholders_can_be_left_out(ward: Any) -> None:
    with_placeholders(ward, 18, 2)
    found = ward.examine(placeholder_patients="quarantine")
    assert found.stop == ""
    assert found.quarantine == {"placeholder_patient": 2}
    assert "placeholder_patients" in {warned.code for warned in found.warnings}


def test_few_placeholders_are_left_out_by_themselves(ward: Any) -> None:
    with_placeholders(ward, 19, 2)
    assert ward.examine().stop == ""
    assert len(intake.cohort(ward.site(), lambda *_: None)) == 19


def test_nothing_but_placeholders_stops_in_any_case(ward: Any) -> None:
    with_placeholders(ward, 0, 4)
    assert "[data] patient" in ward.examine(placeholder_patients="quarantine").stop


def test_a_column_of_patients_stands_in_for_placeholders(ward: Any) -> None:
    with_placeholders(ward, 0, 8)
    found = ward.examine(patient="who")
    assert (found.stop, found.quarantine, found.patients) == ("", {}, 8)


def test_a_column_may_hold_placeholders_too(ward: Any) -> None:
    rows = []
    for number in range(20):
        ward.picture(f"{number}.png", scan_of(number))
        rows.append({"path": f"{number}.png", "label": "ab"[number % 2], "patient": "n/a" if number == 3 else number})
    rows[0]["patient"] = "0000"
    ward.table(rows)
    found = ward.examine()
    assert found.quarantine == {"placeholder_patient": 2}


# -------------------------------------------------------------------------------------------------- nothing to be used


def test_an_empty_folder(ward: Any) -> None:
    found = ward.examine()
    assert "no usable image" in found.stop
    assert (found.files, found.sheet.shape[0], found.patients) == ((), 0, 0)
    with pytest.raises(DataError, match="no usable image"):
        intake.cohort(ward.site(), lambda *_: None)


def test_no_folder_no_secret(ward: Any) -> None:
    with pytest.raises(DataError, match="expected a folder"):
        ward.take_in(images="nowhere")
    config = ward.site()
    config.secret.unlink()
    with pytest.raises(ConfigError, match="missing"):
        intake.take_in(config, lambda *_: None)


def test_files_that_go_or_change_between_two_looks(chest: Any) -> None:
    before = chest.examine()
    (chest.images / "0" / "00.dcm").unlink()
    chest.dicom("0/02.dcm", 77, PatientID="P00000")
    after = chest.examine()
    assert sum(after.examples.values()) == sum(before.examples.values()) - 1
    assert after.from_cache == 28
    assert after.rows_without_file == 1


# ------------------------------------------------------------------------------------------------------------- the rest


def test_two_sites_alike_say_the_same(wards: Any) -> None:
    documents = []
    for name in ("one", "two"):
        ward = wards(name)
        for number in range(12):
            ward.dicom(f"{'ab'[number % 2]}/{number}.dcm", scan_of(number), bits=8, PatientID=f"P{number}")
        document_of = document(ward.examine(), files=True)
        again = document(ward.examine(), files=True)
        assert again["from_cache"] == 12
        for one in (document_of, again):
            for key in ("seconds", "from_cache", "decode"):
                del one[key]
        documents += [document_of, again]
    assert all(one == documents[0] for one in documents)


def test_nothing_is_read_twice(chest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = chest.examine()

    def pool(*_: Any) -> None:
        raise AssertionError("a file was read again")

    monkeypatch.setattr(catalogue, "Pool", pool)
    second = chest.examine()
    assert (first.from_cache, second.from_cache) == (0, 30)
    assert second.manifest_sha256 == first.manifest_sha256
    assert np.array_equal(second.sheet, first.sheet)
    assert second.sheet_labels == first.sheet_labels


def test_a_cohort_trains(chest: Any, tmp_path: Path) -> None:
    """The very images that were shown become features of a real backbone."""
    cohort = intake.cohort(chest.site(), lambda *_: None)
    assert len(cohort) == 30
    assert cohort.label_names == ("normal", "scar")
    assert {split: len(cohort.indices(split)) for split in SPLITS} == chest.examine().examples
    assert len(np.unique(cohort.patients)) == 10
    run = RunConfig(
        task=Task(name="tiny", labels=cohort.label_names),
        data=Data(preset="generic", image_size=32, views=1),
        model=Model(backbone="test_efficientnet", weights="none", trainable="head"),
    )
    torch.set_num_threads(1)
    built = model.skeleton(run)
    extractor = Extractor.open(
        built.trunk,
        built.spec,
        sha256="ab" * 32,
        cohort=cohort,
        cache=chest.site().cache,
        augmentation=Augmentation.of(chest.site().preset),
        device="cpu",
    )
    assert extractor.fill(cohort, 1) == 30
    features = extractor.features(cohort, 1)
    assert features is not None
    assert extractor.fill(cohort, 1) == 0


def test_the_sheet_shows_each_label_and_no_more_than_it_should(chest: Any) -> None:
    found = chest.examine()
    assert found.sheet.shape == (24, 1, 32, 32)
    assert Counter(found.sheet_labels) == {"normal": 12, "scar": 12}


def test_several_labels_an_image_make_a_cohort_of_several_labels(ward: Any) -> None:
    rows = []
    for number in range(12):
        ward.picture(f"{number}.png", number)
        rows.append({"path": f"{number}.png", "edema": number % 2, "effusion": number // 2 % 2})
    ward.table(rows)
    found = ward.examine()
    assert {label: sum(counts[label] for counts in found.labels.values()) for label in ("edema", "effusion")} == {
        "edema": 6,
        "effusion": 6,
    }
    several = intake.cohort(ward.site(), lambda *_: None)
    assert (several.kind, several.label_names, several.labels.shape) == ("multi-label", ("edema", "effusion"), (12, 2))
    assert intake.cohort(ward.site(label="edema"), lambda *_: None).label_names == ("negative", "positive")
