"""What the people of a site say to a run: each new one waits until one of them has approved it.

`state/pending_runs/FINGERPRINT.json` is what a run asks for, in words, as long as it waits. `state/approvals.json` has
every decision, in the order in which they were made; of two on one run the later one counts, and a rejection is final.
A run of the same fingerprint is the same run: approved once, it may come again. Both are for the eyes of their owner.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client import audit
from client.site_config import SiteConfig
from common.errors import ConsiliumError, UsageError
from common.files import write_atomic
from common.run_config import RunConfig

MOST = 100
"""Runs that may wait: a coordinator cannot fill the disk with them."""

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_KEPT = 200  # characters of a text that a coordinator wrote
_NAMES = 200  # names of a list that a coordinator wrote
_LIMIT = 2**24  # bytes of a file that is read


@dataclass(frozen=True)
class Said:
    """One decision."""

    fingerprint: str
    approved: bool
    time: str  # UTC, ISO 8601 to the second
    who: str  # the user of this machine who decided
    asked: Mapping[str, Any] = field(default_factory=dict)  # what the run asked for, as it was shown


def waiting(config: SiteConfig, run: RunConfig, facts: Mapping[str, Any]) -> Path:
    """Write down what a run asks for, so that a person can look; one that waits already stays as it is.

    Args:
        config: the site.
        run: what is asked for.
        facts: what the site would bring: patients, examples, labels.

    Raises:
        ConsiliumError: it cannot be written, or too many runs wait.
    """
    fingerprint = run.fingerprint()
    path = _pending(config) / f"{fingerprint}.json"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists():
            return path
        if sum(1 for _ in path.parent.glob("*.json")) >= MOST:
            raise ConsiliumError(
                f"{path.parent}: {MOST} runs wait already; reject some: consilium site approve FINGERPRINT --reject"
            )
        write_atomic(path, _json(described(run, facts)), mode=0o600)
    except OSError as error:
        raise ConsiliumError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def described(run: RunConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a person should know of a run; texts of the coordinator are shortened."""
    training, privacy = run.training, run.privacy
    return {
        "fingerprint": run.fingerprint(),
        "asked": _now(),
        "task": run.task.name[:_KEPT],
        "labels": _names(run.task.labels),
        "backbone": run.model.backbone[:_KEPT],
        "trainable": run.model.trainable[:_KEPT],
        "trunk_sha256": run.model.trunk_sha256[:_KEPT],
        "strategy": training.strategy[:_KEPT],
        "rounds": training.rounds,
        "local_epochs": training.local_epochs,
        "local_steps": training.local_steps,
        "batch_size": training.batch_size,
        "privacy": privacy.model_dump(mode="json") if privacy.on else None,
        "sites": _names(run.sites.names),
        "quorum": run.sites.quorum,
        "site": dict(facts),
    }


def approved(config: SiteConfig, fingerprint: str) -> bool:
    """Return whether a person has approved a run.

    Raises:
        ConsiliumError: the decisions cannot be read.
    """
    said = decided(config, fingerprint)
    return said is not None and said.approved


def decided(config: SiteConfig, fingerprint: str) -> Said | None:
    """Return the decision that counts for a run; None: nobody has decided yet.

    Raises:
        ConsiliumError: the decisions cannot be read.
    """
    return next((said for said in reversed(decisions(config)) if said.fingerprint == fingerprint), None)


def decisions(config: SiteConfig) -> tuple[Said, ...]:
    """Return every decision, the first one first.

    Raises:
        ConsiliumError: they cannot be read.
    """
    path = _decisions(config)
    content = _read(path)
    if content is None:
        return ()
    try:
        return tuple(_said(value) for value in json.loads(content))
    except (ValueError, TypeError, RecursionError):
        raise ConsiliumError(
            f"{path}: damaged: no list of decisions; bring it back from your backup, for a rejected run could pass else"
        ) from None


def pending(config: SiteConfig) -> tuple[dict[str, Any], ...]:
    """Return what the runs that wait ask for, the one that waits longest first.

    Raises:
        ConsiliumError: a file cannot be read.
    """
    known = {said.fingerprint for said in decisions(config)}
    found = [_asked(path) for path in sorted(_pending(config).glob("*.json")) if path.stem not in known]
    return tuple(sorted((asked for asked in found if asked is not None), key=lambda asked: str(asked.get("asked"))))


