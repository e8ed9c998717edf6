"""Several labels an image, as files annotate them, to the targets that training and evaluation read.

A file says 1 for present, 0 for absent, -1 for "not sure", and NaN or nothing where nothing was said. What the last two
are taken for is a matter of policy: the same words as CheXpert's (Irvin et al., AAAI 2019, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.run_config import Blank, Uncertain

UNCERTAIN: Final[dict[str, float]] = {"ignore": np.nan, "zeros": 0.0, "ones": 1.0, "soft": 0.5}
BLANK: Final[dict[str, float]] = {"ignore": np.nan, "zeros": 0.0}


@dataclass(frozen=True)
class Policy:
    """What annotations that are neither yes nor no are taken for; the fields are those of the run's `[data]`."""

    uncertain: Uncertain = "ignore"  # of -1
    blank: Blank = "zeros"  # of NaN


AS_USUAL: Final = Policy()


def targets(values: NDArray[Any], name: str, policy: Policy, sites: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """Return the targets of annotations: (N, K) of 1, 0, -1, NaN to (N, K) float32 of 1, 0, 0.5, NaN.

    A label that a whole site left blank was not annotated there, and is masked whatever the policy says of blanks.

    Args:
        values: (N, K) numbers.
        name: of the array, for messages.
        policy: what -1 and NaN are taken for.
        sites: (N,) where each example comes from, if that is known.

    Raises:
        DataError: a value of another kind.

    Examples:
        >>> targets(np.array([[1, -1], [np.nan, 0]]), "labels", Policy("soft", "zeros")).tolist()
        [[1.0, 0.5], [0.0, 0.0]]
    """
    if values.dtype.kind not in "biuf":
        raise DataError(f"{name}: expected 1, 0, -1 or NaN for each label of an image, got {values.dtype}")
    found = values.astype(np.float32)
    blank, uncertain = np.isnan(found), found == -1
    if not (blank | uncertain | (found == 0) | (found == 1)).all():
        raise DataError(f"{name}: expected 1, 0, -1 or NaN for each label of an image, got another number")
    found[uncertain] = UNCERTAIN[policy.uncertain]
    found[blank & ~_blank_at_site(blank, sites)] = BLANK[policy.blank]
    return found


def _blank_at_site(blank: NDArray[np.bool_], sites: NDArray[Any] | None) -> NDArray[np.bool_]:
    """Return, for each example and label, whether its whole site left the label blank: (N, K)."""
    if sites is None:
        return np.zeros_like(blank)
    _, number = np.unique(sites, return_inverse=True)
    whole = np.ones((int(number.max(initial=-1)) + 1, blank.shape[1]), dtype=bool)
    np.logical_and.at(whole, number, blank)
    return np.asarray(whole[number])


def names(given: NDArray[Any] | Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return the names of K labels: those given, else their numbers.

    Raises:
        DataError: another number of names, an empty one, or one twice.
    """
    if given is None:
        return tuple(str(number) for number in range(count))
    found = tuple(str(name).strip() for name in np.asarray(given, np.str_).reshape(-1))
    if len(found) != count or len(set(found)) != count or "" in found:
        raise DataError(f"label_names: expected {count} different names, one a label, got {len(found)}")
    return found


def notices(labels: NDArray[np.float32], label_names: Sequence[str], sites: NDArray[Any] | None) -> list[str]:
    """Return what a user should know of the targets before using them."""
    found = []
    if labels.shape[1] > 1 and ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all():
        found.append(
            "each image has exactly one of several labels: if they exclude each other, save them as one number an image"
        )
    masked = _blank_at_site(np.isnan(labels), sites)
    some = [name for name, column in zip(label_names, masked.T, strict=True) if column.any()]
    if some:
        found.append(f"not annotated at every site, and masked where it was not: {', '.join(some)}")
    return found
