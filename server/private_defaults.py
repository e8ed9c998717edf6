"""What a private run takes where its plan leaves something open, and what it cannot be.

The rule: noise is paid for once, whatever is done with it afterwards, so a head is best trained by few clean looks.

- A head alone takes `ROUNDS` rounds of one step each, over every patient of every site, from a head of zeros: what
  local epochs gain, drift and noise cost twice, and the result does not depend on how the patients are spread. The rate
  follows from the noise (`common.private_steps`).
- `--strategy analytic` takes the closed form on noisy sums instead: one exchange.
- Deeper cuts take Poisson-sampled steps, a pass a round.

Standardising by exact moments and weights by exact label counts would be releases: inputs are scaled by stage, and the
loss has no weights.
"""

from __future__ import annotations

import secrets
from typing import Any

from common.errors import ConfigError
from common.private_steps import ROUNDS, clip_of
from common.run_config import METRICS, Evaluated, RunConfig, Training
from common.strict import Section

EVERYBODY = 65_536
"""A batch of as many takes every patient of a site, each time."""

DEEP_BATCH = 64


def private(plan: RunConfig) -> RunConfig:
    """Return a private plan with its open ends filled in; any other as it is.

    Raises:
        ConfigError: it asks for something that would be a release of its own, or would take nothing.
    """
    if not plan.privacy.on:
        return plan
    check(plan)
    model = _filled(plan.model, scaling="stages", init="zero")
    training = _filled(plan.training, **_training(plan))
    training = training.model_copy(update={"draw": "patients"})
    found = plan.model_copy(update={"model": model, "training": training, "evaluation": _evaluation(plan)})
    if training.rule.kind != "analytic" and not training.rounds and model.init == "zero":
        raise ConfigError("--epsilon: the run has no rounds and no closed form, so nothing would be learnt")
    named = {"clip": clip_of(found), "run": plan.privacy.run or secrets.token_hex(16)}
    return found.model_copy(update={"privacy": plan.privacy.model_copy(update=named)})


def check(plan: RunConfig) -> None:
    """Refuse what a private run cannot have; whatever else a plan is, is no business of this.

    Raises:
        ConfigError: it asks for something that would be a release of its own.
    """
    if not plan.privacy.on:
        return
    given = {section: getattr(plan, section).model_fields_set for section in ("model", "training")}
    if "scaling" in given["model"] and plan.model.scaling == "moments":
        raise ConfigError(
            '[model] scaling: "moments" takes exact means and deviations of the data, which no epsilon covers; '
            'leave it out, or take "stages"'
        )
    if "class_weights" in given["training"] and plan.training.class_weights == "balanced":
        raise ConfigError(
            '--class-weights: "balanced" takes exact counts of labels, which no epsilon covers; '
            'leave it out, or say "none"'
        )


def _evaluation(plan: RunConfig) -> Evaluated:
    """Return what sites tell: where counts are noisy, nothing besides them."""
    return plan.evaluation if plan.privacy.histogram_epsilon is None else Evaluated(metrics=METRICS[:2])


def _training(plan: RunConfig) -> dict[str, Any]:
    """Return what suits what is trained."""
    if plan.model.trainable != "head":
        return {"class_weights": "none", "batch_size": DEEP_BATCH}
    alone = {"local_steps": 1} if plan.training.local_epochs is None else {}
    return {
        "class_weights": "none",
        "optimizer": "sgd",
        "momentum": 0.0,
        "schedule": "constant",
        "rounds": ROUNDS,
        "batch_size": EVERYBODY,
        **alone,
    }


def _filled(section: Section, **wanted: Any) -> Any:
    """Return a section with what was not given; pydantic remembers what was."""
    return section.model_copy(
        update={key: value for key, value in wanted.items() if key not in section.model_fields_set}
    )


def leaves_rate_open(plan: RunConfig, training: Training) -> bool:
    """Return whether the rate of a run is settled by its noise, when that is known."""
    return plan.privacy.on and plan.model.trainable == "head" and training.lr is None
