"""The desk: every piece of work is done once, in order, by one thread; nobody waits longer than they want."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.desk import Desk, Finished, Progress, Underway
from common.errors import SiteRefusal


@pytest.fixture
def desks() -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(**options: Any) -> Desk:
        made.append(Desk(**options))
        return made[-1]

    yield make
    assert all(desk.close(10) for desk in made)


class Held:
    """Work that waits until it is let go."""

    def __init__(self, content: bytes = b"done") -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.content, self.times = content, 0

    def __call__(self, progress: Progress) -> bytes:
        self.times += 1
        progress("features", 3, 9)
        self.begun.set()
        assert self.go.wait(20)
        return self.content


def code(call: Callable[[], object]) -> str:
    with pytest.raises(SiteRefusal) as raised:
        call()
    return raised.value.code


def test_quick_work_is_answered_at_once(desks: Any) -> None:
    assert desks().ask("a", lambda _: b"x", 20) == Finished(b"x")


def test_long_work_is_underway_and_collected(desks: Any) -> None:
    desk, work = desks(), Held()
    begin = time.monotonic()
    desk.ask("a", work, 0.05)
    assert time.monotonic() - begin < 1
    work.begun.wait(20)
    assert desk.collect("a", 0) == Underway("a", "features", 3, 9)
    assert desk.ask("a", work, 0) == Underway("a", "features", 3, 9)
    work.go.set()
    assert desk.collect("a", 20) == Finished(b"done")
    assert desk.ask("a", work, 0) == Finished(b"done")
    assert work.times == 1
    assert desk.status()[:4] == (False, "", 0, 0)


def test_what_nobody_asked_for_is_unknown(desks: Any) -> None:
    assert code(lambda: desks().collect("a", 5)) == "unknown_ticket"


def test_too_much_work_is_refused(desks: Any) -> None:
    desk, work = desks(queue=2), Held()
    desk.ask("a", work, 0)
    work.begun.wait(20)
    for key in "bc":
        assert isinstance(desk.ask(key, lambda _: b"", 0), Underway)
    assert code(lambda: desk.ask("d", lambda _: b"", 0)) == "busy"
    assert isinstance(desk.ask("b", lambda _: b"", 0), Underway)  # it waits already
    work.go.set()
    assert desk.collect("c", 20) == Finished(b"")


def test_a_failure_is_a_code_and_is_tried_again(desks: Any, caplog: pytest.LogCaptureFixture) -> None:
    desk, times = desks(), []

    def work(_: Progress) -> bytes:
        times.append(1)
        raise (SiteRefusal("not_prepared"), KeyError("Doe^Jane"))[len(times) - 1]

    assert code(lambda: desk.ask("a", work, 20)) == "not_prepared"
    assert code(lambda: desk.collect("a", 20)) == "not_prepared"
    assert code(lambda: desk.ask("a", work, 20)) == "internal"
    assert len(times) == 2
    assert "Doe^Jane" in caplog.text
    assert desk.ask("b", lambda _: b"x", 20) == Finished(b"x")


def test_a_reply_is_dropped_in_time(desks: Any) -> None:
    desk = desks(keep_s=0.05)
    desk.ask("a", lambda _: b"x", 20)
    deadline = time.monotonic() + 5
    while desk._finished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not desk._finished  # nobody asked: the desk itself has dropped it
    assert code(lambda: desk.collect("a", 0)) == "unknown_ticket"


def test_what_is_to_be_forgotten_is_computed_again(desks: Any) -> None:
    desk, times = desks(), []
    for _ in range(2):
        desk.ask("a", lambda _: times.append(1) or b"x", 20)
        desk.forget()
    assert len(times) == 2


def test_a_desk_that_closes_ends_work_at_its_next_progress(desks: Any) -> None:
    desk, begun = desks(), threading.Event()

    def endless(progress: Progress) -> bytes:
        while True:
            progress("features", 0, 1)
            begun.set()
            time.sleep(0.001)

    desk.ask("a", endless, 0)
    begun.wait(20)
    desk.ask("b", endless, 0)
    assert desk.close(10)
    assert code(lambda: desk.ask("c", endless, 1)) == "unavailable"


def test_work_that_cannot_be_ended_is_left_behind() -> None:
    desk, work = Desk(), Held()
    desk.ask("a", work, 0)
    work.begun.wait(20)
    assert not desk.close(0.01)
    work.go.set()
    assert desk.close(10)


@given(keys=st.lists(st.sampled_from("abcd"), max_size=30))
@settings(deadline=None, max_examples=40)
def test_work_is_done_in_order_and_never_twice_in_a_row(keys: list[str]) -> None:
    """Whatever is asked for: the outcomes are right, no two run at once, and few are kept."""
    desk, done, running = Desk(queue=100), [], threading.Lock()

    def work(key: str) -> Callable[[Progress], bytes]:
        def run(_: Progress) -> bytes:
            assert running.acquire(blocking=False)
            done.append(key)
            running.release()
            return key.encode()

        return run

    for key in keys:
        assert desk.ask(key, work(key), 20) == Finished(key.encode())
        assert len(desk._finished) <= 2
        assert all(job.work is None for job in desk._finished)
        assert desk.collect(key, 0) == Finished(key.encode())
    assert done == [key for place, key in enumerate(keys) if not place or keys[place - 1] != key]
    assert desk.close(10)


@given(keys=st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
@settings(deadline=None, max_examples=25)
def test_what_waits_is_attached_to(keys: list[str]) -> None:
    """While one is at work, whoever asks for what waits already adds nothing."""
    desk, first, done = Desk(queue=3), Held(), []
    desk.ask("first", first, 0)
    first.begun.wait(20)
    for key in keys:
        desk.ask(key, lambda _, key=key: done.append(key) or key.encode(), 0)
    first.go.set()
    assert desk.collect(keys[-1], 20) == Finished(keys[-1].encode())
    assert desk.close(10)
    assert done == list(dict.fromkeys(keys))[: len(done)]
