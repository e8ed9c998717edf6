"""Updates that wait on disk come back bit for bit, and give the same weights as those in memory."""

from __future__ import annotations

import numpy as np
import pytest

from common.run_config import Training
from server import spill as module
from server.aggregation import Aggregator, Contribution
from server.spill import Spill

pytestmark = pytest.mark.usefixtures("grid_identity")

SHAPES = {"a.weight": (3, 4), "b": (), "c.empty": (0, 2), "d.bias": (5,)}


def update(seed):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "RESIDENT_BYTES", 0)
    spill = Spill(tmp_path / "state" / "incoming", 1)
    spill.clear()
    return spill


def test_what_is_kept_comes_back_bit_for_bit(on_disk):
    given = update(0)
    kept = on_disk.keep("north", given)
    assert list(kept) == list(given)
    assert len(kept) == len(given)
    for name, value in given.items():
        assert kept[name].shape == value.shape
        assert kept[name].tobytes() == value.tobytes()


def test_a_new_round_begins_with_an_empty_folder(on_disk, tmp_path):
    on_disk.keep("north", update(0))
    on_disk.clear()
    assert not list((tmp_path / "state" / "incoming").iterdir())


def test_small_updates_stay_in_memory(tmp_path):
    spill = Spill(tmp_path / "incoming", 1000)
    spill.clear()
    given = update(0)
    assert spill.keep("north", given) is given
    assert not (tmp_path / "incoming").exists()


@pytest.mark.parametrize(
    "strategy", ["fedavg", "fedprox:0.1", "fedavgm", "fedadam", "median", "trimmed-mean:0.2", "krum"]
)
def test_weights_are_the_same_from_disk_and_from_memory(on_disk, strategy):
    current, updates = update(9), [update(seed) for seed in range(5)]
    found = []
    for keep in (lambda _site, given: given, on_disk.keep):
        aggregator = Aggregator(Training(strategy=strategy), 5)
        for number in (1, 2):
            contributions = [Contribution(f"s{i}", keep(f"s{i}", given), 10 + i) for i, given in enumerate(updates)]
            weights = aggregator.aggregate(number, current, contributions)
        found.append({name: value.tobytes() for name, value in weights.items()})
    assert found[0] == found[1]
