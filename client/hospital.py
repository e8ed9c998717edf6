"""What the daemon's desk works on: one hospital in one run at a time, its cohort opened once.

Everything here but `heard`, `changed` and `status` runs on the desk's one thread.

The caches of a site are also written by `consilium site check` and `consilium site forget`, in processes of their own.
So every request holds the site's lock (`client.examination.alone`) as long as it is at work, and no longer: between two
requests anybody may have it, and a pass over the images lets others go first whenever it has written a part. A patient
who is taken out is on the opt-out list before anything of theirs is deleted. Whenever that list has changed, or rows
were deleted (`client.erasure.mark`), work that is under way ends at its next part, and cohort, model and caches are
opened anew: in a run, also after a restart, with those examples that are left of it and no others.
"""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client import audit, erasure, examination, intake, policy, pruning
from client.cohort import SPLITS, Cohort
from client.desk import Progress
from client.memory import Memory
from client.outbox import Outbox, describe
from client.site_config import SiteConfig
from client.site_ledger import open_ledger
from client.tenancy import Tenancy, Tenure
from common.errors import ConfigError, ConsiliumError, SiteRefusal
from common.files import write_atomic
from common.messages import (
    KINDS,
    REFUSALS,
    Describe,
    Done,
    Finish,
    Reply,
    Request,
    ticket,
    to_bytes,
    to_record,
)
from common.run_config import RunConfig

if TYPE_CHECKING:
    from client.guard import Guard  # these import torch, which takes seconds
    from client.site import Site

OpenCohort = Callable[[Progress], Cohort]
"""Returns a site's examples, telling of its progress."""

LEAST_ROOM = 2**20
"""Bytes below which a disk is full: an event of the trail still fits, and nothing else."""

_Marks = tuple[tuple[int, ...], bytes]
_RELEASE = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_TICKETS = 8
REVIEW_S = 0.5
"""Seconds between two looks whether a person has let a reply go."""

COMPLETED = ("completed", "completed_partial")
_log = logging.getLogger("consilium.site")


class _Changed(BaseException):
    """Rows that the work at hand counts on are gone, or are to go."""


@dataclass(frozen=True)
class Health:
    """How a hospital is."""

    opened: bool  # the cohort is there
    code: str  # of the refusal that requests meet as long as it is not; empty: not tried to the end yet
    examples: dict[str, int]  # by split
    device: str
    tenure: Tenure | None
    refused: tuple[str, float] | None  # the last refusal: code, and seconds since 1970


