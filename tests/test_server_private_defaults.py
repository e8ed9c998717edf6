"""What a private run leaves open gets what suits a private run; what was said stands, or is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import ConfigError
from common.private_steps import ROUNDS, clip
from common.run_config import RunConfig, Task
from server.plan import settled
from server.private_defaults import DEEP_BATCH, EVERYBODY, leaves_rate_open, private

LABELS = ("dark", "bright")


def asked(**sections: Any) -> RunConfig:
    """A plan as a command or a file has it: what is not named was not given."""
    values: dict[str, Any] = {"task": {"labels": LABELS}, "privacy": {"epsilon": 3.0}}
    return RunConfig.model_validate({**values, **sections})


def test_a_run_without_privacy_is_left_as_it_is() -> None:
    plain = RunConfig()
    assert private(plain) is plain


def test_a_head_alone_takes_few_clean_looks_at_everybody() -> None:
    found = private(asked())
    assert (found.model.scaling, found.model.init) == ("stages", "zero")
    training = found.training
    assert (training.rounds, training.local_steps, training.local_epochs) == (ROUNDS, 1, None)
    assert (training.batch_size, training.draw, training.class_weights) == (EVERYBODY, "patients", "none")
    assert (training.optimizer, training.momentum, training.schedule, training.lr) == ("sgd", 0.0, "constant", None)
    assert found.privacy.clip == clip(2, "single-label")
    assert leaves_rate_open(found, training)


def test_deeper_cuts_take_a_sampled_pass_a_round() -> None:
    found = private(asked(model={"trainable": "stages:1"}))
    training = found.training
    assert (training.batch_size, training.local_steps, training.rounds) == (DEEP_BATCH, None, 10)
    assert (training.draw, training.class_weights, training.optimizer) == ("patients", "none", "adamw")
    assert found.privacy.clip == 1.0
    assert not leaves_rate_open(found, training)


def test_what_was_asked_for_stands() -> None:
    found = private(
        asked(
            model={"init": "analytic", "scaling": "stages"},
            training={"rounds": 7, "local_epochs": 2, "batch_size": 16, "optimizer": "adamw", "lr": 0.5},
            privacy={"epsilon": 1.0, "clip": 0.25, "run": "ab" * 16},
        )
    )
    assert (found.model.init, found.privacy.clip, found.privacy.run) == ("analytic", 0.25, "ab" * 16)
    training = found.training
    assert (training.rounds, training.local_epochs, training.local_steps, training.batch_size) == (7, 2, None, 16)
    assert (training.optimizer, training.lr) == ("adamw", 0.5)
    assert not leaves_rate_open(found, training)


def test_noise_may_be_given_instead_of_epsilon() -> None:
    assert private(asked(privacy={"noise_multiplier": 2.0})).training.rounds == ROUNDS


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"scaling": "moments"}}, r'\[model\] scaling: "moments" takes exact means'),
        ({"training": {"class_weights": "balanced"}}, '--class-weights: "balanced" takes exact counts'),
        ({"training": {"rounds": 0}}, "nothing would be learnt"),
    ],
)
def test_what_would_be_a_release_of_its_own_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        private(asked(**sections))


@pytest.mark.parametrize("training", [{"strategy": "analytic"}, {"strategy": "analytic", "rounds": 0}])
def test_a_closed_form_needs_no_rounds(training: dict[str, Any]) -> None:
    assert private(asked(training=training)).training.rule.kind == "analytic"


def test_a_closed_form_start_needs_no_rounds() -> None:
    assert private(asked(model={"init": "analytic"}, training={"rounds": 0})).training.rounds == 0


def test_two_runs_that_look_alike_are_told_apart() -> None:
    """For each takes of the patients by itself: noise of one run must not stand for that of another."""
    first, second = private(asked()), private(asked())
    assert first.privacy.run != second.privacy.run
    assert first.fingerprint() != second.fingerprint()
    assert private(first) == first  # settled once and for all


def test_noisy_counts_are_all_that_sites_tell_of_an_evaluation() -> None:
    assert private(asked(privacy={"epsilon": 3.0, "histogram_epsilon": 1.0})).evaluation.metrics == (
        "confusion",
        "histograms",
    )
    assert "calibration" in private(asked()).evaluation.metrics


def test_a_settled_private_run_is_settled() -> None:
    model = {"backbone": "test_efficientnet", "weights": "none"}
    plan = asked(data={"image_size": 32}, model=model)
    task = Task(name="blobs", labels=LABELS)
    run = settled(plan, task, ("south", "north"), "generic").run
    assert (run.training.lr, run.training.local_steps, run.training.local_epochs) == (None, 1, None)
    assert run.sites.names == ("north", "south")
    assert settled(run, task, run.sites.names, "ct").run == run
    assert RunConfig.from_toml(run.to_toml()) == run
    deep = settled(
        asked(data={"image_size": 32}, model={**model, "trainable": "stages:1"}), task, ("a",), "generic"
    ).run
    assert (deep.training.lr, deep.training.local_epochs) == (1e-4, 1)
