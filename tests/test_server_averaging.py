"""The mean of the last rounds is the mean of exactly these, whatever came before."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import QuorumLost
from common.run_config import Training
from server.averaging import averaged

Weights = Mapping[str, np.ndarray]


def rounds(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    shapes = {"body": (2, 3), "head": (4,)}
    return [
        {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(count)
    ]


def means(training: Training, weights: list[dict[str, np.ndarray]]) -> list[Weights]:
    """What is kept after each round."""
    kept: list[Weights] = []
    for number, one in enumerate(weights, start=1):
        kept.append(averaged(training, number, kept[-1] if kept else {}, one))
    return kept


@given(count=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_the_last_rounds_count_alike_and_earlier_ones_not_at_all(count: int, share: float, seed: int) -> None:
    weights = rounds(count, seed)
    kept = means(Training(rounds=count, averaging=share), weights)
    last = int(np.ceil(share * count))
    assert [bool(mean) for mean in kept] == [number > count - last for number in range(1, count + 1)]
    for number in range(count - last, count):
        for name in weights[0]:
            expected = np.mean([one[name] for one in weights[count - last : number + 1]], axis=0, dtype=np.float64)
            assert kept[number][name].dtype == np.float32
            np.testing.assert_allclose(kept[number][name], expected, rtol=1e-5, atol=1e-6)


def test_without_averaging_nothing_is_kept() -> None:
    assert means(Training(rounds=3), rounds(3, 0)) == [{}, {}, {}]


def test_what_came_in_is_not_changed() -> None:
    first, second = rounds(2, 0)
    copies = {name: value.copy() for name, value in first.items()}
    averaged(Training(rounds=2, averaging=1), 2, first, second)
    assert all(np.array_equal(first[name], copies[name]) for name in first)


AVERAGING = {"rounds": 4, "averaging": 0.5, "lr": 0.05, "schedule": "constant"}


def judged(outcome):
    return [entry["validation"] for entry in outcome.rounds]


@pytest.fixture(scope="module")
def ended(lab):
    """A run of four rounds that ends with the mean of the last two."""
    return lab.execute(lab.start(training=AVERAGING))


def test_a_run_takes_its_way_and_ends_with_the_mean(lab, ended):
    plain = lab.execute(lab.start(training={**AVERAGING, "averaging": 0.0}))
    assert judged(plain)[:4] == judged(ended)[:4]
    assert judged(plain)[4] != judged(ended)[4]


def test_a_run_that_was_interrupted_averages_the_same_rounds(lab, ended, tmp_path):
    start = lab.start(tmp_path, training=AVERAGING)
    with pytest.raises(QuorumLost):
        lab.execute(start, lab.grid(start, faults=["drop:south@4"]))
    assert judged(lab.execute(start)) == judged(ended)
