"""What `consilium site` does, in the order in which a crash does least harm; each step ends in the audit trail."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from client import audit, founding, intake, optout
from client.findings import Findings
from client.identity import Identity
from client.report.document import document
from client.report.page import render
from client.secret import read_secret
from client.site_config import SiteConfig
from common.errors import ConfigError, ConsiliumError, UsageError
from common.files import write_atomic

if TYPE_CHECKING:
    from client.pacs import Pulled  # may need an extra that is not installed

PAGE = "check.html"
DOCUMENT = "check.json"
PRIVATE = 0o600

Progress = Callable[[str, int, int], None]


def found(config: SiteConfig) -> bool:
    """Make the state of a site that has none yet, and return whether that was done.

    Only an examination may come first: whoever forgets patients or pulls images at a site without state has most
    likely named another one than was meant.

    Raises:
        ConfigError: it cannot be made.
    """
    return founding.found_state(config.state)


def ready(config: SiteConfig, output: Path | None) -> Identity:
    """Return the site's identity, having looked at all that would stop a long examination at its end.

    Raises:
        ConfigError: there is no state, or its secret is missing or open to others.
        UsageError: the page cannot be written where it shall be.
    """
    if not config.state.is_dir():
        raise ConfigError(f"{config.state}: there is no such folder; `consilium site check` makes it for a new site")
    if not os.access(config.state, os.W_OK | os.X_OK):
        raise ConfigError(f"{config.state}: cannot be written; run the command as the user whose site it is")
    if output is not None and (output.is_dir() or not os.access(output.absolute().parent, os.W_OK | os.X_OK)):
        raise UsageError(f"--output: {output} cannot be written; name a file in a folder that exists")
    return Identity(read_secret(config.secret))


def pull(config: SiteConfig, progress: Progress) -> Pulled:
    """Pull what is missing from the PACS into the folder of the images."""
    from client import pacs

    identity = ready(config, None)
    source = config.toml.data.dicomweb
    if source is None:
        raise ConfigError(f"{config.path.name}: no [data.dicomweb], so there is nothing to pull from")
    pulled = pacs.pull(
        source, config.path.parent, config.images, identity, lambda done, total: progress("studies", done, total)
    )
    counts = {name: value for name, value in dataclasses.asdict(pulled).items() if type(value) is int}
    audit.append(config.audit, "pull", counts)
    return pulled


@contextmanager
def alone(config: SiteConfig) -> Iterator[Callable[[], None]]:
    """Let no other process examine the site's data or forget patients meanwhile: the later one waits.

    An examination that began before a patient was taken out would else write their images when they are forgotten.

    Yields:
        What lets those who wait go first, and returns when it is this process's turn again: the caches may have lost
        rows by then, see `client.erasure.mark`.

    Raises:
        ConsiliumError: the cache cannot be made.
    """
    try:
        config.cache.mkdir(exist_ok=True)
        handle = os.open(config.cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConsiliumError(f"{config.cache}: cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield lambda: _give_way(handle)
    finally:
        os.close(handle)


def _give_way(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_UN)
    time.sleep(0.001)  # whoever waits is woken, and needs a moment to take it
    fcntl.flock(handle, fcntl.LOCK_EX)


def examine(config: SiteConfig, progress: Progress) -> Findings:
    """Examine the site's data and record that it was done."""
    found = intake.examine(config, progress)
    digests = {"manifest_sha256": found.manifest_sha256, "preprocessing_id": found.preprocessing_id}
    audit.append(
        config.audit,
        "check",
        {
            **{name: digest for name, digest in digests.items() if digest},
            "accepted": sum(found.examples.values()),
            "patients": found.patients,
            "quarantine": dict(found.quarantine),
            "ignored": dict(found.ignored),
            "stopped": int(bool(found.stop)),
        },
    )
    return found


def write(config: SiteConfig, found: Findings, output: Path | None) -> Path:
    """Write `check.json` and `check.html` for their owner's eyes, and return where the page is to be looked at.

    Raises:
        ConsiliumError: they cannot be written.
    """
    page = render(found).encode()
    try:
        text = json.dumps(document(found), indent=1, allow_nan=False)
        write_atomic(config.state / DOCUMENT, f"{text}\n".encode(), mode=PRIVATE)
        for path in (config.state / PAGE, output):
            if path is not None:
                write_atomic(path, page, mode=PRIVATE)
    except OSError as error:
        raise ConsiliumError(f"the report cannot be written ({error.strerror}); see {config.state}") from None
    return output or config.state / PAGE


def forget(config: SiteConfig, patients: Path, column: str | None = None) -> dict[str, int]:
    """Take out the patients that a CSV file names, and return counts.

    First the list, so that no later examination takes them in whatever happens; then the page, which may show their
    images; then what is kept of them. After a crash, the same again finishes it.

    Raises:
        ConfigError: there is no state, or its secret is missing or open to others.
        DataError: the file of patients cannot be read or names nobody.
        ConsiliumError: something cannot be deleted or written.
    """
    identity = ready(config, None)
    persons = optout.persons(patients, identity, column)
    new = optout.take_out(config, persons)
    with alone(config):
        _delete_report(config)
        gone = intake.forget(config, set(persons))
    counts = {
        "persons": len(persons),
        "new": new,
        "images": gone.images,
        "features": gone.features,
        "files": gone.files,
    }
    audit.append(config.audit, "forget", counts)
    return counts


def _delete_report(config: SiteConfig) -> None:
    try:
        for name in (PAGE, DOCUMENT):
            (config.state / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConsiliumError(f"{config.state}: the last report cannot be deleted ({error.strerror})") from None
