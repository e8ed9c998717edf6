"""One run from the coordinator's side: set up the sites, settle what is fixed, exchange rounds, choose, test once.

    describe -> trunk -> prepare -> statistics -> freeze -> [train x rounds] -> evaluate -> choose -> test, two looks

A train message evaluates the weights that it brings before it trains, so round r's weights are judged by the exchange
of round r + 1, and the last ones by an exchange of their own. Round 0 is the start; it competes like any other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from common import codec, parameters
from common.errors import Interrupted
from common.messages import Prepare, Train, Trained
from server import averaging
from server import state as saved
from server.admission import Expectation, Rejected, admit_evaluation, admit_update
from server.aggregation import Aggregator, Contribution
from server.census import VALIDATION
from server.company import Cast, Company, Progress, Start
from server.evaluation import Edges, Measured, Threshold, next_edges, operating_threshold, score_for_choice
from server.federation import Answer, Federation, Traffic
from server.latecomers import FORGOTTEN, Latecomers
from server.proportion import absurd_updates
from server.settling import Settling, Weights
from server.spill import Spill
from server.state import RoundLog, RunState
from server.tally import Admitted, Tally, round_bytes


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
        self._start = start
        self._run = start.run
        self._fingerprint = start.run.fingerprint()
        self._cast = cast if cast is not None else Cast()
        self._company = Company(federation, start, progress, self._cast)
        self._log = RoundLog(start.folder / "rounds.jsonl", self._lines_kept()) if start.folder else None
        self._entries: list[dict[str, Any]] = []
        values = sum(value.size for value in start.weights.values())
        spilled = start.folder / "state" / "incoming" if start.folder else None
        self._spill = Spill(spilled, 4 * values * len(start.run.sites.names))

    def execute(self) -> Outcome:
        """Run to the end, from the saved state if there is one.

        Raises:
            QuorumLost: a phase had fewer usable answers than the quorum.
            DataError: the sites' data cannot carry the run.
        """
        try:
            outcome = self._execute()
        except Interrupted:  # the run goes on, and the sites cannot be reached
            raise
        except Exception:
            self._company.finish("failed")
            raise
        except BaseException:  # whoever ends the process, not the run's own trouble
            self._company.finish("stopped")
            raise
        self._company.finish("completed" if outcome.complete else "completed_partial")
        return outcome

    def _execute(self) -> Outcome:
        begin = time.monotonic()
        self._company.describe()
        self._company.send_trunk(self._cast.ready)
        self._company.ask_all("prepare", Prepare(self._fingerprint))
        prepared = time.monotonic()
        held = saved.load(self._start.folder / "state") if self._start.folder else None
        current = self._resumed(held) if held else Settling(self._company, self._start).settle()
        self._company.freeze(current.fixed)
        current = self._rounds(current)
        current = self._judge_last(current)
        test = self._test(current)
        spent = {"features": prepared - begin, "rounds": current.seconds, "total": time.monotonic() - begin}
        return self._outcome(current, test, spent)

    # Rounds

    @property
    def _last_round(self) -> int:
        training = self._run.training
        return 0 if training.rule.kind == "analytic" else training.rounds

    def _rounds(self, current: RunState) -> RunState:
        aggregator = Aggregator(self._run.training, len(self._run.sites.names))
        aggregator.restore(current.strategy)
        latecomers = Latecomers(self._company, self._start)
        self._keep(current)
        for number in range(current.round + 1, self._last_round + 1):
            self._company.progress("rounds", number - 1, self._last_round)
            latecomers.welcome(number, current.fixed)
            current = self._round(number, current, aggregator)
            self._keep(current)
        self._company.progress("rounds", self._last_round, self._last_round)
        return current

    def _round(self, number: int, current: RunState, aggregator: Aggregator) -> RunState:
        """Exchange one round: it judges the weights before it, and makes new ones."""
        begin = time.monotonic()
        vector = codec.encode(current.weights, self._run.wire.dtype)
        request = Train(self._fingerprint, number, vector, current.edges)
        received = codec.decode(vector, codec.shapes_of(current.weights), self._run.wire.dtype)
        tally = Tally()
        self._spill.clear()
        for answer in self._company.each(request):
            tally.add(self._admit_round(number, answer, current.edges))
            self._cast.say(answer.site, tally.status(answer.site))
            if answer.status == "refused" and answer.reason in FORGOTTEN:
                self._company.drop(answer)
        for site in absurd_updates(tally.norms, parameters.norm(received)):
            tally.reject(site, "norm_too_large")
            self._cast.say(site, tally.status(site))
        self._company.require(len(tally.contributions), f"round {number}")
        judged = self._judged(current, Measured(current.edges, tally.evaluations, self._run.evaluation.metrics))
        weights = aggregator.aggregate(number, received, tally.contributions)
        mean = averaging.averaged(self._run.training, number, current.average, weights)
        seconds = time.monotonic() - begin
        entry = {"round": number, "seconds": seconds, **round_bytes(tally.traffic), "sites": tally.sites}
        self._cast.onlooker.ended_round(entry)
        return replace(
            judged,
            round=number,
            weights=mean if mean and number == self._last_round else weights,
            average=mean,
            strategy=aggregator.state(),
            pending=entry,
            seconds=judged.seconds + seconds,
        )

    def _admit_round(self, number: int, answer: Answer, edges: Edges) -> Admitted:
        if not isinstance(answer.reply, Trained):
            return Admitted(answer)
        reply = answer.reply
        examples, limit = self._cast.examples[answer.site], self._run.sites.max_norm
        expected = Expectation(codec.shapes_of(self._start.weights), self._run.wire.dtype, examples, limit, number)
        try:
            update = admit_update(reply, expected)
            evaluation = admit_evaluation(reply, self._company.declared(answer.site, VALIDATION), edges)
        except Rejected as rejected:
            return Admitted(replace(answer, status="quarantined", reason=str(rejected)))
        return Admitted(
            replace(answer, reply=None),  # the vector it holds is decoded
            Contribution(answer.site, self._spill.keep(answer.site, update), reply.num_examples),
            evaluation,
            *self._told(answer.site, reply),
            norm=parameters.norm(update),
        )

    def _told(self, site: str, reply: Trained) -> tuple[float | None, float | None]:
        """Return the training loss of a reply, and what a private run has spent at the site."""
        if not self._run.privacy.on:
            return float(reply.train_loss), None
        spent = self._cast.privacy[site] = self._cast.privacy[site].after(reply)
        return None, spent.epsilon

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
        if _competes(current, measured, labels, self._answered(measured)):
            state = replace(
                state,
                best=current.weights,
                best_round=current.round,
                best_score=score_for_choice(measured, labels),
                best_examples=self._answered(measured),
                threshold=operating_threshold(measured),
            )
        self._cast.onlooker.judged_round(entry, state.best_round, state.best_score)
        return state

    def _answered(self, measured: Measured) -> int:
        """Return how much of the validation split was asked: its examples, or the sites where their number is noisy."""
        return measured.pooled.examples if self._run.privacy.histogram_epsilon is None else len(measured.sites)

    def _unheard(self, site: str, number: int) -> dict[str, Any]:
        """Return the facts of a site that judges a round without having been in it; in the start everybody was."""
        if number:
            return {"status": "lost", "examples": 0, "train_loss": None, "reason": "absent"}
        return {"status": "contributed", "examples": self._cast.examples[site], "train_loss": None}

    def _judge_last(self, current: RunState) -> RunState:
        measured = self._company.measure("validation", current.weights, "validation", current.edges)
        return self._judged(current, measured)

    # Evaluation

    def _test(self, current: RunState) -> Measured:
        """Look at the test split twice: for the quantiles of its scores, then on these quantiles."""
        first = self._company.measure("test", current.best, "test", current.edges)
        return self._company.measure("test", current.best, "test", next_edges(first, current.threshold))

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
            self._cast.onlooker.kept(current.round)

    def _write(self, entry: dict[str, Any]) -> None:
        if self._log:
            self._log.append(entry)
        else:
            self._entries.append(entry)

    def _outcome(self, current: RunState, test: Measured, spent: Mapping[str, float]) -> Outcome:
        rounds = self._log.read() if self._log else self._entries
        contributed = contributed_rounds(rounds, self._run.sites.names)
        for site in test.sites:  # who was away for a moment, or not asked for a round since the engine began, was in it
            if contributed[site] and self._cast.status[site].startswith(("registered", "lost")):
                self._cast.say(site, "contributed")
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
            traffic=self._company.traffic,
            complete=complete,
            seconds=spent,
        )


def contributed_rounds(rounds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, int]:
    """Return in how many finished rounds each site's update was used."""
    found = dict.fromkeys(names, 0)
    for entry in rounds[1:]:
        for site, facts in entry["sites"].items():
            found[site] += facts["status"] == "contributed"
    return found


def _competes(current: RunState, measured: Measured, labels: tuple[str, ...], answered: int) -> bool:
    """Return whether the weights just judged are the best so far.

    Rounds compete by their score on the same examples: a round that misses a site's validation split was asked an
    easier or a harder question, so the round judged on more examples wins. Without validation the last round wins.
    """
    score = score_for_choice(measured, labels)
    if score is None or current.best_score is None:
        return score is not None or current.best_score is None
    return (answered, score) > (current.best_examples, current.best_score)
