"""Nothing a site sends is believed: a reply is checked before it can touch the global model.

A reply that fails is quarantined with a code of `REASONS`; the round goes on if the quorum holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common import codec, parameters
from common.analytic import Sums
from common.codec import Shapes
from common.errors import ConsiliumError
from common.messages import Description, Evaluated, PrivateStatistics, PrivateSums, Statistics, Summed, Trained
from common.metrics import FIELDS, Evaluation
from common.multilabel import STATES, LabelwiseEvaluation
from common.private_form import Noisy
from common.run_config import RunConfig, WireType
from server import census
from server.evaluation import Edges, Statistic
from server.spending import plausible

_PRESENT, _ABSENT = STATES.index("present"), STATES.index("absent")

REASONS = (
    "wrong_shape",  # not the run's number of values at the wire precision
    "not_finite",  # NaN or infinity in the update or the loss
    "norm_too_large",  # the update's L2 norm is above the run's limit
    "wrong_round",  # the reply to a request of another round
    "examples_differ",  # another number of examples than the site declared
    "bad_statistics",  # evaluation counts that are malformed or contradict the declared split
    "unreadable",  # not a reply to the request
    "too_large",  # larger than any reply of the run can be: it was not fetched
)


class Rejected(ConsiliumError):
    """A reply is not admitted; the message is a code of `REASONS`."""


@dataclass(frozen=True)
class Expectation:
    """What a site's updates must agree with."""

    shapes: Shapes
    wire: WireType
    examples: int  # what the site declared for training
    max_norm: float | None = None
    round: int = 0


@dataclass(frozen=True)
class Declared:
    """What a site's evaluation of a split must agree with."""

    support: NDArray[np.int64]  # (K,) examples by label, or of several labels an image (4, K) by state and label
    exact: bool = True  # whether its counts are these; noisy ones are not
    calibrated: bool = True  # whether the run asks for calibration, so that it may not be withheld


def admissible(said: Description, run: RunConfig) -> bool:
    """Return whether what a site says of itself can be: it holds something to train on, and has a plan if it needs one.

    In a private run the site tells nothing of its training split but its size.
    """
    if not census.believable(said.support, run.task):
        return False
    training = int(census.examples(said.support)[census.TRAIN])
    if not run.privacy.on:
        return training > 0
    return training == 0 and 0 < said.examples <= census.MOST_EXAMPLES and plausible(said, run.privacy.epsilon)


def admit_update(reply: Trained, expected: Expectation) -> dict[str, NDArray[np.float32]]:
    """Return the update of a reply.

    Raises:
        Rejected: with the reason code.
    """
    if reply.round != expected.round:
        raise Rejected("wrong_round")
    try:
        update = codec.decode(reply.weights, expected.shapes, expected.wire)
    except ValueError:
        raise Rejected("wrong_shape") from None
    if not (np.isfinite(reply.train_loss) and np.isfinite(reply.epsilon)) or not all(
        np.isfinite(value).all() for value in update.values()
    ):
        raise Rejected("not_finite")
    if expected.max_norm is not None and parameters.norm(update) > expected.max_norm:
        raise Rejected("norm_too_large")
    if reply.num_examples != expected.examples:
        raise Rejected("examples_differ")
    return update


def admit_evaluation(reply: Trained | Evaluated, declared: Declared, edges: Edges) -> Statistic:
    """Return the statistics of a reply.

    Args:
        reply: what a site sent.
        declared: what it said before.
        edges: that were sent.

    Raises:
        Rejected: with the reason code.
    """
    arrays: Mapping[str, NDArray[np.generic]] = {name: getattr(reply, name) for name in FIELDS}
    try:
        found = _single(arrays, declared) if declared.support.ndim == 1 else _labelwise(arrays, declared)
    except ValueError:
        raise Rejected("bad_statistics") from None
    if found.bins != edges.shape[1] + 1 or (declared.calibrated and not _calibrated(found)):
        raise Rejected("bad_statistics")
    return found


def _calibrated(found: Statistic) -> bool:
    """Return whether calibration is told wherever there are examples."""
    parts = found.labels if isinstance(found, LabelwiseEvaluation) else (found,)
    return all(bool(part.calibration.any()) for part in parts if part.examples)


def _single(arrays: Mapping[str, NDArray[np.generic]], declared: Declared) -> Evaluation:
    found = Evaluation.from_arrays(arrays)
    if found.num_labels != len(declared.support):
        raise ValueError("other labels than the run's")
    if declared.exact and not np.array_equal(found.support, declared.support):
        raise ValueError("other examples than declared")
    return found


