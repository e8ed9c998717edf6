"""Folders of real files: both layouts, what is refused and what is only counted, and the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

import client.folder
from client.decoding import decode
from client.folder import FolderIndex, read_folder
from client.image import CODES, Decoded
from client.listing import IGNORED, list_folder
from client.preprocessing import preprocess, preprocessing_id
from client.presets import PRESETS
from common.errors import CacheError, DataError

GENERIC = PRESETS["generic"]
SIZE = 16


def picture(path: Path, seed: int = 0, colour: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 20, 3) if colour else (12, 20), np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def manifest(root: Path, text: str, encoding: str = "utf-8") -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "manifest.csv").write_bytes(text.encode(encoding))


def read(tmp_path: Path, root: Path, **fields: object) -> FolderIndex:
    return read_folder(root, replace(GENERIC, **fields), SIZE, tmp_path / "cache")  # type: ignore[arg-type]


def refusal(tmp_path: Path, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, root)
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    return message


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four pictures in two nested classes."""
    for number, name in enumerate(["b/1.png", "a/deep/er/2.png", "a/1.png", "a/10.png"]):
        picture(tmp_path / "data" / name, number)
    return tmp_path / "data"


# --- one subfolder a class ----------------------------------------------------------------------------------


def test_class_folders_in_path_order_with_the_pixels_of_each(tmp_path: Path, root: Path) -> None:
    index = read(tmp_path, root)
    assert index.labels == ("a", "a", "a", "b")
    assert (index.sites, index.splits, index.patients) == (None, None, (None,) * 4)
    assert index.preprocessing == preprocessing_id(GENERIC, SIZE)
    for row, digest, name in zip(index.rows, index.digests, ["a/1", "a/10", "a/deep/er/2", "b/1"], strict=True):
        image = decode(root / f"{name}.png")
        assert digest.tobytes() == image.sha256
        np.testing.assert_array_equal(index.source(np.array([row]))[0], preprocess(image, GENERIC, SIZE))


