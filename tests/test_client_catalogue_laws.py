"""Each file is read once: by digests of path, size and time; by processes that are killed in between as well."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.catalogue import FLUSH, Catalogue
from client.identity import Identity
from client.image import Header
from client.preprocessing import preprocess_array
from client.records import Entry
from common.presets import GENERIC
from simulations.encodings import SYNTAXES, film, write

SITE = Identity(b"s" * 32)
SIZE = 16
ROOT = Path(__file__).resolve().parents[1]


def opened(cache: Path, identity: Identity = SITE, **options: Any) -> Catalogue:
    return Catalogue(cache, identity, GENERIC, SIZE, 1, **options)


def pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for seed in range(count):
        Image.fromarray(film(24, 24, 8, seed)).save(folder / f"{seed}.png")
    return [folder / f"{seed}.png" for seed in range(count)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are handed to decoding processes."""
    names: list[str] = []
    true = Catalogue._read

    def counting(self: Catalogue, paths: Any) -> Any:
        names.extend(path.name for path in paths)
        return true(self, paths)

    monkeypatch.setattr(Catalogue, "_read", counting)
    return names


def test_a_second_reading_opens_nothing(tmp_path: Path, reads: list[str]) -> None:
    paths = pictures(tmp_path / "in", 5)
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG and no more")
    paths.append(tmp_path / "in" / "bad.png")
    first = opened(tmp_path / "cache").read(paths)
    assert len(reads) == 6
    again = opened(tmp_path / "cache").read(paths)
    assert len(reads) == 6
    assert again == first
    assert [entry.code for entry in again] == [""] * 5 + ["not_an_image"]


def test_the_pixels_are_those_of_the_preprocessing(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "in", 4)
    catalogue = opened(tmp_path / "cache")
    entries = catalogue.read(paths)
    expected = preprocess_array(np.stack([np.asarray(Image.open(path)) for path in paths]), SIZE)
    np.testing.assert_array_equal(catalogue.source("grey")(catalogue.rows(entries)), expected)


def test_a_changed_file_is_read_again_and_no_other(tmp_path: Path, reads: list[str]) -> None:
    paths = pictures(tmp_path / "in", 3)
    first = opened(tmp_path / "cache").read(paths)
    reads.clear()
    Image.fromarray(film(24, 24, 8, 99)).save(paths[1])
    os.utime(paths[1], ns=(1, 1))
    again = opened(tmp_path / "cache").read(paths)
    assert reads == ["1.png"]
    assert [a == b for a, b in zip(first, again, strict=True)] == [True, False, True]


def test_another_time_alone_is_another_file(tmp_path: Path, reads: list[str]) -> None:
    paths = pictures(tmp_path / "in", 1)
    opened(tmp_path / "cache").read(paths)
    os.utime(paths[0], ns=(1, 1))
    opened(tmp_path / "cache").read(paths)
    assert reads == ["0.png", "0.png"]


def test_grey_and_colour_beside_each_other(tmp_path: Path) -> None:
    grey, colour = film(24, 24, 8), np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    for name, pixels in (("grey", grey), ("colour", colour)):
        Image.fromarray(pixels).save(tmp_path / name, "PNG")
    catalogue = opened(tmp_path / "cache")
    entries = catalogue.read([tmp_path / "grey", tmp_path / "colour"])
    assert [entry.kind for entry in entries] == ["grey", "colour"]
    shown = catalogue.source("colour")(catalogue.rows(entries))
    np.testing.assert_array_equal(shown[0], np.repeat(preprocess_array(grey[None], SIZE)[0], 3, axis=0))
    np.testing.assert_array_equal(shown[1], preprocess_array(colour[None], SIZE)[0])


def test_what_says_more_of_the_moment_than_of_the_file_is_not_kept(tmp_path: Path, reads: list[str]) -> None:
    paths = pictures(tmp_path / "in", 2)
    content = paths[0].read_bytes()
    paths[0].unlink()
    assert [entry.code for entry in opened(tmp_path / "cache").read(paths)] == ["missing", ""]
    paths[0].write_bytes(content)
    assert [entry.code for entry in opened(tmp_path / "cache").read(paths)] == ["", ""]
    assert reads == ["0.png", "1.png", "0.png"]


def test_who_is_taken_out_is_not_read_and_who_comes_back_is(tmp_path: Path) -> None:
    paths = [write(tmp_path / who, film(24, 24, 8, n), 8, SYNTAXES["raw"], PatientID=who) for n, who in enumerate("ab")]
    person = SITE.person("a")
    assert [e.code for e in opened(tmp_path / "cache").read(paths)] == ["", ""]
    out = opened(tmp_path / "cache", opted_out=frozenset([person]))
    assert out.known(paths)[0] is None
    out.exclude(paths[:1], [person])
    assert [e.code for e in out.read(paths)] == ["opted_out", ""]
    assert out.read(paths)[0] == Entry("opted_out", Header(person=person))
    assert [e.code for e in opened(tmp_path / "cache").read(paths)] == ["", ""]


def test_an_image_that_is_not_there_has_no_row_and_is_not_shown(tmp_path: Path) -> None:
    catalogue = opened(tmp_path / "cache")
    (known,) = catalogue.read(pictures(tmp_path / "in", 1))
    rows = catalogue.rows([known, Entry("", digest=b"\1" * 32), Entry("", kind="colour", digest=b"\1" * 32)])
    assert rows.tolist() == [0, -1, -1]
    for row in rows[1:]:
        with pytest.raises(IndexError):
            catalogue.source("colour")(np.array([row]))


def test_each_file_is_told_of(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    paths = pictures(tmp_path / "in", 3)
    opened(tmp_path / "cache").read(paths, lambda done, total: told.append((done, total)))
    assert told[0] == (0, 3)
    assert told[-1] == (3, 3)


@pytest.mark.slow
def test_a_reading_that_is_killed_goes_on_where_it_was(tmp_path: Path, reads: list[str]) -> None:
    paths = pictures(tmp_path / "in", 4 * FLUSH)
    script = (
        "import sys\nfrom pathlib import Path\nfrom client.catalogue import Catalogue\n"
        "from client.identity import Identity\nfrom common.presets import GENERIC\n"
        f"catalogue = Catalogue(Path(sys.argv[1]), Identity(b's' * 32), GENERIC, {SIZE}, 1)\n"
        "catalogue.read(sorted(Path(sys.argv[2]).iterdir()), lambda done, total: print(done, flush=True))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script, str(tmp_path / "cache"), str(tmp_path / "in")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 2 * FLUSH:
            pass
        time.sleep(0.02)
        process.kill()
    entries = opened(tmp_path / "cache").read(paths)
    assert 0 < len(reads) <= 2 * FLUSH
    assert [entry.code for entry in entries] == [""] * len(paths)
    reads.clear()
    assert opened(tmp_path / "cache").read(paths) == entries
    assert reads == []
