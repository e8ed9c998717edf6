"""A site's part in a private run: what it draws with noise, each once, reserved before and spent before it leaves.

The same request gets the same bytes, after a crash too, for they are kept until the run is over: two draws for one
question would cost the patients' privacy twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from client import clipping, evaluation, noisy_counts, private_training
from client.cohort import Cohort
from client.features import Features
from client.guard import Guard
from client.memory import Frozen, Memory
from client.noise import add_noise
from client.workshop import Bench
from common import codec, model, parameters, private_form
from common.errors import SiteRefusal
from common.files import write_json
from common.messages import (
    KINDS,
    Evaluate,
    Evaluated,
    PrivateStatistics,
    PrivateSums,
    Reply,
    Request,
    Train,
    Trained,
    from_bytes,
    from_record,
    ticket,
    to_bytes,
    to_record,
)
from common.parameters import Parameters
from common.privacy import Release
from common.private_form import Noisy
from common.private_plan import Plan, most_looks
from common.private_steps import clip_of
from common.run_config import RunConfig, Training

LOOKS = "looks.json"

T = TypeVar("T")
Drawn = tuple[dict[str, Any], tuple[int, ...]]
"""Fields of a reply, and the entries of the ledger that they were reserved under."""

_log = logging.getLogger("consilium.site")


@dataclass(frozen=True)
class PrivateSite:
    """One site in one private run.

    Args:
        name: the site's.
        run: the run.
        cohort: the site's examples.
        labels: of the cohort, as the run has them.
        guard: what it answers to.
        memory: where looks and replies are kept.
    """

    name: str
    run: RunConfig
    cohort: Cohort
    labels: NDArray[Any]
    guard: Guard
    memory: Memory
    names: Sequence[tuple[str, tuple[int, ...]]] = ()  # of what is trained, with shapes, for whoever looks at a reply

    def check(self, bench: Bench) -> None:
        """Refuse a model whose gradients cannot be told apart by patient, before any data are read.

        Raises:
            SiteRefusal: `not_private`; the site's own log says why.
        """
        try:
            labels = len(self.run.task.labels)
            clipping.require_private(bench.upper, labels, multi_label=self._several, clip=clip_of(self.run))
        except clipping.NotPrivate as error:
            _log.warning("refused (not_private): %s", error)
            raise SiteRefusal("not_private") from None

    @property
    def _several(self) -> bool:
        return self.run.task.kind == "multi-label"

    def _plan(self) -> Plan:
        return self.guard.plan_of(self.run, self.cohort)

    def statistics(self, request: PrivateStatistics, bench: Bench, features: Features) -> PrivateSums:
        """Return the noisy sums of the closed form."""
        return self._once(request, PrivateSums, lambda: self._sums(request, bench, features))

    def train(self, request: Train, bench: Bench, features: Features, received: Parameters, frozen: Frozen) -> Trained:
        """Return a round's part: weights judged, then trained with clipped gradients and noise."""

        def work() -> Drawn:
            found, looked = self._evaluated(bench, features, "validation", request.edges, request.weights)
            update, number = self._trained(request, bench, features, received, frozen)
            epsilon, steps = self.guard.spent(self.run, self._plan().delta)
            facts = {
                "weights": codec.encode(update, self.run.wire.dtype),
                "num_examples": self.guard.told_size(self.cohort),
                "train_loss": 0.0,
                "epsilon": epsilon,
                "steps": steps,
                "round": request.round,
            }
            return {**facts, **found}, (*looked, number)

        return self._once(request, Trained, work)

    def evaluate(self, request: Evaluate, bench: Bench, features: Features) -> Evaluated:
        """Return the counts of a split, through noise if the run says so."""
        return self._once(
            request, Evaluated, lambda: self._evaluated(bench, features, request.split, request.edges, request.weights)
        )

    # Drawing

    def _sums(self, request: PrivateStatistics, bench: Bench, features: Features) -> Drawn:
        """Return the noisy sums of the closed form, or of the centre."""
        plan = self._plan()
        release = plan.sums if request.gram else plan.centre
        if release is None:
            raise SiteRefusal("budget")
        number = self.guard.reserve(self.run, self.cohort, "sums" if request.gram else "centre", release)
        found = self._summed(bench, features, gram=request.gram)
        most = private_form.sensitivity(len(self.run.task.labels), self.run.task.kind) if request.gram else 1.0
        std = release.noise_multiplier * most
        epsilon, steps = self.guard.spent(self.run, plan.delta)
        noisy = {name: self._noisy(total, std) for name, total in found.__dict__.items()}
        facts = {"noise_multiplier": release.noise_multiplier, "epsilon": epsilon, "steps": steps}
        return {**noisy, **facts}, (number,)

    def _summed(self, bench: Bench, features: Features, *, gram: bool) -> Noisy:
        indices, views = self.cohort.indices("train"), features.views
        inputs, shares = evaluation.head_inputs(bench.upper, features, indices), self._shares(indices, views)
        if not gram:
            return private_form.totals(inputs, shares)
        return private_form.sums(private_form.records(inputs), self._targets(indices, views), shares)

    def _noisy(self, total: NDArray[np.float64], std: float) -> NDArray[np.float64]:
        return add_noise(torch.from_numpy(total), std, self.guard.noise).double().numpy()

    def _targets(self, indices: NDArray[np.int64], views: int) -> NDArray[np.float64]:
        labels = evaluation.in_order_of_inputs(self.labels[indices], views)
        if self._several:
            return private_form.several_targets(labels)
        return private_form.single_targets(labels, len(self.run.task.labels))

    def _shares(self, indices: NDArray[np.int64], views: int) -> NDArray[np.float64]:
        """Return what share of its patient each head input stands for: those of one patient add up to 1."""
        _, of, count = np.unique(self.cohort.patients[indices], return_inverse=True, return_counts=True)
        return evaluation.in_order_of_inputs(1 / (count[of] * views), views)

    def _trained(
        self, request: Train, bench: Bench, features: Features, received: Parameters, frozen: Frozen
    ) -> tuple[Parameters, int]:
        release = self._plan().one_round
        number = self.guard.reserve(self.run, self.cohort, f"round-{request.round}", release)
        private_training.fit(
            bench.upper,
            features,
            torch.from_numpy(self.labels).to(features.device),
            self.cohort.indices("train"),
            self._training(frozen),
            mechanism=private_training.Mechanism(release.noise_multiplier, release.sampling_rate, clip_of(self.run)),
            round_number=request.round,
            class_weights=torch.from_numpy(np.array(frozen["class_weights"], np.float32)).to(features.device),
            patients=self.cohort.patients,
            noise=self.guard.noise,
            size=self.guard.told_size(self.cohort),  # the scale of the noise would tell the exact one
        )
        return parameters.subtract(model.trainable_values(bench.upper), received), number

    def _training(self, frozen: Frozen) -> Training:
        """Return the run's section, with the rate that was settled by all sites' noise where it leaves that open."""
        settled = float(frozen["lr"][0])
        return self.run.training.model_copy(update={"lr": settled}) if settled else self.run.training

    def _evaluated(
        self,
        bench: Bench,
        features: Features,
        split: str,
        edges: NDArray[np.float64],
        weights: NDArray[np.generic],
    ) -> Drawn:
        self._look(split, edges, weights)
        whole = self.run.privacy.histogram_epsilon
        if whole is not None:
            return self._hidden(bench, features, split, edges, whole / most_looks(self.run, split))
        indices = evaluation.shown(self.cohort, split, self.guard.limits.min_cell)
        found = evaluation.evaluate(bench.upper, features, self.labels, indices, edges)
        return evaluation.told(found, self.run.evaluation.metrics), ()

    def _hidden(
        self, bench: Bench, features: Features, split: str, edges: NDArray[np.float64], epsilon: float
    ) -> Drawn:
        """Return counts under Laplace noise, paid for by the patients of the split, one image of each.

        Which of them does not depend on anybody else; and no cell is hidden for being small, for that would tell.
        """
        number = self.guard.reserve_look(self.run, split, Release(1 / epsilon, kind="laplace"))
        indices = noisy_counts.one_of_each(self.cohort, self.cohort.indices(split))
        found = evaluation.evaluate(bench.upper, features, self.labels, indices, edges, lenient=True)
        return noisy_counts.noisy(found, epsilon, self.guard.noise).arrays(), (number,)

    # Once

    def _look(self, split: str, edges: NDArray[np.float64], weights: NDArray[np.generic]) -> None:
        """Take note of a look at a split; the run needs no more than so many, and gets no more.

        Raises:
            SiteRefusal: `cadence`.
        """
        path = self.memory.folder / LOOKS
        seen = _read_looks(path, self.run.fingerprint())
        look = hashlib.sha256(weights.tobytes() + b"|" + edges.tobytes()).hexdigest()
        known = seen.setdefault(split, [])
        if look in known:
            return
        if len(known) >= most_looks(self.run, split):
            _log.warning("refused (cadence): the run has looked at the %s split %d times", split, len(known))
            raise SiteRefusal("cadence")
        known.append(look)
        write_json(path, {"run": self.run.fingerprint(), "looks": seen})

    def _once(self, request: Request, expected: type[T], work: Callable[[], Drawn]) -> T:
        """Return the reply to a request: the one that was made already, else a new one."""
        called = ticket(request)
        outbox = self.guard.outbox
        letter = outbox.find(called)
        if letter is None:
            facts, numbers = work()
            content = to_bytes(to_record(cast(Reply, expected(**facts))))
            kept = {"run": self.run.fingerprint(), "reserved": list(numbers), "names": list(self.names)}
            outbox.put(called, KINDS[type(request)][0], content, kept)
        else:
            self.guard.check(self.run, self.cohort)
            content, numbers = outbox.content(letter), tuple(letter.facts.get("reserved", ()))
        for number in numbers:
            self.guard.spend(number, content)
        return from_record(from_bytes(content), expected)


def _read_looks(path: Path, fingerprint: str) -> dict[str, list[str]]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(held["looks"]) if held.get("run") == fingerprint else {}