def test_files_that_are_no_images_are_ignored_and_counted(tmp_path: Path, root: Path) -> None:
    for name in ["a/notes.txt", "a/labels.CSV", "a/.DS_Store", ".git/x.png", "b/DICOMDIR", "readme.md"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    picture(root / "loose.png")
    shutil.copy(str(get_testdata_file("MR_small.dcm", download=False)), root / "a" / "IM0001")
    shutil.copy(str(get_testdata_file("MR_small.dcm", download=False)), root / "b" / "1.2.840.113619.2")
    index = read(tmp_path, root)
    assert len(index) == 6
    assert index.ignored == {"hidden": 2, "other_suffix": 4}
    assert index.quarantine == {"no_label": 1}
    assert set(index.ignored) <= set(IGNORED)
    hashed = {patient for patient in index.patients if patient is not None}
    assert len(hashed) == 1
    assert all(isinstance(patient, bytes) and len(patient) == 32 for patient in hashed)


def test_bad_files_only_cost_themselves(tmp_path: Path, root: Path) -> None:
    (root / "a" / "empty.png").touch()
    (root / "a" / "text.png").write_text("no picture")
    (root / "b" / "cut.png").write_bytes((root / "b" / "1.png").read_bytes()[:150])
    shutil.copy(str(get_testdata_file("rtplan.dcm", download=False)), root / "b" / "plan.dcm")
    index = read(tmp_path, root)
    assert len(index) == 4
    assert index.quarantine == {"damaged": 1, "empty": 1, "not_an_image": 1, "unsupported_image": 1}
    assert set(index.quarantine) <= set(CODES)


def test_split_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    for name in ["train/normal/1.png", "test/normal/2.png"]:
        picture(tmp_path / "data" / name)
    assert "look like splits" in refusal(tmp_path, tmp_path / "data")


def test_links_out_of_the_folder_are_refused(tmp_path: Path, root: Path) -> None:
    outside = picture(tmp_path / "outside" / "secret.png", 9)
    (root / "a" / "link.png").symlink_to(outside)
    (root / "c").symlink_to(outside.parent)
    (root / "a" / "twin.png").symlink_to(root / "a" / "1.png")  # inside: the same file, once
    index = read(tmp_path, root)
    assert index.quarantine == {"outside_root": 1}
    assert index.labels == ("a", "a", "a", "b")


@pytest.mark.parametrize("content", ["nothing", "text", "no folder"])
def test_nothing_usable(tmp_path: Path, content: str) -> None:
    data = tmp_path / "data"
    if content != "no folder":
        data.mkdir()
    if content == "text":
        (data / "a").mkdir()
        (data / "a" / "secret.png").write_text("x")
    assert "expected" in refusal(tmp_path, data)


# --- manifest -----------------------------------------------------------------------------------------------


def test_manifest_with_every_column_in_its_order(tmp_path: Path, root: Path) -> None:
    manifest(
        root,
        "\ufeffLabel ; path;Patient;site;split;age\r\n"
        " pos ;b/1.png;007;X;Val;3\r\n\r\nneg; a/1.png ;8;X;train;\r\nneg;a\\10.png;;Y;TEST;\r\n",
    )
    index = read(tmp_path, root)
    assert index.labels == ("pos", "neg", "neg")
    assert index.patients == ("007", "8", None)
    assert index.sites == ("X", "X", "Y")
    assert index.splits == ("validation", "train", "test")
    assert index.digests[0].tobytes() == decode(root / "b" / "1.png").sha256


def test_manifest_rows_that_are_quarantined(tmp_path: Path, root: Path) -> None:
    picture(tmp_path / "secret.png", 5)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        "a/1.png,x",
        "./a/1.png,x",  # the same again
        "a/10.png,x",
        "b/../a/10.png,y",  # the same with another label
        "b/1.png,",
        "gone.png,x",
        "a,x",  # a folder
        f"{'n' * 300}.png,x",
        "../secret.png,x",
        f"{tmp_path}/secret.png,x",
        f"{root}/a/1.png,x",  # absolute paths never; the file stays in by its other name
        "link.png,x",
    ]
    manifest(root, "path,label\n" + "\n".join(rows) + "\n")
    index = read(tmp_path, root)
    assert index.labels == ("x",)
    assert index.quarantine == {"label_conflict": 1, "missing": 3, "no_label": 1, "outside_root": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("file,class\na/1.png,x\n", "expected columns path,label (and patient,site,split), found file, class"),
        ("secret/1.png,x\n", "found (another), x"),
        ("path,label,label\na/1.png,x,y\n", "each column once"),
        ("path,label,patients\na/1.png,x,3\n", "rename it to 'patient'"),
        ("path,label,split\na/1.png,x,train\na/10.png,x,secret\n", "line 3: split must be train, val, validation"),
        ("path,label,site\na/1.png,x,A\na/10.png,x,\n", "column site is blank in 1 of 2 rows, first in line 3"),
        ("path,label,split\na/1.png,x,\na/10.png,x,val\n", "column split is blank in 1 of 2 rows"),
        ("path,label\nsecret,a,x\n", "line 2: 3 cells, expected 2"),
        ("path,label,patient\na/1.png,x,secret\na/10.png,x,1\na/1.png,x,2\n", "lines 2 and 4: one file"),
        ("path,label\n", "no usable image"),
        ("label,path\nx\n", "missing 1"),
        ("path,label\nsecret.png,x\n", "missing 1"),
    ],
)
def test_manifests_that_cannot_be_taken_at_their_word(tmp_path: Path, root: Path, text: str, message: str) -> None:
    manifest(root, text)
    assert message in refusal(tmp_path, root)


def test_manifest_in_another_encoding(tmp_path: Path, root: Path) -> None:
    manifest(root, "path,label\na/1.png,gr\xf6\xdfer\n", "latin-1")
    assert "UTF-8" in refusal(tmp_path, root)


def test_blank_columns_are_no_columns(tmp_path: Path, root: Path) -> None:
    manifest(root, "path,label,patient,site,split\na/1.png,x,,,\nb/1.png,y\n")
    index = read(tmp_path, root)
    assert (index.patients, index.sites, index.splits) == ((None, None), None, None)


# --- grey and colour ----------------------------------------------------------------------------------------


def test_the_commoner_kind_stays(tmp_path: Path, root: Path) -> None:
    picture(root / "a" / "colour.png", 7, colour=True)
    index = read(tmp_path, root)
    assert (index.kind, len(index), index.quarantine) == ("grey", 4, {"kind_differs": 1})
    for number in range(4):
        picture(root / "b" / f"colour{number}.png", 10 + number, colour=True)
    index = read(tmp_path, root)
    assert (index.kind, len(index), index.quarantine) == ("colour", 5, {"kind_differs": 4})
    assert index.source(index.rows).shape == (5, 3, SIZE, SIZE)


