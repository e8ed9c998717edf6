"""From what a coordinator wrote to a run that is settled: every default filled in, every site named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common import checkpoint, model
from common.errors import ConfigError, unknown_value
from common.model import Built
from common.presets import PRESETS, preprocessing_id
from common.run_config import Data, RunConfig, Task, base_lr
from common.weights import Weights
from server.aggregation import check_sites
from server.private_defaults import leaves_rate_open, private


@dataclass(frozen=True)
class Settled:
    """A run whose fingerprint stands, with the model that it starts from."""

    run: RunConfig
    built: Built
    trunk: bytes  # the frozen content


def settled(plan: RunConfig, task: Task, names: Sequence[str], preset: str) -> Settled:
    """Return the run of a plan.

    Args:
        plan: what was asked for; what it leaves open is filled in.
        task: what is learnt, with its labels.
        names: the run's sites.
        preset: how images are shown, where the plan does not say.

    Raises:
        ConfigError: parts of the plan contradict each other.
        WeightsUnavailable: the pretrained weights cannot be had.
    """
    plan = private(plan.model_copy(update={"task": task}))
    weights = Weights.parse(plan.model.weights, plan.model.backbone)
    names = tuple(sorted(names))
    check_sites(plan.training.rule, len(names))
    quorum = plan.sites.quorum or len(names)
    if quorum > len(names):
        raise ConfigError(f"quorum {quorum}: the run has {len(names)} sites")
    training = plan.training
    if training.local_epochs is None and training.local_steps is None:
        training = training.model_copy(update={"local_epochs": 1})
    if not leaves_rate_open(plan, training):
        training = training.model_copy(update={"lr": base_lr(training, deep=plan.model.trainable != "head")})
    run = plan.model_copy(
        update={
            "task": task,
            "data": _data(plan, preset),
            "model": plan.model.model_copy(update={"weights": str(weights.path or weights.source)}),
            "training": training,
            "sites": plan.sites.model_copy(update={"names": names, "quorum": quorum}),
        }
    )
    return with_trunk(run)


def _data(plan: RunConfig, preset: str) -> Data:
    name = plan.data.preset or preset
    if name not in PRESETS:
        unknown_value("preset", name, list(PRESETS))
    size = plan.data.image_size or PRESETS[name].image_size
    update = {
        "preset": name,
        "image_size": size,
        "views": plan.data.views or PRESETS[name].views,
        "preprocessing": preprocessing_id(PRESETS[name], size),
    }
    return plan.data.model_copy(update=update)


def with_trunk(run: RunConfig) -> Settled:
    """Return the run with the hash of the trunk that its backbone has."""
    built = model.pretrained(run)
    content = model.frozen_content(built, run)
    named = run.model.model_copy(update={"trunk_sha256": checkpoint.sha256(content)})
    return Settled(run.model_copy(update={"model": named}), built, content)
