"""Public image sets as one pool of examples: phantoms, MedMNIST files, other .npz files and folders.

A .npz holds either MedMNIST's six arrays (`train_images`, `train_labels`, `val_images`, ...), which name the splits, or
the flat layout: `images` (N, H, W) or (N, H, W, 3) uint8 and `labels` (N,), with optional `site`, `patient`, `split`.
Labels of two or more columns, (N, K), are several an image: 1, 0, -1 or NaN each, with optional `label_names` (K,).
Nothing is ever unpickled, pixels are resized only when they are read, and medmnist is imported only to download.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import re
import struct
import sys
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.catalogue import Catalogue, Progress
from client.cohort import Cohort, PixelSource
from client.gathering import Folder, Gathered, gather, nothing_usable
from client.identity import Identity
from client.labels import Labelled, Rules
from client.preprocessing import preprocess_array
from client.secret import make_secret, read_secret
from common.errors import ConfigError, ConsiliumError, DataError, unknown_value
from common.presets import ColourPolicy, Preset, preprocessing_id
from simulations import annotation, phantoms
from simulations.annotation import AS_USUAL, Policy
from simulations.splits import assign

PHANTOM_IMAGES = 600

MEDMNIST_SPLITS = ("train", "val", "test")

MEDMNIST_ARRAYS = tuple(f"{split}_{what}" for split in MEDMNIST_SPLITS for what in ("images", "labels"))

FLAT_ARRAYS = ("images", "labels")

FLAT_COLUMNS = ("site", "patient", "split")  # optional, one value an image

LABEL_NAMES = "label_names"  # optional, of several labels an image

SPLIT_WORDS = {
    "train": 0, "val": 1, "validation": 1, "test": 2,
    "0": 0, "1": 1, "2": 2,
}  # fmt: skip

_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError, RuntimeError,
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
)  # fmt: skip
"""What NumPy and zipfile raise on damaged files; RuntimeError is an encrypted or unknown compression."""

Array = NDArray[Any]
_Shown = tuple[int, ColourPolicy]  # image size and colour policy


@dataclass(frozen=True)
class Dataset:
    """One pool of examples, before it is divided into sites."""

    name: str  # short name for the output folder and the report
    cohort: Cohort  # the whole pool, splits filled in
    sites: tuple[str, ...] | None  # natural site of each example; None where the data name none
    dropped: Mapping[str, int]  # reason -> examples left out, e.g. {"duplicate_across_splits": 8}
    ignored: Mapping[str, int]  # reason -> files of a folder that are no images
    warnings: tuple[str, ...] = ()  # what was decided on the user's behalf


@dataclass(frozen=True)
class ArraySource:
    """A `PixelSource` over arrays in memory: their rows count on from one array to the next."""

    parts: tuple[NDArray[np.uint8], ...]  # each (n, H, W), or each (n, H, W, 3)
    size: int  # S, pixels a side
    colour: ColourPolicy

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the preprocessed images of these rows: (n, C, S, S) uint8, C 1 for grey or 3 for colour."""
        ends = np.cumsum([len(part) for part in self.parts])
        owner = np.searchsorted(ends, rows, side="right")
        grey = self.colour == "grey" or (self.colour == "keep" and self.parts[0].ndim == 3)
        images = np.empty((len(rows), 1 if grey else 3, self.size, self.size), dtype=np.uint8)
        for number in np.unique(owner):
            chosen = np.flatnonzero(owner == number)
            part = self.parts[number]
            images[chosen] = preprocess_array(part[rows[chosen] - ends[number] + len(part)], self.size, self.colour)
        return images


