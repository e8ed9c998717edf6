"""Data sets: both .npz layouts, folders, phantoms and names; files that are damaged, hostile or of another kind."""

from __future__ import annotations

import csv
import io
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.preprocessing import preprocess_array
from common.errors import ConfigError, ConsiliumError, DataError
from common.presets import PRESETS, preprocessing_id
from simulations import datasets, encodings, phantoms
from simulations.annotation import Policy
from simulations.datasets import ArraySource, load
from simulations.splits import units

PRESET = PRESETS["generic"]


def images_of(count, side=6, seed=0, colour=False):
    shape = (count, side, side, 3) if colour else (count, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def medmnist(**changed):
    """Return the arrays of a small file in MedMNIST's layout: two labels, 20/6/6 images."""
    arrays = {}
    for number, (split, count) in enumerate((("train", 20), ("val", 6), ("test", 6))):
        arrays[f"{split}_images"] = images_of(count, seed=number)
        arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 2).reshape(-1, 1)
    return arrays | changed


def flat(count=40, **changed):
    return {"images": images_of(count), "labels": np.arange(count) % 2} | changed


def findings_of(count):
    """Return three labels an image, 1 or 0."""
    return np.stack([np.arange(count) // step % 2 for step in (1, 2, 4)], axis=1)


def written(folder, arrays, name="data.npz"):
    path = folder / name
    np.savez(path, **arrays)
    return path


def read(dataset, root, **changed):
    arguments = {"data_root": root / "data", "cache": root / "cache", "preset": PRESET, "image_size": 8}
    return load(str(dataset), **(arguments | {"seed": 0, "sites": 3} | changed))


# ------------------------------------------------------------------------------------------------------------- layouts


def test_medmnist_layout_keeps_its_splits_and_reads_its_pixels(tmp_path):
    arrays = medmnist()
    data = read(written(tmp_path, arrays, "tiny chest.npz"), tmp_path)
    assert data.name == "tiny-chest"
    assert data.cohort.label_names == ("0", "1")
    assert [data.cohort.support(split).tolist() for split in ("train", "validation", "test")] == [
        [10, 10],
        [3, 3],
        [3, 3],
    ]
    assert data.sites is None and data.dropped == {} and data.warnings == ()
    assert data.cohort.preprocessing == preprocessing_id(PRESET, 8)
    order = np.array([31, 0, 20, 19, 20])  # across the three arrays, out of order, one twice
    whole = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    assert np.array_equal(data.cohort.pixels(order), preprocess_array(whole[order], 8))


def test_flat_layout_with_sites_patients_and_splits(tmp_path):
    patients = np.array([f"p{number // 2}" for number in range(40)])
    patients[38:] = ""
    splits = np.array((["train"] * 6 + ["val"] * 2 + ["Test"] * 2) * 4)
    labels = np.array(["scar", "normal"])[np.arange(40) % 2]
    sites = np.array([b"north", b"s\xc3\xbcd"])[np.arange(40) // 20]
    data = read(written(tmp_path, flat(labels=labels, patient=patients, split=splits, site=sites)), tmp_path)
    assert data.cohort.label_names == ("normal", "scar")
    assert data.cohort.labels.tolist() == [1, 0] * 20
    assert data.sites == ("north",) * 20 + ("süd",) * 20
    assert len(np.unique(data.cohort.patients)) == 21  # 19 pairs, and two images of unknown patients
    assert data.cohort.splits.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 2, 2] * 4


@pytest.mark.parametrize("splits", [np.arange(40) % 3, (np.arange(40) % 3).astype(np.uint8).reshape(-1, 1)])
def test_splits_may_be_numbers(tmp_path, splits):
    labels = np.arange(40) // 20
    data = read(written(tmp_path, flat(labels=labels, split=splits)), tmp_path)
    assert data.cohort.splits.tolist() == np.ravel(splits).tolist()


def test_flat_layout_without_splits_is_split_by_patient(tmp_path):
    patients = np.arange(80) // 4
    data = read(written(tmp_path, flat(80, patient=patients, labels=patients % 2)), tmp_path)
    for patient in range(20):
        assert len(np.unique(data.cohort.splits[data.cohort.patients == patient])) == 1
    assert data.cohort.support("test").tolist() == [8, 8]  # 2 of the 10 patients of each label


@pytest.mark.parametrize("labels", [np.arange(40) % 2, (np.arange(40) % 2).astype(float), np.arange(40) % 2 == 1])
def test_labels_may_be_whole_floats_or_flags(tmp_path, labels):
    data = read(written(tmp_path, flat(labels=labels)), tmp_path)
    assert data.cohort.labels.tolist() == [0, 1] * 20


@pytest.mark.parametrize("colour", [False, True])
def test_grey_and_colour_have_one_and_three_channels(tmp_path, colour):
    images = images_of(40, colour=colour)
    path = written(tmp_path, flat(images=images if colour else images[..., None]))
    for policy, channels in (("keep", 3 if colour else 1), ("grey", 1), ("colour", 3)):
        data = read(path, tmp_path, preset=replace(PRESET, colour=policy))
        assert data.cohort.pixels(np.array([3, 1])).shape == (2, channels, 8, 8)
        assert data.cohort.pixels(np.array([], dtype=np.int64)).shape == (0, channels, 8, 8)


def test_duplicates_never_straddle_given_splits_and_are_counted(tmp_path):
    arrays = medmnist()
    arrays["val_images"][0] = arrays["train_images"][3]
    arrays["test_images"][5] = arrays["train_images"][4]
    arrays["train_images"][7] = arrays["train_images"][6]
    data = read(written(tmp_path, arrays), tmp_path)
    assert data.dropped == {"duplicate_across_splits": 2}
    assert len(data.cohort) == 30
    kept = preprocess_array(np.delete(arrays["train_images"], [3, 4], axis=0), 8)
    assert np.array_equal(data.cohort.pixels(data.cohort.indices("train")), kept)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=30, max_size=30), st.lists(st.integers(0, 2), min_size=30, max_size=30))
