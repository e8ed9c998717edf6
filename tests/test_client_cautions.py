"""What a site is told before a run: each warning where it belongs, with its numbers, and none where all is well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from client.cohort import SPLITS
from client.findings import WARNINGS


def told(ward: Any, **data: Any) -> dict[str, str]:
    """Return code -> messages of the warnings."""
    found: dict[str, str] = {}
    for warned in ward.examine(**data).warnings:
        assert warned.code in WARNINGS
        found[warned.code] = found.get(warned.code, "") + warned.message
    return found


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (24, 24), np.uint8)


def fill(ward: Any, count: int, change: Callable[[int], dict[str, Any]] = lambda _: {}) -> list[dict[str, Any]]:
    """Write files of single patients, two labels in each of three given splits; return the rows of their table."""
    rows = []
    for number in range(count):
        elements = {"PatientID": f"P{number}", "Manufacturer": "SIEMENS", "BurnedInAnnotation": "NO"} | change(number)
        ward.dicom(f"{number:03d}.dcm", pixels(number), bits=8, **elements)
        split = SPLITS[number // 2 % 3]
        rows.append({"path": f"{number:03d}.dcm", "label": "ab"[number % 2], "split": split})
    ward.table(rows)
    return rows


def test_all_is_well(ward: Any) -> None:
    fill(ward, 60)
    assert told(ward) == {}


def test_a_split_without_images_and_one_without_a_label(ward: Any) -> None:
    rows = fill(ward, 60)
    for row in rows:
        row["split"] = "train" if row["split"] == "validation" else row["split"]
        row["label"] = "a" if row["split"] == "test" else row["label"]
    ward.table(rows)
    found = told(ward)
    assert found["label_absent"] == "no image in test has 'b'"
    assert "no_validation" in found
    assert "no_test" not in found
    for row in rows:
        row["split"] = "train"
    ward.table(rows)
    assert {"no_validation", "no_test"} <= set(told(ward))


def test_few_and_rare(ward: Any) -> None:
    rows = fill(ward, 66)
    for number, row in enumerate(rows):
        row["label"] = "b" if number in (0, 2, 4) else "a"
    ward.table(rows)
    found = told(ward)
    assert found["few_examples"].startswith("few images of 'b' (3)")
    assert found["imbalanced"] == "63 images of 'a', 3 of 'b'"


def test_a_device_that_tells_the_label(ward: Any) -> None:
    fill(ward, 60, lambda number: {"Manufacturer": ("GE", "SIEMENS")[number % 2]})
    found = told(ward)
    assert "'a' is almost told by the device" in found["confounding"]
    assert "60 of 60 images" in found["confounding"]
    strengths = {(label, by): strength for label, by, strength, _ in ward.examine().confounding}
    assert strengths["a", "device"] == pytest.approx(1, abs=0.01)
    assert set(strengths) == {("a", "device"), ("b", "device")}


def test_a_view_that_tells_it_in_part(ward: Any) -> None:
    fill(ward, 80, lambda number: {"ViewPosition": "PA" if number % 2 == (number % 8 > 1) else "AP"})
    assert "in part told by the view" in told(ward)["confounding"]


def test_an_unknown_label_tells_nothing_of_a_device(ward: Any) -> None:
    """Blanks from one device are no evidence that its patients are healthy."""
    rows = fill(ward, 120, lambda number: {"Manufacturer": ("GE", "SIEMENS")[number // 60]})
    for number, row in enumerate(rows):
        del row["label"]
        row |= {"edema": number % 2 if number < 60 else (1 if number % 8 == 0 else ""), "scar": number // 2 % 2}
    ward.table(rows)
    assert "confounding" not in told(ward, blank="ignore", label=["edema", "scar"])


def test_mixtures(ward: Any) -> None:
    intents = ("FOR PRESENTATION", "FOR PROCESSING")
    fill(ward, 60, lambda n: {"Modality": ("DX", "CR")[n // 2 % 2], "PresentationIntentType": intents[n // 2 % 2]})
    rng = np.random.default_rng(0)
    rows = [line.split(",") for line in (ward.folder / "labels.csv").read_text().splitlines()]
    ward.picture("colour.png", rng.integers(0, 255, (24, 24, 3), np.uint8))
    table = [dict(zip(rows[0], row, strict=True)) for row in [*rows[1:], ["colour.png", "a", "train"]]]
    ward.table(table)
    found = told(ward)
    assert found["mixed_modalities"] == "images of 2 modalities: CR, DX"
    assert set(found) == {"mixed_modalities", "mixed_intent", "mixed_kinds", "burned_in", "no_patient"}
    assert found["mixed_kinds"].startswith("60 grey and 1 colour images together")


def test_text_burned_in(ward: Any) -> None:
    fill(ward, 60, lambda number: {"Modality": "US", "BurnedInAnnotation": ("YES", "NO", "")[number % 3]})
    found = told(ward)
    assert "20 images say that text is burned into them" in found["burned_in"]
    assert "20 images are of a kind that often has text burned in" in found["burned_in"]
    assert ward.examine().burned_in == {"yes": 20, "no": 20, "unknown": 20}


def test_much_in_quarantine(ward: Any) -> None:
    fill(ward, 60)
    for number in range(20):
        (ward.images / f"broken{number}").write_bytes(b"nothing")
    assert told(ward)["many_quarantined"] == "20 of 80 files are in quarantine"


def test_messages_name_no_file_and_no_patient(ward: Any) -> None:
    fill(ward, 60, lambda number: {"PatientID": "SECRET" if number < 30 else "ANON", "StationName": "SECRET"})
    (ward.images / "SECRET").write_bytes(b"nothing")
    for message in told(ward).values():
        assert "SECRET" not in message
