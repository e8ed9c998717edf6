"""What a site keeps to be quick, and will hardly need again: taken away when a run begins if it was of no use for long.

Frozen weights can be sent again and features computed again. A reply is kept so that the coordinator can ask for it
again; of a run that nobody has gone on with for months, nobody will. What a crash left half written goes as well.
Nothing of the ledger, of the audit trail or of a person's decision is ever touched.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from client.memory import Memory
from client.outbox import Outbox
from client.site_config import SiteConfig
from common.errors import CheckpointError
from common.files import half_written
from common.run_config import RunConfig

UNUSED_S = 90 * 86400.0
"""Seconds without use after which something goes."""

TORN_S = 86400.0
"""Seconds after which nobody is writing a file any more."""

_log = logging.getLogger("consilium.site")


def prune(config: SiteConfig, outbox: Outbox, run: RunConfig, now: float | None = None) -> None:
    """Take away what was not used for long, but for what a run needs, which counts as used now.

    Args:
        config: the site.
        outbox: its replies.
        run: the run that begins.
        now: seconds since 1970; by default by the clock.
    """
    now = time.time() if now is None else now
    try:
        for path in _cached(config):
            if path.name.startswith(run.model.trunk_sha256[:32]):
                os.utime(path)
        for path in [*_unused(config, now), *_torn(config.state, now)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            _log.info("something that was of no use for long is taken away")
        _drop_replies(outbox, run.fingerprint(), now)
    except OSError as error:  # a disk that fails has other ways to say so
        _log.warning("what is no longer needed cannot be taken away (%s)", error.strerror)
    except CheckpointError:
        _log.warning("a reply in the outbox is damaged, so no old ones are taken away")


def _cached(config: SiteConfig) -> list[Path]:
    """Return frozen weights, also those received in part, and folders of features: each is named by its weights."""
    memory = Memory.at(config.state / "federation", config.name)
    features = config.cache / "features"
    return [*memory.trunks.glob("*.safetensors"), *memory.folder.glob("*.part"), *features.glob("*")]


def _unused(config: SiteConfig, now: float) -> Iterator[Path]:
    """Yield what nobody used; when it came or was touched here counts, however old its content is."""
    yield from (path for path in _cached(config) if path.stat().st_ctime < now - UNUSED_S)


def _torn(state: Path, now: float) -> Iterator[Path]:
    for folder, _, _ in os.walk(state):
        yield from half_written(Path(folder), TORN_S, now)


def _drop_replies(outbox: Outbox, fingerprint: str, now: float) -> None:
    latest: dict[str, str] = {}
    for letter in outbox.letters():
        latest[letter.run] = max(letter.time, latest.get(letter.run, ""))
    oldest = datetime.fromtimestamp(now - UNUSED_S, UTC).isoformat()
    for run, made in latest.items():
        if run not in ("", fingerprint) and made < oldest:
            outbox.drop(run)
