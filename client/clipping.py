"""The sum of clipped gradients: each record's gradient over all trainable parameters, scaled down to a norm of C.

    Σ_i g_i · min(1, C / ‖g_i‖)

One record changes it by C at most, which is what the noise is measured against; how the sum is computed at the cost of
an ordinary step is told in `client.ghost`. A record whose gradient is not finite contributes nothing.

The claim rests on gradients being those of single records. `require_private` therefore compares this model's sum with
a loop over records before any patient's data are touched, and refuses what differs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.ghost import Call, NotPrivate, Tap, noted
from client.taps import drops_out, taps
from client.training import example_losses
from common.backbone import NORMS_WITH_STATISTICS, Upper

__all__ = ["Clipper", "NotPrivate", "clip_factors", "require_private", "self_test"]

MOST_ERROR = 1e-3
"""Relative difference from the loop at which a model is refused: rounding stays below a tenth of it."""

MARGIN = 1 - 2.0**-18
"""Records are clipped to this share of C: what float32 rounds afterwards stays within C."""


def clip_factors(squared_norms: Tensor, clip: float) -> Tensor:
    """Return min(1, C / ‖g_i‖) of each record, (n,)."""
    return (clip * MARGIN / squared_norms.sqrt()).clamp(max=1)


@dataclass(frozen=True)
class Clipper:
    """An upper whose clipped gradients can be summed."""

    upper: Upper
    taps: tuple[Tap, ...]
    parameters: tuple[nn.Parameter, ...]  # as `Upper.trainable` orders them

    @staticmethod
    def of(upper: Upper) -> Clipper:
        """Return a clipper, in the mode that the upper is in.

        Raises:
            NotPrivate: no way to the gradients of single records is known.
        """
        return Clipper(upper, tuple(taps(upper)), tuple(upper.trainable().values()))

    def sums(self, features: Tensor, labels: Tensor, class_weights: Tensor, clip: float) -> list[Tensor]:
        """Return the sum over records of their clipped gradients, one tensor for each trainable parameter.

        Args:
            features: (n, D).
            labels: (n,) or (n, K), as for `client.training.example_losses`.
            class_weights: (K,) or (2, K).
            clip: C.
        """
        if not len(features):
            return [torch.zeros_like(parameter) for parameter in self.parameters]
        calls = self._backward(features, labels, class_weights)
        norms = torch.stack([tap.squared_norms(call) for tap, call in zip(self.taps, calls, strict=True)]).sum(0)
        finite = norms.isfinite()
        if not bool(finite.all()):
            return self.sums(features[finite], labels[finite], class_weights, clip)
        factors = clip_factors(norms, clip)
        found: dict[Tensor, Tensor] = {}
        for tap in self.taps:
            found |= tap.sums(calls.pop(0), factors)
        return [found[parameter] for parameter in self.parameters]

    def _backward(self, features: Tensor, labels: Tensor, class_weights: Tensor) -> list[Call]:
        """Return the calls of the taps with the gradients by their outputs."""
        with torch.enable_grad(), noted({tap.name: tap.module for tap in self.taps}, len(features)) as noted_calls:
            losses = example_losses(self.upper(features), labels, class_weights)
        calls = [noted_calls[tap.name][0] for tap in self.taps]
        edges = [edge for call in calls for edge in call.edges]
        gradients = list(torch.autograd.grad(losses.sum(), edges, allow_unused=True))
        for call in calls:
            call.close([gradients.pop(0) for _ in call.edges], losses)
        return calls


# The claim, checked


def require_private(upper: Upper, labels: int, *, multi_label: bool, clip: float) -> None:
    """Refuse an upper whose clipped sum is not what a loop over records gives; nothing of it is changed.

    Args:
        upper: with the weights that training starts from.
        labels: K.
        multi_label: whether an image may have several labels.
        clip: C.

    Raises:
        NotPrivate: a module mixes the records of a batch, cannot be taken apart, or is taken apart wrongly.
    """
    with torch.random.fork_rng(_devices(upper)):
        _refuse_mixing(upper)
        try:
            error = self_test(upper, upper.layout.width, labels, multi_label=multi_label, clip=clip)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            NotImplementedError,
            AttributeError,
            KeyError,
            IndexError,
        ) as cause:
            reason = type(cause).__name__
            raise NotPrivate(
                f"the gradients of single records cannot be had from this model ({reason}); "
                "use --trainable head or another backbone"
            ) from cause
    if not error <= MOST_ERROR:
        raise NotPrivate(
            f"the sum of clipped gradients is off by {error:.1e} of what single records give, expected at most "
            f"{MOST_ERROR:.0e}; use --trainable head or another backbone"
        )


def _devices(upper: Upper) -> list[torch.device]:
    device = next(upper.parameters()).device
    return [device] if device.type == "cuda" else []


def _refuse_mixing(upper: Upper) -> None:
    for name, module in upper.named_modules():
        statistics = isinstance(module, NORMS_WITH_STATISTICS)
        if statistics and (module.training or getattr(module, "running_mean", None) is None):
            raise NotPrivate(
                f"{name} ({type(module).__name__}) normalises with the statistics of a batch, so one patient changes "
                "the gradients of all others; choose a backbone whose norms keep running statistics"
            )


def self_test(upper: Upper, width: int, labels: int, *, multi_label: bool, clip: float) -> float:
    """Return the largest error of the clipped sums of three records and of one, against a loop over single records.

    The records are random, and clipped at C and where about half of them are. The error of a parameter is relative to
    the norms of the records' gradients (their sum may vanish), or to a thousandth of those of all parameters.
    What drops out at random is switched off, and a head at zero, through which no gradient passes, is filled.

    Args:
        upper: left as it is: the test works on a copy.
        width: D.
        labels: K.
        multi_label: whether targets are (n, K) with some unknown.
        clip: C.
    """
    tested = _ready(upper)
    generator = torch.Generator().manual_seed(0)
    device = next(tested.parameters()).device
    features = torch.randn(3, width, generator=generator).to(device)
    targets = _targets(labels, multi_label=multi_label, generator=generator).to(device)
    class_weights = torch.linspace(0.5, 1.5, 2 * labels).reshape(2, labels).to(device)[0 if not multi_label else ...]
    errors = []
    for records in (slice(0, 1), slice(0, 3)):
        single = _one_by_one(tested, features[records], targets[records], class_weights)
        norms = [_length(gradients) for gradients in single]
        errors += [
            _error(Clipper.of(tested).sums(features[records], targets[records], class_weights, at), single, norms, at)
            for at in (clip, float(torch.tensor(norms).median()))
        ]
    return float(torch.tensor(errors).max())  # a NaN stays one


def _ready(upper: Upper) -> Upper:
    modes = [module.training for module in upper.modules()]
    tested = copy.deepcopy(upper).train()
    for module, training in zip(tested.modules(), modes, strict=True):
        if isinstance(module, NORMS_WITH_STATISTICS) and training:
            module.training = True  # a norm that was let out of eval mode must be seen
        if drops_out(module):
            module.training = False
    if not bool(tested.head.linear.weight.any()):
        nn.init.normal_(tested.head.linear.weight, std=tested.head.linear.in_features**-0.5)
    return tested


def _targets(labels: int, *, multi_label: bool, generator: torch.Generator) -> Tensor:
    if not multi_label:
        return torch.randint(labels, (3,), generator=generator)
    targets = torch.randint(2, (3, labels), generator=generator).float()
    targets[1, 0] = torch.nan
    return targets


def _one_by_one(upper: Upper, features: Tensor, targets: Tensor, class_weights: Tensor) -> list[list[Tensor]]:
    parameters = list(upper.trainable().values())
    found = []
    for place in range(len(features)):
        alone = slice(place, place + 1)
        loss = example_losses(upper(features[alone]), targets[alone], class_weights).sum()
        found.append(list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)))
    return found


def _length(gradients: list[Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def _error(sums: list[Tensor], single: list[list[Tensor]], norms: list[float], clip: float) -> float:
    factors = [min(1.0, clip / norm) if norm else 1.0 for norm in norms]
    whole = sum(factor * norm for factor, norm in zip(factors, norms, strict=True))
    errors = []
    for got, gradients in zip(sums, zip(*single, strict=True), strict=True):
        wanted = torch.stack([f * gradient for f, gradient in zip(factors, gradients, strict=True)])
        scale = max(float(wanted.flatten(1).norm(dim=1).sum()), 1e-3 * whole, torch.finfo(torch.float32).tiny)
        errors.append(float((got - wanted.sum(0)).norm()) / scale)
    return float(torch.tensor(errors).max())
