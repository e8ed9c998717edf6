"""Features once: what passes the trunk, what stays on disk, and what comes back."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client import features as features_module
from client import views
from client.augmentation import Augmentation, keys
from client.cohort import Cohort
from client.features import BATCH, Extractor, Features
from client.folding import folded
from client.rowstore import RowStore
from common import checkpoint, model
from common.backbone import Layout, Trunk
from common.errors import CacheError
from common.model import Built
from common.presets import PRESETS
from common.run_config import Data, Model, RunConfig, Task

SIZE = 32
GENERIC = Augmentation.of(PRESETS["generic"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cohort_of(count: int, channels: int = 1) -> Cohort:
    images = np.random.default_rng(5).integers(0, 256, (count, channels, SIZE, SIZE), np.uint8)
    digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images)
    return Cohort(
        source=lambda rows: images[rows],
        rows=np.arange(count),
        digests=np.frombuffer(digests, np.uint8).reshape(count, 32),
        labels=np.arange(count) % 2,
        splits=np.zeros(count, np.int8),
        patients=np.arange(count),
        label_names=("benign", "malignant"),
        preprocessing="0123456789abcdef",
    )


def run_of(backbone: str = "tf_efficientnet_lite0", trainable: str = "head", labels: int = 2) -> RunConfig:
    return RunConfig(
        task=Task(name="tiny", labels=tuple(f"label {number}" for number in range(labels))),
        data=Data(preset="generic", image_size=SIZE, views=2),
        model=Model(backbone=backbone, weights="none", trainable=trainable),
    )


def with_statistics(built: Built) -> Built:
    """Give the norms running statistics as training leaves them, so that they do something."""
    generator = torch.Generator().manual_seed(3)
    for module in built.trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").normal_(0, 0.1, generator=generator)
            module.get_buffer("running_var").uniform_(0.5, 1.5, generator=generator)
    return built


@pytest.fixture(scope="module")
def built() -> Built:
    return with_statistics(model.skeleton(run_of()))


def extractor_of(
    built: Built, cache: Path, cohort: Cohort, augmentation: Augmentation = GENERIC, sha256: str = "ab" * 32
) -> Extractor:
    return Extractor.open(
        built.trunk,
        built.spec,
        sha256=sha256,
        cohort=cohort,
        cache=cache,
        augmentation=augmentation,
        device="cpu",
    )


@pytest.fixture
def seen(built: Built) -> Iterator[list[bytes]]:
    """The images that pass the trunk in batches, one entry an image; the comparison of `folded` is left out."""
    images: list[bytes] = []

    def note(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) == BATCH["cpu"]:
            images.extend(image.contiguous().numpy().tobytes() for image in inputs[0])

    handle = built.trunk.register_forward_pre_hook(note)  # copies of the trunk keep it
    yield images
    handle.remove()


def rows_of(extractor: Extractor, cohort: Cohort, count: int) -> np.ndarray:
    """(views, N, D) as float16, straight from the store."""
    found = np.stack([keys(cohort.digests, view, extractor.augmentation) for view in range(count)])
    places = extractor.store.find(found.reshape(-1))
    assert (places >= 0).all()
    return extractor.store.take(places).reshape(count, len(cohort), -1)


# Once


def test_every_image_and_view_passes_the_trunk_once_whatever_comes_later(
    built: Built, seen: list[bytes], tmp_path: Path
) -> None:
    cohort = cohort_of(32)
    first = extractor_of(built, tmp_path, cohort)
    assert first.fill(cohort, 2) == 64
    assert (len(seen), len(set(seen))) == (64, 64)
    before = rows_of(first, cohort, 2)
    assert first.fill(cohort, 2) == 0

    other_head = model.skeleton(run_of(labels=5))
    order = np.random.default_rng(0).permutation(32)
    for part in (order[:11], order[11:], order):  # the sites of another partition, then all in another order
        again = extractor_of(Built(built.trunk, other_head.upper, built.spec), tmp_path, cohort)
        assert again.fill(cohort.subset(part), 2) == 0
        np.testing.assert_array_equal(rows_of(again, cohort.subset(part), 2), before[:, part])
    assert len(seen) == 64
    assert extractor_of(built, tmp_path, cohort).fill(cohort, 3) == 32
    assert len(set(seen)) == 96


def test_another_head_has_the_same_trunk_and_another_cut_has_not() -> None:
    runs = [run_of(), run_of(labels=3), run_of(trainable="stages:1")]
    names = [checkpoint.sha256(model.frozen_content(model.skeleton(run), run)) for run in runs]
    assert names[0] == names[1] != names[2]


def test_duplicates_are_computed_once(built: Built, seen: list[bytes], tmp_path: Path) -> None:
    cohort = cohort_of(16)
    repeated = cohort.subset(np.concatenate([np.arange(16), np.arange(15, -1, -1), np.array([3, 3])]))
    extractor = extractor_of(built, tmp_path, repeated)
    assert extractor.fill(repeated, 1) == 16
    assert (len(seen), len(set(seen))) == (16, 16)
    rows = rows_of(extractor, repeated, 1)[0]
    np.testing.assert_array_equal(rows[:16], rows[16:32][::-1])
    np.testing.assert_array_equal(extractor.missing(repeated, 1), np.arange(16))


def test_an_interrupted_fill_is_completed_and_nothing_is_done_twice(
    built: Built, seen: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "FLUSH_ROWS", 16)
    cohort = cohort_of(64)

    def interrupt(done: int, _total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extractor_of(built, tmp_path / "interrupted", cohort).fill(cohort, 1, interrupt)
    assert len(seen) == 32
    extractor = extractor_of(built, tmp_path / "interrupted", cohort)
    np.testing.assert_array_equal(extractor.missing(cohort, 0), np.arange(32, 64))
    assert extractor.fill(cohort, 1) == 32
    assert (len(seen), len(set(seen))) == (64, 64)
    whole = extractor_of(built, tmp_path / "whole", cohort)
    whole.fill(cohort, 1)
    np.testing.assert_array_equal(rows_of(extractor, cohort, 1), rows_of(whole, cohort, 1))


def test_a_damaged_row_is_redone_and_equal(built: Built, seen: list[bytes], tmp_path: Path) -> None:
    cohort = cohort_of(20)
    extractor = extractor_of(built, tmp_path, cohort)
    extractor.fill(cohort, 2)
    before = rows_of(extractor, cohort, 2)
    seen.clear()
    path = extractor.store.folder / "rows.bin"
    content = bytearray(path.read_bytes())
    content[7 * extractor.store.row.itemsize + 5] ^= 4
    path.write_bytes(content)
    mended = extractor_of(built, tmp_path, cohort)
    assert mended.store.damaged == 1
    with pytest.raises(CacheError, match="missing"):
        mended.features(cohort, 2)
    np.testing.assert_array_equal(mended.missing(cohort, 0), [7])
    assert mended.fill(cohort, 2) == 1
    assert len(set(seen)) == 1
    np.testing.assert_array_equal(rows_of(mended, cohort, 2), before)


@pytest.mark.parametrize(("sha256", "preprocessing"), [("cd" * 32, "0123456789abcdef"), ("ab" * 32, "f" * 16)])
def test_another_trunk_or_preprocessing_finds_nothing(
    built: Built, tmp_path: Path, sha256: str, preprocessing: str
) -> None:
    cohort = cohort_of(3)
    extractor_of(built, tmp_path, cohort).fill(cohort, 1)
    other = Cohort(**{**cohort.__dict__, "preprocessing": preprocessing})
    np.testing.assert_array_equal(extractor_of(built, tmp_path, other, sha256=sha256).missing(other, 0), [0, 1, 2])


def test_progress_counts_rows(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "FLUSH_ROWS", 8)
    told: list[tuple[int, int]] = []
    cohort = cohort_of(10)
    extractor_of(built, tmp_path, cohort).fill(cohort, 2, lambda done, total: told.append((done, total)))
    assert told == [(8, 20), (10, 20), (18, 20), (20, 20)]


# Bits


def assert_rows_depend_on_nothing_else(built: Built, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = cohort_of(21, channels=3)
    straight = extractor_of(built, folder / "straight", cohort)
    straight.fill(cohort, 2)
    expected = rows_of(straight, cohort, 2)
    for flush in (1024, 5):
        monkeypatch.setattr(features_module, "FLUSH_ROWS", flush)
        order = np.random.default_rng(flush).permutation(21)
        mixed = extractor_of(built, folder / f"mixed-{flush}", cohort)
        mixed.fill(cohort.subset(order), 2)
        np.testing.assert_array_equal(rows_of(mixed, cohort, 2), expected)
    alone = extractor_of(built, folder / "alone", cohort)
    for number in (20, 4):
        alone.fill(cohort.subset(np.array([number])), 2)
        np.testing.assert_array_equal(rows_of(alone, cohort.subset(np.array([number])), 2), expected[:, [number]])
    assert len(np.unique(expected.reshape(42, -1), axis=0)) == 42


def test_rows_depend_on_no_neighbour_position_or_chunk(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_rows_depend_on_nothing_else(built, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_rows_of_other_families_depend_on_no_neighbour_either(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = with_statistics(model.skeleton(run_of(backbone, "stages:1")))
    assert_rows_depend_on_nothing_else(built, tmp_path, monkeypatch)


def test_rows_are_the_trunks_outputs_rounded_once(built: Built, tmp_path: Path) -> None:
    cohort = cohort_of(48, channels=3)
    extractor = extractor_of(built, tmp_path, cohort)
    extractor.fill(cohort, 1)
    rows = rows_of(extractor, cohort, 1)[0].astype(np.float64)
    images = views.normalise(torch.from_numpy(cohort.pixels(np.arange(48))).float() / 255, built.spec)
    trunk = folded(built.trunk, SIZE).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        batches = images.contiguous(memory_format=torch.channels_last).split(BATCH["cpu"])
        exact = torch.cat([trunk(batch) for batch in batches]).double().numpy()
    normal = np.abs(exact) >= 2.0**-14
    assert normal.mean() > 0.5
    relative = np.abs(rows - exact)[normal] / np.abs(exact)[normal]
    assert relative.max() <= 2.0**-11
    assert relative.max() > 2.0**-13  # rows do have float16's precision
    assert np.abs(rows - exact)[~normal].max(initial=0.0) <= 2.0**-25
    head = np.random.default_rng(0).normal(size=(exact.shape[1], 3))
    assert np.abs((rows - exact) @ head).max() < 1e-2 * (exact @ head).std(axis=0).min()


def test_rows_are_those_of_the_plain_trunk_up_to_folding(built: Built, tmp_path: Path) -> None:
    cohort = cohort_of(8)
    extractor = extractor_of(built, tmp_path, cohort)
    extractor.fill(cohort, 1)
    rows = rows_of(extractor, cohort, 1)[0].astype(np.float32)
    grey = torch.from_numpy(cohort.pixels(np.arange(8))).float() / 255
    with torch.inference_mode():
        plain = built.trunk(views.normalise(grey, built.spec)).numpy()
    assert np.abs(rows - plain).max() <= 2e-3 * np.abs(plain).max()


def test_filling_leaves_the_trunk_as_it_is(built: Built, tmp_path: Path) -> None:
    before = copy.deepcopy(built.trunk.state_dict())
    extractor_of(built, tmp_path, cohort_of(2)).fill(cohort_of(2), 1)
    after = built.trunk.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Amplifier(nn.Module):
    """Pools one channel, multiplied."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images[:, :1] * self.factor,)


