"""Every strategy gives the numbers of its paper, whatever the order of the sites, and goes on where it was saved."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.run_config import Training
from server import state as saved
from server.aggregation import Aggregator, Contribution, krum_malicious

pytestmark = pytest.mark.usefixtures("grid_identity")

# Two parameters at five sites, unequal numbers of examples, one site far off.
START = np.array([0.5, -1.0])
UPDATES = np.array([[0.10, 0.20], [0.30, -0.10], [-0.20, 0.40], [0.02, 0.13], [5.00, -7.00]])
EXAMPLES = np.array([10, 20, 30, 25, 15])
STATELESS = ("fedavg", "analytic", "fedprox:0.1", "median", "trimmed-mean:0.2", "krum")
STATEFUL = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
SERVER_LR, MOMENTUM, TAU = 0.02, 0.7, 1e-3


def training(strategy):
    return Training(strategy=strategy, server_lr=SERVER_LR, server_momentum=MOMENTUM)


def split(vector):
    """As two arrays, so that names and shapes are in play."""
    return {"b": np.float32(vector[:1]), "a": np.float32(vector[1:]).reshape(1, 1)}


def joined(weights):
    return np.concatenate([weights["b"].ravel(), weights["a"].ravel()]).astype(np.float64)


def contributions(updates, examples=EXAMPLES):
    return [
        Contribution(f"site-{number}", split(update), int(count))
        for number, (update, count) in enumerate(zip(updates, examples, strict=False))
    ]


def run(aggregator, rounds, current=START, first=1):
    """Aggregate some rounds of changing updates; return the weights after each."""
    current = split(current)
    reached = []
    for number in range(first, first + rounds):
        current = aggregator.aggregate(number, current, contributions(UPDATES * (1.0 - 0.3 * number)))
        reached.append(joined(current))
    return reached


def mean(updates):
    return EXAMPLES @ updates / EXAMPLES.sum()


def by_hand(strategy, rounds):
    """The same rounds from the formulas of the papers, in float64."""
    w, first, second, momentum = START.copy(), np.zeros(2), np.zeros(2), None
    reached = []
    for t in range(1, rounds + 1):
        updates = UPDATES * (1.0 - 0.3 * t)
        delta = mean(updates)
        if strategy in ("fedavg", "analytic", "fedprox:0.1"):
            w = w + delta  # McMahan et al. 2017, algorithm 1
        elif strategy == "median":
            w = w + np.median(updates, axis=0)  # Yin et al. 2018, definition 1
        elif strategy == "trimmed-mean:0.2":
            w = w + np.sort(updates, axis=0)[1:-1].mean(axis=0)  # Yin et al. 2018, definition 2
        elif strategy == "krum":
            w = w + updates[_krum(updates)]
        elif strategy == "fedavgm":
            momentum = -delta if momentum is None else MOMENTUM * momentum - delta  # Hsu et al. 2019, section 4.3
            w = w - momentum
        else:  # Reddi et al. 2021, algorithm 2
            first = 0.9 * first + 0.1 * delta if strategy != "fedadagrad" else delta
            second, rate = _second_moment(strategy, second, delta, t)
            w = w + rate * first / (np.sqrt(second) + TAU)
        reached.append(w)
    return reached


def _second_moment(strategy, v, delta, t):
    square = delta**2
    if strategy == "fedadagrad":
        return v + square, SERVER_LR
    if strategy == "fedyogi":
        return v - 0.01 * square * np.sign(v - square), SERVER_LR
    # Kingma and Ba's bias correction, which Flower counts from the second step.
    return 0.99 * v + 0.01 * square, SERVER_LR * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))


def _krum(updates):
    """The site whose n - f - 2 nearest neighbours are nearest (Blanchard et al. 2017, section 4)."""
    n = len(updates)
    f = (n - 3) // 2
    distances = ((updates[:, None] - updates[None]) ** 2).sum(-1)
    return int(np.argmin([np.sort(np.delete(row, own))[: n - f - 2].sum() for own, row in enumerate(distances)]))


@pytest.mark.parametrize("strategy", STATELESS + STATEFUL)
def test_the_numbers_are_those_of_the_formulas(strategy):
    found = run(Aggregator(training(strategy), 5), 3)
    np.testing.assert_allclose(found, by_hand(strategy, 3), rtol=2e-5)


def test_a_far_off_site_moves_the_mean_and_not_the_robust_rules():
    moved = {name: run(Aggregator(training(name), 5), 1)[0] - START for name in STATELESS}
    assert np.abs(moved["fedavg"]).max() > 0.5
    assert all(np.abs(moved[name]).max() < 0.2 for name in ("median", "trimmed-mean:0.2", "krum"))


def test_examples_weigh_the_mean_and_not_the_median():
    heavy = EXAMPLES * np.array([1, 1, 1, 1, 1000])
    for strategy, changes in (("fedavg", True), ("median", False)):
        light, loaded = (
            Aggregator(training(strategy), 5).aggregate(1, split(START), contributions(UPDATES, counts))
            for counts in (EXAMPLES, heavy)
        )
        assert bool(np.abs(joined(light) - joined(loaded)).max() > 1e-3) is changes


@pytest.mark.parametrize("strategy", STATELESS + STATEFUL)
def test_what_comes_out_is_float32_of_the_same_names_and_shapes_and_nothing_is_changed(strategy):
    current, given = split(START), contributions(UPDATES)
    before = (joined(current), [joined(one.update) for one in given])
    found = Aggregator(training(strategy), 5).aggregate(1, current, given)
    assert list(found) == list(current)
    assert all(found[name].dtype == np.float32 and found[name].shape == current[name].shape for name in current)
    np.testing.assert_array_equal(before[0], joined(current))
    np.testing.assert_array_equal(before[1], [joined(one.update) for one in given])


@pytest.mark.parametrize("strategy", STATELESS + STATEFUL)
def test_the_order_of_the_sites_does_not_change_a_bit(strategy):
    given = contributions(np.random.default_rng(0).normal(size=(4, 2)), EXAMPLES)
    outcomes = set()
    for order in permutations(given):
        aggregator = Aggregator(training(strategy), 4)
        weights = aggregator.aggregate(1, split(START), order)
        weights = aggregator.aggregate(2, weights, order[::-1])
        outcomes.add(joined(weights).tobytes() + b"".join(value.tobytes() for value in aggregator.state().values()))
    assert len(outcomes) == 1


@pytest.mark.parametrize("strategy", ["fedavg", "analytic", "fedprox:0.1", "fedavgm", "median", "trimmed-mean:0.2"])
def test_one_site_alone_gives_its_own_weights_unless_the_server_has_a_rate(strategy):
    found = Aggregator(training(strategy), 1).aggregate(1, split(START), contributions(UPDATES[:1]))
    np.testing.assert_allclose(joined(found), START + UPDATES[0], rtol=1e-6)


# ------------------------------------------------------------------------------------------------ saved states


@pytest.mark.parametrize("strategy", STATEFUL)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_restored_strategy_goes_on_with_the_same_bits(strategy, after, tmp_path):
    whole = run(Aggregator(training(strategy), 5), 5)
    first = Aggregator(training(strategy), 5)
    reached = run(first, after)
    current = reached[-1] if reached else START
    state = saved.RunState(
        round=after,
        weights=split(current),
        best={},
        best_round=0,
        best_score=None,
        best_examples=0,
        threshold=None,
        strategy=first.state(),
        fixed={},
        edges=np.zeros((1, 1)),
    )
    saved.save(tmp_path / "state", state)
    held = saved.load(tmp_path / "state")
    second = Aggregator(training(strategy), 5)
    second.restore(held.strategy)
    rest = run(second, 5 - after, joined(held.weights), after + 1)
    assert [row.tobytes() for row in reached + rest] == [row.tobytes() for row in whole]


@pytest.mark.parametrize("strategy", STATEFUL)
def test_memory_matters(strategy):
    """If forgetting changed nothing, the test above would prove nothing."""
    whole = run(Aggregator(training(strategy), 5), 3)
    forgetful = run(Aggregator(training(strategy), 5), 1, whole[1], 3)
    assert np.abs(forgetful[0] - whole[2]).max() > 1e-5


@pytest.mark.parametrize("strategy", STATELESS)
def test_strategies_without_memory_have_nothing_to_save(strategy):
    aggregator = Aggregator(training(strategy), 5)
    run(aggregator, 2)
    assert aggregator.state() == {}


# --------------------------------------------------------------------------------------------------------- krum


@pytest.mark.parametrize("sites", [1, 2])
def test_krum_needs_three_sites(sites):
    with pytest.raises(ConfigError, match=rf"krum: needs at least 3 sites, got {sites}"):
        Aggregator(training("krum"), sites)


@given(st.integers(3, 1000))
def test_krum_stands_as_many_hostile_sites_as_its_theorem_allows(sites):
    f = krum_malicious(sites)
    assert 2 * f + 2 < sites <= 2 * (f + 1) + 2


@pytest.mark.parametrize("present", [1, 2, 3, 4])
def test_krum_takes_one_of_those_who_are_left(present):
    found = Aggregator(training("krum"), 5).aggregate(1, split(START), contributions(UPDATES[:present]))
    assert any(np.allclose(joined(found), START + update, atol=1e-6) for update in UPDATES[:present])


@pytest.mark.parametrize("seed", range(6))
def test_krum_sees_small_updates_of_large_weights(seed):
    """Distances of weights would drown in the rounding of their squared norms, which are a million times larger."""
    random = np.random.default_rng(seed)
    current = {"w": random.normal(0, 30, 4000).astype(np.float32)}
    updates = random.normal(0, 1e-3, (5, 4000)).astype(np.float32)
    updates[2] *= 20
    given = [Contribution(f"site-{n}", {"w": update}, 10) for n, update in enumerate(updates)]
    found = Aggregator(training("krum"), 5).aggregate(1, current, given)
    assert found["w"].tobytes() == (current["w"] + updates[_krum(updates.astype(np.float64))]).tobytes()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(3, 8))
def test_krum_chooses_by_the_definition(seed, sites):
    updates = np.random.default_rng(seed).normal(size=(sites, 2))
    given = contributions(updates, np.ones(sites))
    found = Aggregator(training("krum"), sites).aggregate(1, split(START), given)
    np.testing.assert_allclose(joined(found), START + updates[_krum(updates)], rtol=1e-4, atol=1e-6)
