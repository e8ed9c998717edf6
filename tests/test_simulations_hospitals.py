"""Sites from files are the sites they were written from."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import DataError
from simulations import plain_flower
from simulations.hospitals import OpenFromDisk, _site


@pytest.mark.parametrize("several", [False, True])
def test_a_cohort_comes_back_from_disk_with_its_labels(lab, tmp_path, several):
    sites = lab.clinics(masked="west") if several else lab.cohorts()
    opener = OpenFromDisk.write(tmp_path / "state", sites, lab.cache, "cpu")
    for number, (name, cohort) in enumerate(sites.items()):
        found = _site(opener, number)
        assert (found.name, found.cohort.kind, found.cohort.label_names) == (name, cohort.kind, cohort.label_names)
        for field in ("rows", "digests", "labels", "splits", "patients"):
            one, other = getattr(found.cohort, field), getattr(cohort, field)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_the_comparison_with_plain_flower_takes_one_label_an_image(lab):
    with pytest.raises(DataError, match="one label an image"):
        plain_flower.Images.of(lab.clinics()["north"])
