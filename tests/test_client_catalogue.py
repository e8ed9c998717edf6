"""Each file is read once, whatever happens to the process; what is known of it follows the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import client.catalogue
from client.catalogue import Catalogue
from client.identity import Identity
from common.presets import GENERIC

SITE = Identity(b"s" * 32)


def pictures(folder: Path) -> list[Path]:
    random = np.random.default_rng(0)
    shapes = [(20, 20), (20, 30, 3), (9, 9)]
    paths = [folder / f"{number}.png" for number in range(len(shapes))]
    for path, shape in zip(paths, shapes, strict=True):
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(path)
    (folder / "bad").write_bytes(b"no image")
    return [*paths, folder / "bad", folder / "absent"]


def opened(tmp_path: Path, identity: Identity = SITE) -> Catalogue:
    return Catalogue(tmp_path / "cache", identity, GENERIC, 16, workers=1)


def test_the_second_time_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pictures(tmp_path)
    told: list[tuple[int, int]] = []
    first = opened(tmp_path).read(paths, lambda done, total: told.append((done, total)))
    assert [entry.code for entry in first] == ["", "", "", "not_an_image", "missing"]
    assert told[0] == (0, 5) and told[-1] == (5, 5)
    monkeypatch.setattr(client.catalogue, "Pool", None)
    again = opened(tmp_path)
    assert again.read(paths[:4]) == first[:4]
    images = again.source("colour")(again.rows(first[:3]))
    assert images.shape == (3, 3, 16, 16)
    assert [bool((image == image[:1]).all()) for image in images] == [True, False, True]
    np.testing.assert_array_equal(again.source("grey")(again.rows([first[0], first[2]]))[:, 0], images[[0, 2], 0])


def test_a_changed_file_is_read_again_and_another_secret_finds_nothing(tmp_path: Path) -> None:
    paths = pictures(tmp_path)[:2]
    before = opened(tmp_path).read(paths)
    Image.fromarray(np.full((20, 20), 9, np.uint8)).save(paths[0])
    os.utime(paths[0], ns=(1, 1))
    known = opened(tmp_path).known(paths)
    assert known[0] is None and known[1] == before[1]
    assert opened(tmp_path).read(paths)[0].digest != before[0].digest
    assert opened(tmp_path, Identity(b"t" * 32)).known(paths) == [None, None]


def test_copies_share_their_pixels(tmp_path: Path) -> None:
    path = pictures(tmp_path)[0]
    copy = tmp_path / "copy.png"
    copy.write_bytes(path.read_bytes())
    catalogue = opened(tmp_path)
    one, other = catalogue.read([path, copy])
    assert one.digest == other.digest
    assert len(set(catalogue.rows([one, other]).tolist())) == 1


def test_a_record_without_its_pixels_is_not_believed(tmp_path: Path) -> None:
    paths = pictures(tmp_path)[:1]
    catalogue = opened(tmp_path)
    (entry,) = catalogue.read(paths)
    for store in catalogue._pixels.values():
        store.remove(np.frombuffer(entry.digest, "V32"))
    assert opened(tmp_path).known(paths) == [None]
    assert opened(tmp_path).read(paths)[0].digest == entry.digest
