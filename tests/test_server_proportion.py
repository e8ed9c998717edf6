from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.proportion import ABSURD_NORM, absurd_examples, absurd_updates

NORMS = st.floats(0, 1e6)


@given(st.dictionaries(st.text(min_size=1), NORMS, min_size=1), st.floats(0, 1e3))
def test_what_is_no_larger_than_the_weights_is_never_absurd(norms: dict[str, float], weights: float) -> None:
    for site in absurd_updates(norms, weights):
        assert norms[site] > max(1.0, weights)


@given(st.lists(st.floats(0.01, 0.9), min_size=2, max_size=9), st.floats(1e3, 1e30), st.floats(0, 10))
def test_a_minority_that_shouts_is_found_and_nobody_else(honest: list[float], loud: float, weights: float) -> None:
    norms = {f"honest-{number}": norm for number, norm in enumerate(honest)}
    shouting = {f"loud-{number}": loud + number for number in range((len(honest) - 1) // 2 + len(honest) % 2)}
    shouting = dict(list(shouting.items())[: max(1, len(honest) - 1)])
    assert absurd_updates({**norms, **shouting}, weights) == sorted(shouting)


def test_where_all_updates_are_large_the_bound_is_a_hundred_times_the_weights() -> None:
    assert absurd_updates({"a": 900.0, "b": 950.0, "c": 999.0}, 10.0) == []
    assert absurd_updates({"a": 10 * ABSURD_NORM + 1}, 10.0) == ["a"], "also of one site"
    assert absurd_updates({}, 1.0) == []


def test_large_and_small_hospitals_may_be_in_one_federation() -> None:
    assert absurd_examples({"small": 60, "large": 10_000_000}) == []
    assert absurd_examples({"small": 500, "other": 800, "large": 4_000_000}) == []
    assert absurd_examples({"small": 500, "other": 800, "liar": 2**40}) == ["liar"]
    assert absurd_examples({}) == []
