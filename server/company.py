"""The sites of one run as the coordinator deals with them: who is in, what each was asked, what was believed of it.

Whoever fails is dropped, and the run goes on without them as long as the quorum holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import codec
from common.errors import ConsiliumError, QuorumLost
from common.messages import Describe, Description, Evaluate, Evaluated, Finish, Freeze, InstallTrunk, Request
from common.parameters import Parameters
from common.run_config import RunConfig
from server import census
from server.admission import Declared, Rejected, admissible, admit_evaluation
from server.census import TEST, VALIDATION
from server.evaluation import Edges, Measured, Statistic
from server.federation import Answer, Federation, Traffic
from server.onlooker import Onlooker
from server.proportion import absurd_examples
from server.refusals import quorum_missed
from server.spending import Spent

_log = logging.getLogger("consilium.coordinator")

Progress = Callable[[str, int, int], None]

FAREWELL_S = 10.0
"""Seconds that the sites have for the last message of a run."""


@dataclass(frozen=True)
class Start:
    """What the coordinator brings to a run."""

    run: RunConfig  # resolved; its names and quorum are set
    trunk: bytes  # the frozen content
    weights: Parameters  # trainable values before round 1, the head at zero
    folder: Path | None = None  # where state and rounds.jsonl go; None keeps nothing
    every_label: bool = True  # whether a label without training examples is an error
    version: str = ""  # of this package, where the sites are processes of their own
    ended: tuple[str, ...] = ()  # fingerprints of earlier runs that are over, whatever their sites believe
    stages: tuple[int, ...] = ()  # widths of what the head reads; of use in a private run
    part_bytes: int = 0  # the trunk is sent in parts of this size; 0: as one


@dataclass
class Cast:
    """Who is in the run, and what each was seen to do."""

    support: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # as `server.census` has it
    status: dict[str, str] = field(default_factory=dict)
    transfers: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)  # for training; of a private run patients, maybe rounded
    privacy: dict[str, Spent] = field(default_factory=dict)  # of a private run
    onlooker: Onlooker = field(default_factory=Onlooker)

    def note(self, answer: Answer) -> None:
        """Keep a site's last state in words."""
        self.say(answer.site, answer.status + (f"({answer.reason})" if answer.reason else ""))

    def say(self, site: str, status: str) -> None:
        """Keep a site's last state, and tell whoever looks on."""
        self.status[site] = status
        self.onlooker.judged(site, status, self.privacy.get(site))

    @property
    def ready(self) -> list[str]:
        """The sites that were described, in text order."""
        return sorted(self.support)


