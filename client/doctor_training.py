"""One dry round of training on drawn data: whether this machine trains, and how fast.

The code is that of real rounds. The weights are random, nothing is read or written, and a model that waits for the GPU
elsewhere is not touched.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from client.features import Features
from client.site_config import SiteConfig
from client.training import fit
from client.workshop import choose_device
from common import model
from common.doctor import Found, passed
from common.model import Built
from common.run_config import RunConfig, Training
from common.weights import EMBEDDED_BACKBONE

BATCH, LABELS, CUT = 32, ("absent", "present"), "stages:1"
SECONDS = 1.0
"""How long steps are timed, about."""

_MOST_STEPS = 50
_NO_STORE: Any = None  # features that are in memory are not looked for elsewhere


def look(config: SiteConfig) -> Found:
    """Train the last stage and the head of a backbone for about a second.

    Raises:
        ConfigError: a GPU was asked for and there is none, or there is no such backbone.
    """
    device, backbone = choose_device(config.toml.compute.device), backbone_of(config)
    built = model.skeleton(drawn_run(backbone, config.image_size))
    built.upper.to(device)
    timed(built, device, 1)  # the first step of a process takes longer
    one = timed(built, device, 1)
    steps = max(1, min(_MOST_STEPS, int(SECONDS / max(one, 1e-6))))
    each = timed(built, device, steps) / steps
    what = f"{backbone}, last stage and head, {BATCH} images at {config.image_size} pixels"
    return passed(f"{each * 1e3:.0f} ms a step on {device}, {BATCH / each:.0f} images a second ({what})")


def backbone_of(config: SiteConfig) -> str:
    """Return the backbone that a run here is likely to have: the first that the policy names, else the usual one."""
    return next(iter(config.toml.policy.backbones), EMBEDDED_BACKBONE)


def drawn_run(backbone: str, image_size: int) -> RunConfig:
    """Return a run of one site."""
    values = {
        "task": {"name": "doctor", "labels": LABELS},
        "data": {"preset": "generic", "image_size": image_size, "views": 1},
        "model": {"backbone": backbone, "weights": "none", "trainable": CUT},
        "sites": {"names": ("doctor",), "quorum": 1},
    }
    return RunConfig.model_validate(values)


def timed(built: Built, device: str, steps: int) -> float:
    """Return the seconds that steps on drawn features take."""
    stream = torch.Generator().manual_seed(0)
    rows = torch.randn(1, BATCH, built.upper.layout.width, generator=stream).to(device)
    features = Features(rows, _NO_STORE, np.zeros((1, BATCH), np.int64), torch.device(device))
    labels = torch.arange(BATCH, device=device) % len(LABELS)
    begin = time.perf_counter()
    fit(
        built.upper,
        features,
        labels,
        np.arange(BATCH),
        Training(local_steps=steps, batch_size=BATCH),
        round_number=1,
        class_weights=torch.ones(len(LABELS), device=device),
        seed=0,
        site="doctor",
    )  # its loss is a number by now, so the device is done
    return time.perf_counter() - begin
