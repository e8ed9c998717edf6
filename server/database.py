"""The SuperLink's database between two starts: what was freed in it goes back to the disk.

Flower takes a message out of it as soon as it was answered, and what an engine that died left behind when the next one
starts. So rows grow by a kilobyte a run; but SQLite keeps every page that it ever had, and with large models and many
sites these are gigabytes. Nothing in it is deleted here.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

LEAST = 64 * 2**20
"""Free bytes from which the file is written anew."""

_WAIT_S = 1.0  # for whoever else has it open
_log = logging.getLogger("consilium.superlink")


def compact(path: Path, least: int = LEAST) -> None:
    """Give free pages back to the disk, if they are many and more than are in use; before anybody opens the database.

    SQLite makes the smaller file whole before it takes the place of the larger one, so a crash loses nothing. What
    cannot be done, for the disk is full or the file is damaged, is left to whoever opens the database next.
    """
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            size, pages, free = (_pragma(database, name) for name in ("page_size", "page_count", "freelist_count"))
            if size * free >= least and 2 * free > pages:
                database.execute("VACUUM")
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        _log.info("the database is not made smaller (%s)", type(error).__name__)  # whoever opens it says more


def _pragma(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])
