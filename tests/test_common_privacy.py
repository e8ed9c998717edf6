"""Privacy in numbers: equal to opacus, equal to closed forms, and never cheaper for more looks or less noise."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import privacy
from common.errors import ConfigError
from common.privacy import NoNoise, Release, default_delta, epsilon, noise_multiplier, tight_epsilon

SLACK = 1e-9  # relative; what rounding may do to a law
ROUNDS = [Release(0.8 + 0.01 * k, 0.01 + 0.0002 * k, 10) for k in range(200)]
"""Two hundred rounds, no two alike."""
GOLDEN = 3.97030076017  # their cost at δ = 1e-5, by opacus 1.6.0

noises = st.floats(0.02, 200)
rates = st.one_of(st.just(1.0), st.floats(1e-5, 1))
steps = st.integers(0, 10_000)
deltas = st.floats(1e-9, 0.1)
gaussians = st.builds(Release, noises, rates, steps)
laplaces = st.builds(Release, st.floats(0.05, 100), st.just(1.0), st.integers(0, 20), st.just("laplace"))
histories = st.lists(st.one_of(gaussians, laplaces), max_size=5)


def opacus_epsilon(releases: Sequence[Release], delta: float) -> float:
    """Return what a fresh accountant of opacus says, told one step after another."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for release in releases:
        for _ in range(release.steps):
            accountant.step(noise_multiplier=release.noise_multiplier, sample_rate=release.sampling_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def at_least(more: float, less: float) -> bool:
    return more >= less - SLACK * (1 + less)


def test_the_orders_are_those_of_opacus() -> None:
    from opacus.accountants import RDPAccountant

    assert privacy._ORDERS.tolist() == RDPAccountant.DEFAULT_ALPHAS


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.064, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.1, 4.0, 30.0])
def test_one_mechanism_is_that_of_opacus(sigma: float, rate: float) -> None:
    for count, delta in [(1, 1e-5), (320, 1e-4), (5000, 1e-6)]:
        expected = opacus_epsilon([Release(sigma, rate, count)], delta)
        assert epsilon([Release(sigma, rate, count)], delta) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_history_is_that_of_opacus() -> None:
    history = [Release(1.1, 0.02, 100), Release(0.9, 0.05, 30), Release(1.1, 0.02, 100), Release(8.0), Release(2, 0.5)]
    assert epsilon(history, 1e-5) == pytest.approx(opacus_epsilon(history, 1e-5), rel=1e-10)


def test_two_hundred_different_rounds_are_quick_and_have_a_known_cost() -> None:
    privacy._sampled_gaussian.cache_clear()
    begun = time.perf_counter()
    value = epsilon(ROUNDS, 1e-5)
    assert time.perf_counter() - begun < 1
    assert value == pytest.approx(GOLDEN, rel=1e-10)


@pytest.mark.slow
def test_two_hundred_different_rounds_are_those_of_opacus() -> None:
    assert opacus_epsilon(ROUNDS, 1e-5) == pytest.approx(GOLDEN, rel=1e-10)


@given(sigma=st.floats(0.05, 1e3), rate=st.floats(1e-6, 1 - 1e-9))
def test_order_two_is_in_closed_form(sigma: float, rate: float) -> None:
    """D_2 = ln(1 + q² (e^(1/σ²) - 1)): Mironov, Talwar, Zhang 2019, equation 3 with α = 2."""
    exponent = 2 * math.log(rate) + (sigma**-2 if sigma < 0.1 else math.log(math.expm1(sigma**-2)))
    curve = privacy._sampled_gaussian(sigma, rate)
    assert (curve >= 0).all()
    assert curve[privacy._ORDERS == 2.0][0] == pytest.approx(np.logaddexp(0, exponent), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0, 40.0])
def test_the_divergence_of_laplace_noise_is_its_integral(scale: float) -> None:
    points = np.linspace(-60 * scale, 1 + 60 * scale, 2_000_001)
    here, there = np.abs(points) / scale, np.abs(points - 1) / scale
    curve = privacy._laplace_curve({scale: 1})
    for order in (1.5, 2.0, 5.0, 32.0):
        integral = np.trapezoid(np.exp((order - 1) * here - order * there), points) / (2 * scale)
        assert curve[order == privacy._ORDERS][0] == pytest.approx(math.log(integral) / (order - 1), rel=1e-4, abs=1e-9)


