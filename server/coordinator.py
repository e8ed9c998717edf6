"""One run from the coordinator's side: set up the sites, settle what is fixed, exchange rounds, choose, test once.

    describe -> trunk -> prepare -> statistics -> freeze -> [train x rounds] -> evaluate -> choose -> test, two looks

A train message evaluates the weights that it brings before it trains, so round r's weights are judged by the exchange
of round r + 1, and the last ones by an exchange of their own. Round 0 is the start; it competes like any other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import analytic, codec, parameters
from common.analytic import Sums
from common.errors import ConsiliumError, QuorumLost
from common.messages import (
    Describe,
    Description,
    Evaluate,
    Evaluated,
    Finish,
    Freeze,
    InstallTrunk,
    Prepare,
    Request,
    Statistics,
    Summed,
    Train,
    Trained,
)
from common.parameters import Parameters
from common.run_config import RunConfig
from server import census
from server import state as saved
from server.admission import Expectation, Rejected, admit_evaluation, admit_sums, admit_update
from server.aggregation import Aggregator, Contribution
from server.census import TEST, TRAIN, VALIDATION
from server.evaluation import (
    Edges,
    Measured,
    Statistic,
    Threshold,
    first_edges,
    next_edges,
    operating_threshold,
    score_for_choice,
)
from server.federation import Answer, Federation, Traffic
from server.refusals import quorum_missed
from server.spill import Spill
from server.state import RoundLog, RunState

_log = logging.getLogger("consilium.coordinator")

Progress = Callable[[str, int, int], None]
Weights = dict[str, NDArray[np.float32]]

FAREWELL_S = 10.0
"""Seconds that the sites have for the last message of a run."""

HEAD_WEIGHT, HEAD_BIAS = "head.linear.weight", "head.linear.bias"


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
    part_bytes: int = 0  # the trunk is sent in parts of this size; 0: as one


@dataclass
class Cast:
    """Who is in the run, and what each was seen to do."""

    support: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # as `server.census` has it
    status: dict[str, str] = field(default_factory=dict)
    transfers: dict[str, int] = field(default_factory=dict)

    def note(self, answer: Answer) -> None:
        """Keep a site's last state in words."""
        self.status[answer.site] = answer.status + (f"({answer.reason})" if answer.reason else "")

    @property
    def ready(self) -> list[str]:
        """The sites that were described, in text order."""
        return sorted(self.support)


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    weights: Weights  # of the best round
    fixed: Mapping[str, NDArray[Any]]
    best_round: int
    rounds: list[dict[str, Any]]
    test: Measured
    threshold: Threshold
    cast: Cast
    contributed: Mapping[str, int]  # rounds by site
    traffic: Mapping[str, Traffic]  # by phase outside the rounds, of this process
    complete: bool
    seconds: Mapping[str, float]


