"""Differential privacy in numbers: what looks at a cohort cost together, and how much noise a budget needs.

A mechanism M is (ε, δ)-private if P(M(D) ∈ S) ≤ e^ε P(M(D') ∈ S) + δ for every set S and all cohorts D, D' of which one
is the other without one patient. Costs are added up as Rényi divergences (RDP) at the orders of opacus' RDPAccountant,
and turned into one ε at the end. That figure is what is enforced; `tight_epsilon` is the finer one, and for reports.

Pure arithmetic: nothing here draws noise, and opacus, which imports torch, is imported where it is called.

Letters: σ standard deviation of Gaussian noise over the L2 sensitivity; λ scale of Laplace noise over the L1
sensitivity; q Poisson sampling rate over patients; α Rényi order; A = 151 orders.

Sources: Mironov, "Rényi differential privacy", 2017 (composition: proposition 1; Laplace, Gauss: table II); Mironov,
Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019, section 3; Balle et al.,
"Hypothesis testing interpretations and Rényi differential privacy", 2020, theorem 21 (from RDP to ε).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError

MOST_NOISE = 1e4
"""The largest noise multiplier that `noise_multiplier` tries: beyond it nothing is left of any update."""

_ORDERS = np.array([1 + tenth / 10 for tenth in range(1, 100)] + [float(order) for order in range(12, 64)])
_LEAST_NOISE = 1e-3  # that `noise_multiplier` tries; its epsilon is above 500 000
_SAMPLED = (0.05, 1e6)  # noise multipliers between which sampling is worth its arithmetic
_PRECISION = 1.001  # of a calibrated noise multiplier
_MOST_STEPS = 10**12
_PRV_ERROR = 0.01  # of epsilon, the default of opacus
_PRV_PAIRS = 20  # different (σ, q) that PRV composes in a few seconds
_PRV_POINTS = 2**22  # of its mesh: 32 MiB an array

Pairs = Mapping[tuple[float, float], int]
"""(σ, q) -> steps."""


class NoNoise(ConfigError):
    """No amount of noise reaches the epsilon that was asked for."""


@dataclass(frozen=True)
class Release:
    """Looks at a cohort through noise: `steps` of them, all alike.

    Raises:
        ValueError: a value is out of its range.

    Examples:
        >>> Release(1.1, sampling_rate=0.01, steps=100)
        Release(noise_multiplier=1.1, sampling_rate=0.01, steps=100, kind='gaussian')
    """

    noise_multiplier: float  # > 0; σ or λ
    sampling_rate: float = 1.0  # q, in (0, 1]; 1: everybody; Laplace: always 1
    steps: int = 1
    kind: Literal["gaussian", "laplace"] = "gaussian"

    def __post_init__(self) -> None:
        if self.kind not in ("gaussian", "laplace"):
            raise ValueError(f"kind: got {self.kind!r}, expected gaussian or laplace")
        if not (_real(self.noise_multiplier) and 0 < self.noise_multiplier < math.inf):
            raise ValueError(f"noise_multiplier: got {self.noise_multiplier!r}, expected a finite number above 0")
        if not (_real(self.sampling_rate) and 0 < self.sampling_rate <= 1):
            raise ValueError(f"sampling_rate: got {self.sampling_rate!r}, expected a number above 0, at most 1")
        if type(self.steps) is not int or not 0 <= self.steps <= _MOST_STEPS:
            raise ValueError(f"steps: got {self.steps!r}, expected a whole number from 0 to {_MOST_STEPS}")
        if self.kind == "laplace" and self.sampling_rate != 1:
            raise ValueError(f"sampling_rate: got {self.sampling_rate!r}, expected 1, for Laplace noise is not sampled")


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Return the ε that releases cost together at δ: the figure that is enforced.

    The order of the releases does not matter. Equal to opacus' `RDPAccountant` for Gaussian noise, but never negative;
    Laplace noise counts by its Rényi divergence, or by Σ 1/λ added to the ε of the rest, whichever is less.

    Raises:
        ValueError: δ is not in (0, 1), or the noise is so little that ε is no finite number.
    """
    _check_delta(delta)
    gaussian, laplace = _merged(releases)
    curve = _gaussian_curve(gaussian)
    if not laplace:
        return _finite(_converted(curve, delta))
    whole = _converted(curve + _laplace_curve(laplace), delta)
    return _finite(min(whole, _converted(curve, delta) + _pure(laplace)))