def test_no_image_is_ever_in_two_splits(tmp_path_factory, copies, splits):
    folder = tmp_path_factory.mktemp("npz")
    images = np.concatenate([images_of(26)[copies], images_of(6, seed=1)])
    given_splits = np.array([*splits, 0, 0, 1, 1, 2, 2])
    path = written(folder, flat(36, images=images, labels=np.arange(36) % 2, split=given_splits))
    cohort = read(path, folder).cohort
    unit = units(cohort.patients, cohort.digests)
    assert len(np.unique(unit * 3 + cohort.splits)) == len(np.unique(unit))


def test_digests_tell_shapes_apart_and_do_not_depend_on_the_image_size(tmp_path):
    tall = written(tmp_path, flat(images=np.zeros((40, 2, 8), np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None]))
    data = read(tall, tmp_path)
    wide = written(tmp_path, flat(images=np.zeros((40, 8, 2), np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None]))
    other = read(wide, tmp_path)
    assert not (data.cohort.digests == other.cohort.digests).all(axis=1).any()
    assert np.array_equal(read(wide, tmp_path, image_size=16).cohort.digests, other.cohort.digests)


def test_a_source_over_arrays_can_be_pickled():
    source = ArraySource((images_of(3), images_of(2, seed=1)), 8, "keep")
    rows = np.array([4, 0])
    assert np.array_equal(pickle.loads(pickle.dumps(source))(rows), source(rows))


def test_images_are_resized_only_when_they_are_asked_for(tmp_path, monkeypatch):
    path = written(tmp_path, flat(60, images=images_of(60, side=28)))
    resized = []
    original = datasets.preprocess_array
    monkeypatch.setattr(
        datasets, "preprocess_array", lambda images, *more: resized.append(len(images)) or original(images, *more)
    )
    data = read(path, tmp_path)
    assert len(data.cohort) == 60 and resized == []
    data.cohort.pixels(np.arange(3))
    assert resized == [3]


# ------------------------------------------------------------------------------------------------------- refused files