@pytest.mark.parametrize("factor", [1e9, float("nan"), float("inf")])
def test_activations_beyond_float16_are_an_error_and_are_not_kept(built: Built, tmp_path: Path, factor: float) -> None:
    cohort = cohort_of(5)
    loud = Built(Trunk(Amplifier(factor), Layout((), 1)), built.upper, built.spec)  # type: ignore[arg-type]
    extractor = extractor_of(loud, tmp_path, cohort)
    with pytest.raises(CacheError, match="float16"):
        extractor.fill(cohort, 1)
    assert len(extractor.store) == 0


# What comes back


@pytest.fixture(scope="module")
def filled(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Extractor, Cohort]:
    cohort = cohort_of(23)
    extractor = extractor_of(built, tmp_path_factory.mktemp("cache"), cohort)
    extractor.fill(cohort, 3)
    return extractor, cohort


def test_batches_are_the_rows_of_examples_and_views(filled: tuple[Extractor, Cohort]) -> None:
    extractor, cohort = filled
    found = extractor.features(cohort, 3)
    assert found.resident is not None
    assert found.views == 3
    view, index = torch.tensor([2, 0, 1, 1]), torch.tensor([22, 5, 5, 0])
    batch = found.batch(view, index)
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), rows_of(extractor, cohort, 3)[view, index].astype(np.float32))


