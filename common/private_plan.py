"""What a private run takes of a site's patients, settled from the run and the site's own size before anything is taken.

Everything here follows from the run's configuration and one number of the site, so the site and whoever looks over its
shoulder come to the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import ConfigError
from common.privacy import NoNoise, Release, default_delta, epsilon, noise_multiplier
from common.run_config import RunConfig, steps_per_round

CENTRE_SHARE = 0.2
"""Share of the budget, as 1/σ², that the centre of the head's inputs takes; with many patients 0.03 does as well."""

SUMS_SHARE = 0.5
"""Share of it that the sums of a closed-form start take where rounds of training follow."""

TEST_LOOKS = 2
"""At the best weights: for the quantiles of their scores, then on these."""

_PRECISION = 1e-3
_MOST_NOISE = 1e4


class DeltaTooLarge(ConfigError):
    """A delta above 1 / patients would allow to give one patient away whole."""


@dataclass(frozen=True)
class Plan:
    """What a run takes of one site at most."""

    delta: float
    centre: Release | None  # of the head's inputs
    sums: Release | None  # of the closed form
    rounds: Release | None  # of all rounds together
    round_steps: int  # private steps of one round

    @property
    def releases(self) -> tuple[Release, ...]:
        """All of it."""
        return tuple(release for release in (self.centre, self.sums, self.rounds) if release is not None)

    @property
    def epsilon(self) -> float:
        """What all of it comes to."""
        return epsilon(self.releases, self.delta)

    @property
    def main(self) -> Release:
        """What stands for the plan in one line: the rounds, or the sums of a closed form alone."""
        found = self.rounds or self.sums
        assert found is not None  # noqa: S101  `plan` refuses a run that takes nothing
        return found

    @property
    def one_round(self) -> Release:
        """What one round takes.

        Raises:
            ConfigError: the run has no rounds.
        """
        if self.rounds is None:
            raise ConfigError("this run has no private rounds")
        return replace(self.rounds, steps=self.round_steps)


def plan(run: RunConfig, patients: int) -> Plan:
    """Return what a private run takes of a site.

    Args:
        run: settled, and private.
        patients: of the site's training split.

    Raises:
        DeltaTooLarge: the run's delta is above 1 / patients.
        NoNoise: no noise reaches the run's epsilon at this size.
        ConfigError: the run takes nothing.
    """
    if patients < 1:
        raise NoNoise("privacy: a site without training patients has nothing to protect and nothing to give")
    delta = run.privacy.delta or default_delta(patients)
    if delta > 1 / patients:
        raise DeltaTooLarge(
            f"[privacy] delta: the run's is {delta:g}, this site has {patients} training patients and allows at most "
            f"1 / {patients} = {1 / patients:.2g}; leave it out, and each site takes 1 / (10 patients)"
        )
    steps = steps_per_round(run.training, patients)
    centre, sums, rounds = _asked(run, rate=min(1.0, run.training.batch_size / patients), steps=steps)
    if sums is None and rounds is None:
        raise ConfigError("privacy: the run has no rounds and no closed form, so there is nothing to make private")
    noise, target = run.privacy.noise_multiplier, run.privacy.epsilon
    if noise is not None:
        return Plan(delta, _with(centre, noise), _with(sums, noise), _with(rounds, noise), steps)
    assert target is not None  # noqa: S101  a private run has epsilon or noise_multiplier
    whole = noise_multiplier(target, delta, 1.0, 1)  # of a single look that takes everything
    centre = _with(centre, whole / math.sqrt(CENTRE_SHARE))
    sums = _with(sums, whole / math.sqrt(SUMS_SHARE)) if rounds is not None else sums
    first = tuple(release for release in (centre, None if rounds is None else sums) if release is not None)
    last = _beside(first, rounds or sums, target, delta)
    return Plan(delta, centre, last if rounds is None else sums, rounds and last, steps)


def _asked(run: RunConfig, rate: float, steps: int) -> tuple[Release | None, Release | None, Release | None]:
    """Return centre, sums and rounds of a run, their noise still open (1)."""
    closed = run.training.rule.kind == "analytic"
    rounds = 0 if closed else run.training.rounds
    centre = Release(1.0) if run.privacy.centre else None
    sums = Release(1.0) if closed or run.model.init == "analytic" else None
    return centre, sums, Release(1.0, rate, rounds * steps) if rounds else None


def _with(release: Release | None, noise: float) -> Release | None:
    return None if release is None else replace(release, noise_multiplier=noise)


def _beside(first: Sequence[Release], last: Release | None, target: float, delta: float) -> Release:
    """Return the last release with as little noise as stays within the target together with what comes first."""
    assert last is not None  # noqa: S101  `plan` has looked

    def fits(noise: float) -> bool:
        return epsilon((*first, replace(last, noise_multiplier=noise)), delta) <= target

    low = high = noise_multiplier(target, delta, last.sampling_rate, last.steps)
    while not fits(high):
        low, high = high, 1.5 * high
        if high > _MOST_NOISE:
            raise NoNoise(f"[privacy] epsilon: no noise reaches {target:g} with delta {delta:g} at this site")
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return replace(last, noise_multiplier=high)


def most_looks(run: RunConfig, split: str) -> int:
    """Return how often a run has to evaluate a split: a site answers as often, and no more.

    Validation is looked at once a round, once at the end, and once for the head of a closed form; the test split twice.
    """
    if split == "test":
        return TEST_LOOKS
    closed = run.training.rule.kind == "analytic"
    head = closed or run.model.init == "analytic"
    return (0 if closed else run.training.rounds) + 1 + head
