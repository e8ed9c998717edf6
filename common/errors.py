"""The exception tree that users meet: every message says what was expected, what came, where, and what to do.

    ConsiliumError                exit code 1: the command failed
    ├── UsageError                exit code 2: an option, a file or a folder that was named cannot be used
    │   ├── ConfigError           a configuration value
    │   │   ├── NoNoise           a target of privacy that no noise reaches
    │   │   └── DeltaTooLarge     a delta above 1 / patients
    │   └── DataError             a data set: its layout, labels or splits
    ├── WeightsUnavailable        pretrained weights that cannot be had
    ├── CacheError                a cache that cannot be written or holds values it must not
    ├── CheckpointError           saved state that is missing, foreign or damaged
    ├── NotPrivate                a model whose gradients cannot be told apart by patient
    ├── LedgerError               the ledger of spent privacy cannot be used
    │   ├── CohortChanged         a run comes back with other patients than it was planned for
    │   └── BudgetExceeded        a run would take more than the hospital allows
    ├── Interrupted               what a run rests on is away for now: the SuperLink
    ├── QuorumLost                fewer usable replies than the run asked for
    └── SiteRefusal               a site answers a request with a code of the closed list, never with text

Messages may name what the user typed. They never carry a patient identifier, a pixel value or a path below a data root.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import ClassVar, NoReturn


class ConsiliumError(Exception):
    """Root of everything that is reported to the user as one line, without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(ConsiliumError):
    """The command was asked for something it cannot do as asked."""

    exit_code: ClassVar[int] = 2


class ConfigError(UsageError):
    """A configuration value is unknown, out of range or contradicts another."""


class DataError(UsageError):
    """A data set cannot be used: layout, labels, splits or partition."""


class WeightsUnavailable(ConsiliumError):
    """Pretrained weights could not be had; the message says how to go on offline."""


class CacheError(ConsiliumError):
    """The feature cache cannot be written, or a value does not fit its type."""


class CheckpointError(ConsiliumError):
    """Saved state is missing, damaged, or belongs to another configuration."""


class Interrupted(ConsiliumError):
    """What a run rests on is away for now; it goes on from its last round once that is back."""


class QuorumLost(ConsiliumError):
    """A round ended with fewer usable replies than the quorum."""


class SiteRefusal(ConsiliumError):
    """A site declines a request; `code` is all that leaves the site.

    Args:
        code: one of `common.messages.REFUSALS`.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def unknown_value(what: str, got: str, allowed: list[str]) -> NoReturn:
    """Raise a `ConfigError` that names the allowed values and the nearest one.

    Examples:
        >>> unknown_value("--wire", "flaot32", ["float32", "float16"])
        Traceback (most recent call last):
        common.errors.ConfigError: --wire: got 'flaot32', expected float32 or float16 (did you mean 'float32'?)
    """
    choices = " or ".join([", ".join(allowed[:-1]), allowed[-1]]) if len(allowed) > 1 else allowed[0]
    close = get_close_matches(got, allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(f"{what}: got {got!r}, expected {choices}{hint}")
