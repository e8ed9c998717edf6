"""One site's part in a round: a fixed number of optimiser steps on the upper, from cached features.

Each round starts a fresh optimiser from the weights received, so a site keeps nothing between rounds and a round can
be repeated. Norms with running statistics stay frozen; that is checked after every round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from client.features import Features
from common.backbone import Upper
from common.model import norm_statistics
from common.run_config import Training, base_lr, steps_per_round
from common.seeds import derive


@dataclass(frozen=True)
class Fitted:
    """What a round of training was."""

    loss: float  # mean over steps, without the proximal term
    steps: int


def learning_rate(training: Training, base: float, progress: float) -> float:
    """Return the rate at a share of the whole run: a linear rise over `warmup`, then a cosine to zero or a constant.

    Args:
        training: the schedule.
        base: the highest rate.
        progress: steps done over steps of the whole run, 0 to 1.

    Examples:
        >>> learning_rate(Training(schedule="cosine"), 1.0, 0.5)
        0.5
        >>> learning_rate(Training(schedule="constant", warmup=0.5), 1.0, 0.25)
        0.5
    """
    if progress < training.warmup:
        return base * progress / training.warmup
    if training.schedule == "constant":
        return base
    return base * 0.5 * (1 + math.cos(math.pi * (progress - training.warmup) / (1 - training.warmup)))


def fit(
    upper: Upper,
    features: Features,
    labels: Tensor,
    indices: NDArray[np.int64],
    training: Training,
    *,
    round_number: int,
    class_weights: Tensor,
    seed: int,
    site: str,
    patients: NDArray[np.int64] | None = None,
) -> Fitted:
    """Train `upper` in place from the weights it holds.

    The loss is `weighted_loss`; FedProx adds (μ/2)·‖w − w_received‖² over the trainable parameters (Li et al.,
    Federated Optimization in Heterogeneous Networks, MLSys 2020, eq. 2).

    Args:
        upper: weights as received.
        features: of the site's examples.
        labels: (N,) or (N, K) as a cohort has them, on the features' device.
        indices: the examples to train on.
        training: the run's section.
        round_number: 1 for the first.
        class_weights: (K,) or (2, K) on the features' device.
        seed: the run's.
        site: its name; decides the order of examples together with seed and round.
        patients: (N,) whose each example is; needed where the run draws patients.

    Raises:
        ValueError: the run draws patients, and there are none.
    """
    if training.draw == "patients" and patients is None:
        raise ValueError("patients: got none, expected whose each example is, for the run draws patients")
    statistics = norm_statistics(upper)
    parameters = list(upper.trainable().values())
    received = [parameter.detach().clone() for parameter in parameters]
    deep = upper.body is not None
    optimizer = optimizer_of(training, parameters, base_lr(training, deep=deep))
    pool = Pool.of(indices, patients if training.draw == "patients" else None)
    steps = steps_per_round(training, len(pool))
    total = torch.zeros((), device=labels.device)
    upper.train()
    stream = _batches(pool, features.views, training.batch_size, steps, derive(seed, "train", site, round_number))
    mu = training.rule.parameter if training.rule.kind == "fedprox" else 0.0
    draws = deep or upper.head.dropout.p > 0  # a plain head draws nothing, and a stream costs as much as ten steps
    stream_of_dropout = _dropout_stream(derive(seed, "dropout", site, round_number), labels.device)
    with stream_of_dropout if draws else nullcontext():
        for step, (view, index) in enumerate(stream):
            progress = (round_number - 1 + step / steps) / max(training.rounds, 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, base_lr(training, deep=deep), progress)
            view, index = view.to(labels.device), index.to(labels.device)
            with _autocast(labels.device, deep=deep):
                loss = weighted_loss(upper(features.batch(view, index)), labels[index], class_weights)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            add_proximal_gradient(parameters, received, mu)
            optimizer.step()
            total += loss.detach()
    upper.eval()
    if norm_statistics(upper) != statistics:
        raise RuntimeError("running statistics changed during training")
    return Fitted(float(total) / max(steps, 1), steps)


def weighted_loss(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Return the mean of w_y · cross-entropy over examples, or of several labels an image over their annotations.

    It divides by the number of examples, not by their weight: else a site with one label would not feel the weights.

    Args:
        logits: (B, K).
        labels: (B,) indices, or (B, K) targets in 0..1 with NaN where an example was not annotated.
        class_weights: (K,), or (2, K) of absent and present.
    """
    if labels.dim() == 1:
        return example_losses(logits, labels, class_weights).mean()
    losses, known = _annotation_losses(logits, labels, class_weights)
    return losses.sum() / known.sum().clamp(min=1)


