"""Nothing a site sends is believed: a reply is checked before it can touch the global model.

A reply that fails is quarantined with a code of `REASONS`; the round goes on if the quorum holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common import codec, parameters
from common.codec import Shapes
from common.errors import ConsiliumError
from common.messages import Evaluated, Trained
from common.metrics import FIELDS, Evaluation
from common.run_config import WireType

REASONS = (
    "wrong_shape",  # not the run's number of values at the wire precision
    "not_finite",  # NaN or infinity in the update or the loss
    "norm_too_large",  # the update's L2 norm is above the run's limit
    "examples_differ",  # another number of examples than the site declared
    "bad_statistics",  # evaluation counts that are malformed or contradict the declared split
    "unreadable",  # not a reply to the request
)


class Rejected(ConsiliumError):
    """A reply is not admitted; the message is a code of `REASONS`."""


@dataclass(frozen=True)
class Expectation:
    """What a site's replies must agree with."""

    shapes: Shapes
    wire: WireType
    support: NDArray[np.int64]  # (3, K) declared examples by split and label
    max_norm: float | None = None


def admit_update(reply: Trained, expected: Expectation) -> dict[str, NDArray[np.float32]]:
    """Return the update of a reply.

    Raises:
        Rejected: with the reason code.
    """
    try:
        update = codec.decode(reply.weights, expected.shapes, expected.wire)
    except ValueError:
        raise Rejected("wrong_shape") from None
    if not np.isfinite(reply.train_loss) or not all(np.isfinite(value).all() for value in update.values()):
        raise Rejected("not_finite")
    if expected.max_norm is not None and parameters.norm(update) > expected.max_norm:
        raise Rejected("norm_too_large")
    if reply.num_examples != int(expected.support[0].sum()):
        raise Rejected("examples_differ")
    return update


def admit_evaluation(reply: Trained | Evaluated, support: NDArray[np.int64], bins: int) -> Evaluation:
    """Return the statistics of a reply.

    Args:
        reply: what a site sent.
        support: (K,) examples by label that the site declared for this split.
        bins: B of the edges that were sent.

    Raises:
        Rejected: with the reason code.
    """
    arrays: Mapping[str, NDArray[np.generic]] = {name: getattr(reply, name) for name in FIELDS}
    try:
        found = Evaluation.from_arrays(arrays)
    except ValueError:
        raise Rejected("bad_statistics") from None
    fits = found.confusion.shape == (len(support), len(support)) and found.positives.shape[1] == bins
    if not fits or not np.array_equal(found.support, support):
        raise Rejected("bad_statistics")
    return found