def test_one_look_through_laplace_noise_costs_its_pure_epsilon_at_most() -> None:
    assert epsilon([Release(2.0, kind="laplace")], 1e-5) == 0.5
    assert epsilon([Release(2.0, steps=3, kind="laplace")], 1e-9) == 1.5
    many = [Release(20.0, steps=400, kind="laplace")]
    assert epsilon(many, 1e-5) < 20 / 2  # Σ 1/λ = 20: composing divergences is worth it
    assert tight_epsilon(many, 1e-5) == epsilon(many, 1e-5)
    with_rest = epsilon([Release(1.0, 0.01, 100), Release(0.1, kind="laplace")], 1e-5)
    assert with_rest <= epsilon([Release(1.0, 0.01, 100)], 1e-5) + 10


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([Release(0.1, steps=0), Release(0.1, steps=0, kind="laplace")], 1e-5) == 0
    assert tight_epsilon([], 1e-5) == 0
    assert tight_epsilon([Release(1.0, 0.1, steps=0)], 1e-5) == 0


@given(histories, deltas)
def test_it_is_finite_and_never_negative(history: list[Release], delta: float) -> None:
    assert 0 <= epsilon(history, delta) < math.inf


@given(histories, deltas, st.randoms())
def test_the_order_of_releases_is_nothing(history: list[Release], delta: float, random: object) -> None:
    shuffled = list(history)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert epsilon(shuffled, delta) == epsilon(history, delta)


@given(histories, histories, deltas)
def test_together_they_cost_at_least_as_much_as_either_and_no_more_than_both(
    some: list[Release], others: list[Release], delta: float
) -> None:
    whole = epsilon([*some, *others], delta)
    assert at_least(whole, max(epsilon(some, delta), epsilon(others, delta)))
    assert at_least(epsilon(some, delta / 2) + epsilon(others, delta / 2), tight_lower(whole, delta))


def tight_lower(whole: float, delta: float) -> float:
    """Return what basic composition cannot undercut: its two halves are converted at the same orders, or better."""
    return whole - 2 * (math.log(1 / delta) + math.log(64)) / 62


@given(gaussians, deltas, st.integers(0, 1000))
def test_more_steps_cost_no_less(release: Release, delta: float, more: int) -> None:
    longer = Release(release.noise_multiplier, release.sampling_rate, release.steps + more)
    assert at_least(epsilon([longer], delta), epsilon([release], delta))


@given(gaussians, deltas, st.floats(0.1, 1))
def test_less_noise_costs_no_less(release: Release, delta: float, part: float) -> None:
    louder = Release(release.noise_multiplier * part, release.sampling_rate, release.steps)
    assert at_least(epsilon([louder], delta), epsilon([release], delta))


@given(gaussians, deltas, st.floats(0, 1))
def test_a_larger_rate_costs_no_less(release: Release, delta: float, part: float) -> None:
    rate = min(1.0, release.sampling_rate + part * (1 - release.sampling_rate))
    assert at_least(epsilon([Release(release.noise_multiplier, rate, release.steps)], delta), epsilon([release], delta))


@given(histories, deltas, st.floats(0.01, 1))
def test_a_smaller_delta_costs_no_less(history: list[Release], delta: float, part: float) -> None:
    assert at_least(epsilon(history, delta * part), epsilon(history, delta))


@given(st.floats(0.3, 50), st.integers(1, 500), deltas)
def test_noise_on_everybody_is_exact(sigma: float, count: int, delta: float) -> None:
    """δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ), μ = √T / σ: Balle and Wang 2018, theorem 8."""
    from scipy.special import log_ndtr

    mu = math.sqrt(count) / sigma
    found = tight_epsilon([Release(sigma, steps=count)], delta)
    assert found is not None and found <= epsilon([Release(sigma, steps=count)], delta)
    reached = math.exp(log_ndtr(mu / 2 - found / mu)) - math.exp(found + log_ndtr(-mu / 2 - found / mu))
    assert reached <= delta * (1 + 1e-6)
    assert reached == pytest.approx(delta, rel=1e-6) or found == 0


def test_one_look_at_everybody_has_its_known_cost() -> None:
    assert tight_epsilon([Release(1.0)], 1e-5) == pytest.approx(4.37717810, rel=1e-8)  # root of theorem 8, by hand
    merged = tight_epsilon([Release(1.0, steps=3), Release(2.0, steps=4)], 1e-5)
    assert merged == pytest.approx(tight_epsilon([Release(0.5)], 1e-5), rel=1e-9)