@dataclass(frozen=True)
class _Pool:
    """What every kind of data comes to before splits are assigned: N examples."""

    source: PixelSource
    rows: NDArray[np.int64]
    digests: NDArray[np.uint8]
    labels: Array  # (N,) int64, or of several an image (N, K) float32, as a cohort has them
    label_names: tuple[str, ...]
    patients: NDArray[np.int64]
    sites: Array | None = None
    splits: NDArray[np.int8] | None = None
    quarantine: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def load(
    dataset: str,
    *,
    data_root: Path,
    cache: Path,
    preset: Preset,
    image_size: int,
    seed: int,
    sites: int,
    policy: Policy = AS_USUAL,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set by name, file or folder, and assign its splits.

    Args:
        dataset: `phantoms`; a MedMNIST name, such as `pneumoniamnist` or `pneumoniamnist_128`; a .npz file; a folder.
        data_root: where MedMNIST files are, or are downloaded to.
        cache: where phantoms are written.
        preset: how images are shown to the network; of arrays, which are 8-bit already, only its colour policy.
        image_size: side of the preprocessed images, in pixels.
        seed: the run's seed: draws phantoms and splits.
        sites: how many hospitals the phantoms come from.
        policy: what annotations of several labels an image are taken for that are neither yes nor no.
        progress: called with the number of files done and of files in all.

    Raises:
        ConfigError: `dataset` is neither a name nor a path.
        DataError: the data cannot be used.
        ConsiliumError: a MedMNIST file could not be downloaded.
    """
    catalogue = _catalogue()
    path = Path(dataset)
    base, side = _base_and_side(dataset)
    shown = (image_size, preset.colour)
    if dataset == "phantoms":
        path = _phantoms(cache, sites, seed, progress)
        pool = _folder_pool(path, preset, image_size, cache, progress, phantoms.LABELS)
    elif base in catalogue and (not side or f"url{side}" in catalogue[base]):
        pool = _medmnist_pool(base, side, catalogue[base], data_root, shown, policy)
    elif path.is_dir():
        rules = Rules(uncertain=policy.uncertain, blank=policy.blank)
        pool = _folder_pool(path, preset, image_size, cache, progress, None, rules)
    elif path.is_file():
        pool = _npz_pool(path, shown, None, policy)
    else:
        if path.suffix == ".npz" or len(path.parts) > 1:
            raise ConfigError(f"--dataset {dataset}: no such file or folder")
        names = [name for name, info in catalogue.items() if not _unsupported(info)]
        unknown_value("--dataset", dataset, ["phantoms", *names, "a .npz file that exists", "a folder that exists"])
    return _dataset(_short_name(dataset), pool, preprocessing_id(preset, image_size), seed)


def _dataset(name: str, pool: _Pool, preprocessing: str, seed: int) -> Dataset:
    several = pool.labels.ndim == 2
    if len(pool.label_names) < 2 and not several:
        raise DataError(f"{name}: expected at least two labels, got only {pool.label_names[0]!r}")
    try:
        made = assign(pool.labels, pool.digests, pool.patients, pool.splits, seed, pool.label_names)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    whole = Cohort(
        source=pool.source,
        rows=pool.rows,
        digests=pool.digests,
        labels=pool.labels,
        splits=made.splits,
        patients=pool.patients,
        label_names=pool.label_names,
        preprocessing=preprocessing,
        quarantine=pool.quarantine,
    )
    natural = None if pool.sites is None else tuple(str(site) for site in pool.sites[made.keep])
    cohort = whole if made.keep.all() else replace(whole.subset(np.flatnonzero(made.keep)), quarantine=pool.quarantine)
    notices = annotation.notices(pool.labels, pool.label_names, pool.sites) if several else []
    return Dataset(name, cohort, natural, made.dropped, pool.ignored, (*pool.warnings, *made.warnings, *notices))


def _phantoms(cache: Path, sites: int, seed: int, progress: Progress | None) -> Path:
    """Write the phantoms of this seed unless they are there already, and return their folder."""
    images = max(PHANTOM_IMAGES, phantoms.MIN_IMAGES_PER_SITE * sites)
    path = cache / "phantoms" / f"v{phantoms.VERSION}-{sites}-{images}-{seed}"
    phantoms.write(path, sites, images, seed, None if progress is None else lambda done: progress(done, images))
    return path


def _short_name(dataset: str) -> str:
    path = Path(dataset)
    stem = path.stem if path.suffix == ".npz" else path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "data"


# ---------------------------------------------------------------------------------------------------- MedMNIST by name


def _catalogue() -> dict[str, dict[str, Any]]:
    """Return medmnist's table of data sets, read as text: importing the package loads torch and makes a home folder."""
    spec = importlib.util.find_spec("medmnist")
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse(Path(spec.origin).with_name("info.py").read_text(encoding="utf-8"))
    tables = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INFO"
    ]
    table: dict[str, dict[str, Any]] = ast.literal_eval(tables[0])
    return table