def _examples(arrays: Mapping[str, NDArray[np.generic]]) -> int:
    """Return the least examples that counts of several labels can be of."""
    confusion = arrays["confusion"]
    if confusion.ndim != 3 or confusion.dtype != np.int64:
        raise ValueError("confusion: not of several labels")
    return int(max((int(label.sum()) for label in confusion), default=0))


def _labelwise(arrays: Mapping[str, NDArray[np.generic]], declared: Declared) -> LabelwiseEvaluation:
    support = declared.support
    examples = int(support[:, 0].sum()) if declared.exact else _examples(arrays)
    found = LabelwiseEvaluation.from_arrays(arrays, support.shape[1], examples)
    if declared.exact and not np.array_equal(found.support, support[[_PRESENT, _ABSENT]]):
        raise ValueError("other annotations than declared")
    return found


def admit_private_sums(reply: PrivateSums, request: PrivateStatistics, width: int, labels: int) -> Noisy:
    """Return the noisy sums of a reply: of what is under the noise nothing can be checked.

    Args:
        reply: what a site sent.
        request: what it was asked.
        width: W of the head.
        labels: K.

    Raises:
        Rejected: with the reason code.
    """
    size = width + 1
    closed_form, centre = ((0,), (size * (size + 1) // 2,), (size, labels)), ((width,), (0,), (0, 0))
    arrays = (reply.total, reply.gram, reply.cross)
    if tuple(value.shape for value in arrays) != (closed_form if request.gram else centre):
        raise Rejected("bad_statistics")
    limit = float(np.finfo(np.float32).max)
    finite = all(bool((np.abs(value) <= limit).all()) for value in arrays)
    if not (finite and 0 < reply.noise_multiplier <= limit and 0 <= reply.epsilon <= limit and reply.steps >= 0):
        raise Rejected("bad_statistics")
    return Noisy(*arrays)


def admit_sums(reply: Summed, request: Statistics, examples: NDArray[np.int64], width: int) -> Sums:
    """Return the sums of a reply.

    Args:
        reply: what a site sent.
        request: what it was asked.
        examples: what the site declared for training, times the views of an example: (K,) or (4, K).
        width: W of the head.

    Raises:
        Rejected: with the reason code.
    """
    found = Sums(**reply.__dict__)
    shapes = _shapes(width, examples, gram=request.gram)
    if any(value.shape != shapes[name] for name, value in found.__dict__.items()):
        raise Rejected("bad_statistics")
    counted = _counted if examples.ndim == 1 else _labelwise_counted
    total = examples.sum() if examples.ndim == 1 else examples[:, 0].sum()
    limit = float(np.finfo(np.float32).max) * float(total)
    finite = all((np.abs(value) <= limit).all() for value in found.__dict__.values())  # a NaN fails every comparison
    if not (finite and found.count[0] == total and counted(found, examples, request.class_weights)):
        raise Rejected("bad_statistics")
    return found


def _shapes(width: int, examples: NDArray[np.int64], *, gram: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the sums."""
    labels = examples.shape[-1]
    triangle = width * (width + 1) // 2 if gram else 0
    each = () if examples.ndim == 1 else (labels,)  # several labels an image have sums of their own
    return {
        "count": (1,),
        "total": (width,),
        "squares": (width,),
        "weight": each or (1,),
        "weighted": (*each, width),
        "targets": (labels,),
        "gram": (*each, triangle),
        "cross": (width, labels) if gram else (0, 0),
    }


def _counted(found: Sums, examples: NDArray[np.int64], class_weights: NDArray[np.float64]) -> bool:
    """Return whether the weights can be those of so many examples by label."""
    weights = class_weights * examples
    return bool(np.allclose(found.weight, weights.sum()) and np.allclose(found.targets, weights))


def _labelwise_counted(found: Sums, examples: NDArray[np.int64], class_weights: NDArray[np.float64]) -> bool:
    """Return whether the weights can be those of so many annotations: between p and p + s of them count as present."""
    present, absent, between, _ = examples
    share = found.targets / class_weights[1]  # of all annotations, as present
    slack = 1e-8 + 1e-5 * (present + between)
    within = bool((share >= present - slack).all() and (share <= present + between + slack).all())
    rest = class_weights[0] * (present + absent + between - share)
    return within and bool(np.allclose(found.weight, found.targets + rest))
