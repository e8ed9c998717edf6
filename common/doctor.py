"""What the doctors of a site and of a coordinator share: a closed list of checks, tried in turn, each in one line.

No check can stop the others. One that raises is a failure: what a `ConsiliumError` says is for its reader, of any other
exception the name of its class alone is told, for its text may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from common.errors import ConsiliumError

LEVELS = ("pass", "warn", "fail", "skip")
Case = TypeVar("Case")


@dataclass(frozen=True)
class Found:
    """What came of a look."""

    level: str  # one of LEVELS
    said: str
    remedy: str = ""  # empty: the check's own


@dataclass(frozen=True)
class Check(Generic[Case]):
    """Something to look at."""

    meaning: str  # what holds if it passes
    remedy: str  # what to do if it does not, where a look knows nothing better
    look: Callable[[Case], Found]


@dataclass(frozen=True)
class Result:
    """What came of a check."""

    check: str
    level: str
    said: str
    remedy: str  # empty where there is nothing to do


def passed(said: str) -> Found:
    """Return that all is well."""
    return Found("pass", said)


def warned(said: str, remedy: str = "") -> Found:
    """Return that somebody should look at it some day."""
    return Found("warn", said, remedy)


def failed(said: str, remedy: str = "") -> Found:
    """Return that work cannot go well."""
    return Found("fail", said, remedy)


def skipped(why: str) -> Found:
    """Return that nothing was looked at."""
    return Found("skip", why)


def examine(checks: Mapping[str, Check[Case]], case: Case) -> Iterator[Result]:
    """Try all checks in their order; each result comes as soon as it is known."""
    for name, check in checks.items():
        found = _tried(check, case)
        remedy = (found.remedy or check.remedy) if found.level in ("warn", "fail") else ""
        yield Result(name, found.level, found.said, remedy)


def _tried(check: Check[Case], case: Case) -> Found:
    try:
        return check.look(case)
    except ConsiliumError as error:
        return failed(str(error))
    except Exception as error:  # noqa: BLE001  no check may stop the others
        return failed(f"the check itself failed ({type(error).__name__})", "Report it, with `consilium --version`.")


def document(about: Mapping[str, Any], results: tuple[Result, ...]) -> dict[str, Any]:
    """Return all of it for JSON."""
    return {**about, "healthy": healthy(results), "checks": [asdict(result) for result in results]}


def healthy(results: tuple[Result, ...]) -> bool:
    """Return whether nothing failed."""
    return all(result.level != "fail" for result in results)


def lines(result: Result, width: int) -> Iterator[str]:
    """Yield a result for people: what was found, and below it what to do."""
    yield f"{result.level:<5} {result.check:<{width}} {result.said}"
    if result.remedy:
        yield f"{'':<5} {'':<{width}} {result.remedy}"


def tally(results: tuple[Result, ...]) -> str:
    """Return how many there are of each level.

    Examples:
        >>> tally((Result("a", "pass", "", ""), Result("b", "fail", "", "x")))
        '1 pass, 0 warn, 1 fail, 0 skip'
    """
    levels = [result.level for result in results]
    return ", ".join(f"{levels.count(level)} {level}" for level in LEVELS)