def _base_and_side(name: str) -> tuple[str, str]:
    """Split `pathmnist_128` into `pathmnist` and `_128`, the way medmnist names its variants."""
    base, _, side = name.rpartition("_")
    return (base, f"_{side}") if base and side.isdigit() else (name, "")


def _unsupported(info: Mapping[str, Any]) -> str:
    """Return why a MedMNIST set cannot be used, or an empty text."""
    return "3-D sets are not supported" if info["python_class"].endswith("3D") else ""


def _medmnist_pool(
    base: str, side: str, info: Mapping[str, Any], data_root: Path, shown: _Shown, policy: Policy
) -> _Pool:
    if _unsupported(info):
        raise DataError(f"{base}: {_unsupported(info)}: choose another data set")
    path = data_root / f"{base}{side}.npz"
    if not path.is_file():
        _download(path, info, side)
    names = tuple(str(info["label"][str(number)]) for number in range(len(info["label"])))
    return _npz_pool(path, shown, names, policy)


def _download(path: Path, info: Mapping[str, Any], side: str) -> None:
    """Let medmnist fetch and verify a file; it gets its name in the data root only when it is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as draft, contextlib.redirect_stdout(sys.stderr):
            kind = getattr(importlib.import_module("medmnist"), info["python_class"])
            kind(split="val", download=True, root=draft, size=int(side[1:] or 28))
            (Path(draft) / path.name).replace(path)
    except (OSError, RuntimeError) as error:
        raise ConsiliumError(
            f"{path.name}: could not be downloaded from {info[f'url{side}']}; to go on offline, put the file into "
            f"{path.parent} (--data-root) or pass a .npz file as --dataset"
        ) from error


# ---------------------------------------------------------------------------------------------------------- .npz files


def _npz_pool(path: Path, shown: _Shown, label_names: tuple[str, ...] | None, policy: Policy) -> _Pool:
    """Read a .npz in either layout; `label_names` are those of the catalogue, None for a file of the user's."""
    try:
        arrays = _read_npz(path)
        if "images" in arrays:
            return _flat_pool(arrays, shown, policy)
        return _medmnist_layout_pool(arrays, shown, label_names, policy)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error


