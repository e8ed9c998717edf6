"""Pace and patience under a clock that tests turn by hand."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.pacing import LONGEST_WAIT_S, Pace, backoff, retry_after


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@given(st.floats(0.05, 50), st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_no_stretch_of_time_sees_more_requests_than_allowed(rate: float, work: list[float]) -> None:
    clock = Clock()
    pace = Pace(rate, clock, clock.pass_by)
    sent = []
    for seconds in work:
        pace.wait()
        sent.append(clock.now)
        clock.pass_by(seconds)
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            assert last - first + 1 <= max(1, rate) + rate * (sent[last] - sent[first]) + 1e-6


def test_requests_that_come_slowly_do_not_wait() -> None:
    clock = Clock()
    pace = Pace(2.0, clock, lambda seconds: pytest.fail("waited"))
    for _ in range(20):
        pace.wait()
        clock.pass_by(0.5)


def test_a_busy_client_sends_at_the_rate() -> None:
    clock = Clock()
    pace = Pace(4.0, clock, clock.pass_by)
    for _ in range(44):
        pace.wait()
    assert clock.now - 1000 == pytest.approx(10)  # 4 at once, 40 at 4 a second


@given(st.integers(1, 2000))
def test_waits_double_up_to_a_minute_and_vary(tries: int) -> None:
    longest = min(60.0, 2.0 ** min(tries - 1, 10))
    assert longest / 2 <= backoff(tries) <= longest


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0), ("", 0), ("7", 7), (" 7 ", 7), ("0", 0), ("-5", 0), ("1e9", 0), ("9" * 400, LONGEST_WAIT_S),
        ("٣", 0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30), ("Wed, 21 Oct 2015 07:27:00 GMT", 0), ("21 Oct 2015 07:28:30 -0000", 30),
        ("Wed, 21 Oct 2099 07:28:00 GMT", LONGEST_WAIT_S), ("Wed, 99 Oct 2015 07:28:30 GMT", 0), ("soon", 0),
    ],
)  # fmt: skip
def test_what_retry_after_asks_for(header: str | None, seconds: float) -> None:
    assert retry_after(header, datetime(2015, 10, 21, 7, 28, tzinfo=UTC)) == seconds


@given(st.text())
def test_any_header_is_read(header: str) -> None:
    assert 0 <= retry_after(header) <= LONGEST_WAIT_S