class Hospital:
    """One site with its cohort, its memory and the run that it is in.

    Args:
        config: the site; its state is there.
        open_cohort: where its examples come from; None: from its own data.

    Raises:
        OSError: the state cannot be written.
    """

    def __init__(self, config: SiteConfig, open_cohort: OpenCohort | None = None) -> None:
        self._config = config
        self._source = open_cohort or (lambda progress: intake.cohort(config, progress))
        self._memory = Memory.at(config.state / "federation", config.name)
        self._tenancy = Tenancy(self._memory.folder / "run.json")
        self._site: Site | None = None
        self._marks: _Marks | None = None  # when the cohort was opened
        self._examined = 0
        self._members: NDArray[np.uint8] | None = None  # digests of who is in the run: nobody may join them later
        self._fewer = False  # the cohort is what is left of its members
        self._decision = ("", "")  # fingerprint and rule of the policy's last one
        self._guard: Guard | None = None
        self._outbox = Outbox.at(config.state)
        self._asked = ""  # the last request, by what it is called
        self._run: RunConfig | None = None  # that was judged last
        self._code = ""
        self._device = ""
        self._refused: tuple[str, float] | None = None
        self._told: tuple[str, str] | None = None
        self._tickets: deque[tuple[str, str]] = deque(maxlen=_TICKETS)
        self._step: Callable[[int, int], None] = lambda _done, _total: None

    # ------------------------------------------------------------------------------------------- from any thread

    def expect(self, ticket: str, request: Request) -> None:
        """Remember which run a ticket belongs to."""
        self._tickets.append((ticket, getattr(request, "fingerprint", "")))

    def heard(self, ticket: str) -> None:
        """Take note that a ticket's run asked for it."""
        fingerprint = dict(self._tickets).get(ticket, "")
        if fingerprint:
            self._tenancy.hear(fingerprint)

    def changed(self) -> bool:
        """Return whether patients were taken out since the cohort was opened."""
        marks = self._marks
        return marks is not None and marks != (_optout(self._config), erasure.mark(self._config.cache))

    def health(self) -> Health:
        """Return how it is."""
        site = self._site
        examples = {split: len(site.cohort.indices(split)) for split in SPLITS} if site else {}
        return Health(site is not None, self._code, examples, self._device, self._tenancy.tenure, self._refused)

    def refuse(self, code: str) -> None:
        """Remember the last refusal."""
        self._refused = (code if code in REFUSALS else "internal", time.time())

    # -------------------------------------------------------------------------------------- on the desk's thread

    def open(self, progress: Progress) -> bytes:
        """Open the cohort, if it can be: work for the desk that nobody waits for."""
        self._at_work(progress, lambda _site: Done())
        return b""

    def work(self, request: Request, progress: Progress) -> bytes:
        """Return the bytes of the reply to a request; they and their hash are in the audit trail by then.

        Raises:
            SiteRefusal: with a code of `common.messages.REFUSALS`.
        """
        kind = KINDS[type(request)][0].rpartition(".")[2]
        try:
            asked = ticket(request)
            self._note_request(kind, asked)
            content = to_bytes(to_record(self.answer(request, progress)))
            self._let_out(kind, asked, getattr(request, "fingerprint", ""), content, progress)
            self._told = None
        except Exception as error:  # recorded, and raised on
            if _no_room(error, self._config.state):
                _log.warning("there is no room on the disk of the site's state")  # nor in the trail
                raise SiteRefusal("no_room") from error
            self._record(kind, error.code if isinstance(error, SiteRefusal) else "internal")
            raise
        return content

    def _note_request(self, kind: str, asked: str) -> None:
        """Put a request into the trail, once if it comes again and again."""
        if self._asked != asked:
            audit.append(self._config.audit, "request", {"kind": {kind: 1}, "sha256": asked})
            self._asked = asked

    def _let_out(self, kind: str, asked: str, fingerprint: str, content: bytes, progress: Progress) -> None:
        """Write down what is about to leave, and wait for a person to look at it if the policy wants that.

        Args:
            kind: of the request.
            asked: what it is called.
            fingerprint: of its run; empty: it names none.
            content: of the reply.
            progress: told that somebody looks at it.

        Raises:
            SiteRefusal: `policy` if it is too large.
        """
        self._check_size(fingerprint, content)
        names = self._site.trained_shapes() if self._site is not None else []
        told = describe(content, dict(names))
        if self._config.toml.policy.review and told["arrays"]:
            self._outbox.replace(asked, kind, content, {"run": fingerprint, "names": names})
            self._await_release(asked, progress)
        sent = {"kind": {kind: 1}, "bytes": len(content), "sha256": told["sha256"], "tensors": _tensors(told)}
        audit.append(self._config.audit, "reply", {**sent, **self._spent(fingerprint)})
        self._outbox.mark_sent(asked)

    def _check_size(self, fingerprint: str, content: bytes) -> None:
        """Refuse to let out a reply that is larger than the policy allows, and say so where a run's refusal is said."""
        try:
            policy.check_reply(self._config.toml.policy, len(content))
        except policy.PolicyRefusal as error:
            self._refused_by(error, fingerprint)
            raise

    def _await_release(self, asked: str, progress: Progress) -> None:
        """Hold a reply until a person has let it go; the coordinator is told that somebody looks at it."""
        while not self._outbox.is_released(asked):
            progress("review", 0, 0)
            time.sleep(REVIEW_S)

    def _spent(self, fingerprint: str) -> dict[str, Any]:
        """Return what the ledger says after a reply of a private run, and its head."""
        private = self._run is not None and self._run.privacy.on and self._guard is not None
        return (self._guard.statement(fingerprint) or {}) if private and self._guard else {}

    def answer(self, request: Request, progress: Progress) -> Reply:
        """Return the reply to a request.

        Raises:
            SiteRefusal: with a code of `common.messages.REFUSALS`.
        """
        if isinstance(request, Describe):
            return self._describe(request, progress)
        fingerprint = getattr(request, "fingerprint", "")
        if isinstance(request, Finish):
            self._end(fingerprint, request.status)
            return Done()
        held = self._tenancy.tenure
        if held is None or held.fingerprint != fingerprint:
            raise SiteRefusal("unknown_run")
        try:
            run = RunConfig.from_toml(self._memory.run() or "")
        except ConfigError:
            raise SiteRefusal("unknown_run") from None
        self._judge(run, None)
        self._tenancy.hear(fingerprint, getattr(request, "round", None))
        return self._at_work(progress, lambda site: self._judged(site, run, request))

    def _judged(self, site: Site, run: RunConfig, request: Request) -> Reply:
        """Answer, if the policy still allows the run: it may have been changed, or a person have thought again."""
        self._judge(run, site.cohort)
        return site.handle(request)

    def _judge(self, run: RunConfig, cohort: Cohort | None) -> None:
        """Refuse a run that the hospital's own policy does not allow, and say why: in the trail, and in the site's log.

        Args:
            run: what is asked for.
            cohort: the site's; None: not looked at yet, so what depends on it is judged later.

        Raises:
            PolicyRefusal: the policy says no.
        """
        fingerprint = run.fingerprint()
        try:
            policy.enforce(self._config, run, policy.facts_of(self._config, cohort), opened=cohort is not None)
        except policy.PolicyRefusal as error:
            self._refused_by(error, fingerprint)
            raise
        self._run = run
        if cohort is not None:
            self._decided(fingerprint, policy.ALLOWED, allowed=True)

    def _refused_by(self, error: policy.PolicyRefusal, fingerprint: str) -> None:
        _log.warning("a run was refused: %s", error.reason)
        self._decided(fingerprint, error.rule, allowed=False)

    def _decided(self, fingerprint: str, rule: str, *, allowed: bool) -> None:
        """Put a decision and the rule that made it into the trail, once as long as it stays the same."""
        if self._decision != (fingerprint, rule):
            facts = {"fingerprint": fingerprint, "allowed": int(allowed), "rule": {rule or "policy": 1}}
            audit.append(self._config.audit, "decision", facts)
            self._decision = (fingerprint, rule)

    def _describe(self, request: Describe, progress: Progress) -> Reply:
        if _release(request.version) != _release(importlib.metadata.version("consilium")):
            raise SiteRefusal("version_differs")
        try:
            run = RunConfig.from_toml(request.run)
        except ConfigError:
            raise SiteRefusal("malformed") from None
        self._judge(run, None)
        fingerprint, held = run.fingerprint(), self._tenancy.tenure
        if not self._tenancy.is_free(fingerprint, request.ended):
            raise SiteRefusal("busy")
        if held is None or held.fingerprint != fingerprint:
            self._end(held.fingerprint if held else "")
            self._let_in()
        reply = self._at_work(progress, lambda site: self._described(site, request, run))
        self._tenancy.begin(fingerprint, run.task.name, run.sites.deadline_s, run.training.rounds)
        if held is None or held.fingerprint != fingerprint:
            audit.append(self._config.audit, "run", {"fingerprint": fingerprint, "described": 1})
            _log.info("in run %s", fingerprint[:12])
        return reply

    def _described(self, site: Site, request: Describe, run: RunConfig) -> Reply:
        self._judge(run, site.cohort)
        reply = site.handle(request)
        fingerprint = run.fingerprint()
        _write_members(self._config, fingerprint, site.cohort.digests)
        pruning.prune(self._config, self._outbox, run)
        return reply

    def _end(self, fingerprint: str, status: str = "") -> None:
        if status in COMPLETED:
            self._outbox.drop(fingerprint)
        if self._tenancy.end(fingerprint):
            audit.append(self._config.audit, "run", {"fingerprint": fingerprint, "finished": 1})
            _log.info("run %s is over", fingerprint[:12])

    def _let_in(self) -> None:
        """For a run that is new here, open the cohort anew if it was examined since, or is what is left of another."""
        if self._site is None or self._fewer or self._examined != _examined(self._config):
            self._site = self._members = None

    def _at_work(self, progress: Progress, work: Callable[[Site], Reply]) -> Reply:
        """Return what work on the site comes to; whenever patients were taken out meanwhile, it begins anew."""
        while True:
            try:
                with examination.alone(self._config) as give_way:
                    site = self._opened(progress)
                    with self._telling(progress, give_way):
                        return work(site)
            except _Changed:
                _log.info("patients were taken out: the cohort is opened anew")

    @contextmanager
    def _telling(self, progress: Progress, give_way: Callable[[], None]) -> Iterator[None]:
        """Let the site's long work tell of its progress, let others go first, and end if rows are gone."""

        def step(done: int, total: int) -> None:
            progress("features", done, total)
            give_way()
            if self.changed():
                raise _Changed

        self._step = step
        try:
            yield
        finally:
            self._step = lambda _done, _total: None

    def _opened(self, progress: Progress) -> Site:
        if self._site is None or self.changed():
            self._site = self._marks = None
            try:
                self._site = self._open(progress)
                self._code = ""
            except Exception as error:  # noqa: BLE001  its text may name a patient: the site's own log may say it
                self._code = "no_cohort"
                if isinstance(error, ConsiliumError):
                    _log.error("the site's data cannot be used: %s", error)
                else:
                    _log.exception("the site's data cannot be used")
                raise SiteRefusal("no_cohort") from None
        return self._site

    def _open(self, progress: Progress) -> Site:
        """Return a site over cohort and caches as they are now."""
        listed, self._examined = _optout(self._config), _examined(self._config)

        def step(phase: str, done: int, total: int) -> None:
            progress(phase, done, total)
            if _optout(self._config) != listed:
                raise _Changed

        step("examining", 0, 0)
        cohort = self._source(step)
        held = self._tenancy.tenure
        members = self._members
        if members is None and held is not None:
            members = _read_members(self._config, held.fingerprint)
        self._fewer = members is not None
        if members is not None:
            cohort = _left(cohort, members)
        self._members = cohort.digests
        if held is not None:
            _write_members(self._config, held.fingerprint, cohort.digests)
        site = self._built(cohort)
        # Not before: opening the cohort finishes an erasure that was cut short, and has seen what that deletes.
        self._marks = (listed, erasure.mark(self._config.cache))
        return site

    def _built(self, cohort: Cohort) -> Site:
        import torch

        from client.site import Site
        from client.workshop import Workshop, choose_device

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = choose_device(self._config.toml.compute.device)
        workshop = Workshop(self._config.cache, self._device)
        self._guard = self._made_guard()
        return Site(
            self._config.name,
            cohort,
            workshop,
            self._memory,
            lambda done, total: self._step(done, total),
            wheel=True,
            weights=self._config.weights,
            guard=self._guard,
        )

    def _made_guard(self) -> Guard:
        from client.guard import Guard, Limits

        limits = self._config.toml.policy
        return Guard(
            lambda: open_ledger(self._config, write=True),
            self._outbox,
            Limits(limits.max_epsilon, limits.max_delta, limits.min_cell, limits.round_counts),
        )

    def _record(self, kind: str, code: str) -> None:
        """Record a refusal; one that is the same as the last is told once, for some are asked for all day."""
        self.refuse(code)
        known = code if code in REFUSALS else "internal"
        if self._told != (kind, known):
            audit.append(self._config.audit, "refused", {"kind": {kind: 1}, "code": {known: 1}})
            self._told = (kind, known)


