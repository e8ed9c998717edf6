"""How far a private step goes and where a patient's gradient is cut, from public numbers alone.

The head reads records of norm ρ = sqrt(37) (`common.private_form.RECORD_NORM`), so all of this has no unit of the data.
At a head of zeros the gradient of one patient has norm ρ sqrt(1 - 1/K), and of K labels an image ρ / (2 sqrt(K)); C is
half of that. Noise of T steps of rate η, each a mean over N patients that S sites made noisy with σ_i C, leaves in a
logit of a record the standard deviation η ρ C sqrt(T Σ σ_i²) / N, and sqrt(2) of that between two logits. Measured on
several sizes and budgets, a run does best where that is about `NOISE_IN_LOGITS`, whatever T and C: longer steps drown
in noise, shorter ones stop early. So η follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.private_form import RECORD_NORM
from common.run_config import RunConfig, TaskKind

NOISE_IN_LOGITS = 0.7
"""Standard deviation of the noise between two logits of a record at the end of a run; 0.5 to 2 are alike."""

ROUNDS = 30
"""Rounds of one step each; 15 to 200 are alike."""

DEEP_CLIP = 1.0
"""C where blocks below the head are trained as well."""

LONGEST_WAY = 8000.0
"""T η ρ² of a run with next to no noise."""


def clip(labels: int, kind: TaskKind) -> float:
    """Return C for a head alone: half the norm of a patient's first gradient.

    Examples:
        >>> round(clip(2, "single-label"), 3)
        2.151
    """
    first = 1 / (2 * math.sqrt(labels)) if kind == "multi-label" else math.sqrt(1 - 1 / labels)
    return RECORD_NORM * first / 2


def clip_of(run: RunConfig) -> float:
    """Return C of a run: its own, or what suits what it trains."""
    if run.privacy.clip is not None:
        return run.privacy.clip
    return clip(len(run.task.labels), run.task.kind) if run.model.trainable == "head" else DEEP_CLIP


def learning_rate(noises: Sequence[tuple[float, float, int]], patients: int, cut: float, kind: TaskKind) -> float:
    """Return η for steps on the mean gradient of all patients.

    Args:
        noises: of each site: noise multiplier σ_i and sampling rate of a step, and steps T of the run.
        patients: N, of all sites.
        cut: C.
        kind: of the task.
    """
    total = math.sqrt(sum(steps * (noise / rate) ** 2 for noise, rate, steps in noises))
    apart = 1.0 if kind == "multi-label" else math.sqrt(2)
    most = max(steps for _, _, steps in noises)
    longest = LONGEST_WAY / (RECORD_NORM**2 * most)
    return min(longest, NOISE_IN_LOGITS * patients / (apart * RECORD_NORM * cut * total))