def _read_npz(path: Path) -> dict[str, Array]:
    """Read the arrays of one layout and no others; object arrays, which are pickles, are refused unread."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    try:
        with file:
            if not zipfile.is_zipfile(file):
                raise DataError("expected a .npz file (a zip of NumPy arrays); it is something else, or was cut short")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: np.asarray(archive[name]) for name in _wanted(archive.files)}
                if LABEL_NAMES in archive.files and any(_several(arrays[name]) for name in arrays if "label" in name):
                    arrays[LABEL_NAMES] = np.asarray(archive[LABEL_NAMES])
                return arrays
    except _UNREADABLE as error:
        raise DataError(
            "expected plain NumPy arrays; it is damaged, or holds Python objects, which are never unpickled: "
            "download it again, or save numbers and text only"
        ) from error


def _wanted(found: list[str]) -> list[str]:
    """Return the arrays to read: those of the layout that the names found point to."""
    medmnist = any(name in found for name in MEDMNIST_ARRAYS)
    required = MEDMNIST_ARRAYS if medmnist else FLAT_ARRAYS
    missing = [name for name in required if name not in found]
    if missing:
        raise DataError(
            f"expected MedMNIST's arrays (train_images, train_labels, val_..., test_...) or images and labels; "
            f"missing {', '.join(missing)}, found {', '.join(map(repr, found[:12])) or 'nothing'}"
        )
    return [*required, *(name for name in FLAT_COLUMNS if name in found and not medmnist)]


def _medmnist_layout_pool(
    arrays: dict[str, Array], shown: _Shown, names: tuple[str, ...] | None, policy: Policy
) -> _Pool:
    parts = [_images(arrays[f"{split}_images"], f"{split}_images") for split in MEDMNIST_SPLITS]
    if len({part.ndim for part in parts}) > 1:
        raise DataError("expected all images grey or all in colour; got some of each")
    counts = [len(part) for part in parts]
    several = _several(arrays["train_labels"])
    labels, label_names = (
        _medmnist_targets(arrays, counts, names, policy) if several else _medmnist_labels(arrays, counts, names)
    )
    splits = np.repeat(np.arange(3, dtype=np.int8), counts)
    return _array_pool(parts, shown, labels, label_names, None, splits=splits)


def _medmnist_labels(
    arrays: dict[str, Array], counts: list[int], names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return one label an image, as a number, and the names of the labels."""
    found = [
        _whole(_column(arrays[f"{split}_labels"], f"{split}_labels", count), f"{split}_labels")
        for split, count in zip(MEDMNIST_SPLITS, counts, strict=True)
    ]
    return _numbered(np.concatenate(found), names)


