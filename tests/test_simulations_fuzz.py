"""A short fuzz through the true decoding processes, and its reproducibility."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from client.image import CODES, IGNORED
from simulations.fuzz import fuzz, good_files, spoiled_files

pytestmark = pytest.mark.slow


def test_three_hundred_spoiled_files_are_all_accounted_for() -> None:
    found = fuzz(300, 7, 120.0, 2)
    assert found.files == 300 == sum(found.outcomes.values())
    assert set(found.outcomes) <= {"", *CODES, *IGNORED}
    assert 0 < found.outcomes[""] < 300


def test_the_seed_decides_every_file(tmp_path: Path) -> None:
    files = good_files(tmp_path)
    one, other, third = (list(islice(spoiled_files(files, 20, seed), 20)) for seed in (1, 1, 2))
    assert one == other != third
