"""Files written for tests and measurements say what they hold; spoiled ones follow from the seed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.pixels import pixel_array

from simulations.encodings import LOSSLESS, SYNTAXES, film, transcode, write
from simulations.fuzz import good_files, spoiled_files


@pytest.mark.parametrize("name", list(SYNTAXES))
def test_a_file_says_what_it_is(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, film(34, 42, 8), 8, SYNTAXES[name], PatientID="4711")
    data = dcmread(path)
    assert data.file_meta.TransferSyntaxUID == SYNTAXES[name]
    assert (data.Rows, data.Columns, data.BitsStored, data.PatientID) == (34, 42, 8, "4711")
    if name in LOSSLESS and name != "deflated":  # of which pydicom reads no pixels by the path
        np.testing.assert_array_equal(pixel_array(path), film(34, 42, 8))


def test_a_film_follows_from_its_seed() -> None:
    assert film(9, 7, 12, 3).max() < 2**12
    np.testing.assert_array_equal(film(9, 7, 12, 3), film(9, 7, 12, 3))
    assert not np.array_equal(film(9, 7, 12, 3), film(9, 7, 12, 4))


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a", film(34, 42, 12), 12, SYNTAXES["raw"])
    with pytest.raises(ValueError, match="GDCM does not write"):
        transcode(path, tmp_path / "b", SYNTAXES["jpeg"])


def test_spoiled_files_follow_from_the_seed(tmp_path: Path) -> None:
    good = good_files(tmp_path)
    first, again, other = (list(islice(spoiled_files(good, 200, seed), 200)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(content for content in first)
    assert sum(content in good for content in first) < 20
