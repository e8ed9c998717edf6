"""Whose the site is: it is in one run at a time, and in a small file beside its memory stands which.

A run gives the site free when it is finished, when its coordinator says with another run that it is over, or when it
was silent for longer than its own deadline.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from common.errors import ConfigError
from common.files import write_json
from common.strict import Section, validated

WRITTEN_S = 60.0
"""Seconds after which it is worth a write that a run was heard of."""

_log = logging.getLogger("consilium.site")


class Tenure(Section):
    """The run that the site is in."""

    fingerprint: str = Field(pattern="[0-9a-f]{64}")
    name: str  # what the run calls its task
    deadline_s: float = Field(gt=0)  # of silence, after which the site is free
    heard: float  # seconds since 1970
    round: int = 0  # the last that the site was asked for
    rounds: int = 0  # of the run; 0: an earlier version wrote this


class Tenancy:
    """Keeps which run the site is in; safe to call from several threads.

    Args:
        path: the file; its folder is there.
        now: seconds since 1970.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._lock = threading.Lock()
        self._tenure = _read(path, now())
        self._written = self._tenure.heard if self._tenure else -math.inf

    @property
    def tenure(self) -> Tenure | None:
        """The run that the site is in."""
        return self._tenure

    def is_free(self, fingerprint: str, ended: str = "") -> bool:
        """Return whether a run may have the site: it has it already, nobody has, or whoever has it is gone.

        Args:
            fingerprint: the run's.
            ended: fingerprints, blanks between them, of runs that are over.
        """
        held = self._tenure
        if held is None or held.fingerprint in (fingerprint, *ended.split()):
            return True
        return self._now() - held.heard > held.deadline_s

    def begin(self, fingerprint: str, name: str, deadline_s: float, rounds: int = 0) -> None:
        """Give the site to a run.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            held = self._tenure
            number = held.round if held and held.fingerprint == fingerprint else 0
            facts: dict[str, Any] = {"name": name, "deadline_s": deadline_s, "round": number, "rounds": rounds}
            self._write(Tenure(fingerprint=fingerprint, heard=self._now(), **facts))

    def hear(self, fingerprint: str, number: int | None = None) -> None:
        """Take note that a run asked for something, and for which round.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            if self._tenure is None or self._tenure.fingerprint != fingerprint:
                return
            now = self._now()
            self._tenure = self._tenure.model_copy(
                update={"heard": now, "round": self._tenure.round if number is None else number}
            )
            if number is not None or not 0 <= now - self._written < WRITTEN_S:
                self._write(self._tenure)

    def end(self, fingerprint: str) -> bool:
        """Take the site from a run, and return whether it had it.

        Raises:
            OSError: the file cannot be deleted.
        """
        with self._lock:
            if self._tenure is None or self._tenure.fingerprint != fingerprint:
                return False
            self._path.unlink(missing_ok=True)
            self._tenure = None
            return True

    def _write(self, tenure: Tenure) -> None:
        write_json(self._path, tenure.model_dump(mode="json"))
        self._tenure, self._written = tenure, tenure.heard


def _read(path: Path, now: float) -> Tenure | None:
    """Return what the file says; one that is damaged says that the site is free, for its coordinator will ask again."""
    try:
        tenure = validated(Tenure, json.loads(path.read_text(encoding="utf-8")), path.name)
        return tenure.model_copy(update={"heard": min(tenure.heard, now)})  # the clock may have been set back
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError, RecursionError):
        _log.warning("%s cannot be read: the site takes itself for free", path.name)
        return None