class Coordinator:
    """Drives one run over a federation.

    Args:
        federation: the sites.
        start: run, trunk and first weights.
        progress: told of phases: name, done, total.
        cast: filled with what becomes of the sites, for whoever needs it also after a failure.
    """

    def __init__(
        self, federation: Federation, start: Start, progress: Progress | None = None, cast: Cast | None = None
    ) -> None:
        self._federation = federation
        self._start = start
        self._run = start.run
        self._fingerprint = start.run.fingerprint()
        self._progress = progress or (lambda _phase, _done, _total: None)
        self._cast = cast if cast is not None else Cast()
        self._quorum = start.run.sites.quorum or len(start.run.sites.names)
        self._log = RoundLog(start.folder / "rounds.jsonl", self._lines_kept()) if start.folder else None
        self._entries: list[dict[str, Any]] = []
        self._traffic: dict[str, Traffic] = {}
        values = sum(value.size for value in start.weights.values())
        spilled = start.folder / "state" / "incoming" if start.folder else None
        self._spill = Spill(spilled, 4 * values * len(start.run.sites.names))
        self._received: dict[str, int] = {}  # bytes of the trunk, by site

    def execute(self) -> Outcome:
        """Run to the end, from the saved state if there is one.

        Raises:
            QuorumLost: a phase had fewer usable answers than the quorum.
            DataError: the sites' data cannot carry the run.
        """
        try:
            outcome = self._execute()
        except Exception:
            self._finish("failed")
            raise
        except BaseException:  # whoever ends the process, not the run's own trouble
            self._finish("stopped")
            raise
        self._finish("completed" if outcome.complete else "completed_partial")
        return outcome

    def _execute(self) -> Outcome:
        begin = time.monotonic()
        self._describe()
        self._install_trunk()
        self._ask_all("prepare", Prepare(self._fingerprint))
        prepared = time.monotonic()
        held = saved.load(self._start.folder / "state") if self._start.folder else None
        current = self._resumed(held) if held else self._settle()
        self._freeze(current.fixed)
        current = self._rounds(current)
        current = self._judge_last(current)
        test = self._test(current)
        spent = {"features": prepared - begin, "rounds": current.seconds, "total": time.monotonic() - begin}
        return self._outcome(current, test, spent)

    # Setting up

    def _describe(self) -> None:
        names = self._run.sites.names
        agreed = self._run.model_copy(
            update={"simulation": None}
        )  # where a simulation's data lie is no site's business
        request = Describe(agreed.to_toml(), self._start.version, " ".join(self._start.ended))
        for site, answer in self._federation.find(names, request).items():
            self._cast.note(_unbelievable(answer))
            if isinstance(answer.reply, Description) and census.believable(answer.reply.support, self._run.task):
                self._cast.support[site] = answer.reply.support
                self._cast.status[site] = "registered"
                held = answer.reply.trunk_sha256 == self._run.model.trunk_sha256
                self._cast.transfers[site] = 0 if held else 1
                self._received[site] = answer.reply.trunk_bytes
        self._require(len(self._cast.support), "setup")
        if self._start.every_label:
            census.check_labels(self._pooled_support(), self._run.task.labels)

    def _pooled_support(self) -> NDArray[np.int64]:
        return np.asarray(sum(self._cast.support[site] for site in self._cast.ready), np.int64)

    def _install_trunk(self) -> None:
        """Send the trunk to the sites that lack it, to each from where an earlier attempt was cut off."""
        content = np.frombuffer(self._start.trunk, np.uint8)
        size = self._start.part_bytes or max(1, len(content))
        for offset in range(0, max(1, len(content)), size):
            part = content[offset : offset + size]
            whole = len(content) if self._start.part_bytes else 0
            request = InstallTrunk(self._fingerprint, self._run.model.trunk_sha256, part, offset, whole)
            self._collect("trunk", dict.fromkeys(self._needy(offset + len(part)), request))

    def _needy(self, end: int) -> list[str]:
        """Return the sites that lack the part of the trunk that ends here; a last part that was cut off comes whole."""
        lacking = (site for site in self._cast.ready if self._cast.transfers[site])
        return [site for site in lacking if self._received[site] < end or end == len(self._start.trunk)]

    def _finish(self, status: str) -> None:
        """Tell the sites that they are free; whoever cannot be told finds out at the next run.

        A farewell that fails changes nothing of how the run ended.
        """
        known = {site: Finish(self._fingerprint, status) for site in self._federation.sites}
        try:
            for _ in self._federation.ask(known, FAREWELL_S):
                pass
        except ConsiliumError as error:
            _log.warning("the sites could not be told that the run is over: %s", error)

    def _ask_all(self, phase: str, request: Request) -> dict[str, Answer]:
        return self._collect(phase, dict.fromkeys(self._cast.ready, request))

    def _collect(self, phase: str, requests: Mapping[str, Request]) -> dict[str, Answer]:
        """Ask, and go on without the sites that fail, if the quorum holds."""
        answers: dict[str, Answer] = {}
        for answer in self._asked(phase, requests, preparing=phase == "prepare"):
            answers[answer.site] = answer
            if answer.reply is None:
                self._drop(answer)
        self._require(len(self._cast.support), phase)
        return answers

    def _require(self, usable: int, phase: str) -> None:
        """Check that enough sites are in.

        Raises:
            QuorumLost: too few, with the reason of each that is not.
        """
        if usable < self._quorum:
            statuses = {name: self._cast.status.get(name, "lost(absent)") for name in self._run.sites.names}
            raise QuorumLost(quorum_missed(phase, usable, self._quorum, statuses))

    def _drop(self, answer: Answer) -> None:
        self._cast.note(answer)
        self._cast.support.pop(answer.site, None)

    def _asked(self, phase: str, requests: Mapping[str, Request], *, preparing: bool = False) -> Iterator[Answer]:
        self._progress(phase, 0, len(requests))
        for number, answer in enumerate(self._federation.ask(requests, preparing=preparing), start=1):
            self._count(phase, answer)
            yield answer
            self._progress(phase, number, len(requests))

    def _count(self, phase: str, answer: Answer) -> None:
        """Add a message's bytes to those of its phase; rounds are counted apart, in their entries."""
        self._traffic[phase] = self._traffic.get(phase, Traffic()) + answer.traffic

    def _settle(self) -> RunState:
        """Find standardiser and head from the sites' sums; the head's penalty is chosen on validation."""
        begin = time.monotonic()
        model, training = self._run.model, self._run.training
        weights = census.class_weights(self._pooled_support(), balanced=training.class_weights == "balanced")
        closed_form = model.init == "analytic" or training.rule.kind == "analytic"
        pooled = self._sum(Statistics(self._fingerprint, weights, closed_form, self._body()))
        mean, scale = analytic.standardiser(pooled)
        fixed: Mapping[str, NDArray[Any]] = {"mean": mean, "scale": scale, "class_weights": weights}
        first: Weights = {name: np.asarray(value) for name, value in self._start.weights.items()}
        edges = self._first_edges()
        if closed_form:
            self._freeze(fixed)
            heads = analytic.ridge_heads(pooled, mean, scale, model.ridge)
            first, edges = self._choose_head(first, heads)
        entry = {"round": 0, "seconds": time.monotonic() - begin, **_bytes(Traffic()), "sites": {}}
        return RunState(
            round=0,
            weights=first,
            best={},
            best_round=0,
            best_score=None,
            best_examples=0,
            threshold=None,
            strategy={},
            fixed=fixed,
            edges=edges,
            pending=entry,
            transfers=self._cast.transfers,
        )

    def _first_edges(self) -> Edges:
        return first_edges(len(self._run.task.labels), self._run.task.kind)

    def _body(self) -> NDArray[np.generic]:
        """Return the first weights for sites that need them to compute what the head reads; none for a head alone."""
        head_alone = parameters.head_alone(self._start.weights)
        return codec.encode({} if head_alone else self._start.weights, self._run.wire.dtype)

    def _sum(self, request: Statistics) -> Sums:
        """Add up the sites' sums in the order of their names, holding as few of them as arrive out of order."""
        waiting: dict[str, Sums] = {}
        order = iter(self._cast.ready)
        expected = next(order)
        total: Sums | None = None
        lost: set[str] = set()
        for answer in self._asked("statistics", dict.fromkeys(self._cast.ready, request)):
            sums = self._admitted_sums(answer, request)
            if sums is None:
                self._drop(_unbelievable(answer))
                lost.add(answer.site)
            else:
                waiting[answer.site] = sums
            while expected and (expected in waiting or expected in lost):
                if expected in waiting:
                    part = waiting.pop(expected)
                    self._cast.status[expected] = "contributed"
                    total = part if total is None else total + part
                expected = next(order, "")
        self._require(len(self._cast.support), "statistics")
        assert total is not None  # noqa: S101  the quorum is at least one site
        return total

    def _admitted_sums(self, answer: Answer, request: Statistics) -> Sums | None:
        if not isinstance(answer.reply, Summed):
            return None
        examples = self._cast.support[answer.site][TRAIN] * (self._run.data.views or 1)
        try:
            return admit_sums(answer.reply, request, examples, len(self._start.weights[HEAD_WEIGHT][0]))
        except Rejected:
            return None

    def _choose_head(
        self, first: Weights, heads: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]
    ) -> tuple[Weights, Edges]:
        """Return the start with the head that scores best on pooled validation, and edges that suit its scores.

        Of equals, and without validation examples, the last one stands: the strongest penalty of a rising list.
        """
        best: tuple[float, Weights, Edges] | None = None
        for weight, bias in heads:
            candidate = codec.through({**first, HEAD_WEIGHT: weight, HEAD_BIAS: bias}, self._run.wire.dtype)
            measured = self._measure("closed form", candidate, "validation", self._first_edges())
            score = score_for_choice(measured, self._run.task.labels)
            score = -np.inf if score is None else score
            if best is None or score >= best[0]:
                best = (score, candidate, next_edges(measured))
        assert best is not None  # noqa: S101  the configuration holds at least one penalty
        return best[1], best[2]

    def _freeze(self, fixed: Mapping[str, NDArray[Any]]) -> None:
        self._ask_all("freeze", Freeze(self._fingerprint, **fixed))

    # Rounds

    @property
    def _last_round(self) -> int:
        training = self._run.training
        return 0 if training.rule.kind == "analytic" else training.rounds

    def _rounds(self, current: RunState) -> RunState:
        aggregator = Aggregator(self._run.training, len(self._run.sites.names))
        aggregator.restore(current.strategy)
        self._keep(current)
        for number in range(current.round + 1, self._last_round + 1):
            self._progress("rounds", number - 1, self._last_round)
            current = self._round(number, current, aggregator)
            self._keep(current)
        self._progress("rounds", self._last_round, self._last_round)
        return current

    def _round(self, number: int, current: RunState, aggregator: Aggregator) -> RunState:
        """Exchange one round: it judges the weights before it, and makes new ones."""
        begin = time.monotonic()
        vector = codec.encode(current.weights, self._run.wire.dtype)
        request = Train(self._fingerprint, number, vector, current.edges)
        received = codec.decode(vector, codec.shapes_of(current.weights), self._run.wire.dtype)
        tally = _Tally()
        self._spill.clear()
        for answer in self._federation.ask(dict.fromkeys(self._cast.ready, request)):
            tally.add(self._admit_round(answer, current.edges))
            self._cast.status[answer.site] = tally.status(answer.site)
        self._require(len(tally.contributions), f"round {number}")
        judged = self._judged(current, Measured(current.edges, tally.evaluations))
        weights = aggregator.aggregate(number, received, tally.contributions)
        seconds = time.monotonic() - begin
        entry = {"round": number, "seconds": seconds, **_bytes(tally.traffic), "sites": tally.sites}
        return replace(
            judged,
            round=number,
            weights=weights,
            strategy=aggregator.state(),
            pending=entry,
            seconds=judged.seconds + seconds,
        )

    def _admit_round(self, answer: Answer, edges: Edges) -> _Admitted:
        if not isinstance(answer.reply, Trained):
            return _Admitted(answer)
        reply = answer.reply
        support = self._cast.support[answer.site]
        expected = Expectation(
            codec.shapes_of(self._start.weights), self._run.wire.dtype, support, self._run.sites.max_norm
        )
        try:
            update = admit_update(reply, expected)
            evaluation = admit_evaluation(reply, support[VALIDATION], edges.shape[1] + 1)
        except Rejected as rejected:
            return _Admitted(replace(answer, status="quarantined", reason=str(rejected)))
        return _Admitted(
            replace(answer, reply=None),  # the vector it holds is decoded
            Contribution(answer.site, self._spill.keep(answer.site, update), reply.num_examples),
            evaluation,
            float(reply.train_loss),
        )

    def _judged(self, current: RunState, measured: Measured) -> RunState:
        """Finish the entry of the weights that were just evaluated, and let them compete."""
        labels = self._run.task.labels
        sites = {name: {**facts, "validation": None} for name, facts in current.pending["sites"].items()}
        for name, summary in measured.site_summaries(labels).items():
            sites.setdefault(name, self._unheard(name, current.round))
            sites[name]["validation"] = summary
        entry = {**current.pending, "validation": measured.summary(labels), "sites": sites}
        self._write(entry)
        state = replace(current, edges=next_edges(measured), lines=current.lines + 1, pending={})
        if not _competes(current, measured, labels):
            return state
        return replace(
            state,
            best=current.weights,
            best_round=current.round,
            best_score=score_for_choice(measured, labels),
            best_examples=measured.pooled.examples,
            threshold=operating_threshold(measured),
        )

    def _unheard(self, site: str, number: int) -> dict[str, Any]:
        """Return the facts of a site that judges a round without having been in it; in the start everybody was."""
        if number:
            return {"status": "lost", "examples": 0, "train_loss": None, "reason": "absent"}
        examples = int(census.examples(self._cast.support[site])[TRAIN])
        return {"status": "contributed", "examples": examples, "train_loss": None}

    def _judge_last(self, current: RunState) -> RunState:
        measured = self._measure("validation", current.weights, "validation", current.edges)
        return self._judged(current, measured)

    # Evaluation

    def _measure(self, phase: str, weights: Parameters, split: str, edges: Edges) -> Measured:
        vector = codec.encode(weights, self._run.wire.dtype)
        request = Evaluate(self._fingerprint, split, vector, edges)
        row = {"validation": VALIDATION, "test": TEST}[split]
        found: dict[str, Statistic] = {}
        for answer in self._asked(phase, dict.fromkeys(self._cast.ready, request)):
            if isinstance(answer.reply, Evaluated):
                try:
                    support = self._cast.support[answer.site][row]
                    found[answer.site] = admit_evaluation(answer.reply, support, edges.shape[1] + 1)
                except Rejected as rejected:
                    self._cast.status[answer.site] = f"quarantined({rejected})"
            else:
                self._cast.note(answer)
        self._require(len(found), phase)
        return Measured(edges, found)

    def _test(self, current: RunState) -> Measured:
        """Look at the test split twice: for the quantiles of its scores, then on these quantiles."""
        first = self._measure("test", current.best, "test", current.edges)
        return self._measure("test", current.best, "test", next_edges(first, current.threshold))

    # Keeping

    def _lines_kept(self) -> int:
        held = saved.load(self._start.folder / "state") if self._start.folder else None
        return held.lines if held else 0

    def _resumed(self, held: RunState) -> RunState:
        transfers = {site: held.transfers.get(site, 0) + sent for site, sent in self._cast.transfers.items()}
        self._cast.transfers = dict(transfers)
        return replace(held, transfers=transfers)

    def _keep(self, current: RunState) -> None:
        if self._start.folder:
            saved.save(self._start.folder / "state", current)

    def _write(self, entry: dict[str, Any]) -> None:
        if self._log:
            self._log.append(entry)
        else:
            self._entries.append(entry)

    def _outcome(self, current: RunState, test: Measured, spent: Mapping[str, float]) -> Outcome:
        rounds = self._log.read() if self._log else self._entries
        contributed = contributed_rounds(rounds, self._run.sites.names)
        expected = len(self._run.sites.names)
        complete = all(count == self._last_round for count in contributed.values()) and len(test.sites) == expected
        return Outcome(
            weights=codec.through(current.best, self._run.wire.dtype),  # as the sites judged them
            fixed=current.fixed,
            best_round=current.best_round,
            rounds=rounds,
            test=test,
            threshold=current.threshold,
            cast=self._cast,
            contributed=contributed,
            traffic=self._traffic,
            complete=complete,
            seconds=spent,
        )


