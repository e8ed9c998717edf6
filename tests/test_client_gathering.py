"""A folder and a table of labels: every way to name an image, every kind of label, and what finds no partner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from client import examination
from common.errors import DataError

KEYS = ("path", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber")


def elements(number: int) -> dict[str, str]:
    """Return what names one of two images of a series, one of two series of a study, and one of its order."""
    return {
        "SOPInstanceUID": f"1.2.840.9.1.{number}",
        "SeriesInstanceUID": f"1.2.840.9.2.{number // 2}",
        "StudyInstanceUID": f"1.2.840.9.3.{number // 4}",
        "AccessionNumber": f"00{4711 + number // 4}",
        "PatientID": f"P{number // 4}",
    }


@pytest.fixture
def studies(ward: Any) -> Any:
    """Sixteen images of four studies of four patients."""
    for number in range(16):
        ward.dicom(f"{number // 4}/IM{number:04d}", number, **elements(number))
    return ward


def labels_of(ward: Any, **data: Any) -> dict[str, str | None]:
    """Return path -> label of the images in use."""
    taken = ward.take_in(**data)
    gathered = taken.gathered
    values = gathered.labels(taken.places)
    names = gathered.labelled.label_names
    paths = [gathered.found.paths[place] for place in taken.places.tolist()]
    return {path: names[value] for path, value in zip(paths, values.tolist(), strict=True)}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_every_key(key: str, named: bool, studies: Any) -> None:
    known: dict[str, str] = {}
    expected = {}
    for number in range(16):
        path = f"{number // 4}/IM{number:04d}"
        value = {**elements(number), "path": path}[key]
        label = known.setdefault(value, "ab"[len(known) % 2])
        expected[path] = label
    studies.table([{key: value, "label": label} for value, label in known.items()])
    assert labels_of(studies, key=key if named else "auto") == expected
    found = studies.examine()
    assert (found.key, found.rows, found.rows_without_file, found.files_without_label) == (key, len(known), 0, 0)


@pytest.mark.parametrize("lost", [lambda text: text.lstrip("0"), lambda text: f"{text.lstrip('0')}.0"])
def test_accession_numbers_whose_zeros_a_spreadsheet_took(lost: Any, studies: Any) -> None:
    rows = [{"AccessionNumber": lost(elements(4 * number)["AccessionNumber"]), "label": "ab"[number % 2]}
            for number in range(4)]  # fmt: skip
    studies.table(rows)
    found = studies.examine()
    assert sum(found.examples.values()) == 16
    assert "leading_zeros" in {warned.code for warned in found.warnings}


def test_class_folders(ward: Any) -> None:
    for number in range(9):
        ward.picture(f"{('normal', 'pneumonia', 'normal')[number % 3]}/deep/{number}.png", number)
    ward.picture("lost.png", 20)
    assert set(labels_of(ward).values()) == {"normal", "pneumonia"}
    found = ward.examine()
    assert found.quarantine == {"no_label": 1}
    assert (found.key, found.files_without_label) == ("folder", 1)


def test_a_manifest_in_the_folder(ward: Any) -> None:
    for number in range(4):
        ward.picture(f"{number}.png", number)
    text = "path,label\n" + "".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(4))
    (ward.images / "manifest.csv").write_text(text)
    assert labels_of(ward) == {f"{number}.png": "ab"[number % 2] for number in range(4)}
    assert ward.outcomes()["manifest.csv"] == ("ignored", "other_suffix")


CELLS = (1, 0, -1, "")


@pytest.mark.parametrize("blank", ["zeros", "ignore"])
@pytest.mark.parametrize("uncertain", ["ignore", "zeros", "ones", "soft"])
def test_several_labels_and_every_policy(uncertain: str, blank: str, ward: Any) -> None:
    rows = []
    for number in range(16):
        ward.picture(f"{number:02d}.png", number)
        first, second = CELLS[number % 4], CELLS[number // 4]
        rows.append({"path": f"{number:02d}.png", "edema": first, "effusion": second})
    ward.table(rows)
    taken = ward.take_in(uncertain=uncertain, blank=blank)
    nan = float("nan")
    value = {
        1: 1.0,
        0: 0.0,
        -1: {"ignore": nan, "zeros": 0.0, "ones": 1.0, "soft": 0.5}[uncertain],
        "": {"zeros": 0.0, "ignore": nan}[blank],
    }
    expected = {
        f"{number:02d}.png": [value[CELLS[number % 4]], value[CELLS[number // 4]]]  # type: ignore[index]
        for number in range(16)
    }
    unknown = {path for path, pair in expected.items() if all(np.isnan(one) for one in pair)}
    paths = [taken.gathered.found.paths[place] for place in taken.places.tolist()]
    assert set(paths) == set(expected) - unknown
    values = taken.gathered.labels(taken.places)
    assert values.dtype == np.float32
    for path, pair in zip(paths, values.tolist(), strict=True):
        np.testing.assert_array_equal(pair, expected[path])
    found = ward.examine(uncertain=uncertain, blank=blank)
    assert found.quarantine == ({"no_label": len(unknown)} if unknown else {})
    assert sum(counts["edema"] for counts in found.labels.values()) == sum(
        pair[0] == 1 for path, pair in expected.items()
    )


def test_local_words(ward: Any) -> None:
    words = ("Pleuraerguss", "o.B.", "unbrauchbar", "PLEURAERGUSS")
    rows = []
    for number in range(8):
        ward.picture(f"{number}.png", number)
        rows.append({"path": f"{number}.png", "label": words[number % 4]})
    ward.table(rows)
    found = labels_of(ward, words={"pleuraerguss": "effusion", "o.B.": "normal", "unbrauchbar": ""})
    assert found == {
        f"{number}.png": ("effusion", "normal", "", "effusion")[number % 4] for number in range(8) if number % 4 != 2
    }
    assert ward.outcomes(words={"unbrauchbar": ""})["2.png"] == ("quarantined", "no_label")


def test_what_finds_no_partner_and_what_contradicts_itself(ward: Any) -> None:
    for number in range(6):
        ward.picture(f"{number}.png", number)
    rows = [{"path": f"{number}.png", "label": "ab"[number % 2]} for number in range(4)]
    rows += [{"path": "3.png", "label": "a"}, {"path": "gone.png", "label": "a"}, {"path": "4.png", "label": ""}]
    ward.table(rows)
    outcomes = ward.outcomes()
    assert outcomes["3.png"] == ("quarantined", "label_conflict")
    assert outcomes["4.png"] == outcomes["5.png"] == ("quarantined", "no_label")
    found = ward.examine()
    assert (found.rows, found.rows_without_file, found.files_without_label) == (7, 1, 2)
    codes = {warned.code for warned in found.warnings}
    assert {"rows_without_file", "files_without_label", "label_conflict"} <= codes


def test_a_broken_file_beside_good_ones_changes_nothing_about_them(studies: Any) -> None:
    """A column PatientID is not needed where the headers of all that are images name their patients."""
    rows = [
        {"SOPInstanceUID": elements(number)["SOPInstanceUID"], "label": "ab"[number % 2], "PatientID": number}
        for number in range(16)
    ]
    studies.table(rows)
    assert sum(studies.examine().examples.values()) == 16
    (studies.images / "broken").write_bytes(b"nothing")
    (studies.images / "0" / "cut").write_bytes((studies.images / "0" / "IM0000").read_bytes()[:300])
    found = studies.examine()
    assert sum(found.examples.values()) == 16
    assert sum(found.quarantine.values()) == 2


def test_a_taken_out_patient_changes_nothing_about_the_others(studies: Any) -> None:
    rows: list[Mapping[str, object]] = [
        {"SOPInstanceUID": elements(number)["SOPInstanceUID"], "label": "ab"[number % 2], "PatientID": number}
        for number in range(16)
    ]
    studies.table(rows)
    config = studies.site()
    (studies.folder / "out.csv").write_text("P1\n")
    studies.examine()
    examination.forget(config, studies.folder / "out.csv")
    found = studies.examine()
    assert sum(found.examples.values()) == 12
    assert found.ignored == {"opted_out": 4}


@pytest.mark.parametrize("colour", [0, 3, 8])
def test_grey_among_colour_is_shown_in_colour(colour: int, ward: Any) -> None:
    random = np.random.default_rng(0)
    for number in range(8):
        shape = (24, 24, 3) if number < colour else (24, 24)
        ward.picture(f"{'ab'[number % 2]}/{number}.png", random.integers(0, 255, shape, np.uint8))
    taken = ward.take_in()
    assert taken.gathered.kind == ("colour" if colour else "grey")
    places = taken.gathered.usable
    assert len(places) == 8
    images = taken.catalogue.source(taken.gathered.kind)(taken.catalogue.rows(taken.gathered.entries_of(places)))
    assert images.shape[1] == (3 if colour else 1)
    for entry, image in zip(taken.gathered.entries_of(places), images, strict=True):
        assert (image == image[:1]).all() == (entry.kind == "grey")


def test_messages_name_no_file_and_no_cell(studies: Any) -> None:
    studies.table([{"SOPInstanceUID": "1.2.3.4", "label": "secret-cell"}])
    with pytest.raises(DataError) as caught:
        studies.examine()
    assert "secret-cell" not in str(caught.value)
    assert "IM00" not in str(caught.value)
    assert "1.2.3.4" not in str(caught.value)
