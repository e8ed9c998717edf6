"""What stands before a site's patients: nothing is drawn that was not planned, paid for and written down before."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort import Cohort
from client.guard import Guard, Limits, no_guard, rounded, unit
from client.ledger import Ledger
from client.outbox import Outbox
from common import private_plan
from common.errors import SiteRefusal
from common.messages import Description
from common.privacy import Release, default_delta, epsilon
from common.run_config import RunConfig
from server.spending import plausible

OWNER = "0a" * 32
PATIENTS = 60
"""In training, of two images each."""


def cohort_of(patients: int = PATIENTS) -> Cohort:
    """So many training patients, and ten each for validation and test."""
    every = np.repeat(np.arange(patients + 20), 2)
    count = len(every)
    digests = b"".join(hashlib.sha256(bytes([place % 256, place // 256])).digest() for place in range(count))
    return Cohort(
        source=lambda rows: np.zeros((len(rows), 1, 8, 8), np.uint8),
        rows=np.arange(count),
        digests=np.frombuffer(digests, np.uint8).reshape(-1, 32),
        labels=np.arange(count) % 2,
        splits=np.repeat(np.array([0, 1, 2], np.int8), [2 * patients, 20, 20]),
        patients=every,
        label_names=("dark", "bright"),
        preprocessing="noise",
    )


COHORT = cohort_of()


def run_of(seed: int = 0, **privacy: Any) -> RunConfig:
    """Four rounds of one step, and the centre before them."""
    return RunConfig.model_validate(
        {
            "task": {"name": "noise", "labels": ("dark", "bright")},
            "model": {"init": "zero", "scaling": "stages"},
            "training": {"rounds": 4, "local_steps": 1, "batch_size": 20, "draw": "patients"},
            "privacy": {"epsilon": 3.0, **privacy},
            "seed": seed,
        }
    )


@pytest.fixture
def guard(tmp_path: Path) -> Callable[..., Guard]:
    """Return a maker of the guard of one site; each is a start of the site anew."""

    def make(**limits: Any) -> Guard:
        return Guard(
            lambda: Ledger.open(tmp_path / "ledger.jsonl", OWNER), Outbox(tmp_path / "outbox"), Limits(**limits)
        )

    return make


def refused(code: str, work: Callable[..., Any], *given_: Any) -> None:
    with pytest.raises(SiteRefusal) as raised:
        work(*given_)
    assert raised.value.code == code


def kinds(of: Guard) -> list[str]:
    return [entry.kind for entry in of.ledger.entries]


# The plan


def test_a_plan_is_noted_once_and_found_again(guard: Callable[..., Guard]) -> None:
    first = guard()
    found = first.plan(run_of(), COHORT)
    assert found == private_plan.plan(run_of(), PATIENTS)
    assert first.plan(run_of(), COHORT) == found
    again = guard()
    assert again.plan(run_of(), COHORT) == found
    assert kinds(again) == ["open", "plan"]
    noted = again.ledger.planned(run_of().fingerprint())
    assert noted is not None
    assert (noted.patients, noted.unit, noted.delta) == (PATIENTS, "patient", default_delta(PATIENTS))
    assert noted.releases == found.releases


@pytest.mark.parametrize("limits", [{"max_epsilon": 2.9}, {"max_delta": 1e-6}, {"max_epsilon": 9, "max_delta": 1e-6}])
def test_what_the_hospital_does_not_allow_is_refused_before_anything_is_written(
    limits: dict[str, float], guard: Callable[..., Guard], caplog: pytest.LogCaptureFixture
) -> None:
    strict = guard(**limits)
    with caplog.at_level(logging.WARNING, logger="consilium.site"):
        refused("budget", strict.plan, run_of(), COHORT)
    assert "refused (budget)" in caplog.text
    assert kinds(strict) == ["open"]
    assert guard(max_epsilon=3.0).plan(run_of(), COHORT).epsilon <= 3.0


def test_runs_add_up_and_a_run_counts_what_it_took_not_what_it_planned(guard: Callable[..., Guard]) -> None:
    both = guard(max_epsilon=4.0)
    centre = both.plan(run_of(), COHORT).centre
    assert centre is not None
    both.plan(run_of(seed=1), COHORT)  # nothing was taken yet
    both.reserve(run_of(), COHORT, "centre", centre)
    for number in range(1, 5):
        both.reserve(run_of(), COHORT, f"round-{number}", both.plan(run_of(), COHORT).one_round)
    refused("budget", both.plan, run_of(seed=2), COHORT)
    refused("budget", both.reserve, run_of(seed=1), COHORT, "round-1", Release(0.5))
    assert both.ledger.releases(run_of(seed=1).fingerprint()) == ()


@pytest.mark.parametrize("privacy", [{"delta": 0.5}, {"epsilon": 1e-4}])
def test_a_target_that_cannot_be_reached_is_refused(privacy: dict[str, float], guard: Callable[..., Guard]) -> None:
    one = guard()
    refused("target", one.plan, run_of(**privacy), COHORT)
    assert kinds(one) == ["open"] or not one.ledger.entries


def test_a_site_without_a_ledger_takes_part_in_no_private_run(tmp_path: Path) -> None:
    refused("ledger", no_guard(tmp_path).plan, run_of(), COHORT)
    assert no_guard(tmp_path).statement(run_of().fingerprint()) is None


# The cohort


def without(places: Any) -> Cohort:
    return COHORT.subset(np.delete(np.arange(len(COHORT)), places))


def swapped() -> Cohort:
    """As many patients, one of them another."""
    digests = COHORT.digests.copy()
    digests[0] ^= 1
    return replace(COHORT, digests=digests)


def moved() -> Cohort:
    """A patient of training and one of the test split have changed places."""
    splits = COHORT.splits.copy()
    splits[[0, 1, -2, -1]] = [2, 2, 0, 0]
    return replace(COHORT, splits=splits)


@pytest.mark.parametrize("other", [without([0, 1]), without([0]), swapped(), moved(), cohort_of(PATIENTS + 1)])
def test_a_run_keeps_the_patients_that_it_was_planned_for(other: Cohort, guard: Callable[..., Guard]) -> None:
    one = guard()
    release = one.plan(run_of(), COHORT).one_round
    for again in (one, guard()):
        refused("cohort_changed", again.plan, run_of(), other)
        refused("cohort_changed", again.reserve, run_of(), other, "round-1", release)
        refused("cohort_changed", again.check, run_of(), other)
    assert kinds(one) == ["open", "plan"]


def test_the_order_of_the_images_is_no_other_cohort(guard: Callable[..., Guard]) -> None:
    one = guard()
    one.plan(run_of(), COHORT)
    turned = COHORT.subset(np.arange(len(COHORT))[::-1])
    one.check(run_of(), turned)
    assert one.plan(run_of(), turned).delta == default_delta(PATIENTS)


def test_nothing_is_drawn_for_a_run_that_was_not_planned(guard: Callable[..., Guard]) -> None:
    one = guard()
    refused("cohort_changed", one.reserve, run_of(), COHORT, "round-1", Release(100.0))
    assert kinds(one) == ["open"]


# Reserving and spending


def test_the_whole_plan_can_be_reserved_and_no_more(guard: Callable[..., Guard]) -> None:
    one = guard()
    found = one.plan(run_of(), COHORT)
    assert found.centre is not None
    one.reserve(run_of(), COHORT, "centre", found.centre)
    for number in range(1, 5):
        one.reserve(run_of(), COHORT, f"round-{number}", found.one_round)
    before = kinds(one)
    refused("budget", one.reserve, run_of(), COHORT, "round-5", found.one_round)
    refused("budget", guard().reserve, run_of(), COHORT, "round-4", found.one_round)  # a crash does not pay for it
    assert kinds(guard()) == before == ["open", "plan", *["reserve"] * 5]
    cost, steps = one.spent(run_of(), found.delta)
    assert cost == pytest.approx(found.epsilon)
    assert steps == 5


def test_one_look_that_is_too_clear_is_refused(guard: Callable[..., Guard]) -> None:
    one = guard()
    found = one.plan(run_of(), COHORT)
    clear = replace(found.one_round, noise_multiplier=found.one_round.noise_multiplier / 4)
    refused("budget", one.reserve, run_of(), COHORT, "round-1", clear)
    assert kinds(one) == ["open", "plan"]


def test_what_leaves_is_noted_with_its_hash_and_nothing_else_may_take_its_place(guard: Callable[..., Guard]) -> None:
    one = guard()
    number = one.reserve(run_of(), COHORT, "round-1", one.plan(run_of(), COHORT).one_round)
    one.spend(number, b"bytes")
    one.spend(number, b"bytes")
    assert kinds(one) == ["open", "plan", "reserve", "spend"]
    assert one.ledger.entries[-1].facts["bytes_sha256"] == hashlib.sha256(b"bytes").hexdigest()
    refused("ledger", one.spend, number, b"other")


def test_the_statement_has_what_was_spent_and_the_head_of_the_ledger(guard: Callable[..., Guard]) -> None:
    one, fingerprint = guard(), run_of().fingerprint()
    assert one.statement(fingerprint) is None
    found = one.plan(run_of(), COHORT)
    assert one.statement(fingerprint) == {
        "epsilon": 0.0,
        "ledger_entries": 2,
        "ledger_sha256": one.ledger.entries[-1].sha256,
    }
    one.reserve(run_of(), COHORT, "round-1", found.one_round)
    said = one.statement(fingerprint)
    assert said is not None
    assert (said["epsilon"], said["ledger_entries"]) == (epsilon([found.one_round], found.delta), 3)


def test_a_ledger_that_was_put_back_is_refused(guard: Callable[..., Guard], tmp_path: Path) -> None:
    one = guard()
    found = one.plan(run_of(), COHORT)
    shutil.copy(tmp_path / "ledger.jsonl", tmp_path / "copy")
    one.reserve(run_of(), COHORT, "round-1", found.one_round)
    shutil.copy(tmp_path / "copy", tmp_path / "ledger.jsonl")
    for guarded in (one, guard()):
        refused("ledger", guarded.reserve, run_of(), COHORT, "round-2", found.one_round)
        refused("ledger", guarded.plan, run_of(seed=1), COHORT)
    assert (tmp_path / "ledger.jsonl").read_bytes() == (tmp_path / "copy").read_bytes()


# Looks at a split


def test_looks_take_what_the_run_said_and_no_more(guard: Callable[..., Guard]) -> None:
    one, run = guard(), run_of(histogram_epsilon=1.0)
    one.plan(run, COHORT)
    for _ in range(5):
        one.reserve_look(run, "validation", Release(5.0, kind="laplace"))
    refused("budget", one.reserve_look, run, "validation", Release(5.0, kind="laplace"))
    one.reserve_look(run, "test", Release(1.0, kind="laplace"))  # other patients
    assert one.spent(run, 1e-3) == (0.0, 0)  # and others than those of training
    refused("budget", one.reserve_look, run_of(), "test", Release(1.0, kind="laplace"))  # a run with exact counts


def test_looks_of_all_runs_add_up_to_what_the_hospital_allows(guard: Callable[..., Guard]) -> None:
    one = guard(max_epsilon=3.5)
    for seed in range(2):
        one.plan(run_of(seed=seed, histogram_epsilon=2.0), COHORT)
    one.reserve_look(run_of(histogram_epsilon=2.0), "test", Release(0.5, kind="laplace"))
    refused("budget", one.reserve_look, run_of(seed=1, histogram_epsilon=2.0), "test", Release(0.5, kind="laplace"))
    one.reserve_look(run_of(seed=1, histogram_epsilon=2.0), "test", Release(1.0, kind="laplace"))


# What is told


@pytest.mark.parametrize(("digits", "told"), [(None, 60), (1, 60), (2, 60)])
def test_an_offer_is_one_that_the_coordinator_believes(
    digits: int | None, told: int, guard: Callable[..., Guard]
) -> None:
    one = guard(digits=digits)
    offer = one.offer(run_of(), COHORT)
    said = Description("north", np.zeros((3, 2), np.int64), "", **offer)
    assert plausible(said, 3.0)
    assert (said.examples, said.unit, said.steps, said.steps_done, said.spent) == (told, "patient", 5, 0, 0.0)
    one.reserve(run_of(), COHORT, "round-1", one.plan(run_of(), COHORT).one_round)
    later = guard(digits=digits).offer(run_of(), COHORT)
    assert later["steps_done"] == 1
    assert 0 < later["spent"] < later["epsilon"] <= 3.0
    assert {key: value for key, value in later.items() if key not in ("spent", "steps_done")} == {
        key: value for key, value in offer.items() if key not in ("spent", "steps_done")
    }


def test_sizes_are_rounded_as_the_hospital_wants_and_the_plan_is_not(guard: Callable[..., Guard]) -> None:
    odd, one = cohort_of(64), guard(digits=1)
    assert one.told_size(odd) == one.offer(run_of(), odd)["examples"] == 60
    noted = one.ledger.planned(run_of().fingerprint())
    assert noted is not None
    assert noted.patients == 64


@given(number=st.integers(1, 10**9), digits=st.integers(1, 4))
def test_a_rounded_number_is_near_and_has_as_many_digits(number: int, digits: int) -> None:
    found = rounded(number, digits)
    assert found > 0
    assert len(str(found).rstrip("0")) <= digits
    assert abs(found - number) <= 0.5 * 10 ** (len(str(number)) - digits)
    assert rounded(number, None) == number


def test_the_guarantee_is_for_patients_unless_every_image_is_one() -> None:
    assert unit(COHORT) == "patient"
    assert unit(replace(COHORT, patients=np.arange(len(COHORT)))) == "image"
