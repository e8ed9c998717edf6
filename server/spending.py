"""What a private run has taken of each site's patients, as the sites tell it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from common.messages import Description, PrivateSums, Trained
from common.privacy import NoNoise, noise_multiplier

UNITS = ("patient", "image")

_MOST_NOISE, _LEAST_RATE, _MOST_STEPS = 1e6, 2.0**-40, 10**12
"""What no plan goes beyond; what follows from plans stays finite within."""

EXACT = {
    "size": "The number of training patients of each site is known to the coordinator, for it weighs the updates"
    "{rounded}.",
    "evaluation": "Validation and test patients are outside of the guarantee: their counts by label, confusion counts, "
    "histograms of scores, calibration and losses leave each site exact, once a round and twice at the end.",
    "choice": "The best round, the penalty of a closed form and the threshold are chosen by validation patients alone.",
    "labels": "The names of the labels, the configuration of the run and how images are prepared were fixed before.",
}
"""What is no part of epsilon, in plain words."""

NOISY_EVALUATION = (
    "Validation and test patients are protected as well: what all evaluations of a split tell of one patient is "
    "limited by epsilon {epsilon:g} (Laplace noise on every count), and calibration and losses do not leave a site."
)


@dataclass(frozen=True)
class Spent:
    """One site's part."""

    unit: str
    delta: float
    planned: float  # epsilon, at most
    epsilon: float  # so far
    noise_multiplier: float
    sampling_rate: float
    planned_steps: int
    steps: int = 0  # so far

    @staticmethod
    def of(said: Description) -> Spent:
        """Return what a site said of its plan."""
        return Spent(
            unit=said.unit,
            delta=said.delta,
            planned=said.epsilon,
            epsilon=said.spent,
            noise_multiplier=said.noise_multiplier,
            sampling_rate=said.sampling_rate,
            planned_steps=said.steps,
            steps=said.steps_done,
        )

    def after(self, reply: Trained | PrivateSums) -> Spent:
        """Return it after a reply, which says what has been spent by now; no site can take anything back."""
        steps = min(max(self.steps, reply.steps), _MOST_STEPS)
        return replace(self, epsilon=max(self.epsilon, reply.epsilon), steps=steps)


def plausible(said: Description, epsilon: float | None) -> bool:
    """Return whether a plan can be that of a run.

    Args:
        said: what a site offers.
        epsilon: the run's target, if it has one.
    """
    numbers = (said.delta, said.epsilon, said.spent, said.noise_multiplier, said.sampling_rate)
    if said.unit not in UNITS or not all(math.isfinite(number) for number in numbers):
        return False
    noise = 0 < said.noise_multiplier <= _MOST_NOISE and _LEAST_RATE <= said.sampling_rate <= 1
    steps = 0 < said.steps <= _MOST_STEPS and 0 <= said.steps_done <= _MOST_STEPS
    costs = 0 < said.delta < 1 and said.epsilon > 0 and said.spent >= 0
    return noise and steps and costs and (epsilon is None or said.epsilon <= epsilon * (1 + 1e-9))


def _told(one: Spent) -> dict[str, Any]:
    return {
        "epsilon": one.epsilon,
        "delta": one.delta,
        "noise_multiplier": _alike(one),
        "sampling_rate": one.sampling_rate,
        "steps": one.steps,
        "planned_epsilon": one.planned,
        "planned_steps": one.planned_steps,
        "round_noise_multiplier": one.noise_multiplier,
    }


def _alike(one: Spent) -> float:
    """Return the noise multiplier with which as many steps, all alike, cost what was spent.

    The centre and the rounds of a run have noise of their own; so three numbers stand for all of them, and an
    accountant that is fed them comes to the epsilon that is told.
    """
    if not (one.steps and one.epsilon):
        return one.noise_multiplier
    try:
        return _noise_multiplier(one.epsilon, one.delta, one.sampling_rate, one.steps)
    except (NoNoise, ValueError):  # a site says what no steps can cost, or more steps than can be
        return one.noise_multiplier


_noise_multiplier = cache(noise_multiplier)  # sites of one size have the same plan


def document(spent: Mapping[str, Spent], histogram_epsilon: float | None) -> dict[str, Any] | None:
    """Return the part of `result.json` on privacy, None for a run without.

    The guarantee holds for each site's patients by themselves, so sites are not added up: the worst one counts.
    """
    if not spent:
        return None
    sites = {name: _told(one) for name, one in sorted(spent.items())}
    units = {one.unit for one in spent.values()}
    told = dict(EXACT)
    if histogram_epsilon is not None:
        told["evaluation"] = NOISY_EVALUATION.format(epsilon=histogram_epsilon)
    told["size"] = told["size"].format(rounded="; sites may round it")
    return {
        "unit": "patient" if "patient" in units else "image",
        "epsilon": max(one.epsilon for one in spent.values()),
        "delta": max(one.delta for one in spent.values()),
        "histogram_epsilon": histogram_epsilon,
        "sites": sites,
        "outside": list(told.values()),
    }
