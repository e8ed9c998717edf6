"""A hospital that answers as it must not, in place of `simulations.rehearsed`.

    python -P tests/mischief.py up SITE.TOML

What it does is in `mischief.json` beside its `site.toml`, read at every answer: {"kind": KIND, "round": ROUND}.
Everything else is the true daemon and the true link.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from client import daemon, link, up
from client.site_config import read_site
from common.errors import ConsiliumError
from common.messages import MalformedMessage, Trained, from_bytes, from_record, to_bytes, to_record
from common.supervisor import supervise
from simulations import rehearsed

ORDERS = "mischief.json"
DONE = "mischief.done"
"""Written beside the orders once they were carried out, so that a test knows that it tested something."""

LATE_S = 25.0

_CHANGES: dict[str, Callable[[Trained], Trained]] = {
    "nan": lambda reply: dataclasses.replace(reply, weights=np.full_like(reply.weights, np.nan)),
    "shapes": lambda reply: dataclasses.replace(reply, weights=reply.weights[:-1]),
    "counts": lambda reply: dataclasses.replace(reply, num_examples=10**12),
    "norms": lambda reply: dataclasses.replace(reply, weights=np.full_like(reply.weights, 1e6)),
    "statistics": lambda reply: dataclasses.replace(reply, confusion=reply.confusion * 1000),
}


def orders(folder: Path) -> dict[str, Any]:
    """Return what is to be done, nothing where there are no orders."""
    try:
        found: dict[str, Any] = json.loads((folder / ORDERS).read_bytes())
    except FileNotFoundError:
        return {}
    return found


def _done(folder: Path) -> None:
    (folder / DONE).touch()


def _daemon(path: Path) -> None:
    config = read_site(path)
    folder = config.path.parent
    honest = daemon.Daemon._answer
    kept: dict[int, bytes] = {}  # replies by round

    def answer(self: daemon.Daemon, content: bytes, context: Any) -> bytes:
        said = honest(self, content, context)
        try:
            reply = from_record(from_bytes(said), Trained)
        except (MalformedMessage, ConsiliumError):
            return said
        kept[reply.round] = said
        asked = orders(folder)
        if reply.round != asked.get("round"):
            return said
        _done(folder)
        if asked["kind"] == "replay":
            return kept[reply.round - 1]
        if asked["kind"] == "garbage":
            return os.urandom(len(said))
        return to_bytes(to_record(_CHANGES[asked["kind"]](reply))) if asked["kind"] in _CHANGES else said

    daemon.Daemon._answer = answer  # type: ignore[method-assign]
    if not daemon.serve(config, lambda _progress: rehearsed.read(folder)):
        os._exit(0)


def _link(path: Path) -> None:
    folder = read_site(path).path.parent
    honest = link.push

    def push(session: Any, reply: Any, seconds: float) -> None:
        asked = orders(folder)
        if asked.get("kind") == "late" and (folder / DONE).exists():  # this is the answer that the daemon gave just now
            (folder / ORDERS).unlink()
            time.sleep(LATE_S)
        honest(session, reply, seconds)
        if asked.get("kind") == "duplicate" and (folder / DONE).exists():
            for _ in range(3):
                try:
                    honest(session, reply, seconds)
                except Exception as error:  # noqa: BLE001  the coordinator may well say no
                    sys.stderr.write(f"a repeat was declined: {type(error).__name__}\n")

    link.push = push  # type: ignore[assignment]
    sys.argv = ["link", str(path)]
    link.main()


def _up(path: Path) -> None:
    config = read_site(path)
    children = tuple(
        dataclasses.replace(child, argv=(sys.executable, "-P", __file__, child.name, str(config.path)))
        for child in up.children(config)
    )
    supervise(children, up.logs(config))


if __name__ == "__main__":
    {"up": _up, "daemon": _daemon, "link": _link}[sys.argv[1]](Path(sys.argv[2]))