def _unbelievable(answer: Answer) -> Answer:
    """Return the answer as what it is if its reply contradicts itself or what was declared."""
    return answer if answer.reply is None else replace(answer, status="quarantined", reason="bad_statistics")


def contributed_rounds(rounds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, int]:
    """Return in how many finished rounds each site's update was used."""
    found = dict.fromkeys(names, 0)
    for entry in rounds[1:]:
        for site, facts in entry["sites"].items():
            found[site] += facts["status"] == "contributed"
    return found


@dataclass(frozen=True)
class _Admitted:
    """One site's answer to a train message, after admission."""

    answer: Answer
    contribution: Contribution | None = None
    evaluation: Statistic | None = None
    train_loss: float | None = None


@dataclass
class _Tally:
    """What came in during one round."""

    contributions: list[Contribution] = field(default_factory=list)
    evaluations: dict[str, Statistic] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)

    def add(self, admitted: _Admitted) -> None:
        answer = admitted.answer
        self.traffic = self.traffic + answer.traffic
        facts: dict[str, Any] = {"status": answer.status, "examples": 0, "train_loss": admitted.train_loss}
        if answer.reason:
            facts["reason"] = answer.reason
        if admitted.contribution and admitted.evaluation:
            facts["examples"] = admitted.contribution.num_examples
            self.contributions.append(admitted.contribution)
            self.evaluations[answer.site] = admitted.evaluation
        self.sites[answer.site] = facts

    def status(self, site: str) -> str:
        facts = self.sites[site]
        return str(facts["status"]) + (f"({facts['reason']})" if "reason" in facts else "")


def _competes(current: RunState, measured: Measured, labels: tuple[str, ...]) -> bool:
    """Return whether the weights just judged are the best so far.

    Rounds compete by their score on the same examples: a round that misses a site's validation split was asked an
    easier or a harder question, so the round judged on more examples wins. Without validation the last round wins.
    """
    score = score_for_choice(measured, labels)
    if score is None or current.best_score is None:
        return score is not None or current.best_score is None
    return (measured.pooled.examples, score) > (current.best_examples, current.best_score)


def _bytes(traffic: Traffic) -> dict[str, int]:
    return {
        "bytes_down": traffic.weights_down,
        "bytes_up": traffic.weights_up,
        "evaluation_bytes_down": traffic.other_down,
        "evaluation_bytes_up": traffic.other_up,
    }
