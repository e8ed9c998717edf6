"""How much a label goes with a device or a view: closed forms, and no strength out of nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.confounding import LEAST_IMAGES, LEAST_LEVEL, association


def told(present: list[int], levels: list[int]) -> float | None:
    return association(np.array(present, bool), np.array(levels, np.int64))


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_a_factor_that_decides_the_label(levels: int) -> None:
    level = np.arange(300) % levels
    assert association(level == 0, level) == pytest.approx(1.0, abs=0.01)
    assert association(level != 0, level * 7 - 3) == pytest.approx(1.0, abs=0.01)


def test_a_factor_that_tells_nothing() -> None:
    assert told([0, 1] * 50, [0, 0, 1, 1] * 25) == 0.0


def test_two_by_two_in_closed_form() -> None:
    """Counts 40 10 / 10 40: chi² = 100 (1600 - 100)² / 50⁴ = 36, phi² = 0.36; corrected as Bergsma's formula says."""
    present, levels = [1] * 50 + [0] * 50, [0] * 40 + [1] * 10 + [0] * 10 + [1] * 40
    phi = 0.36 - 1 / 99
    assert told(present, levels) == pytest.approx(np.sqrt(phi / (2 - 1 / 99 - 1)))


def test_chance_alone_is_not_told() -> None:
    random = np.random.default_rng(0)
    strengths = [association(random.random(400) < 0.3, random.integers(0, 12, 400)) for _ in range(50)]
    assert np.mean(strengths) < 0.06
    assert max(strengths) < 0.3  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("present", "levels"),
    [
        ([1] * 60, [0, 1] * 30),  # one outcome
        ([0, 1] * 30, [0] * 60),  # one level
        ([0, 1] * (LEAST_IMAGES // 2 - 1), [0, 0, 1, 1] * (LEAST_IMAGES // 4) + [0, 1]),  # too few
        ([0, 1] * 30, [0] * (60 - LEAST_LEVEL + 1) + [1] * (LEAST_LEVEL - 1)),  # a level too small to count
        ([0, 1] * 30, list(range(60))),  # each image its own level
        ([], []),
    ],
)
def test_too_little_tells_nothing(present: list[int], levels: list[int]) -> None:
    levels = levels[: len(present)]
    assert told(present, levels) is None


tables = st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=0, max_size=120)


@given(tables, st.permutations(range(5)))
def test_laws(rows: list[tuple[bool, int]], names: list[int]) -> None:
    """Between 0 and 1; the same whatever the levels are called, for the opposite label, and in any order."""
    present, levels = [int(has) for has, _ in rows], [level for _, level in rows]
    strength = told(present, levels)
    assert strength is None or 0 <= strength <= 1
    same = [
        told(present, [names[level] for level in levels]),
        told([1 - has for has in present], levels),
        told(present[::-1], levels[::-1]),
    ]
    for other in same:
        assert other == strength or other == pytest.approx(strength)
