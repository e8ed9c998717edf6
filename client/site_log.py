"""What the daemon logs, and where: on standard error what anybody may read, in a file of the state everything else.

The text of an exception, a traceback or a library's warning may hold a path or a patient's name. Such things go into
`daemon.log` in the site's state alone, for the eyes of its owner.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path

from common.logs import json_handler

NAME = "daemon.log"
LIMIT = 5_000_000
"""Bytes of the file, before it becomes `daemon.log.1` and begins anew."""

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_ours = logging.getLogger("consilium")


class _Private(RotatingFileHandler):
    """A rotated file for the eyes of its owner."""

    def _open(self) -> io.TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return io.TextIOWrapper(
            os.fdopen(os.open(self.baseFilename, flags, 0o600), "ab"), encoding="utf-8", errors="backslashreplace"
        )


class _Public(logging.Formatter):
    """Tells of an exception its kind alone."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        bare = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        line = super().format(bare).replace("\n", " ")
        return f"{line} ({kind}; {NAME} in the site's state says more)" if kind else line


def set_up(state: Path, form: str = "text", site: str = "") -> None:
    """Log from now on as the module says.

    Args:
        state: of the site.
        form: of what anybody may read, `text` or `json`.
        site: its name, for JSON.

    Raises:
        OSError: the file cannot be written.
    """
    file = _Private(state / NAME, maxBytes=LIMIT, backupCount=2)
    file.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(file)
    _ours.addHandler(_text() if form == "text" else json_handler("daemon", lambda: {"site": site}))
    _ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk must stop no work, and print nothing of what could not be written
    threading.excepthook = lambda failed: _ours.error(
        "a thread ended", exc_info=(failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback)
    )


def _text() -> logging.Handler:
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(_Public(_FORMAT))
    return screen
