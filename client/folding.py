"""A trunk for inference alone: each convolution takes over the BatchNorm behind it, which saves a pass over memory.

Measured on two cores with EfficientNet-Lite0 at 128 pixels: 1.3 to 2 times as many images a second. Which norm stands
behind which convolution is read off the order of the modules and then checked by numbers: a folded trunk that does
not give the same features is thrown away.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from common.backbone import Trunk

TOLERANCE = 2e-5
"""Largest difference between folded and plain features, over the largest feature: ten times what rounding leaves."""


def folded(trunk: Trunk, image_size: int) -> Trunk:
    """Return a faster trunk with the same features, or the trunk itself where folding changes them.

    Args:
        trunk: in eval mode.
        image_size: S, for the comparison.
    """
    candidate = copy.deepcopy(trunk)
    if not _fold(candidate):
        return trunk
    probe = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        plain, quick = trunk(probe), candidate(probe)
    return candidate if bool((plain - quick).abs().max() <= TOLERANCE * plain.abs().max()) else trunk


def _fold(module: nn.Module) -> int:
    """Fold in place every norm that follows a convolution among a module's children; return how many."""
    children = list(module.named_children())
    count = sum(_fold(child) for _, child in children)
    for (_, convolution), (name, norm) in pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and _fits(norm, convolution):
            _take_over(convolution, norm)
            setattr(module, name, _rest(norm))
            count += 1
    return count


def _fits(norm: nn.BatchNorm2d, convolution: nn.Conv2d) -> bool:
    return norm.num_features == convolution.out_channels and norm.running_mean is not None


def _take_over(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    own = (convolution.weight, convolution.bias)
    convolution.weight, convolution.bias = fuse_conv_bn_weights(*own, mean, variance, norm.eps, norm.weight, norm.bias)


def _rest(norm: nn.Module) -> nn.Module:
    """Return what a norm does beside normalising: timm's layers hold dropout and activation."""
    extras = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*extras) if extras else nn.Identity()