def test_mapped_features_give_the_same_batches_as_resident_ones(
    filled: tuple[Extractor, Cohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, cohort = filled
    part = cohort.subset(np.array([9, 2, 2, 17, 0]))
    resident = extractor.features(part, 3)
    monkeypatch.setattr(features_module, "RESIDENT_BYTES", 0)
    mapped = extractor.features(part, 3)
    assert resident.resident is not None
    assert mapped.resident is None
    view, index = torch.tensor([2, 0, 1, 1]), torch.tensor([4, 0, 2, 1])
    assert torch.equal(mapped.batch(view, index), resident.batch(view, index))
    indices = np.array([3, 1, 4, 0])
    for one, two in zip(mapped.chunks(indices, 3), resident.chunks(indices, 3), strict=True):
        assert one.dtype == two.dtype == torch.float32
        assert torch.equal(one, two)


def test_features_that_just_fit_are_resident(filled: tuple[Extractor, Cohort], monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, cohort = filled
    size = 3 * 23 * extractor.store.row.itemsize
    for limit, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(features_module, "RESIDENT_BYTES", limit)
        assert (extractor.features(cohort, 3).resident is not None) == fits


def test_chunks_cover_the_examples_in_order(filled: tuple[Extractor, Cohort]) -> None:
    extractor, cohort = filled
    found = extractor.features(cohort, 2)
    indices = np.array([7, 3, 22, 0, 1])
    chunks = list(found.chunks(indices, 2))
    assert [tuple(chunk.shape[:2]) for chunk in chunks] == [(2, 2), (2, 2), (2, 1)]
    joined = torch.cat(chunks, dim=1).numpy()
    np.testing.assert_array_equal(joined, rows_of(extractor, cohort, 2)[:, indices].astype(np.float32))
    assert list(found.chunks(np.zeros(0, np.int64), 2)) == []


def test_features_that_were_not_filled_are_an_error(built: Built, tmp_path: Path) -> None:
    cohort = cohort_of(4)
    extractor = extractor_of(built, tmp_path, cohort)
    extractor.fill(cohort, 1)
    with pytest.raises(CacheError, match="missing"):
        extractor.features(cohort, 2)
    assert extractor.features(cohort, 1).views == 1


@pytest.mark.parametrize("resident_bytes", [0, 2**20])
def test_a_cohort_without_examples_has_features_of_nothing(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident_bytes: int
) -> None:
    monkeypatch.setattr(features_module, "RESIDENT_BYTES", resident_bytes)
    nobody = cohort_of(3).subset(np.zeros(0, np.int64))
    extractor = extractor_of(built, tmp_path, nobody)
    assert extractor.fill(nobody, 2) == 0
    found: Features = extractor.features(nobody, 2)
    assert (found.views, list(found.chunks(np.zeros(0, np.int64), 4))) == (2, [])


def test_a_cache_that_cannot_be_written_is_an_error(built: Built, tmp_path: Path) -> None:
    (tmp_path / "features").touch()
    with pytest.raises(CacheError, match="cannot be written"):
        extractor_of(built, tmp_path, cohort_of(1))


def test_a_row_has_the_width_of_the_trunk(built: Built, tmp_path: Path) -> None:
    store: RowStore = extractor_of(built, tmp_path, cohort_of(1)).store
    assert store.row == np.dtype(("<f2", (built.trunk.layout.width,)))