def approve(config: SiteConfig, fingerprint: str, who: str) -> Said:
    """Let a run have the site.

    Args:
        config: the site.
        fingerprint: of the run, or how it begins.
        who: decides.

    Raises:
        UsageError: no run, or several, begin like that, or it was rejected.
        ConsiliumError: the decision cannot be kept.
    """
    return _decide(config, fingerprint, who, True)


def reject(config: SiteConfig, fingerprint: str, who: str) -> Said:
    """Refuse a run for good, also one that was approved before.

    Raises:
        UsageError: no run, or several, begin like that.
        ConsiliumError: the decision cannot be kept.
    """
    return _decide(config, fingerprint, who, False)


def _decide(config: SiteConfig, prefix: str, who: str, approve: bool) -> Said:
    with _alone(config):
        before = decisions(config)
        fingerprint = _one(config, before, prefix)
        last = decided(config, fingerprint)
        if last is not None and last.approved == approve:
            return last
        if last is not None and approve:
            raise UsageError(
                f"run {fingerprint[:12]}: {last.who} rejected it on {last.time}, which is final; "
                "ask the coordinator to start it anew with another seed, and approve that run"
            )
        path = _pending(config) / f"{fingerprint}.json"
        asked = _asked(path) or (last.asked if last else {})
        said = Said(fingerprint, approve, _now(), who, asked)
        audit.append(config.audit, "approved" if approve else "rejected", {"fingerprint": fingerprint})
        _keep(config, (*before, said))
        path.unlink(missing_ok=True)
    return said


def _one(config: SiteConfig, before: tuple[Said, ...], prefix: str) -> str:
    """Return the one run, waiting or decided, whose fingerprint begins like this."""
    known = {said.fingerprint for said in before} | {path.stem for path in _pending(config).glob("*.json")}
    text = prefix.strip().lower()
    found = sorted(name for name in known if _FINGERPRINT.fullmatch(name) and text and name.startswith(text))
    if not found:
        raise UsageError(
            f"run {prefix[:80]!r}: none of that fingerprint waits here; `consilium site approve` lists those that do"
        )
    if len(found) > 1:
        names = ", ".join(name[:16] for name in found[:4])
        raise UsageError(f"run {prefix[:80]!r}: {len(found)} runs begin like that ({names}); give more of it")
    return found[0]


def _keep(config: SiteConfig, said: tuple[Said, ...]) -> None:
    path = _decisions(config)
    try:
        write_atomic(path, _json([asdict(one) for one in said]), mode=0o600)
        _give(path, config.state)
    except OSError as error:
        raise ConsiliumError(f"{path}: the decision cannot be kept ({error.strerror})") from None


def _give(path: Path, folder: Path) -> None:
    """Let a file that root wrote belong to whom the state belongs, for the daemon has to read it."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


@contextmanager
def _alone(config: SiteConfig) -> Iterator[None]:
    """Let one process decide at a time."""
    try:
        handle = os.open(config.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConsiliumError(f"{config.state}: the site's state cannot be read ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _said(value: Mapping[str, Any]) -> Said:
    said = Said(**value)
    texts = all(isinstance(text, str) for text in (said.fingerprint, said.time, said.who))
    if not (texts and isinstance(said.approved, bool) and isinstance(said.asked, dict)):
        raise ValueError("expected a decision")
    return said


def _asked(path: Path) -> dict[str, Any] | None:
    """Return what a run asks for; None where it is there no more."""
    content = _read(path)
    if content is None:
        return None
    with suppress(ValueError, RecursionError):
        value = json.loads(content)
        if isinstance(value, dict):
            return {**value, "fingerprint": path.stem}
    raise ConsiliumError(f"{path}: damaged; remove it, and it is written anew when the coordinator asks again")


def _read(path: Path) -> bytes | None:
    """Return the content of a file; None where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            return file.read(_LIMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConsiliumError(f"{path}: cannot be read ({error.strerror})") from None


def _pending(config: SiteConfig) -> Path:
    return config.state / "pending_runs"


def _decisions(config: SiteConfig) -> Path:
    return config.state / "approvals.json"


def _names(names: tuple[str, ...]) -> list[str]:
    more = [f"and {len(names) - _NAMES} more"] if len(names) > _NAMES else []
    return [*(name[:_KEPT] for name in names[:_NAMES]), *more]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