def example_losses(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Return each example's loss, (B,): of several labels an image the mean over its own annotations, 0 without any.

    Their mean is `weighted_loss` where all examples have as many annotations.
    """
    if labels.dim() == 1:
        return functional.cross_entropy(logits.float(), labels, weight=class_weights, reduction="none")
    losses, known = _annotation_losses(logits, labels, class_weights)
    return losses.sum(1) / known.sum(1).clamp(min=1)


def _annotation_losses(logits: Tensor, targets: Tensor, class_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return -w₁ t ln p - w₀ (1 - t) ln(1 - p) with p = 1 / (1 + exp(-z)), 0 where not annotated, and where it is."""
    known = ~targets.isnan()
    share = targets.where(known, 0.0)  # a NaN times 0 is a NaN, in the gradient as well
    z = logits.float()
    absent, present = class_weights
    losses = present * share * functional.softplus(-z) + absent * (1 - share) * functional.softplus(z)
    return losses * known, known


def add_proximal_gradient(parameters: list[nn.Parameter], received: list[Tensor], mu: float | None) -> None:
    """Add μ (w − w_received), the gradient of (μ/2)·‖w − w_received‖², to the gradients."""
    if mu:
        for parameter, origin in zip(parameters, received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def optimizer_of(training: Training, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return the run's optimiser, without any state."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=training.momentum, weight_decay=training.weight_decay, fused=True
        )
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=training.weight_decay, fused=True)


@dataclass(frozen=True)
class Pool:
    """What a pass visits: every example once, or every patient once with one of the examples."""

    examples: Tensor  # (n,) of int64, those of one patient side by side
    first: Tensor | None = None  # (P,) where each patient's examples begin; None: every example is visited
    count: Tensor | None = None  # (P,) how many there are

    @staticmethod
    def of(indices: NDArray[np.int64], patients: NDArray[np.int64] | None = None) -> Pool:
        """Return the pool of these examples, with `patients` (N,) that of their patients."""
        if patients is None:
            return Pool(torch.from_numpy(indices))
        order = indices[np.argsort(patients[indices], kind="stable")]
        _, first, count = np.unique(patients[order], return_index=True, return_counts=True)
        return Pool(*(torch.from_numpy(part) for part in (order, first, count)))

    def __len__(self) -> int:
        """Return how many examples a pass has."""
        return len(self.examples if self.first is None else self.first)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Return the examples of one pass, not shuffled; of a patient each example is as likely as any other."""
        if self.first is None or self.count is None:
            return self.examples
        chosen = torch.rand(len(self), generator=generator, dtype=torch.float64) * self.count  # below `count`
        return self.examples[self.first + chosen.long()]


def _batches(pool: Pool, views: int, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (view, index) of each batch: shuffled passes over the pool, each example in a view drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    left = steps
    while left > 0:
        order = pool.drawn(generator)[torch.randperm(len(pool), generator=generator)]
        drawn = torch.randint(views, (len(pool),), generator=generator)
        for start in range(0, min(len(pool), left * size), size):
            yield drawn[start : start + size], order[start : start + size]
            left -= 1


@contextmanager
def _dropout_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Give dropout a stream of its own, for it draws from the process's generators; put those back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _autocast(device: torch.device, *, deep: bool) -> Any:
    """Return bfloat16 autocast for blocks on a GPU; a head alone is too small to gain from it."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" and deep else nullcontext()
