"""The SuperLink's database gives back what was freed, and keeps all that is in it."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest

from server.control import Control
from server.database import compact

ROOT = Path(__file__).parent.parent


def filled(path: Path, megabytes: int, kept: int = 3) -> None:
    """Make a database that once held much, and holds a few rows now."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE IF NOT EXISTS filled (number INTEGER PRIMARY KEY, content BLOB)")
        for number in range(megabytes):
            database.execute("INSERT INTO filled VALUES (?, ?)", (number, b"x" * 2**20))
        database.execute("DELETE FROM filled WHERE number >= ?", (kept,))


def rows(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as database:
        return [number for (number,) in database.execute("SELECT number FROM filled ORDER BY number")]


def test_much_that_is_free_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    filled(path, 20)
    compact(path, least=10 * 2**20)
    assert path.stat().st_size < 4 * 2**20 and rows(path) == [0, 1, 2]
    assert [left.name for left in tmp_path.iterdir() if left.stat().st_size] == [path.name]


@pytest.mark.parametrize(("kept", "least"), [(3, 64 * 2**20), (15, 2**20)])
def test_little_that_is_free_stays(kept: int, least: int, tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    filled(path, 20, kept)
    compact(path, least)
    assert path.stat().st_size > 20 * 2**20 and rows(path) == list(range(kept))


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_what_is_no_database_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    compact(path)
    assert not path.exists()
    path.write_bytes(content)
    compact(path, 0)
    assert path.read_bytes() == content


def test_a_database_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    filled(path, 20)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        compact(path, 0)
        other.execute("ROLLBACK")
    assert rows(path) == [0, 1, 2]


def test_a_kill_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    script = "import sys; from pathlib import Path; from server.database import compact; compact(Path(sys.argv[1]), 0)"
    for pause in (0.0, 0.01):
        path.unlink(missing_ok=True)
        filled(path, 20, 8)
        with subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT) as process:
            end = time.monotonic() + 10
            while process.poll() is None and time.monotonic() < end and not (tmp_path / "superlink.db-wal").exists():
                time.sleep(0.001)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        assert rows(path) == list(range(8))
        compact(path, 0)
        assert path.stat().st_size < 10 * 2**20 and rows(path) == list(range(8))


@pytest.mark.slow
def test_sites_that_are_enrolled_connect_to_a_database_that_was_made_smaller(
    superlinks: Callable[..., Any], links: Callable[..., Any]
) -> None:
    superlink = superlinks().start()
    link = links(superlink)
    with Control(superlink.endpoints) as control:
        node = control.register("north", link.public_key)
        link.activate()
        link.client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    assert superlink.end() == 0
    filled(superlink.endpoints.database, 70, 0)
    assert superlink.endpoints.database.stat().st_size > 70 * 2**20
    superlink.start()
    assert superlink.endpoints.database.stat().st_size < 2 * 2**20
    link.activate()
    with Control(superlink.endpoints) as control:
        (known,) = control.nodes()
    assert (known.name, known.node_id, known.status) == ("north", node, "online")
    assert superlink.end() == 0
