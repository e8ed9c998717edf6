"""The randomness of privacy: its distributions, that nobody chooses it, and that no bit of a result tells the total.

Statistical bounds are set where a correct generator fails less than once in 10⁹ runs.
"""

from __future__ import annotations

import copy
import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.noise import LIFE, PART, Noise, add_noise, grid

MANY = 500_000
SIGMAS = 6.5
"""Standard errors: a Gaussian is beyond them once in 10¹⁰."""


@pytest.fixture(scope="module")
def noise() -> Noise:
    return Noise()


def ks_bound(count: int) -> float:
    """Where sup |F_n - F| is with probability 1 - 10⁻¹⁰ at least (Dvoretzky, Kiefer, Wolfowitz; Massart 1990)."""
    return math.sqrt(math.log(2e10) / (2 * count))


def distance(sample: torch.Tensor, cdf: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's distance, from the distribution function at the sorted sample."""
    places = torch.arange(len(sample) + 1, dtype=torch.float64) / len(sample)
    return max(float((places[1:] - cdf).max()), float((cdf - places[:-1]).max()))


# Distributions


def test_gaussian_noise_has_the_gaussian_distribution(noise: Noise) -> None:
    sample = noise.normal((MANY,), 2.5).sort().values
    assert sample.dtype == torch.float64
    assert distance(sample, torch.special.ndtr(sample / 2.5)) < ks_bound(MANY)


@pytest.mark.parametrize(("power", "moment", "spread"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)])
def test_moments_of_gaussian_noise(noise: Noise, power: int, moment: float, spread: float) -> None:
    """`spread` is the variance of xᵖ."""
    sample = noise.normal((MANY,), 1.0)
    assert abs(float((sample**power).mean()) - moment) < SIGMAS * math.sqrt(spread / MANY)


def test_neighbours_and_the_two_halves_of_a_pair_are_uncorrelated(noise: Noise) -> None:
    """Box and Muller make two numbers of two; their squares are uncorrelated as well."""
    sample = noise.normal((8 * PART,), 1.0).view(8, 2, PART // 2)
    for transform in (lambda x: x, lambda x: (x**2 - 1) / math.sqrt(2)):
        first, second = (transform(sample[:, half]).flatten() for half in (0, 1))
        assert abs(float((first * second).mean())) < SIGMAS / math.sqrt(4 * PART)
        assert abs(float((first[1:] * first[:-1]).mean())) < SIGMAS / math.sqrt(4 * PART)


def test_laplace_noise_has_the_laplace_distribution(noise: Noise) -> None:
    sample = noise.laplace((MANY,), 3.0).sort().values
    tail = 0.5 * torch.exp(-sample.abs() / 3.0)
    assert distance(sample, torch.where(sample < 0, tail, 1 - tail)) < ks_bound(MANY)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.999])
