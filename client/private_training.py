"""One site's part in a round with differential privacy: DP-SGD on the upper, over patients, from cached features.

Each step draws every patient with probability q by itself, and of each one drawn one image in one cached view; sums
their clipped gradients; adds Gaussian noise of σ C to every value; and divides by q · P, the number of patients that
were to be expected, which depends on nobody's data (Abadi et al., Deep Learning with Differential Privacy, CCS 2016,
Algorithm 1). A record is thus a patient. What follows (the proximal term, weight decay, the optimiser) looks at the
noisy gradient alone. All randomness that protects comes from `client.noise`; dropout, which acts before clipping, draws
from torch. The loss is not told: it would be a release.

Opacus' optimisers are not used here: they draw noise of float32 from torch's generator, and hold two further copies of
the gradients. Its samplers of norms and gradients are, in `client.ghost`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.clipping import Clipper
from client.features import Features
from client.noise import Noise, add_noise
from client.training import Pool, add_proximal_gradient, learning_rate, optimizer_of
from common.backbone import Upper
from common.model import norm_statistics
from common.run_config import Training, base_lr, steps_per_round

RECORDS = {"head": 4096, "deep": 48}
"""Most records whose gradients are computed at a time: what bounds memory, whatever a draw holds."""


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism of one step, as the accountant is told of it."""

    noise_multiplier: float  # σ: the noise's standard deviation over C; 0 is for tests of clipping alone
    sampling_rate: float  # q: the probability with which a step takes a patient
    clip: float  # C: the largest norm of one patient's part in a sum

    def __post_init__(self) -> None:
        if not (self.noise_multiplier >= 0 and 0 < self.sampling_rate <= 1 and 0 < self.clip < float("inf")):
            raise ValueError(f"got {self}, expected a noise of 0 or more, a rate in (0, 1] and a positive, finite clip")

    @staticmethod
    def of(training: Training, patients: int, *, noise_multiplier: float, clip: float) -> Mechanism:
        """Return the mechanism at a site: q = batch / patients, at most 1.

        Raises:
            ValueError: no patients.
        """
        if patients < 1:
            raise ValueError(f"patients: got {patients}, expected 1 or more")
        return Mechanism(noise_multiplier, min(1.0, training.batch_size / patients), clip)


@dataclass(frozen=True)
class PrivateFitted:
    """What a round of private training was: nothing that depends on the data."""

    steps: int


def fit(
    upper: Upper,
    features: Features,
    labels: Tensor,
    indices: NDArray[np.int64],
    training: Training,
    *,
    mechanism: Mechanism,
    round_number: int,
    class_weights: Tensor,
    patients: NDArray[np.int64],
    noise: Noise,
    size: int | None = None,
) -> PrivateFitted:
    """Train `upper` in place from the weights it holds.

    Args:
        upper: weights as received; `client.clipping.require_private` was content with it.
        features: of the site's examples.
        labels: (N,) or (N, K) as a cohort has them, on the features' device.
        indices: the examples to train on.
        training: the run's section.
        mechanism: as accounted for.
        round_number: 1 for the first.
        class_weights: (K,) or (2, K) on the features' device; not from this site's counts alone, for they are data.
        patients: (N,) whose each example is.
        noise: where all randomness comes from.
        size: the number of patients as it may be known, P; None: as it is.

    Raises:
        NotPrivate: the gradients of single records cannot be had.
    """
    statistics = norm_statistics(upper)
    deep = upper.body is not None
    pool = Pool.of(indices, patients)
    steps = steps_per_round(training, len(pool))
    mu = training.rule.parameter if training.rule.kind == "fedprox" else 0.0
    parameters = list(upper.trainable().values())
    received = [parameter.detach().clone() for parameter in parameters] if mu else []
    optimizer = optimizer_of(training, parameters, base_lr(training, deep=deep))
    upper.train()
    clipper = Clipper.of(upper)
    for step in range(steps):
        progress = (round_number - 1 + step / steps) / max(training.rounds, 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, base_lr(training, deep=deep), progress)
        drawn = _drawn(pool, features.views, mechanism.sampling_rate, noise)
        sums = _clipped_sums(clipper, features, labels, class_weights, drawn, mechanism.clip)
        _release(clipper, sums, mechanism, size or len(pool), noise)
        if mu:
            add_proximal_gradient(parameters, received, mu)
        optimizer.step()
    upper.eval()
    if norm_statistics(upper) != statistics:
        raise RuntimeError("running statistics changed during training")
    return PrivateFitted(steps)


def _drawn(pool: Pool, views: int, rate: float, noise: Noise) -> tuple[Tensor, Tensor]:
    """Return the (view, index) of one step: of each patient drawn, an image and a view, all equally likely."""
    assert pool.first is not None and pool.count is not None  # noqa: S101 - a pool of patients has them
    chosen = noise.chosen(len(pool), rate)
    index = pool.examples[pool.first[chosen] + noise.below(pool.count[chosen])]
    return noise.below(torch.full_like(index, views)), index


def _clipped_sums(
    clipper: Clipper,
    features: Features,
    labels: Tensor,
    class_weights: Tensor,
    drawn: tuple[Tensor, Tensor],
    clip: float,
) -> list[Tensor]:
    """Return the sum of clipped gradients over a whole draw, a few records at a time."""
    total: list[Tensor] | None = None
    for view, index in _parts(drawn, RECORDS["deep" if clipper.upper.body is not None else "head"]):
        place = index.to(labels.device)
        sums = clipper.sums(features.batch(view.to(labels.device), place), labels[place], class_weights, clip)
        total = sums if total is None else [held.add_(part) for held, part in zip(total, sums, strict=True)]
    return total if total is not None else [torch.zeros_like(parameter) for parameter in clipper.parameters]


def _parts(drawn: tuple[Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a draw in equal parts of `size` at most; none of an empty one."""
    view, index = drawn
    parts = math.ceil(len(index) / size)
    if parts:
        yield from zip(view.tensor_split(parts), index.tensor_split(parts), strict=True)


def _release(clipper: Clipper, sums: list[Tensor], mechanism: Mechanism, patients: int, noise: Noise) -> None:
    """Set the gradients: (sum + noise) / (q · P). A draw of nobody is released like any other."""
    expected = mechanism.sampling_rate * patients
    for parameter in clipper.parameters:
        noisy = add_noise(sums.pop(0), mechanism.noise_multiplier * mechanism.clip, noise)
        parameter.grad = noisy.div_(expected)
