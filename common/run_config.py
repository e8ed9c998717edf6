"""What a federation agreed on: one frozen value, strict, written as `run.toml`, fingerprinted.

Facts that belong to one hospital or to the coordinator's machine never stand here. The section `[simulation]` is the
exception that proves the rule: a simulation owns its sites, so it records where their data came from; it is no part of
the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from common.errors import ConfigError, unknown_value
from common.strict import Section, parse_toml, validated

WireType = Literal["float32", "bfloat16", "float16"]
TaskKind = Literal["single-label", "multi-label"]
StrategyKind = Literal[
    "fedavg",
    "analytic",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "median",
    "trimmed-mean",
    "krum",
]
MetricKind = Literal["confusion", "histograms", "calibration", "losses"]
METRICS: tuple[MetricKind, ...] = get_args(MetricKind)
"""What an evaluation can tell: counts by label and argmax, histograms of scores, calibration, Brier and log loss."""

# What a strategy's parameter is called, and the interval it lies in (low inclusive, high exclusive).
_PARAMETERS: dict[str, tuple[str, float, float]] = {
    "fedprox": ("MU", 0.0, math.inf),
    "trimmed-mean": ("BETA", 0.0, 0.5),
}

Uncertain = Literal["ignore", "zeros", "ones", "soft"]
Blank = Literal["zeros", "ignore"]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Strategy(BaseModel):
    """An aggregation rule and its parameter, as `--strategy` spells them.

    Examples:
        >>> Strategy.parse("fedprox:0.1")
        Strategy(kind='fedprox', parameter=0.1)
        >>> Strategy.parse("fedavg").parameter is None
        True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: StrategyKind
    parameter: float | None = None

    @staticmethod
    def parse(text: str) -> Strategy:
        """Read `kind` or `kind:parameter`.

        Raises:
            ConfigError: an unknown kind, or a parameter that is missing, superfluous or out of range.
        """
        kind, colon, value = text.partition(":")
        kinds = list(get_args(StrategyKind))
        if kind not in kinds:
            unknown_value("strategy", kind, kinds)
        if kind not in _PARAMETERS:
            if colon:
                raise ConfigError(f"strategy: {kind!r} takes no parameter, got {text!r}")
            return Strategy(kind=kind)  # type: ignore[arg-type]  # checked against the literal above
        name, low, high = _PARAMETERS[kind]
        return Strategy(kind=kind, parameter=_number(text, value, f"{kind}:{name}", low, high))  # type: ignore[arg-type]


def _number(text: str, value: str, form: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"strategy: got {text!r}, expected {form} with a number") from None
    if not low <= number < high:
        bound = f"at least {low:g}" + ("" if math.isinf(high) else f" and below {high:g}")
        raise ConfigError(f"strategy: got {text!r}, expected {form} {bound}")
    return number


class Task(Section):
    """What is learnt."""

    name: str = ""
    labels: Names = ()  # in the order of the model's outputs
    kind: TaskKind = "single-label"  # one label an image, or several, each present or absent


class Data(Section):
    """How an image becomes the trunk's input."""

    preset: str = ""  # a name of client.preprocessing.PRESETS; empty: the data set's
    image_size: int | None = Field(default=None, ge=16, le=2048)  # pixels, square; None: the preset's
    views: int | None = Field(
        default=None, ge=1, le=16
    )  # cached views an image, the first unchanged; None: the preset's
    preprocessing: str = ""  # preprocessing id, filled in when the run is resolved
    # What becomes of annotations of several labels an image: of -1, "not sure" (soft is 0.5), and of an empty one
    uncertain: Uncertain = "ignore"
    blank: Blank = "zeros"


class Model(Section):
    """The backbone, where it is cut, and the head."""

    backbone: str = "tf_efficientnet_lite0"  # any timm classifier
    weights: str = "auto"  # auto, embedded, hub, none, or a .safetensors file
    trainable: str = "head"  # head, stages:N counted from the output, all
    features: Literal["multi", "last"] = "multi"  # what the head reads: pooled outputs of several stages, or the last
    init: Literal["analytic", "zero"] = "analytic"  # the head's start: closed form of summed statistics, or zeros
    # What the head's inputs are scaled by: pooled mean and deviation, or each stage of an image to norm 1 by itself,
    # which needs nothing of the data
    scaling: Literal["moments", "stages"] = "moments"
    ridge: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = (
        0.1,
        0.3,
        1.0,
        3.0,
    )  # candidates, an example
    dropout: float = Field(default=0.0, ge=0, lt=1)  # on the head's input
    trunk_sha256: str = ""  # of the frozen tensors, filled in when the run is resolved

    @field_validator("trainable")
    @classmethod
    def _known_cut(cls, value: str) -> str:
        kind, _, depth = value.partition(":")
        if value in ("head", "all") or (kind == "stages" and re.fullmatch("[1-9][0-9]*", depth)):
            return value
        raise ValueError(f"got {value!r}, expected head, stages:N with N at least 1, or all")

    @field_validator("ridge")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError("expected positive numbers")
        return value