def _tensors(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what left by tensor, as the trail takes it: of weights in one vector each part by its name."""
    parts = [part for array in told["arrays"] for part in array.get("parts") or [array]]
    kept = ("shape", "norm", "sha256")
    return {part["name"]: {key: part[key] for key in kept if part[key] is not None} for part in parts}


def _release(version: str) -> str:
    """Return major.minor.patch; empty for what is no version."""
    found = _RELEASE.match(version)
    return found[0] if found else "none"


def _optout(config: SiteConfig) -> tuple[int, ...]:
    """Return what changes with the list of patients who are not to be used: it is only ever replaced."""
    try:
        found = config.optout.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _examined(config: SiteConfig) -> int:
    """Return what changes when the site's data are examined by hand."""
    try:
        return (config.state / examination.DOCUMENT).stat().st_mtime_ns
    except OSError:
        return 0


def _left(cohort: Cohort, members: NDArray[np.uint8]) -> Cohort:
    """Return the examples of a cohort that are among the members."""
    known = set(map(bytes, members))
    indices = np.flatnonzero([bytes(digest) in known for digest in cohort.digests])
    return replace(cohort.subset(indices), quarantine=cohort.quarantine)


def _write_members(config: SiteConfig, fingerprint: str, digests: NDArray[np.uint8]) -> None:
    """Keep who is in a run beside the caches, so that an erasure deletes it with them."""
    content = bytes.fromhex(fingerprint) + digests.tobytes()
    write_atomic(config.cache / erasure.MEMBERS, content, mode=0o600)


def _read_members(config: SiteConfig, fingerprint: str) -> NDArray[np.uint8] | None:
    """Return who is in a run; None if that is not known any more."""
    try:
        content = (config.cache / erasure.MEMBERS).read_bytes()
    except FileNotFoundError:
        return None
    if content[:32].hex() != fingerprint or len(content) % 32:
        return None
    return np.frombuffer(content, np.uint8, offset=32).reshape(-1, 32)


def _no_room(error: Exception, state: Path) -> bool:
    """Return whether work failed because the disk is full; a library may hide why, so the disk is asked as well."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__context__
    try:
        return not isinstance(error, SiteRefusal) and shutil.disk_usage(state).free < LEAST_ROOM
    except OSError:
        return False
