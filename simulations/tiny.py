"""A run as small as one that learns something can be: stripes under noise, a backbone of a third of a million weights.

What a federation costs besides its training shows best where there is next to none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.run_config import RunConfig, build

SIDE = 24
IMAGES = 20
"""Images of a site."""


def plan(folder: Path, sites: int, rounds: int) -> RunConfig:
    """Write images for so many sites into a folder, and return a run over them."""
    path = folder / "stripes.npz"
    _draw(path, sites * IMAGES)
    sections = {
        "simulation": {
            "dataset": str(path),
            "sites": sites,
            "partition": "iid",
            "device": "cpu",
            "baselines": False,
        },
        "model": {"backbone": "test_efficientnet", "weights": "none", "init": "zero"},
        "data": {"image_size": 32, "views": 1},
        # Whoever is slow here has to share the cores, and is not lost.
        "sites": {"patience_s": 900.0},
        "training": {"rounds": rounds, "local_steps": 10, "lr": 0.0003, "batch_size": 8},
    }
    return build(sections, "tiny")


def _draw(path: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 2
    wave = (np.sin(np.arange(SIDE) * 1.3) * 60 + 120)[None, :].repeat(SIDE, 0)
    drawn = np.stack([wave if label else wave.T for label in labels]) + rng.normal(0, 200, (images, SIDE, SIDE))
    split = np.resize(["train", "train", "train", "validation", "test"], images)
    np.savez(path, images=drawn.clip(0, 255).astype(np.uint8), labels=labels, split=np.roll(split, images // 2))