def test_a_poisson_draw_takes_each_at_its_rate(noise: Noise, rate: float) -> None:
    chosen = noise.chosen(MANY, rate)
    assert abs(len(chosen) - rate * MANY) < SIGMAS * math.sqrt(rate * (1 - rate) * MANY) + 1
    assert bool((chosen[1:] > chosen[:-1]).all()) and int(chosen[-1]) < MANY
    early = int((chosen < MANY // 2).sum())  # as many in one half as in the other
    assert abs(2 * early - len(chosen)) < SIGMAS * math.sqrt(len(chosen)) + 1


def test_rates_of_nought_and_one_are_exact(noise: Noise) -> None:
    assert len(noise.chosen(100_000, 0.0)) == 0
    assert torch.equal(noise.chosen(1000, 1.0), torch.arange(1000))
    assert len(noise.chosen(0, 0.5)) == 0


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_none_is_refused(noise: Noise, rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        noise.chosen(3, rate)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_number_below_a_count_is_equally_likely(noise: Noise, count: int) -> None:
    drawn = noise.below(torch.full((MANY // 4,), count))
    seen = torch.bincount(drawn, minlength=count)
    assert drawn.dtype == torch.int64 and len(seen) == count
    expected = len(drawn) / count
    assert float((seen - expected).abs().max()) <= SIGMAS * math.sqrt(expected)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 2**40), max_size=20))
def test_a_number_is_below_its_own_count(counts: list[int]) -> None:
    drawn = Noise().below(torch.tensor(counts, dtype=torch.int64))
    assert all(0 <= got < count for got, count in zip(drawn.tolist(), counts, strict=True))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0, 3), (PART,), (PART + 1,), (2, PART // 2 + 1, 3)])
def test_noise_comes_in_any_shape(noise: Noise, shape: tuple[int, ...]) -> None:
    for drawn in (noise.normal(shape, 1.0), noise.laplace(shape, 1.0)):
        assert drawn.shape == shape
        assert len(set(drawn.flatten().tolist())) == drawn.numel()


# Nobody chooses it, nobody repeats it


def test_two_streams_have_nothing_in_common() -> None:
    first, second = Noise().normal((100_000,), 1.0), Noise().normal((100_000,), 1.0)
    assert not set(first.tolist()) & set(second.tolist())
    assert abs(float((first * second).mean())) < SIGMAS / math.sqrt(100_000)


def test_generators_that_are_seeded_do_not_decide_it() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(Noise().normal((4,), 1.0))
    assert not torch.equal(*drawn)


def test_no_seed_is_taken() -> None:
    with pytest.raises(TypeError):
        Noise(seed=0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Noise(0)  # type: ignore[call-arg]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_is_neither_copied_nor_stored(noise: Noise, way: object) -> None:
    with pytest.raises(TypeError, match="cannot be copied"):
        way(noise)  # type: ignore[operator]


def test_a_forked_process_does_not_repeat_its_parent() -> None:
    noise = Noise()
    noise.below(torch.tensor([2]))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # without threads of torch: they are not there after a fork
        os.write(writing, noise._words(4).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 64)
    assert len(theirs) == 32
    assert theirs != noise._words(4).numpy().tobytes()
    os.close(reading)
    os.close(writing)


def test_a_key_is_renewed_before_its_counter_ends() -> None:
    noise = Noise()
    noise._left = 3
    before = noise._cipher
    noise._words(3)
    assert noise._cipher is before
    noise._words(1)
    assert noise._cipher is not before and noise._left == LIFE - 1


# The grid


@settings(max_examples=200, deadline=None)
@given(std=st.floats(1e-12, 1e12))
def test_the_grid_is_a_power_of_two_just_below_its_share_of_the_noise(std: float) -> None:
    assert math.frexp(grid(std))[0] == 0.5
    assert grid(std) <= std * 2**-20 < 2 * grid(std)


@settings(max_examples=50, deadline=None)
@given(std=st.floats(1e-3, 1e3), size=st.floats(0, 1e4))
def test_noisy_sums_are_multiples_of_a_step_that_data_do_not_change(std: float, size: float) -> None:
    total = torch.linspace(-size, size, 101)
    noisy = add_noise(total, std, Noise())
    assert noisy.dtype == torch.float32
    steps = noisy.double() / grid(std)
    assert torch.equal(steps, steps.round())


def test_noise_has_the_spread_asked_for_around_the_total(noise: Noise) -> None:
    """Chi-squared of n degrees: within n ± 6.5 sqrt(2 n)."""
    total = torch.linspace(-3, 3, MANY)
    off = (add_noise(total, 0.25, noise).double() - total.double()) / 0.25
    assert abs(float(off.square().sum()) - MANY) < SIGMAS * math.sqrt(2 * MANY)
    assert abs(float(off.mean())) < SIGMAS / math.sqrt(MANY)


def test_without_noise_the_total_is_left() -> None:
    total = torch.tensor([0.1, -1e-30, 3e7])
    assert torch.equal(add_noise(total, 0.0, Noise()), total)
