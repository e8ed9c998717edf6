"""What the monitors of a site and of a coordinator share: their three pages, and how they run.

/metrics   what Prometheus scrapes
/healthz   200 as long as the monitor lives
/readyz    200 if a run can go on here, else 503; {"ready": false, "codes": ["daemon_unavailable"]}
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import NoReturn

from common.exposition import CONTENT_TYPE, Family, Sample, exposed
from common.loopback import HOST, Loopback, Page, Pages

PATIENCE_S = 7.0
"""Seconds that a scrape waits for who does not answer; Prometheus itself gives up after 10."""

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_JSON = "application/json"
_log = logging.getLogger("consilium.monitor")


def pages(
    families: Sequence[Family], samples: Callable[[], Iterable[Sample]], missing: Callable[[], Iterable[str]]
) -> Pages:
    """Return the pages of a monitor.

    Args:
        families: all metrics.
        samples: returns what is known now.
        missing: returns why no run can go on here: codes of a closed list.
    """

    def ready() -> Page:
        codes = list(missing())
        status = HTTPStatus.SERVICE_UNAVAILABLE if codes else HTTPStatus.OK
        return _document(status, {"ready": not codes, "codes": codes})

    return {
        "/metrics": lambda: Page(HTTPStatus.OK, CONTENT_TYPE, exposed(families, samples())),
        "/healthz": lambda: _document(HTTPStatus.OK, {"alive": True}),
        "/readyz": ready,
    }


def serve(port: int, found: Pages) -> None:
    """Answer until SIGTERM or SIGINT; for the main thread of a process of its own.

    Raises:
        ConsiliumError: the port cannot be had.
        SystemExit: when it is told to end.
    """
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    with Loopback(port, found) as server:
        _log.info("metrics and health at http://%s:%d", HOST, server.port)
        server.serve_forever()


def room(folder: Path) -> int | None:
    """Return the bytes that are free in a folder, None where it cannot be seen."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _document(status: HTTPStatus, value: object) -> Page:
    return Page(status, _JSON, json.dumps(value).encode() + b"\n")


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
