"""What is out of all proportion to what the other sites say: one hospital's slip, or malice, must not become the model.

Both rules compare with the lower median over the sites, which is an honest site's as long as most of them are honest;
with two sites it is the smaller one's. They are wide on purpose: a site may hold thousands of times as many images as
another one, or learn from stranger images, and its part must count.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low

ABSURD_NORM = 100.0
"""Times the median norm of a round's updates that no honest update reaches."""

ABSURD_EXAMPLES, MANY_EXAMPLES = 10_000, 10_000_000
"""Times the median number of examples that no hospital holds, unless it is below the second number."""


def absurd_updates(norms: Mapping[str, float], weights: float) -> list[str]:
    """Return the sites whose updates are absurdly large.

    An update is that is larger than the weights w that it changes, and than 1 where these are near 0, and larger than
    `ABSURD_NORM` times the median update of the round, if that is not large itself:

        ||u|| > max(m, 100 min(median ||u||, m))  with  m = max(1, ||w||)

    Args:
        norms: L2 norm of each site's update.
        weights: L2 norm of the weights before the round.

    Examples:
        >>> absurd_updates({"a": 1.0, "b": 2.0, "c": 500.0}, 10.0)
        ['c']
        >>> absurd_updates({"a": 0.001, "b": 0.002, "c": 0.5}, 10.0)
        []
    """
    least = max(1.0, weights)
    middle = median_low(norms.values()) if norms else 0.0
    limit = max(least, ABSURD_NORM * min(middle, least))
    return sorted(site for site, norm in norms.items() if norm > limit)


def absurd_examples(examples: Mapping[str, int]) -> list[str]:
    """Return the sites that say that they hold absurdly many examples.

    Examples:
        >>> absurd_examples({"a": 300, "b": 9_000_000, "c": 500, "d": 900_000_000})
        ['d']
    """
    if not examples:
        return []
    limit = max(MANY_EXAMPLES, ABSURD_EXAMPLES * median_low(examples.values()))
    return sorted(site for site, count in examples.items() if count > limit)