def _medmnist_targets(
    arrays: dict[str, Array], counts: list[int], names: tuple[str, ...] | None, policy: Policy
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Return several labels an image, as targets, and the names of the labels."""
    found = [
        annotation.targets(_columns(arrays[f"{split}_labels"], f"{split}_labels", count), f"{split}_labels", policy)
        for split, count in zip(MEDMNIST_SPLITS, counts, strict=True)
    ]
    if len({part.shape[1] for part in found}) > 1:
        raise DataError("expected as many labels in every split; got more in one than in another")
    joined = np.concatenate(found)
    return joined, _label_names(joined, arrays.get(LABEL_NAMES) if names is None else np.array(names))


def _flat_pool(arrays: dict[str, Array], shown: _Shown, policy: Policy) -> _Pool:
    images = _images(arrays["images"], "images")
    columns = {name: _column(arrays[name], name, len(images)) for name in FLAT_COLUMNS if name in arrays}
    for name, column in columns.items():
        if column.dtype.kind not in "biuU":
            raise DataError(f"{name}: expected text or whole numbers, got {column.dtype}")
    sites = _site_names(columns["site"]) if "site" in columns else None
    labels, label_names = _flat_labels(arrays, len(images), policy, sites)
    return _array_pool(
        [images],
        shown,
        labels,
        label_names,
        columns.get("patient"),
        splits=_split_numbers(columns["split"]) if "split" in columns else None,
        sites=sites,
    )


def _flat_labels(
    arrays: dict[str, Array], count: int, policy: Policy, sites: Array | None
) -> tuple[Array, tuple[str, ...]]:
    """Return one label an image as a number, or several as targets, and the names of the labels."""
    if _several(arrays["labels"]):
        found = annotation.targets(_columns(arrays["labels"], "labels", count), "labels", policy, sites)
        return found, _label_names(found, arrays.get(LABEL_NAMES))
    values = _column(arrays["labels"], "labels", count)
    return _named(values) if values.dtype.kind == "U" else _numbered(_whole(values, "labels"), None)


def _several(labels: Array) -> bool:
    """Return whether an array holds several labels an image: two columns or more; one column is one label."""
    return labels.ndim == 2 and labels.shape[1] > 1


def _columns(array: Array, name: str, count: int) -> Array:
    """Return one row an image, (N, K)."""
    if array.ndim != 2 or len(array) != count:
        raise DataError(f"{name}: expected one row of labels for each of {count} images, got shape {array.shape}")
    return array


def _label_names(targets: Array, given: Array | None) -> tuple[str, ...]:
    if not len(targets):
        raise DataError("expected images, got none")
    if given is not None and given.dtype.kind != "U":
        raise DataError(f"{LABEL_NAMES}: expected text, got {given.dtype}")
    return annotation.names(given, targets.shape[1])


def _array_pool(
    parts: list[NDArray[np.uint8]],
    shown: _Shown,
    labels: Array,
    label_names: tuple[str, ...],
    patients: Array | None,
    *,
    splits: NDArray[np.int8] | None,
    sites: Array | None = None,
) -> _Pool:
    rows = np.arange(len(labels))
    return _Pool(
        source=ArraySource(tuple(parts), *shown),
        rows=rows,
        digests=np.concatenate([_digests(part) for part in parts]),
        labels=labels,
        label_names=label_names,
        patients=rows if patients is None else _patient_numbers(patients.tolist()),
        sites=sites,
        splits=splits,
    )


def _images(array: Array, name: str) -> NDArray[np.uint8]:
    """Return the images as (N, H, W) or (N, H, W, 3); a last axis of one grey value is taken off."""
    if array.dtype != np.uint8:
        raise DataError(f"{name}: expected uint8, got {array.dtype}: scale the values to 0..255 and save them as uint8")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if not (array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)):
        volume = array.ndim == 5 or (array.ndim == 4 and array.shape[1] not in (1, 3))
        hint = "3-D sets are not supported" if volume else "put colour last"
        raise DataError(f"{name}: expected (N, H, W) or (N, H, W, 3), got {array.shape}: {hint}")
    if 0 in array.shape[1:]:
        raise DataError(f"{name}: expected images of at least one pixel, got {array.shape}")
    return array


def _column(array: Array, name: str, count: int) -> Array:
    """Return one value an image, (N,); text as Unicode."""
    if array.ndim == 2 and array.shape[1] > 1:
        raise DataError(f"{name}: got {array.shape[1]} values an image, expected one")
    if array.shape not in ((count,), (count, 1)):
        raise DataError(f"{name}: expected one value for each of {count} images, got shape {array.shape}")
    column = array.reshape(count)
    if column.dtype.kind != "S":
        return column
    try:
        return np.char.decode(column, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: expected text in UTF-8, got other bytes") from error


def _whole(values: Array, name: str) -> NDArray[np.int64]:
    """Return labels as int64; floats are accepted where they are whole numbers."""
    if values.dtype.kind not in "biuf":
        raise DataError(f"{name}: expected whole numbers from 0, got {values.dtype}")
    if values.dtype.kind == "f" and not ((np.abs(values) < 2**31) & (np.floor(values) == values)).all():
        raise DataError(f"{name}: expected whole numbers from 0, got fractions, infinities or NaN")
    return values.astype(np.int64)


def _numbered(labels: NDArray[np.int64], names: tuple[str, ...] | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Check labels that are numbers: 0..K-1, K the number of names, or of distinct labels where none are known."""
    found = np.unique(labels)
    expected = len(found) if names is None else len(names)
    if not len(found):
        raise DataError("expected images, got none")
    if found[0] < 0 or found[-1] >= expected:
        raise DataError(
            f"labels: expected 0..{expected - 1} without a gap for {expected} labels, got {found[0]}..{found[-1]}"
        )
    return labels, names or tuple(str(number) for number in range(expected))


def _named(values: Array) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number labels that are text, in text order."""
    found, labels = np.unique(values, return_inverse=True)
    if not len(found):
        raise DataError("expected images, got none")
    if not str(found[0]).strip():
        raise DataError("labels: expected a label for each image, got an empty one")
    return labels.astype(np.int64), tuple(str(name) for name in found)


def _split_numbers(values: Array) -> NDArray[np.int8]:
    """Return given splits as indices into SPLITS."""
    found, inverse = np.unique(values, return_inverse=True)
    words = [str(value).strip().lower() for value in found]
    unknown = [word for word in words if word not in SPLIT_WORDS]
    if unknown:
        raise DataError(f"split: expected train, val, validation or test (or 0, 1, 2), got {unknown[0]!r}")
    return np.array([SPLIT_WORDS[word] for word in words], dtype=np.int8)[inverse]


def _site_names(values: Array) -> Array:
    names = np.char.strip(values.astype(np.str_))
    if (names == "").any():
        raise DataError("site: expected a site for each image, or no sites at all; got an empty one")
    return names


def _patient_numbers(keys: Sequence[str | bytes | int | None]) -> NDArray[np.int64]:
    """Number the patients; an image whose patient is not known (None, or an empty text) is a patient of its own."""
    known = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    unknown = {None, "", b""}
    numbers = [len(known) + row if key in unknown else known[key] for row, key in enumerate(keys)]
    return np.array(numbers, dtype=np.int64)


def _digests(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the SHA-256 of each image and its shape: (N, 32)."""
    start = hashlib.sha256(f"{images.shape[1:]}".encode())
    digests = bytearray()
    for image in np.ascontiguousarray(images):
        each = start.copy()
        each.update(image)
        digests += each.digest()
    return np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 32)


