"""The exception tree: exit codes, and one line that names what came and what is nearest."""

from __future__ import annotations

import inspect
import re

import pytest

from client import clipping
from client.ledger import BudgetExceeded, CohortChanged, LedgerError
from common import errors, privacy, private_plan
from common.errors import ConfigError, ConsiliumError, DataError, SiteRefusal, UsageError, unknown_value

LEDGER = (LedgerError, CohortChanged, BudgetExceeded)
CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_is_a_consilium_error_and_only_wrong_use_exits_with_two(kind: type[ConsiliumError]) -> None:
    assert issubclass(kind, ConsiliumError)
    assert kind.exit_code == (2 if issubclass(kind, UsageError) else 1)


def test_a_wrong_configuration_and_wrong_data_are_wrong_use() -> None:
    assert issubclass(ConfigError, UsageError)
    assert issubclass(DataError, UsageError)


def parents() -> dict[str, str]:
    """Return the class that each drawn one stands under."""
    above: dict[int, str] = {}
    found: dict[str, str] = {}
    for line in (errors.__doc__ or "").split("\n\n")[1].splitlines():
        name = re.search(r"[A-Z]\w+", line)
        assert name is not None
        above[name.start()] = name[0]
        found[name[0]] = next((above[place] for place in sorted(above, reverse=True) if place < name.start()), "")
        above = {place: kind for place, kind in above.items() if place <= name.start()}
    return found


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = parents()
    others = (privacy.NoNoise, private_plan.DeltaTooLarge, clipping.NotPrivate, *LEDGER)  # beside what raises them
    real = {kind.__name__: "" if kind is ConsiliumError else kind.__base__.__name__ for kind in (*CLASSES, *others)}
    assert drawn == real


def test_a_refusal_is_its_code() -> None:
    assert SiteRefusal("not_prepared").code == str(SiteRefusal("not_prepared")) == "not_prepared"


@pytest.mark.parametrize(
    ("got", "allowed", "message"),
    [
        ("flaot32", ["float32", "float16"], "x: got 'flaot32', expected float32 or float16 (did you mean 'float32'?)"),
        ("zzz", ["a", "b", "c"], "x: got 'zzz', expected a, b or c"),
        ("", ["alone"], "x: got '', expected alone"),
        ("two\nlines", ["alone"], "x: got 'two\\nlines', expected alone"),
    ],
)
def test_unknown_value_names_what_came_what_is_allowed_and_the_nearest(
    got: str, allowed: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        unknown_value("x", got, allowed)
    assert str(caught.value) == message