def tight_epsilon(releases: Iterable[Release], delta: float) -> float | None:
    """Return a finer upper bound of ε at δ, for reports; None where it cannot be had in reasonable time and memory.

    Gaussian noise on everybody is exact: steps at σ_k are one at σ = (Σ 1/σ_k²)^(-1/2), and its δ(ε) is known in closed
    form. With sampling, privacy loss distributions are convolved (opacus' `PRVAccountant`, upper end of its bounds).
    Laplace noise adds Σ 1/λ. Never above `epsilon`.

    Raises:
        ValueError: as `epsilon`.

    Source: Gopi, Lee, Wutschitz, "Numerical composition of differential privacy", 2021; Dong, Roth, Su, "Gaussian
    differential privacy", 2022, corollary 3.3.
    """
    releases = tuple(releases)
    enforced = epsilon(releases, delta)
    gaussian, laplace = _merged(releases)
    precision = sum(steps / sigma**2 for (sigma, rate), steps in gaussian.items() if rate == 1)
    sampled = {pair: steps for pair, steps in gaussian.items() if pair[1] < 1}
    if sampled:
        whole = {(precision**-0.5, 1.0): 1} if precision else {}
        tight = _prv_epsilon({**sampled, **whole}, delta)
    else:
        tight = _analytic_epsilon(math.sqrt(precision), delta)
    return None if tight is None else min(enforced, tight + _pure(laplace))


