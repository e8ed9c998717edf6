"""What is settled before round 1: how the head's inputs are scaled, the weights of the loss, and the start.

A run without privacy adds up exact sums of the sites. A private one needs none for the scaling, and takes noisy sums if
the head starts from the closed form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from common import analytic, codec, parameters, private_form, private_steps
from common.analytic import Sums
from common.messages import PrivateStatistics, PrivateSums, Request, Statistics, Summed
from common.private_form import Noisy
from server import census
from server.admission import Rejected, admit_private_sums, admit_sums
from server.census import TRAIN
from server.company import Company, Start, unbelievable
from server.evaluation import Edges, first_edges, next_edges, score_for_choice
from server.federation import Answer, Traffic
from server.state import RunState
from server.tally import round_bytes

Weights = dict[str, NDArray[np.float32]]
Fixed = Mapping[str, NDArray[Any]]
Head = tuple[NDArray[np.float32], NDArray[np.float32]]

HEAD_WEIGHT, HEAD_BIAS = "head.linear.weight", "head.linear.bias"


class _Additive(Protocol):
    def __add__(self, other: Self) -> Self: ...


Part = TypeVar("Part", bound=_Additive)


class Settling:
    """Settles one run.

    Args:
        company: its sites.
        start: what the coordinator brings.
    """

    def __init__(self, company: Company, start: Start) -> None:
        self._company = company
        self._start = start
        self._run = start.run
        self._fingerprint = start.run.fingerprint()
        self._width = len(start.weights[HEAD_WEIGHT][0])

    def settle(self) -> RunState:
        """Return the state before round 1.

        Raises:
            QuorumLost: fewer usable answers than the quorum.
        """
        begin = time.monotonic()
        first, edges, fixed = self._private() if self._run.privacy.on else self._exact()
        entry = {"round": 0, "seconds": time.monotonic() - begin, **round_bytes(Traffic()), "sites": {}}
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
            transfers=self._company.cast.transfers,
        )

    def _closed_form(self) -> bool:
        return self._run.model.init == "analytic" or self._run.training.rule.kind == "analytic"

    def _exact(self) -> tuple[Weights, Edges, Fixed]:
        """Find scaling and head from the sites' exact sums."""
        balanced = self._run.training.class_weights == "balanced"
        weights = census.class_weights(self._company.pooled_support(), balanced=balanced)
        closed_form, mean, scale = self._closed_form(), *self._no_scaling()
        if closed_form or self._run.model.scaling == "moments":
            request = Statistics(self._fingerprint, weights, closed_form, self._body())
            pooled = self._sum(request, lambda answer: self._admitted_sums(answer, request))
            mean, scale = analytic.standardiser(pooled) if self._run.model.scaling == "moments" else (mean, scale)
        fixed: Fixed = {"mean": mean, "scale": scale, "class_weights": weights, "lr": np.zeros(1)}
        if not closed_form:
            return self._zero_head(), self._first_edges(), fixed
        self._company.freeze(fixed)
        heads = analytic.ridge_heads(pooled, mean, scale, self._run.model.ridge)
        return *self._choose_head(heads), fixed

    def _private(self) -> tuple[Weights, Edges, Fixed]:
        """Take a scaling and weights of the loss that need no data, and the head from noisy sums if it is wanted."""
        labels = len(self._run.task.labels)
        weights = np.ones((2, labels) if self._run.task.kind == "multi-label" else labels)
        mean, scale = self._no_scaling()
        if self._run.privacy.centre:
            found, noise = self._noisy_sum(gram=False)
            mean = private_form.centre(found, noise, self._patients(), self._start.stages)
        fixed: Fixed = {"mean": mean, "scale": scale, "class_weights": weights, "lr": np.array([self._rate()])}
        if not self._closed_form():
            return self._zero_head(), self._first_edges(), fixed
        self._company.freeze(fixed)
        return *self._choose_head(self._private_heads()), fixed

    def _rate(self) -> float:
        """Return the rate of a private head's steps, which follows from the noise of those who are in; 0: the run's."""
        if self._run.training.lr is not None or self._run.model.trainable != "head":
            return 0.0
        plans = [self._company.cast.privacy[site] for site in self._company.cast.ready]
        noises = [(one.noise_multiplier, one.sampling_rate, one.planned_steps) for one in plans]
        cut, kind = private_steps.clip_of(self._run), self._run.task.kind
        return private_steps.learning_rate(noises, self._patients(), cut, kind)

    def _private_heads(self) -> list[Head]:
        pooled, noise = self._noisy_sum(gram=True)
        kind = self._run.task.kind
        most = private_form.sensitivity(len(self._run.task.labels), kind)
        ridge = private_form.penalty(noise * most, self._width + 1, self._patients())
        return [private_form.head(pooled, ridge, kind)]

    def _patients(self) -> int:
        return sum(self._company.cast.examples[site] for site in self._company.cast.ready)

    def _noisy_sum(self, *, gram: bool) -> tuple[Noisy, float]:
        """Return the pooled sums, and the noise multiplier of all sites' noise together."""
        variances: dict[str, float] = {}
        request = PrivateStatistics(self._fingerprint, gram, self._body())
        pooled = self._sum(request, lambda answer: self._admitted_noise(answer, request, variances))
        return pooled, math.sqrt(sum(variances.values()))

    def _no_scaling(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.zeros(self._width, np.float32), np.ones(self._width, np.float32)

    def _zero_head(self) -> Weights:
        return {name: np.asarray(value) for name, value in self._start.weights.items()}

    def _first_edges(self) -> Edges:
        return first_edges(len(self._run.task.labels), self._run.task.kind)

    def _body(self) -> NDArray[np.generic]:
        """Return the first weights for sites that need them to compute what the head reads; none for a head alone."""
        head_alone = parameters.head_alone(self._start.weights)
        return codec.encode({} if head_alone else self._start.weights, self._run.wire.dtype)

    def _sum(self, request: Request, admitted: Callable[[Answer], Part | None]) -> Part:
        """Add up the sites' sums in the order of their names, holding as few of them as arrive out of order."""
        company = self._company
        waiting: dict[str, Part] = {}
        order = iter(company.cast.ready)
        expected = next(order)
        total: Part | None = None
        lost: set[str] = set()
        for answer in company.asked("statistics", dict.fromkeys(company.cast.ready, request)):
            sums = admitted(answer)
            if sums is None:
                company.drop(unbelievable(answer))
                lost.add(answer.site)
            else:
                waiting[answer.site] = sums
            while expected and (expected in waiting or expected in lost):
                if expected in waiting:
                    part = waiting.pop(expected)
                    company.cast.say(expected, "contributed")
                    total = part if total is None else total + part
                expected = next(order, "")
        company.require(len(company.cast.support), "statistics")
        assert total is not None  # noqa: S101  the quorum is at least one site
        return total

    def _admitted_sums(self, answer: Answer, request: Statistics) -> Sums | None:
        if not isinstance(answer.reply, Summed):
            return None
        examples = self._company.cast.support[answer.site][TRAIN] * (self._run.data.views or 1)
        try:
            return admit_sums(answer.reply, request, examples, self._width)
        except Rejected:
            return None

    def _admitted_noise(self, answer: Answer, request: PrivateStatistics, variances: dict[str, float]) -> Noisy | None:
        """Return a site's noisy sums, and note the variance of its noise."""
        if not isinstance(answer.reply, PrivateSums):
            return None
        try:
            found = admit_private_sums(answer.reply, request, self._width, len(self._run.task.labels))
        except Rejected:
            return None
        cast = self._company.cast
        cast.privacy[answer.site] = cast.privacy[answer.site].after(answer.reply)
        variances[answer.site] = answer.reply.noise_multiplier**2
        return found

    def _choose_head(self, heads: Iterable[Head]) -> tuple[Weights, Edges]:
        """Return the start with the head that scores best on pooled validation, and edges that suit its scores.

        Of equals, and without validation examples, the last one stands: the strongest penalty of a rising list.
        """
        best: tuple[float, Weights, Edges] | None = None
        for weight, bias in heads:
            changed = {**self._start.weights, HEAD_WEIGHT: weight, HEAD_BIAS: bias}
            candidate = codec.through(changed, self._run.wire.dtype)
            measured = self._company.measure("closed form", candidate, "validation", self._first_edges())
            score = score_for_choice(measured, self._run.task.labels)
            score = -np.inf if score is None else score
            if best is None or score >= best[0]:
                best = (score, candidate, next_edges(measured))
        assert best is not None  # noqa: S101  there is at least one penalty
        return best[1], best[2]
