"""How fast a server is asked, and how long to wait before asking it again."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_WAIT_S = 300.0
"""A server that asks for more patience than this is asked again after this."""

_FIRST_WAIT_S, _LAST_WAIT_S = 1.0, 60.0


class Pace:
    """A token bucket: over any t seconds at most `max(1, rate) + rate · t` requests.

    Args:
        rate: requests a second.
        clock: seconds, never going back.
        sleep: waits for seconds.
    """

    def __init__(self, rate: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._tokens = self._most = max(1.0, rate)
        self._then = clock()

    def wait(self) -> None:
        """Return when one more request may go out."""
        now = self._clock()
        self._tokens = min(self._most, self._tokens + (now - self._then) * self._rate) - 1
        self._then = now
        if self._tokens < 0:  # the debt is paid by the time that passes until the next call
            self._sleep(-self._tokens / self._rate)


def backoff(tries: int) -> float:
    """Return the seconds to wait after a number of failed tries: 1, 2, 4, … up to 60, and less at random by up to half.

    The chance keeps sites that were cut off together from coming back together.
    """
    longest = min(_LAST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(tries - 1, 10))
    return longest * random.uniform(0.5, 1.0)


def retry_after(header: str | None, now: datetime | None = None) -> float:
    """Return the seconds that a Retry-After header asks for, 0 if it asks for nothing (RFC 9110, 10.2.3).

    Examples:
        >>> retry_after("120"), retry_after("soon"), retry_after(None)
        (120.0, 0.0, 0.0)
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return min(LONGEST_WAIT_S, float(text[:9]))
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, IndexError, OverflowError):
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return min(LONGEST_WAIT_S, max(0.0, (then - (now or datetime.now(UTC))).total_seconds()))