def test_a_preset_that_decides_the_kind_takes_both(tmp_path: Path, root: Path) -> None:
    picture(root / "a" / "colour.png", 7, colour=True)
    for colour, channels in [("grey", 1), ("colour", 3)]:
        index = read(tmp_path, root, colour=colour)
        assert (index.kind, index.quarantine) == (colour, {})
        assert index.source(index.rows).shape == (5, channels, SIZE, SIZE)


# --- cache --------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the name of every file that is decoded; the real decoder does the work."""
    names: list[str] = []

    def recording(path: Path) -> Decoded:
        names.append(path.name)
        return decode(path)

    monkeypatch.setattr(client.folder, "decode", recording)
    return names


def same(one: FolderIndex, other: FolderIndex) -> bool:
    return (
        one.labels == other.labels
        and one.patients == other.patients
        and one.digests.tobytes() == other.digests.tobytes()
        and one.source(one.rows).tobytes() == other.source(other.rows).tobytes()
    )


def test_second_run_opens_no_image(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(str(get_testdata_file("CT_small.dcm", download=False)), root / "a" / "ct.dcm")
    decoded = counted(monkeypatch)
    first = read(tmp_path, root)
    assert len(decoded) == 5
    decoded.clear()
    assert same(first, read(tmp_path, root))
    assert decoded == []


def test_a_changed_file_is_read_again(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(tmp_path, root)
    decoded = counted(monkeypatch)
    picture(root / "a" / "1.png", 99)
    os.utime(root / "a" / "1.png", ns=(1, 1))
    second = read(tmp_path, root)
    assert decoded == ["1.png"]
    assert second.digests[0].tobytes() == decode(root / "a" / "1.png").sha256
    assert second.digests[1:].tobytes() == first.digests[1:].tobytes()


def test_other_size_or_preset_has_its_own_cache(tmp_path: Path, root: Path) -> None:
    small = read_folder(root, GENERIC, 8, tmp_path / "cache")
    large = read_folder(root, GENERIC, 16, tmp_path / "cache")
    assert small.source(small.rows).shape == (4, 1, 8, 8)
    assert large.source(large.rows).shape == (4, 1, 16, 16)
    assert len({path.name for path in (tmp_path / "cache" / "images").iterdir()}) == 4


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        picture(tmp_path / "data" / "a" / f"{number}.png", number)
    monkeypatch.setattr(client.folder, "_CHUNK", 4)
    calls: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_folder(tmp_path / "data", GENERIC, SIZE, tmp_path / "cache", interrupt)
    assert calls == [(0, 10), (4, 10), (8, 10)]
    decoded = counted(monkeypatch)
    index = read(tmp_path, tmp_path / "data")
    assert sorted(decoded) == ["8.png", "9.png"]
    assert same(index, read_folder(tmp_path / "data", GENERIC, SIZE, tmp_path / "fresh"))


def test_damaged_rows_are_made_anew(tmp_path: Path, root: Path) -> None:
    first = read(tmp_path, root)
    pixels = first.source(first.rows)
    rows = tmp_path / "cache" / "images" / f"{preprocessing_id(GENERIC, SIZE)}-grey" / "rows.bin"
    content = bytearray(rows.read_bytes())
    content[100] ^= 1
    rows.write_bytes(content)
    second = read(tmp_path, root)
    np.testing.assert_array_equal(second.source(second.rows), pixels)


def test_cache_that_cannot_be_written(tmp_path: Path, root: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(CacheError):
        read(tmp_path, root)


def test_progress_ends_at_all(tmp_path: Path, root: Path) -> None:
    calls: list[tuple[int, int]] = []
    for _ in range(2):
        read_folder(root, GENERIC, SIZE, tmp_path / "cache", lambda done, total: calls.append((done, total)))
    assert calls == [(0, 4), (4, 4), (4, 4)]


def test_listing_opens_nothing(root: Path) -> None:
    (root / "a" / "1.png").chmod(0)
    listing = list_folder(root)
    assert [entry.label for entry in listing.entries] == ["a", "a", "a", "b"]
    assert isinstance(listing.quarantine, Mapping)
