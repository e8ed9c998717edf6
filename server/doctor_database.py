"""The superlink's database: how large it is, and whether SQLite finds it whole. It is read and never written.

A reader does not hold up a superlink that runs. Without one nothing is made beside the file: it is opened as one that
nobody changes.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from common.doctor import Found, failed, passed, skipped
from common.machine import amount

_STEPS = 1000  # of SQLite's machine between two looks at the clock


def look(path: Path, seconds: float) -> Found:
    """Check the database for some seconds.

    Args:
        path: of the database.
        seconds: after which it is left half checked.
    """
    if not path.exists():
        return skipped("there is none yet; the superlink makes it")
    said = f"{path}, {amount(path.stat().st_size)}"
    end = time.monotonic() + seconds
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?{_way(path)}", uri=True)) as database:
            database.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            return skipped(f"{said}: too large to be checked in {seconds:.0f} seconds")
        return failed(f"{said}: cannot be read ({error})")
    except sqlite3.DatabaseError as error:
        return failed(f"{said}: damaged ({error})")
    return passed(said) if verdict == "ok" else failed(f"{said}: damaged")


def _way(path: Path) -> str:
    """Return how to open it: with its log where somebody writes, else as it lies."""
    return "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"
