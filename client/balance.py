"""What a site has spent of its patients' privacy and what is left, by the ledger; read again when it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from client.site_config import SiteConfig
from common.errors import ConsiliumError

NAME = "ledger.jsonl"


def balance(config: SiteConfig) -> dict[str, Any]:
    """Return epsilon, its delta, the budget, what is left of it, and why nothing is known where it is not.

    Only a ledger that is not empty is opened, for that takes a second.
    """
    policy = config.toml.policy
    facts: dict[str, Any] = {"epsilon": None, "delta": None, "max_epsilon": policy.max_epsilon, "left": None}
    try:
        if not (config.state / NAME).stat().st_size:
            return {**facts, "unknown": ""}
        epsilon, delta = _spent(config)
    except FileNotFoundError:
        return {**facts, "unknown": ""}
    except PermissionError:
        return {**facts, "unknown": "closed to this user"}
    except (OSError, ConsiliumError):
        return {**facts, "unknown": "consilium site ledger says what is wrong with it"}
    left = None if policy.max_epsilon is None or epsilon is None else max(0.0, policy.max_epsilon - epsilon)
    return {**facts, "epsilon": epsilon, "delta": delta, "left": left, "unknown": ""}


def watched(config: SiteConfig) -> Callable[[], dict[str, Any]]:
    """Return the same for whoever asks again and again."""
    known: list[Any] = [None, {}]

    def again() -> dict[str, Any]:
        stamp = _stamp(config)
        if not known[1] or stamp != known[0]:
            known[:] = stamp, balance(config)
        return dict(known[1])

    return again


def _spent(config: SiteConfig) -> tuple[float | None, float | None]:
    from client import site_ledger
    from common import privacy

    ledger = site_ledger.open_ledger(config, write=False)
    limit = config.toml.policy.max_delta
    delta = limit if limit is not None else ledger.delta
    return (None if delta is None else privacy.epsilon(ledger.releases(), delta)), delta


def _stamp(config: SiteConfig) -> tuple[int, ...]:
    try:
        found = (config.state / NAME).stat()
    except OSError as error:
        return (error.errno or 0,)
    return found.st_ino, found.st_size, found.st_mtime_ns