@pytest.mark.slow
def test_the_finer_figure_is_that_of_opacus() -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(1.0, 0.064, 320)]
    found = tight_epsilon([Release(1.0, 0.064, 320)], 1e-4) or 0
    assert found == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-12)
    assert found == pytest.approx(6.734, abs=0.001)
    with_laplace = tight_epsilon([Release(1.0, 0.064, 320), Release(2.0, kind="laplace")], 1e-4)
    assert with_laplace == pytest.approx(found + 0.5)
    with_everybody = tight_epsilon([Release(1.0, 0.064, 320), Release(20.0, steps=2)], 1e-4)
    assert with_everybody is not None and found < with_everybody < epsilon([Release(1.0, 0.064, 320)], 1e-4) + 0.5


@pytest.mark.parametrize(
    "history",
    [ROUNDS, [Release(0.06, 0.9, 100_000)], [Release(5.0, 0.05, 10**7)], [Release(1.0, 1e-5, 10**12)]],
    ids=["too many", "too dear", "too long", "too fine"],
)
def test_where_the_finer_figure_is_out_of_reach_there_is_none(history: list[Release]) -> None:
    begun = time.perf_counter()
    assert tight_epsilon(history, 1e-6) is None
    assert time.perf_counter() - begun < 1


@given(target=st.floats(0.5, 50), rate=rates, count=st.integers(1, 5000), delta=st.floats(1e-7, 1e-3))
@settings(max_examples=30, deadline=None)
def test_noise_is_the_least_that_reaches_a_target(target: float, rate: float, count: int, delta: float) -> None:
    sigma = noise_multiplier(target, delta, rate, count)
    assert epsilon([Release(sigma, rate, count)], delta) <= target
    assert epsilon([Release(sigma / 1.001, rate, count)], delta) > target


def test_noise_of_a_known_plan() -> None:
    assert noise_multiplier(3.0, 1e-4, 64 / 1000, 20 * 1000 // 64) == pytest.approx(1.73, abs=0.01)
    assert noise_multiplier(8.0, 1e-4, 64 / 1000, 20 * 1000 // 64) == pytest.approx(0.97, abs=0.01)


def test_no_noise_reaches_what_no_order_shows() -> None:
    with pytest.raises(NoNoise, match=r"epsilon 0\.05 at delta 1e-05 in 10 steps: even a noise multiplier of 10000"):
        noise_multiplier(0.05, 1e-5, 0.1, 10)
    assert issubclass(NoNoise, ConfigError)


@given(st.integers(1, 10**9))
def test_delta_has_one_digit_and_is_as_large_as_it_may_be(patients: int) -> None:
    digit, exponent = f"{default_delta(patients):e}".split("e")
    assert float(digit) == int(float(digit))
    exact = 1 / (10 * patients)
    assert default_delta(patients) <= exact * (1 + 1e-15) < (int(float(digit)) + 1) * 10.0 ** int(exponent) * (1 + 1e-9)


@pytest.mark.parametrize(
    "values",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": True},
        {"noise_multiplier": "1"},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"sampling_rate": math.nan},
        {"steps": -1},
        {"steps": 1.0},
        {"steps": True},
        {"steps": 10**13},
        {"kind": "cauchy"},
        {"kind": "laplace", "sampling_rate": 0.5},
    ],
)
def test_values_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got .*expected"):
        Release(**{"noise_multiplier": 1.0, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_out_of_range(delta: float) -> None:
    calls: list[Callable[[], object]] = [
        lambda: epsilon([], delta),
        lambda: tight_epsilon([], delta),
        lambda: noise_multiplier(1.0, delta, 0.1, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="delta: got"):
            call()


@pytest.mark.parametrize(("target", "count"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (1.0, 0)])
def test_a_target_out_of_range(target: float, count: int) -> None:
    with pytest.raises(ValueError, match="finite and above 0"):
        noise_multiplier(target, 1e-5, 0.1, count)


@pytest.mark.parametrize("sigma", [1e-160, 1e-200, 5e-324])
def test_next_to_no_noise_has_no_epsilon(sigma: float) -> None:
    for call in (epsilon, tight_epsilon):
        with pytest.raises(ValueError, match="no finite epsilon"):
            call([Release(sigma, 0.5, 10**12)], 1e-5)
    with pytest.raises(ValueError, match="no finite epsilon"):
        epsilon([Release(5e-324, kind="laplace")], 1e-5)


def test_no_patient_has_no_delta() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        default_delta(0)


def test_what_is_enforced_needs_neither_opacus_nor_torch() -> None:
    script = (
        "import sys; from common.privacy import *\n"
        "epsilon([Release(1.0, 0.1, 5)], 1e-5); noise_multiplier(1.0, 1e-5, 0.1, 5)\n"
        "tight_epsilon([Release(1.0)], 1e-5)\n"
        "assert not {'torch', 'opacus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
