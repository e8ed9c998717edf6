"""The mean of the last rounds' weights, which ends a run that wants it: noise of single rounds averages out.

Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 30 (1992).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common.parameters import Parameters
from common.run_config import Training


def averaged(
    training: Training, number: int, before: Parameters, weights: Parameters
) -> Mapping[str, NDArray[np.float32]]:
    """Return the mean of the weights of the last `averaging` of all rounds up to this one; nothing before they begin.

    Args:
        training: the run's section.
        number: of the round, from 1.
        before: what this function returned for the round before.
        weights: after this round.

    Examples:
        >>> training = Training(rounds=4, averaging=0.5)
        >>> third = averaged(training, 3, {}, {"w": np.float32([1])})
        >>> averaged(training, 4, third, {"w": np.float32([3])})
        {'w': array([2.], dtype=float32)}
    """
    first = training.rounds - math.ceil(training.averaging * training.rounds) + 1
    if number < first:
        return {}
    share = 1 / (number - first + 1)
    return {name: _moved(before.get(name, value), value, share) for name, value in weights.items()}


def _moved(mean: NDArray[np.float32], value: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    return (mean + share * (value.astype(np.float64) - mean)).astype(np.float32)
