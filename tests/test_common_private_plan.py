"""A plan costs what the run may cost, whatever it is made of, and is the same wherever it is made."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.privacy import NoNoise, Release, default_delta, epsilon
from common.private_plan import CENTRE_SHARE, DeltaTooLarge, Plan, most_looks, plan
from common.run_config import RunConfig

law = settings(deadline=None, max_examples=25)


def run(*, epsilon: float | None = 3.0, **sections: Any) -> RunConfig:
    """A private run of a head alone, thirty rounds of one step; what is given wins."""
    values: dict[str, Any] = {
        "model": {"init": "zero"},
        "training": {"rounds": 30, "local_steps": 1, "batch_size": 65_536},
        "privacy": {} if epsilon is None else {"epsilon": epsilon},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig.model_validate(values)


STARTS = [
    {},
    {"privacy": {"centre": False}},
    {"model": {"init": "analytic"}},
    {"model": {"init": "analytic"}, "privacy": {"centre": False}},
    {"training": {"strategy": "analytic"}},
    {"training": {"strategy": "analytic"}, "privacy": {"centre": False}},
    {"training": {"local_steps": None, "local_epochs": 1, "batch_size": 64}},
    {"model": {"init": "analytic"}, "training": {"local_steps": 5, "batch_size": 8, "rounds": 3}},
]


@pytest.mark.slow
@pytest.mark.parametrize("sections", STARTS)
@law
@given(target=st.floats(0.2, 20), patients=st.integers(20, 20_000))
def test_everything_together_stays_within_the_target_and_takes_most_of_it(
    sections: dict[str, Any], target: float, patients: int
) -> None:
    found = plan(run(epsilon=target, **sections), patients)
    assert 0.97 * target <= found.epsilon <= target
    assert found.epsilon == epsilon(found.releases, found.delta)


@pytest.mark.parametrize("patients", [1, 35, 941, 10_000])
def test_delta_follows_from_the_patients_unless_the_run_says_it(patients: int) -> None:
    assert plan(run(epsilon=8.0), patients).delta == default_delta(patients)
    said = 0.5 / patients
    assert plan(run(epsilon=8.0, privacy={"delta": said}), patients).delta == said


def test_a_delta_above_one_in_the_patients_is_refused() -> None:
    private = run(privacy={"delta": 0.01})
    assert plan(private, 100).delta == 0.01
    with pytest.raises(DeltaTooLarge, match="this site has 101 training patients"):
        plan(private, 101)


def test_a_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(NoNoise, match="even a noise multiplier of"):
        plan(run(epsilon=1e-6, privacy={"delta": 1e-6}), 1000)
    with pytest.raises(NoNoise, match="no noise reaches|even a noise"):
        plan(run(epsilon=0.001, training={"rounds": 100_000}), 1000)


def test_a_site_without_patients_has_no_plan() -> None:
    with pytest.raises(NoNoise, match="nothing to protect"):
        plan(run(), 0)


def test_noise_that_is_given_is_that_of_everything() -> None:
    noise = {"noise_multiplier": 2.5}
    found = plan(run(epsilon=None, privacy=noise, model={"init": "analytic"}), 500)
    assert found.centre == found.sums == Release(2.5)
    assert found.rounds == Release(2.5, 1.0, 30)
    assert found.epsilon > 0
    assert plan(run(epsilon=None, privacy={**noise, "centre": False}), 500).releases == (Release(2.5, 1.0, 30),)


def test_what_the_centre_takes_of_the_budget_does_not_depend_on_the_rest() -> None:
    centres = {plan(run(**sections), 1000).centre for sections in STARTS if "privacy" not in sections}
    assert len(centres) == 1
    (centre,) = centres
    assert centre is not None
    alone = epsilon([Release(centre.noise_multiplier * CENTRE_SHARE**0.5)], default_delta(1000))
    assert alone == pytest.approx(3.0, rel=0.01)


def test_less_budget_and_more_rounds_need_more_noise() -> None:
    def noise(**changes: Any) -> float:
        found = plan(run(**changes), 1000).rounds
        assert found is not None
        return found.noise_multiplier

    assert noise(epsilon=1.0) > noise(epsilon=3.0) > noise(epsilon=8.0)
    assert noise(training={"rounds": 60}) > noise() > noise(training={"rounds": 15})


@pytest.mark.parametrize(
    ("training", "rate", "steps"),
    [
        ({"local_steps": 1, "batch_size": 65_536}, 1.0, 1),
        ({"local_steps": 4, "batch_size": 50}, 0.25, 4),
        ({"local_steps": None, "local_epochs": 2, "batch_size": 64}, 0.32, 8),
    ],
)
def test_a_round_takes_its_part_of_all_of_them(training: dict[str, Any], rate: float, steps: int) -> None:
    found = plan(run(training=training), 200)
    assert found.rounds is not None
    assert (found.rounds.sampling_rate, found.rounds.steps) == (rate, 30 * steps)
    one = found.one_round
    assert (one.noise_multiplier, one.sampling_rate, one.steps) == (found.rounds.noise_multiplier, rate, steps)
    assert found.main is found.rounds


def test_a_closed_form_alone_has_no_rounds() -> None:
    found = plan(run(training={"strategy": "analytic"}), 200)
    assert found.rounds is None
    assert found.main is found.sums
    with pytest.raises(ConfigError, match="no private rounds"):
        _ = found.one_round


def test_a_run_that_takes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to make private"):
        plan(run(training={"rounds": 0}), 200)


def test_the_same_run_and_size_have_the_same_plan() -> None:
    first, second = (plan(run(model={"init": "analytic"}), 321) for _ in range(2))
    assert isinstance(first, Plan)
    assert first == second


@pytest.mark.parametrize(
    ("sections", "looks"),
    [
        ({}, 31),
        ({"model": {"init": "analytic"}}, 32),
        ({"training": {"strategy": "analytic"}}, 2),
        ({"training": {"rounds": 0}, "model": {"init": "analytic"}}, 2),
    ],
)
def test_validation_is_looked_at_once_a_round_and_a_little_more(sections: dict[str, Any], looks: int) -> None:
    assert most_looks(run(**sections), "validation") == looks
    assert most_looks(run(**sections), "test") == 2