# ------------------------------------------------------------------------------------------------------------- folders


def _folder_pool(
    root: Path,
    preset: Preset,
    image_size: int,
    cache: Path,
    progress: Progress | None,
    names: tuple[str, ...] | None,
    rules: Rules | None = None,
) -> _Pool:
    """Read a folder as a hospital would; images that name no patient are patients of their own."""
    identity = Identity(_secret(cache))
    catalogue = Catalogue(cache, identity, preset, image_size)
    gathered = gather(Folder(root, None, rules or Rules()), catalogue, identity, progress=progress)
    places, labelled = gathered.usable, gathered.labelled
    if labelled is None or not len(places):
        raise DataError(nothing_usable(gathered, root))
    labels, label_names = gathered.labels(places), labelled.label_names
    if names is not None and labels.ndim == 1:
        labels, label_names = np.array([names.index(name) for name in label_names], np.int64)[labels], names
    digests = gathered.digests(places)
    quarantine, ignored = gathered.counts()
    sites, splits = (gathered.said(column, places) for column in (labelled.sites, labelled.splits))
    return _Pool(
        source=catalogue.source(gathered.kind),
        rows=catalogue.rows(gathered.entries_of(places)),
        digests=digests,
        labels=labels,
        label_names=label_names,
        patients=_patient_numbers([gathered.patients[place] for place in places.tolist()]),
        sites=None if None in sites else _site_names(np.asarray(sites)),
        splits=None if None in splits else _split_numbers(np.asarray(splits)),
        quarantine=dict(sorted(quarantine.items())),
        ignored=dict(sorted(ignored.items())),
        warnings=(*(message for _, message in labelled.warnings), *_unmatched(gathered, labelled)),
    )


def _unmatched(gathered: Gathered, labelled: Labelled) -> Iterator[str]:
    """Yield what else was decided on the user's behalf."""
    if labelled.unmatched_rows:
        yield f"{labelled.unmatched_rows} of {labelled.rows} rows of the label table match no file"
    nobody = int(gathered.nobody[gathered.usable].sum())
    if nobody:
        yield f"{nobody} images have a PatientID that stands for nobody: each is taken for a patient of its own"


def _secret(cache: Path) -> bytes:
    """Return the secret that digests in this cache are made with; it is made at the first use."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "secret"
    with contextlib.suppress(FileExistsError):
        make_secret(path)
    return read_secret(path)
