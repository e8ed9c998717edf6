"""The algebra of named arrays: laws, closed forms, and nothing changed in place."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.parameters import add, count, norm, subtract

values = st.integers(-1000, 1000).map(float)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two sets of parameters of equal names and shapes; whole numbers, so that float32 adds exactly."""
    shapes = draw(
        st.dictionaries(st.text(max_size=3), hnp.array_shapes(min_dims=0, max_dims=3, max_side=3), max_size=4)
    )
    one, other = ({n: draw(hnp.arrays(np.float32, s, elements=values)) for n, s in shapes.items()} for _ in range(2))
    return one, other


@settings(deadline=None)
@given(pairs())
def test_adding_the_update_gives_the_new_weights_and_leaves_the_old_ones(
    pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
) -> None:
    new, old = pair
    kept = {name: value.copy() for name, value in old.items()}
    result = add(old, subtract(new, old))
    assert list(result) == list(old)
    for name in old:
        assert result[name].dtype == np.float32
        np.testing.assert_array_equal(result[name], new[name])
        np.testing.assert_array_equal(old[name], kept[name])


@settings(deadline=None)
@given(pairs())
def test_norm_is_that_of_all_values_in_one_vector(pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
    update, other = pair
    flat = np.concatenate([np.zeros(1), *(value.reshape(-1).astype(float) for value in update.values())])
    assert math.isclose(norm(update), float(np.linalg.norm(flat)), rel_tol=1e-12)
    assert count(update) == len(flat) - 1
    together = {name: update[name] + other[name] for name in update}
    assert norm(together) <= norm(update) + norm(other) + 1e-9


def test_norm_of_large_values_does_not_overflow_and_that_of_nan_is_nan() -> None:
    assert math.isclose(norm({"a": np.full(4, 1e30, np.float32)}), 2 * float(np.float32(1e30)), rel_tol=1e-12)
    assert math.isnan(norm({"a": np.array([1, np.nan], np.float32)}))
    assert math.isinf(norm({"a": np.array([np.inf], np.float32)}))


def test_nothing_has_norm_and_count_zero() -> None:
    assert (norm({}), count({}), subtract({}, {}), add({}, {})) == (0.0, 0, {}, {})
