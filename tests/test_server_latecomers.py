from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from common.run_config import RunConfig, Sites
from server.latecomers import Latecomers

NAMES = ("early", "late")


class Books:
    """A company that keeps what it was asked to do, and takes in whoever it is told to."""

    def __init__(self, status: dict[str, str], takes: bool) -> None:
        self.cast = SimpleNamespace(status=status, support={"early": None})
        self.takes, self.there = takes, {"late"}
        self.asked: list[tuple[str, list[str]]] = []

    def present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.there]

    def among(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.cast.support]

    def introduce(self, names: list[str]) -> None:
        self.asked.append(("introduce", names))
        if self.takes:
            self.cast.support.update(dict.fromkeys(names))

    def send_trunk(self, names: list[str]) -> None:
        self.asked.append(("trunk", names))

    def collect(self, phase: str, requests: dict[str, Any]) -> None:
        self.asked.append((phase, list(requests)))


def rounds_of_attempts(books: Books, rounds: int) -> list[int]:
    """Return before which rounds somebody was told of the run."""
    start: Any = SimpleNamespace(run=RunConfig(sites=Sites(names=NAMES)))
    latecomers = Latecomers(books, start)  # type: ignore[arg-type]
    found = []
    for number in range(1, rounds + 1):
        before = len(books.asked)
        latecomers.welcome(number, {"mean": None, "scale": None, "class_weights": None})  # type: ignore[dict-item]
        if len(books.asked) > before:
            found.append(number)
    return found


def test_who_is_there_now_is_set_up_once_and_nobody_else() -> None:
    books = Books({"early": "contributed"}, takes=True)
    assert rounds_of_attempts(books, 9) == [1]
    assert books.asked == [(what, ["late"]) for what in ("introduce", "trunk", "prepare", "freeze")]


def test_who_fails_is_tried_more_and_more_rarely() -> None:
    books = Books({"late": "lost(absent)"}, takes=False)
    assert rounds_of_attempts(books, 70) == [1, 2, 4, 8, 16, 32, 48, 64]


@pytest.mark.parametrize("status", ["refused(policy)", "refused(budget)", "quarantined(bad_statistics)"])
def test_who_declined_or_is_not_believed_is_not_asked_again(status: str) -> None:
    assert rounds_of_attempts(Books({"late": status}, takes=True), 40) == []


@pytest.mark.parametrize(
    "status", ["lost(no_room)", "refused(approval)", "refused(unknown_run)", "refused(not_prepared)"]
)
def test_what_may_be_otherwise_by_now_is_tried(status: str) -> None:
    assert rounds_of_attempts(Books({"late": status}, takes=True), 3) == [1]


def test_who_is_away_is_not_waited_for() -> None:
    books = Books({"late": "lost(absent)"}, takes=True)
    books.there = set()
    assert rounds_of_attempts(books, 9) == []
