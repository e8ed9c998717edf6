"""Cached views of an image: the first is the image itself, the others are drawn once, from the image's digest.

A view depends on the image's content, its own number and the preset's numbers, never on the order of the images, on
the site or on the run. So every run, partition and strategy finds the same features again.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from client.augmentation import Augmentation
from common.backbone import InputSpec


def augment(images: Tensor, digests: NDArray[np.uint8], view: int, augmentation: Augmentation) -> Tensor:
    """Return one view of each image.

    View 0 is the image. The others are turned, shifted, scaled and brightened by amounts drawn from the digest; where
    mirroring is allowed, odd views are mirrored.

    Args:
        images: (B, C, S, S) in 0..1.
        digests: (B, 32) of the images.
        view: its number.
        augmentation: the bounds.
    """
    if view == 0:
        return images
    u = torch.from_numpy(_uniforms(digests, view)) * 2 - 1  # (B, 5) in -1..1
    angle = u[:, 0] * math.radians(augmentation.rotate_degrees)
    scale = 1 + u[:, 1] * augmentation.scale
    shift = u[:, 2:4] * 2 * augmentation.translate  # affine_grid counts the side from -1 to 1
    mirror = -1.0 if augmentation.flip and view % 2 else 1.0
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [torch.stack([mirror * cos, -sin, shift[:, 0]], 1), torch.stack([mirror * sin, cos, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (moved * (1 + u[:, 4] * augmentation.brightness)[:, None, None, None]).clamp(0, 1)


def _uniforms(digests: NDArray[np.uint8], view: int) -> NDArray[np.float32]:
    """Return (B, 5) numbers in [0, 1) that the digest and the view decide."""
    joined = b"".join(hashlib.sha256(digest.tobytes() + view.to_bytes(2, "big")).digest()[:20] for digest in digests)
    return (np.frombuffer(joined, ">u4").reshape(-1, 5) / 2.0**32).astype(np.float32)


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """Return what the backbone expects of images in 0..1: three channels, minus mean, over std; (B, 3, S, S)."""
    mean = torch.tensor(spec.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(1, 3, 1, 1)
    return (images.expand(-1, 3, -1, -1) - mean) / std