def noise_multiplier(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the least σ, to one in a thousand and never below it, whose `epsilon` is at most `target`.

    Args:
        target: ε, above 0.
        delta: δ, in (0, 1).
        sampling_rate: q of every step.
        steps: their number over the whole run, at least 1.

    Raises:
        NoNoise: none up to `MOST_NOISE` reaches it.
        ValueError: a value is out of its range.
    """
    if not 0 < target < math.inf or steps < 1:
        raise ValueError(f"epsilon {target!r} in {steps!r} steps: expected both to be finite and above 0")

    def cost(sigma: float) -> float:
        return epsilon([Release(sigma, sampling_rate, steps)], delta)

    least, most = _LEAST_NOISE, MOST_NOISE
    if cost(most) > target:
        raise NoNoise(
            f"epsilon {target:g} at delta {delta:g} in {steps} steps: even a noise multiplier of {most:g} gives "
            f"{cost(most):.3g}; ask for a larger epsilon or delta, or fewer steps"
        )
    while most / least > _PRECISION:
        middle = math.sqrt(least * most)
        least, most = (least, middle) if cost(middle) <= target else (middle, most)
    return most


def default_delta(patients: int) -> float:
    """Return 1 / (10 patients), rounded down to one significant digit.

    Examples:
        >>> default_delta(941), default_delta(1000), default_delta(35)
        (0.0001, 0.0001, 0.002)

    Raises:
        ValueError: there is no patient.
    """
    if patients < 1:
        raise ValueError(f"patients: got {patients!r}, expected at least 1")
    exact = Decimal(1) / (10 * patients)
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted()), ROUND_DOWN))


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta: got {delta!r}, expected a number between 0 and 1")


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("so little noise, so often, has no finite epsilon; expected a larger noise multiplier")
    return value


def _merged(releases: Iterable[Release]) -> tuple[Counter[tuple[float, float]], Counter[float]]:
    """Return the steps of every (σ, q), and of every λ; sorted, so that no sum depends on the order of the releases."""
    gaussian: Counter[tuple[float, float]] = Counter()
    laplace: Counter[float] = Counter()
    for release in sorted(releases, key=lambda one: (one.noise_multiplier, one.sampling_rate)):
        if release.steps and release.kind == "gaussian":
            gaussian[release.noise_multiplier, release.sampling_rate] += release.steps
        elif release.steps:
            laplace[release.noise_multiplier] += release.steps
    return gaussian, laplace


def _pure(laplace: Mapping[float, int]) -> float:
    """Return the ε of Laplace noise at δ = 0: Σ 1/λ."""
    return math.fsum(steps / scale for scale, steps in laplace.items())


def _converted(curve: NDArray[np.float64], delta: float) -> float:
    """Return the ε at δ of Rényi divergences (A,): min over α of D_α - (ln δ + ln α) / (α - 1) + ln((α - 1) / α).

    Source: Balle et al. 2020, theorem 21.
    """
    if not curve.any():
        return 0.0
    bounds = curve - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1) + np.log1p(-1 / _ORDERS)
    return max(0.0, float(bounds.min()))


def _gaussian_curve(gaussian: Pairs) -> NDArray[np.float64]:
    curve = np.zeros_like(_ORDERS)
    for (sigma, rate), steps in gaussian.items():
        curve += steps * _sampled_gaussian(sigma, rate)
    return curve


def _laplace_curve(laplace: Mapping[float, int]) -> NDArray[np.float64]:
    """Return the Rényi divergences (A,) of Laplace noise: Mironov 2017, table II."""
    curve = np.zeros_like(_ORDERS)
    more, less = np.log(_ORDERS / (2 * _ORDERS - 1)), np.log((_ORDERS - 1) / (2 * _ORDERS - 1))
    for scale, steps in laplace.items():
        with np.errstate(over="ignore"):
            moment = np.logaddexp(more + (_ORDERS - 1) / scale, less - _ORDERS / scale)
        curve += steps * np.clip(moment / (_ORDERS - 1), 0, 1 / scale)
    return curve


@lru_cache(maxsize=4096)
def _sampled_gaussian(sigma: float, rate: float) -> NDArray[np.float64]:
    """Return the Rényi divergences (A,) of one look at a Poisson sample through Gaussian noise.

    D_α = ln E[((1 - q) + q e^((2z - 1) / 2σ²))^α] / (α - 1) with z ~ N(0, σ²), and α / 2σ² for q = 1. The latter, an
    upper bound for every q, also serves where noise is so little that sampling changes nothing that matters, or so
    much that nothing is left to change.

    Source: Mironov, Talwar, Zhang 2019, equation 1 and theorem 4.
    """
    if rate == 1 or not _SAMPLED[0] <= sigma <= _SAMPLED[1]:
        with np.errstate(divide="ignore", over="ignore"):
            curve = _ORDERS / sigma / sigma / 2
    else:
        curve = np.maximum(_log_moments(sigma, rate), 0) / (_ORDERS - 1)
    curve.flags.writeable = False
    return curve


def _log_moments(sigma: float, rate: float) -> NDArray[np.float64]:
    """Return ln E[((1 - q) + q e^((2z - 1) / 2σ²))^α] (A,), z ~ N(0, σ²), by the trapezoidal rule.

    The integrand has no singularity nearer to the real line than πσ², so at mesh h the relative error is at most
    2 exp(a²/2σ² - 2πa/h) for a ≤ πσ²: 1e-15 for h = 0.45 min(σ, σ²). All terms are positive, so nothing cancels.
    As (x + y)^α ≤ 2^(α-1) (x^α + y^α), what lies farther than 13σ from both 0 and α is below 1e-17 of the whole.

    Source: Trefethen and Weideman, "The exponentially convergent trapezoidal rule", 2014, theorem 5.1.
    """
    mesh = 0.45 * min(sigma, sigma**2)
    half = math.ceil(13 * sigma / mesh) + 1
    window = np.arange(-half, half + 1, dtype=np.float64)
    around: NDArray[np.float64] = np.round(_ORDERS / mesh)[:, None] + window  # (A, K)
    below = _log_integrand(window * mesh, sigma, rate)
    above = np.where(around > half, _log_integrand(around * mesh, sigma, rate), -np.inf)  # no point counts twice
    terms = np.concatenate([below, above], axis=1)
    top = terms.max(axis=1)
    total: NDArray[np.float64] = top + np.log(np.exp(terms - top[:, None]).sum(axis=1))
    return total + math.log(mesh / sigma / math.sqrt(2 * math.pi))


def _log_integrand(z: NDArray[np.float64], sigma: float, rate: float) -> NDArray[np.float64]:
    """Return α ln((1 - q) + q e^((2z - 1) / 2σ²)) - z²/2σ², shaped (A, K), at points shaped (K,) or (A, K)."""
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (z - 0.5) / sigma**2)
    value: NDArray[np.float64] = _ORDERS[:, None] * ratio - z**2 / (2 * sigma**2)
    return value


def _analytic_epsilon(mu: float, delta: float) -> float:
    """Return the exact ε at δ of Gaussian noise of σ = 1/μ: where Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) = δ.

    Source: Balle and Wang, "Improving the Gaussian mechanism for differential privacy", 2018, theorem 8.
    """

    def excess(value: float) -> float:
        below, above = (value / mu - mu / 2) / math.sqrt(2), (value / mu + mu / 2) / math.sqrt(2)
        return math.erfc(below) / 2 - math.exp(value + _log_erfc(above)) / 2

    if mu == 0 or excess(0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > delta:
        low, high = high, 2 * high
    for _ in range(60):  # halvings: to the last bits of a float
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > delta else (low, middle)
    return high


def _log_erfc(x: float) -> float:
    """Return ln erfc(x), by its asymptotic series where erfc itself would be next to nothing: to 1e-10."""
    if x < 25:
        return math.log(math.erfc(x))
    return -(x**2) - math.log(x * math.sqrt(math.pi)) + math.log1p(-1 / (2 * x**2) + 3 / (4 * x**4) - 15 / (8 * x**6))


def _prv_epsilon(gaussian: Pairs, delta: float) -> float | None:
    """Return the upper end of opacus' PRV bounds; None where its mesh would be too large or its arithmetic gives up."""
    mesh = _PRV_ERROR / math.sqrt(sum(gaussian.values()) * math.log(12_000 / delta) / 2)
    reach = _converted(_gaussian_curve(gaussian), delta / 4000) + 3
    if len(gaussian) > _PRV_PAIRS or 2 * reach / mesh > _PRV_POINTS:
        return None
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps) for (sigma, rate), steps in gaussian.items()]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its numerics, which are known; a bad end is met below
            bound = float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
    except (RuntimeError, ValueError, ArithmeticError, IndexError):
        return None
    return bound if math.isfinite(bound) and bound > 0 else None