REFUSED = {
    "deeper images": (flat(images=images_of(40).astype(np.uint16)), "expected uint8, got uint16"),
    "floats": (flat(images=images_of(40) / 255), "expected uint8, got float64"),
    "volumes": (flat(images=np.zeros((40, 6, 6, 6), np.uint8)), "3-D sets are not supported"),
    "colour volumes": (flat(images=np.zeros((40, 6, 6, 6, 3), np.uint8)), "3-D sets are not supported"),
    "colour first": (flat(images=np.zeros((40, 3, 6, 6), np.uint8)), "put colour last"),
    "rows": (flat(images=np.zeros((40, 36), np.uint8)), r"expected \(N, H, W\)"),
    "no pixels": (flat(images=np.zeros((40, 0, 6), np.uint8)), "at least one pixel"),
    "no images": (flat(0), "got none"),
    "no images, text": (flat(0, labels=np.array([], dtype="U1")), "got none"),
    "fewer labels": (flat(labels=np.arange(39) % 2), "each of 40 images"),
    "one label for all": (flat(labels=np.array(1)), "each of 40 images"),
    "one label": (flat(labels=np.zeros(40, int)), "at least two labels, got only '0'"),
    "one word": (flat(labels=np.full(40, "normal")), "at least two labels, got only 'normal'"),
    "empty word": (flat(labels=np.array(["", "scar"] * 20)), "an empty one"),
    "negative": (flat(labels=np.arange(40) % 2 - 1), r"expected 0\.\.1 .* got -1\.\.0"),
    "gap": (flat(labels=np.arange(40) % 2 * 2), r"got 0\.\.2"),
    "fractions": (flat(labels=np.arange(40) / 2), "whole numbers"),
    "not a number": (flat(labels=np.full(40, np.nan)), "whole numbers"),
    "infinite": (flat(labels=np.array([0.0, np.inf] * 20)), "whole numbers"),
    "complex": (flat(labels=np.zeros(40, complex)), "whole numbers"),
    "dates": (flat(labels=np.zeros(40, "datetime64[s]")), "whole numbers"),
    "huge": (flat(labels=np.full(40, 2**64 - 1, np.uint64)), "without a gap"),
    "several labels, one nowhere": (flat(labels=findings_of(40) * [1, 1, 0]), "no training image has label '2'"),
    "several labels, one everywhere": (flat(labels=np.maximum(findings_of(40), [0, 0, 1])), "lacks label '2'"),
    "several labels of text": (flat(labels=np.full((40, 2), "a")), "expected 1, 0, -1 or NaN .* got <U1"),
    "several labels of numbers": (flat(labels=np.full((40, 2), 3)), "expected 1, 0, -1 or NaN"),
    "several labels of probabilities": (flat(labels=np.full((40, 2), 0.4)), "expected 1, 0, -1 or NaN"),
    "several labels, infinite": (flat(labels=np.full((40, 2), np.inf)), "expected 1, 0, -1 or NaN"),
    "several labels of fewer": (flat(labels=findings_of(39)), "each of 40 images"),
    "labels in three dimensions": (flat(labels=np.zeros((40, 2, 2), int)), "each of 40 images"),
    "fewer names": (flat(labels=findings_of(40), label_names=np.array(["a", "b"])), "expected 3 different names"),
    "a name twice": (flat(labels=findings_of(40), label_names=np.array(["a", "b", "a"])), "expected 3 different names"),
    "an empty name": (
        flat(labels=findings_of(40), label_names=np.array(["a", " ", "c"])),
        "expected 3 different names",
    ),
    "numbers for names": (flat(labels=findings_of(40), label_names=np.arange(3)), "label_names: expected text"),
    "bytes": (flat(labels=np.array([b"\xff", b"a"] * 20)), "UTF-8"),
    "split word": (flat(split=np.array(["train", "exam"] * 20)), "got 'exam'"),
    "split number": (flat(split=np.arange(40) % 4), "got '3'"),
    "split fraction": (flat(split=np.zeros(40)), "split: expected text or whole numbers"),
    "split without test": (flat(split=np.arange(40) % 2), "'test'"),
    "empty site": (flat(site=np.array(["north", " "] * 20)), "site for each image"),
    "fewer patients": (flat(patient=np.arange(3)), "patient: expected one value"),
    "neither layout": ({"x": images_of(4), "y": np.arange(4)}, "missing images, labels, found 'x', 'y'"),
    "labels only": ({"labels": np.arange(4)}, "missing images, found 'labels'"),
    "nothing": ({}, "found nothing"),
    "mixed colour": (medmnist(val_images=images_of(6, colour=True)), "some of each"),
    "several labels in one split": (medmnist(train_labels=np.zeros((20, 14), np.uint8)), "as many labels in every"),
    "several labels in another": (medmnist(val_labels=np.zeros((6, 14), np.uint8)), "got 14 values an image"),
    "text in MedMNIST": (medmnist(train_labels=np.full(20, "a")), "train_labels: expected whole numbers"),
    "no val": ({k: v for k, v in medmnist().items() if "val" not in k}, "missing val_images, val_labels"),
    "objects": (flat(labels=np.array([0, "a"] * 20, dtype=object)), "never unpickled"),
    "records": (flat(images=np.zeros(40, [("a", np.uint8)])), "expected uint8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, case):
    arrays, message = REFUSED[case]
    path = written(tmp_path, arrays)
    with pytest.raises(DataError, match=message) as caught:
        read(path, tmp_path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data")


class Mischief:
    """Unpickling one of these writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_array_is_refused_and_not_executed(tmp_path):
    trace = tmp_path / "executed"
    hostile = np.empty(40, dtype=object)
    hostile[:] = [Mischief(trace)] * 40
    for name in ("images", "labels", "site"):
        path = written(tmp_path, flat(**{name: hostile}))
        with pytest.raises(DataError, match="never unpickled"):
            read(path, tmp_path)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Mischief(trace)))
    with pytest.raises(DataError, match=r"expected a \.npz file"):
        read(tmp_path / "bare.npz", tmp_path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Mischief(trace)))
    assert trace.exists()  # so the trap was set


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = written(tmp_path, medmnist())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=r"data\.npz: expected a \.npz file"):
        read(path, tmp_path)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("npz")
    content = io.BytesIO()
    np.savez_compressed(content, **flat(12, images=images_of(12, side=2)))
    damaged = bytearray(content.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (folder / "data.npz").write_bytes(damaged)
    try:
        assert len(read(folder / "data.npz", folder).cohort) == 12
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (40, -6, 6)}",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999999, 999)}",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (40, 6, 6)",
        b"{'descr': 'wat', 'fortran_order': False, 'shape': (40, 6, 6)}",
        b"__import__('os').getcwd()",
        b"\xff\xfe(",
    ],
)
def test_a_hostile_array_header_is_refused(tmp_path, header):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(1440))
        archive.writestr("labels.npy", b"")
    with pytest.raises(DataError):
        read(path, tmp_path)


def test_members_that_are_no_arrays_are_refused(tmp_path):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"not an array")
        archive.writestr("labels", b"0101")
    with pytest.raises(DataError):
        read(path, tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"notes\.txt: expected a \.npz file"):
        read(tmp_path / "notes.txt", tmp_path)


# ------------------------------------------------------------------------------------------------------ names, folders


def test_an_unknown_name_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'pneumoniamnist'"):
        read("pneumoniamnst", tmp_path)


@pytest.mark.parametrize("name", ["nowhere/data.npz", "pathmnist_17", "_28", "", "phantom\x00s"])
def test_what_is_neither_name_nor_path_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--dataset"):
        read(name or "?", tmp_path)


@pytest.mark.parametrize(("name", "why"), [("organmnist3d", "3-D"), ("organmnist3d_64", "3-D")])
def test_medmnist_sets_of_other_kinds_are_refused_before_any_download(tmp_path, name, why):
    with pytest.raises(DataError, match=why):
        read(name, tmp_path)


@pytest.mark.parametrize("name", ["pneumoniamnist", "pneumoniamnist_128"])
def test_a_medmnist_file_in_the_data_root_is_used_with_its_label_names(tmp_path, name):
    (tmp_path / "data").mkdir()
    written(tmp_path / "data", medmnist(), f"{name}.npz")
    data = read(name, tmp_path)
    assert data.name == name
    assert data.cohort.label_names == ("normal", "pneumonia")


def test_a_medmnist_name_has_the_label_count_of_the_catalogue(tmp_path):
    (tmp_path / "data").mkdir()
    written(tmp_path / "data", medmnist(train_labels=np.arange(20) % 3), "pneumoniamnist.npz")
    with pytest.raises(DataError, match=r"expected 0\.\.1"):
        read("pneumoniamnist", tmp_path)


@pytest.mark.slow
def test_a_failed_download_says_how_to_go_on_offline_and_leaves_nothing(tmp_path):
    code = (
        "import socket, sys, warnings; from pathlib import Path; sys.path.insert(0, '.')\n"
        "def refuse(*_, **__): raise OSError('no network')\n"
        "socket.getaddrinfo = refuse\n"
        "from common.presets import PRESETS; from common.errors import ConsiliumError\n"
        "from simulations.datasets import load; root, preset = Path(sys.argv[1]), PRESETS['generic']\n"
        "try: load('breastmnist', data_root=root, cache=root, preset=preset, image_size=8, seed=0, sites=3)\n"
        "except ConsiliumError as error: sys.stdout.write(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=Path(__file__).parents[1],
        env={"HOME": str(tmp_path / "home"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "breastmnist.npz: could not be downloaded from https://" in done.stdout
    assert "--data-root" in done.stdout and "\n" not in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.name != "home"]


def test_names_cost_no_import_of_medmnist_or_torch(tmp_path):
    (tmp_path / "data").mkdir()
    written(tmp_path / "data", medmnist(), "pneumoniamnist.npz")
    code = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path; from common.presets import PRESETS\n"
        "from simulations.datasets import load; root = Path(sys.argv[1])\n"
        "preset = PRESETS['generic']\n"
        "load('pneumoniamnist', data_root=root, cache=root, preset=preset, image_size=8, seed=0, sites=3)\n"
        "sys.exit(bool({'medmnist', 'torch', 'flwr', 'flwr_datasets'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "data"], cwd=Path(__file__).parents[1], check=True)


def folder_of(root, count=24, **columns):
    """Write a folder of PNG files with a manifest that has the given columns."""
    root.mkdir()
    rows = []
    for number, image in enumerate(images_of(count)):
        Image.fromarray(image).save(root / f"{number:02d}.png")
        row = {"path": f"{number:02d}.png", "label": ("scar", "normal")[number % 2]}
        rows.append(row | {name: values[number] for name, values in columns.items()})
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_a_folder_with_a_manifest(tmp_path):
    patients = [f"p{number // 2}" for number in range(24)]
    sites = ["north", "south"] * 12
    splits = (["train"] * 8 + ["val"] * 2 + ["test"] * 2) * 2
    root = folder_of(tmp_path / "my data", patient=patients, site=sites, split=splits)
    data = read(root, tmp_path)
    assert data.name == "my-data"
    assert data.cohort.label_names == ("normal", "scar")
    assert data.cohort.labels.tolist() == [1, 0] * 12
    assert data.sites == tuple(sites)
    assert data.cohort.splits.tolist() == ([0] * 8 + [1] * 2 + [2] * 2) * 2
    assert np.unique(data.cohort.patients, return_inverse=True)[1].tolist() == [number // 2 for number in range(24)]
    assert data.cohort.pixels(np.array([5, 2])).shape == (2, 1, 8, 8)


def test_a_folder_without_splits_and_a_file_that_cannot_be_read(tmp_path):
    root = folder_of(tmp_path / "images")
    (root / "03.png").write_bytes(b"not an image")
    data = read(root, tmp_path)
    assert len(data.cohort) == 23 and sum(data.cohort.quarantine.values()) == 1
    assert data.cohort.support("train").min() > 0 and data.sites is None


def test_sites_and_quarantine_fit_what_is_left_after_duplicates_are_dropped(tmp_path):
    splits = (["train"] * 8 + ["val"] * 2 + ["test"] * 2) * 2
    root = folder_of(tmp_path / "images", split=splits, site=[f"s{number:02d}" for number in range(24)])
    (root / "00.png").write_bytes((root / "11.png").read_bytes())
    (root / "03.png").write_bytes(b"not an image")
    data = read(root, tmp_path)
    assert data.dropped == {"duplicate_across_splits": 1}
    assert sum(data.cohort.quarantine.values()) == 1 and len(data.cohort) == 22
    assert data.sites == tuple(f"s{number:02d}" for number in range(24) if number not in (0, 3))


def test_a_folder_of_dicom_with_a_manifest_is_read_as_a_hospital_reads_it(tmp_path):
    root, rows = tmp_path / "mixed", [["path", "label", "site"]]
    root.mkdir()
    for number, name in enumerate([*(f"P{n // 2}" for n in range(20)), "ANON", ""]):
        syntax = list(encodings.LOSSLESS.values())[number % len(encodings.LOSSLESS)]
        encodings.write(root / f"{number:02d}", images_of(1, 64, number)[0], 8, syntax, PatientID=name)
        rows.append([f"{number:02d}", ("scar", "normal")[number // 2 % 2], "north"])
    Image.fromarray(images_of(1, 64, 99)[0]).save(root / "90.png")
    (root / "91").write_bytes((root / "00").read_bytes()[:-99])
    rows += [["90.png", "scar", "north"], ["91", "scar", "north"], ["gone.dcm", "scar", "north"]]
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = read(root, tmp_path)
    assert len(data.cohort) == 23 and data.sites == ("north",) * 23
    assert data.cohort.quarantine == {"damaged": 1} and data.ignored == {"other_suffix": 1}
    assert len(np.unique(data.cohort.patients)) == 13
    assert any("1 of 25 rows" in text for text in data.warnings)  # reported, and not as a file that is missing
    assert any("2 images have a PatientID that stands for nobody" in text for text in data.warnings)
    again = read(root, tmp_path)
    assert np.array_equal(again.cohort.digests, data.cohort.digests)


@pytest.mark.slow
def test_phantoms_are_written_once_and_carry_sites_and_patients(tmp_path):
    told = []
    data = read("phantoms", tmp_path, progress=lambda done, total: told.append((done, total)))
    assert data.name == "phantoms" and len(data.cohort) == 600
    assert data.cohort.label_names == phantoms.LABELS
    assert len(set(data.sites)) == 3
    assert len(np.unique(data.cohort.patients)) < 600
    assert told[-1] == (600, 600)
    (folder,) = (tmp_path / "cache" / "phantoms").iterdir()
    assert folder.name == f"v{phantoms.VERSION}-3-600-0"
    again = read("phantoms", tmp_path)
    assert np.array_equal(again.cohort.splits, data.cohort.splits)
    assert np.array_equal(again.cohort.digests, data.cohort.digests)


def test_the_tree_of_errors_ends_with_the_right_exit_codes():
    assert (ConfigError.exit_code, DataError.exit_code, ConsiliumError.exit_code) == (2, 2, 1)


# ------------------------------------------------------------------------------------------- several labels an image


def test_several_labels_are_read_with_their_names_and_policies(tmp_path):
    labels = findings_of(40).astype(float)
    labels[0], labels[1] = [-1, np.nan, 1], [np.nan, -1, np.nan]
    path = written(tmp_path, flat(labels=labels, label_names=np.array(["mass", "effusion", "nodule "])))
    for policy, first in {
        Policy(): [[np.nan, 0, 1], [0, np.nan, 0]],
        Policy("soft", "ignore"): [[0.5, np.nan, 1], [np.nan, 0.5, np.nan]],
        Policy("ones", "zeros"): [[1, 0, 1], [0, 1, 0]],
        Policy("zeros", "ignore"): [[0, np.nan, 1], [np.nan, 0, np.nan]],
    }.items():
        cohort = read(path, tmp_path, policy=policy).cohort
        assert cohort.kind == "multi-label" and cohort.label_names == ("mass", "effusion", "nodule")
        np.testing.assert_array_equal(cohort.labels[:2], np.array(first, np.float32))
        np.testing.assert_array_equal(cohort.labels[2:], labels[2:])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, bool, np.float16, np.float64])
def test_yes_and_no_may_be_of_any_type(tmp_path, dtype):
    cohort = read(written(tmp_path, flat(labels=findings_of(40).astype(dtype))), tmp_path).cohort
    assert cohort.labels.dtype == np.float32 and cohort.label_names == ("0", "1", "2")
    assert cohort.labels.tolist() == findings_of(40).tolist()


def test_a_label_that_a_whole_site_left_blank_is_masked_there_whatever_the_policy(tmp_path):
    labels, sites = findings_of(40).astype(float), np.array(["north", "south"] * 20)
    labels[sites == "south", 1] = np.nan
    labels[3, 0] = labels[4, 1] = np.nan
    data = read(written(tmp_path, flat(labels=labels, site=sites)), tmp_path, policy=Policy(blank="zeros"))
    found = data.cohort.labels
    assert np.isnan(found[sites == "south", 1]).all()
    assert found[3, 0] == found[4, 1] == 0
    assert np.isnan(found).sum() == 20
    assert any("masked where it was not: 1" in warning for warning in data.warnings)


def test_one_column_is_one_label_and_several_that_exclude_each_other_are_told(tmp_path):
    one = read(written(tmp_path, flat(labels=(np.arange(40) % 2).reshape(-1, 1))), tmp_path)
    assert one.cohort.kind == "single-label" and one.warnings == ()
    hot = read(written(tmp_path, flat(labels=np.eye(2, dtype=int)[np.arange(40) % 2])), tmp_path)
    assert hot.cohort.kind == "multi-label"
    assert ["exactly one of several labels" in warning for warning in hot.warnings] == [True]
    free = read(written(tmp_path, flat(labels=findings_of(40))), tmp_path)
    assert free.warnings == ()


def test_several_labels_in_medmnists_layout(tmp_path):
    counts = {"train": 20, "val": 8, "test": 8}
    arrays = medmnist(val_images=images_of(8, seed=5), test_images=images_of(8, seed=6))
    arrays |= {f"{split}_labels": findings_of(count).astype(np.uint8) for split, count in counts.items()}
    cohort = read(written(tmp_path, arrays), tmp_path).cohort
    assert cohort.kind == "multi-label" and cohort.label_names == ("0", "1", "2")
    assert [len(cohort.indices(split)) for split in ("train", "validation", "test")] == [20, 8, 8]
    named = read(written(tmp_path, arrays | {"label_names": np.array(["a", "b", "c"])}), tmp_path).cohort
    assert named.label_names == ("a", "b", "c")


def test_chestmnist_is_found_by_name_with_its_fourteen_findings(tmp_path):
    pytest.importorskip("medmnist")
    random = np.random.default_rng(0)
    arrays = {}
    for number, (split, count) in enumerate((("train", 60), ("val", 20), ("test", 20))):
        arrays[f"{split}_images"] = images_of(count, 28, seed=number)
        arrays[f"{split}_labels"] = (random.random((count, 14)) < 0.3).astype(np.uint8)
    (tmp_path / "data").mkdir()
    written(tmp_path / "data", arrays, "chestmnist.npz")
    cohort = read("chestmnist", tmp_path).cohort
    assert cohort.kind == "multi-label" and len(cohort.label_names) == 14
    assert cohort.label_names[:2] == ("atelectasis", "cardiomegaly")


def test_names_of_labels_are_read_only_where_there_are_several(tmp_path):
    """A file of one label an image may hold whatever it likes under that name."""
    names = np.empty(1, dtype=object)
    assert read(written(tmp_path, flat(label_names=names)), tmp_path).cohort.label_names == ("0", "1")
    with pytest.raises(DataError, match="never unpickled"):
        read(written(tmp_path, flat(labels=findings_of(40), label_names=names)), tmp_path)


@pytest.mark.parametrize("uncertain", ["ignore", "soft"])
def test_a_folder_of_several_labels_is_read_by_the_same_policy(tmp_path, uncertain):
    root, labels = tmp_path / "photos", findings_of(24).astype(object)
    labels[0], labels[5, 1] = [-1, "", 1], ""
    root.mkdir()
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "mass", "effusion", "nodule"])
        for number, (image, row) in enumerate(zip(images_of(24), labels, strict=True)):
            Image.fromarray(image).save(root / f"{number}.png")
            writer.writerow([f"{number}.png", *row])
    cohort = read(root, tmp_path, policy=Policy(uncertain, "ignore")).cohort
    assert cohort.kind == "multi-label" and cohort.label_names == ("mass", "effusion", "nodule")
    assert (cohort.labels == 0.5).sum() == (uncertain == "soft")
    assert np.isnan(cohort.labels).sum() == 2 + (uncertain == "ignore")