class Training(Section):
    """Rounds, and what a site does in one."""

    strategy: str = "fedavg"
    rounds: int = Field(default=10, ge=0, le=100_000)
    local_epochs: int | None = Field(default=None, ge=1, le=10_000)  # passes over a site's training split a round
    local_steps: int | None = Field(default=None, ge=1, le=1_000_000)  # or fixed optimiser steps a round
    batch_size: int = Field(default=32, ge=1, le=65_536)
    draw: Literal["images", "patients"] = "images"  # what a pass visits once; of a patient, one image at random
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = Field(default=None, gt=0, le=100)  # None: 3e-4 for the head alone, 1e-4 for deeper cuts
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"  # over the steps of the whole run
    warmup: float = Field(default=0.0, ge=0, lt=1)  # share of the run with a linearly rising rate
    class_weights: Literal["balanced", "none"] = "balanced"  # from pooled label counts, or none
    server_lr: float = Field(default=0.003, gt=0)  # fedadam, fedyogi, fedadagrad
    server_momentum: float = Field(default=0.9, ge=0, lt=1)  # fedavgm
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of sgd
    averaging: float = Field(default=0.0, ge=0, le=1)  # share of the rounds, the last ones, whose mean ends the run

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        try:
            Strategy.parse(value)
        except ConfigError as error:  # pydantic adds where it stands to a ValueError alone
            raise ValueError(str(error).removeprefix("strategy: ")) from None
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps exclude each other: give one")
        return self

    @property
    def rule(self) -> Strategy:
        """The parsed strategy."""
        return Strategy.parse(self.strategy)


HEAD_LR, DEEP_LR = 3e-4, 1e-4


def base_lr(training: Training, *, deep: bool) -> float:
    """Return the learning rate: the run's, else what was measured best for the head alone or for deeper cuts."""
    return training.lr or (DEEP_LR if deep else HEAD_LR)


Epsilon = Annotated[float, Field(gt=0, le=1000)]


def steps_per_round(training: Training, drawn: int) -> int:
    """Return the optimiser steps of one round at a site; none without examples.

    Args:
        training: the run's section.
        drawn: what one pass visits: the examples, or their patients.
    """
    if training.local_steps is not None and drawn:
        return training.local_steps
    return (training.local_epochs or 1) * math.ceil(drawn / training.batch_size)


class Privacy(Section):
    """Differential privacy of the patients of the training splits, at each site, against everybody; none by default."""

    epsilon: Epsilon | None = None  # what the whole run may cost a site's patients; gives each site its noise
    noise_multiplier: float | None = Field(default=None, ge=1e-3, le=1e6)  # or the noise itself, over the sensitivity
    delta: float | None = Field(default=None, gt=0, lt=1)  # None: by each site's own number of patients
    clip: float | None = Field(default=None, gt=0)  # C, L2 norm that a patient's gradient is cut to; None: a good one
    centre: bool = True  # whether a share of the budget goes into the centre of the head's inputs
    # What all looks at a split of the test and validation patients may cost, as Laplace noise; None: exact counts
    histogram_epsilon: Epsilon | None = None
    run: str = Field(default="", pattern="^([0-9a-f]{32})?$")  # drawn when the run is settled: tells it from its like

    @model_validator(mode="after")
    def _one_target(self) -> Privacy:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("epsilon and noise_multiplier exclude each other: give one")
        wasted = [name for name in ("delta", "clip", "histogram_epsilon") if getattr(self, name) is not None]
        if wasted and not self.on:
            raise ValueError(f"{wasted[0]} without epsilon or noise_multiplier: give one of these with it")
        return self

    @property
    def on(self) -> bool:
        """Whether the run is private."""
        return self.epsilon is not None or self.noise_multiplier is not None


class Evaluated(Section):
    """What sites tell of an evaluation."""

    metrics: Annotated[tuple[MetricKind, ...], Field(strict=False)] = METRICS

    @field_validator("metrics")
    @classmethod
    def _enough(cls, value: tuple[MetricKind, ...]) -> tuple[MetricKind, ...]:
        missing = [name for name in METRICS[:2] if name not in value]
        if missing:
            raise ValueError(
                f"got {', '.join(value) or 'none'}, expected {missing[0]} among them: rounds compete by it"
            )
        return value


class Sites(Section):
    """Who takes part, and how many answers a round needs."""

    names: Names = ()  # the explicit list, in text order
    quorum: int | None = Field(default=None, ge=1)  # usable replies a round needs; None: all sites
    deadline_s: float = Field(default=3600.0, gt=0)  # seconds a site has to answer
    patience_s: float = Field(default=120.0, gt=0)  # seconds that a site of which nothing is heard is waited for
    max_norm: float | None = Field(default=None, gt=0)  # L2 norm above which an update is not admitted; None: no limit


class Wire(Section):
    """How weights travel."""

    dtype: WireType = "float32"


class Simulation(Section):
    """Where a simulation's data came from and how they were cut into sites."""

    dataset: str = "phantoms"
    data_root: str = ""
    sites: int = Field(default=5, ge=1, le=100_000)
    partition: str = (
        ""  # iid, dirichlet:A, shards:K, quantity:A, natural; empty: natural for phantoms, else dirichlet:0.5
    )
    baselines: bool = True
    backend: Literal["inprocess", "ray"] = "inprocess"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class RunConfig(Section):
    """A run, complete: two runs of equal fingerprint on equal data end with equal bytes."""

    task: Task = Task()
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    privacy: Privacy = Privacy()
    evaluation: Evaluated = Evaluated()
    sites: Sites = Sites()
    wire: Wire = Wire()
    simulation: Simulation | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    def fingerprint(self) -> str:
        """Return the SHA-256 over everything the federation agreed on, as 64 hexadecimal digits."""
        agreed = self.model_dump(mode="json", exclude={"simulation"})
        return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """Return the run as TOML; `from_toml` gives it back. Unset values are left out, for TOML has no null."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @staticmethod
    def from_toml(text: str, where: str = "run.toml") -> RunConfig:
        """Read a run.

        Raises:
            ConfigError: no TOML, an unknown key, or a value out of range; names file, key, got and expected.
        """
        return build(parse_toml(text, where), where)


def build(values: Mapping[str, Any], where: str) -> RunConfig:
    """Return the validated run of nested values.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
    """
    return validated(RunConfig, values, where)