class Company:
    """The sites of one run.

    Args:
        federation: the sites, to be found.
        start: the run.
        progress: told of phases: name, done, total.
        cast: filled with what becomes of the sites.
    """

    def __init__(self, federation: Federation, start: Start, progress: Progress | None, cast: Cast) -> None:
        self._federation = federation
        self._start = start
        self._run = start.run
        self._fingerprint = start.run.fingerprint()
        self.progress = progress or (lambda _phase, _done, _total: None)
        self.cast = cast
        self.traffic: dict[str, Traffic] = {}  # by phase; rounds are counted apart, in their entries
        self._quorum = start.run.sites.quorum or len(start.run.sites.names)
        self._received: dict[str, int] = {}  # bytes of the trunk, by site

    def describe(self) -> None:
        """Tell the sites of the run, and learn what each brings.

        Raises:
            QuorumLost: fewer are in than the quorum.
            DataError: their data cannot carry the run.
        """
        self.introduce(self._run.sites.names)
        self.require(len(self.cast.support), "setup")
        if self._start.every_label and not self._run.privacy.on:
            census.check_labels(self.pooled_support(), self._run.task.labels)

    def introduce(self, names: Sequence[str]) -> None:
        """Tell some sites of the run, and take in those that answer as they should."""
        agreed = self._run.model_copy(update={"simulation": None})  # where a simulation's data lie is its own business
        request = Describe(agreed.to_toml(), self._start.version, " ".join(self._start.ended))
        for site, answer in self._federation.find(names, request).items():
            if isinstance(answer.reply, Description) and admissible(answer.reply, self._run):
                self._take_in(site, answer.reply)
            else:
                self.cast.note(unbelievable(answer))
        absurd = absurd_examples({site: self.cast.examples[site] for site in self.cast.ready})
        for site in set(absurd) & set(names):  # who is in stays in, whoever comes
            self.cast.support.pop(site)
            self.cast.say(site, "quarantined(bad_statistics)")

    def present(self, names: Sequence[str]) -> list[str]:
        """Return which of some sites are connected now; none where sites cannot come and go."""
        return self._federation.present(names)

    def among(self, names: Sequence[str]) -> list[str]:
        """Return which of some sites are in."""
        return [name for name in names if name in self.cast.support]

    def _take_in(self, site: str, said: Description) -> None:
        self.cast.support[site] = said.support
        held = said.trunk_sha256 == self._run.model.trunk_sha256
        self.cast.transfers[site] = 0 if held else 1
        self._received[site] = said.trunk_bytes
        if self._run.privacy.on:
            self.cast.examples[site] = said.examples
            self.cast.privacy[site] = Spent.of(said)
        else:
            self.cast.examples[site] = int(census.examples(said.support)[census.TRAIN])
        self.cast.say(site, "registered")

    def pooled_support(self) -> NDArray[np.int64]:
        """Return what the sites that are in hold together."""
        return np.asarray(sum(self.cast.support[site] for site in self.cast.ready), np.int64)

    def send_trunk(self, names: Sequence[str]) -> None:
        """Send the trunk to those that lack it, to each from where an earlier attempt was cut off."""
        content = np.frombuffer(self._start.trunk, np.uint8)
        size = self._start.part_bytes or max(1, len(content))
        for offset in range(0, max(1, len(content)), size):
            part = content[offset : offset + size]
            whole = len(content) if self._start.part_bytes else 0
            request = InstallTrunk(self._fingerprint, self._run.model.trunk_sha256, part, offset, whole)
            self.collect("trunk", dict.fromkeys(self._needy(names, offset + len(part)), request))

    def _needy(self, names: Sequence[str], end: int) -> list[str]:
        """Return who lacks the part of the trunk that ends here; a last part that was cut off comes whole."""
        lacking = (site for site in self.among(names) if self.cast.transfers[site])
        return [site for site in lacking if self._received[site] < end or end == len(self._start.trunk)]

    def finish(self, status: str) -> None:
        """Tell the sites that they are free; whoever cannot be told finds out at the next run.

        A farewell that fails changes nothing of how the run ended.
        """
        known = {site: Finish(self._fingerprint, status) for site in self._federation.sites}
        try:
            for _ in self._federation.ask(known, FAREWELL_S):
                pass
        except ConsiliumError as error:
            _log.warning("the sites could not be told that the run is over: %s", error)

    def ask_all(self, phase: str, request: Request) -> dict[str, Answer]:
        """Ask all sites that are in, and go on without those that fail, if the quorum holds."""
        return self.collect(phase, dict.fromkeys(self.cast.ready, request))

    def collect(self, phase: str, requests: Mapping[str, Request]) -> dict[str, Answer]:
        """Ask, and go on without the sites that fail, if the quorum holds."""
        answers: dict[str, Answer] = {}
        for answer in self.asked(phase, requests, preparing=phase == "prepare"):
            answers[answer.site] = answer
            if answer.reply is None:
                self.drop(answer)
        self.require(len(self.cast.support), phase)
        return answers

    def require(self, usable: int, phase: str) -> None:
        """Check that enough sites are in.

        Raises:
            QuorumLost: too few, with the reason of each that is not.
        """
        if usable < self._quorum:
            statuses = {name: self.cast.status.get(name, "lost(absent)") for name in self._run.sites.names}
            raise QuorumLost(quorum_missed(phase, usable, self._quorum, statuses))

    def drop(self, answer: Answer) -> None:
        """Take a site out of the run."""
        self.cast.note(answer)
        self.cast.support.pop(answer.site, None)

    def asked(self, phase: str, requests: Mapping[str, Request], *, preparing: bool = False) -> Iterator[Answer]:
        """Ask, and yield the answers as they come, their bytes counted; whoever failed is still in."""
        self.progress(phase, 0, len(requests))
        for number, answer in enumerate(self._federation.ask(requests, preparing=preparing), start=1):
            self._count(phase, answer)
            yield answer
            self.progress(phase, number, len(requests))

    def _count(self, phase: str, answer: Answer) -> None:
        """Add a message's bytes to those of its phase; rounds are counted apart, in their entries."""
        self.traffic[phase] = self.traffic.get(phase, Traffic()) + answer.traffic

    def each(self, request: Request) -> Iterator[Answer]:
        """Ask every site that is in, and yield the answers of a round as they come: nobody is dropped for one."""
        return self._federation.ask(dict.fromkeys(self.cast.ready, request))

    def freeze(self, fixed: Mapping[str, NDArray[Any]]) -> None:
        """Send what is settled before round 1 and stays."""
        self.ask_all("freeze", Freeze(self._fingerprint, **fixed))

    def declared(self, site: str, split: int) -> Declared:
        """Return what a site's evaluation of a split has to agree with."""
        return Declared(
            self.cast.support[site][split],
            exact=self._run.privacy.histogram_epsilon is None,
            calibrated="calibration" in self._run.evaluation.metrics,
        )

    def measure(self, phase: str, weights: Parameters, split: str, edges: Edges) -> Measured:
        """Have the sites evaluate weights on a split.

        Raises:
            QuorumLost: fewer usable answers than the quorum.
        """
        vector = codec.encode(weights, self._run.wire.dtype)
        request = Evaluate(self._fingerprint, split, vector, edges)
        row = {"validation": VALIDATION, "test": TEST}[split]
        found: dict[str, Statistic] = {}
        for answer in self.asked(phase, dict.fromkeys(self.cast.ready, request)):
            if isinstance(answer.reply, Evaluated):
                try:
                    found[answer.site] = admit_evaluation(answer.reply, self.declared(answer.site, row), edges)
                except Rejected as rejected:
                    self.cast.say(answer.site, f"quarantined({rejected})")
            else:
                self.cast.note(answer)
        self.require(len(found), phase)
        return Measured(edges, found, self._run.evaluation.metrics)


def unbelievable(answer: Answer) -> Answer:
    """Return the answer as what it is if its reply contradicts itself or what was declared."""
    return answer if answer.reply is None else replace(answer, status="quarantined", reason="bad_statistics")
