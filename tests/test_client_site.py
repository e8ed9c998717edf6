"""The hospital behind one function: the conversation of a run, what it refuses, and what it never tells."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import evaluation
from client.cohort import SPLITS, Cohort
from client.memory import Memory
from client.site import Site
from client.workshop import Workshop, threads
from common import analytic, checkpoint, codec, metrics, model, multilabel
from common.errors import SiteRefusal
from common.messages import (
    Describe,
    Description,
    Done,
    Evaluate,
    Evaluated,
    Freeze,
    InstallTrunk,
    Prepare,
    Reply,
    Request,
    Statistics,
    Summed,
    Train,
    Trained,
)
from common.run_config import RunConfig

SIZES = (67, 23, 19)  # by split: primes, so that no other shape of the run can be mistaken for a count of examples
EDGES = metrics.coarse_edges(2, bins=32)
EVEN = np.ones(2)


@dataclass
class Hospital:
    """A site, what it is made of, and the run that is asked of it."""

    cohort: Cohort
    run: RunConfig
    trunk: bytes
    weights: dict[str, np.ndarray]
    folder: Path
    cache: Path

    def site(self, workshop: Workshop | None = None, name: str = "north") -> Site:
        """Return the site as after a restart: nothing in memory but what its folder holds."""
        return Site(name, self.cohort, workshop or Workshop(self.cache, "cpu"), Memory.at(self.folder, name))

    @property
    def fingerprint(self) -> str:
        return self.run.fingerprint()

    @property
    def vector(self) -> Any:
        return codec.encode(self.weights, self.run.wire.dtype)

    def install(self) -> InstallTrunk:
        return InstallTrunk(self.fingerprint, self.run.model.trunk_sha256, np.frombuffer(self.trunk, np.uint8))

    def freeze(self) -> Freeze:
        width = self.weights["head.linear.weight"].shape[1]
        mean = np.linspace(-0.1, 0.1, width, dtype=np.float32)
        return Freeze(self.fingerprint, mean, np.full(width, 2.0, np.float32), np.array([0.8, 1.3]))

    def statistics(self, class_weights: np.ndarray = EVEN, *, gram: bool = True) -> Statistics:
        """As a coordinator asks: with the weights below the head, where such are trained."""
        deep = self.run.model.trainable != "head"
        return Statistics(self.fingerprint, class_weights, gram, self.vector if deep else self.vector[:0])

    def train(self, number: int = 1) -> Train:
        return Train(self.fingerprint, number, self.vector, EDGES)

    def evaluate(self, split: str = "validation") -> Evaluate:
        return Evaluate(self.fingerprint, split, self.vector, EDGES)

    def before_freeze(self) -> list[Request]:
        return [Describe(self.run.to_toml()), self.install(), Prepare(self.fingerprint)]

    def settled(self, site: Site) -> Site:
        """Lead a site through everything that comes before round 1."""
        for request in (*self.before_freeze(), self.freeze()):
            site.handle(request)
        return site


def pool() -> Cohort:
    count = sum(SIZES)
    images = np.random.default_rng(7).integers(0, 256, (count, 1, 32, 32), np.uint8)
    digests = b"".join(hashlib.sha256(image).digest() for image in images)
    return Cohort(
        source=lambda rows: images[rows],
        rows=np.arange(count),
        digests=np.frombuffer(digests, np.uint8).reshape(count, 32),
        labels=np.random.default_rng(8).integers(0, 2, count),
        splits=np.random.default_rng(9).permutation(np.repeat(np.arange(3), SIZES)).astype(np.int8),
        patients=np.arange(count),
        label_names=("dark", "bright"),
        preprocessing="noise",
    )


def run_of(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "task": {"name": "noise", "labels": ("dark", "bright")},
        "data": {"preset": "generic", "image_size": 32, "views": 2, "preprocessing": "noise"},
        "model": {"backbone": "test_efficientnet", "weights": "none"},
        "training": {"rounds": 3, "batch_size": 16, "lr": 0.01},
        "sites": {"names": ("north",)},
    }
    return RunConfig.model_validate(values | {name: values.get(name, {}) | given for name, given in sections.items()})


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small batches gain nothing from threads, which wait for each other where the machine is busy."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    with threads(1):
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features are computed once for all tests but those that look at it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def hospital(cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Hospital:
    """A hospital in the run that the test asks for: the head alone by default."""
    plan = run_of(**getattr(request, "param", {}))
    trunk, weights = built_for(plan.to_toml())
    resolved = plan.model.model_copy(update={"trunk_sha256": checkpoint.sha256(trunk)})
    run = plan.model_copy(update={"model": resolved})
    return Hospital(pool(), run, trunk, weights, tmp_path / "memory", cache)


@lru_cache
def built_for(plan: str) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the trunk's content, and weights that are not all zero."""
    run, random = RunConfig.from_toml(plan), np.random.default_rng(3)
    built = model.pretrained(run)
    values = model.trainable_values(built.upper).items()
    weights = {name: (value + random.normal(0, 0.02, value.shape)).astype(np.float32) for name, value in values}
    return model.frozen_content(built, run), weights


DEEP = {"model": {"trainable": "stages:1"}}
both_cuts = pytest.mark.parametrize("hospital", [{}, DEEP], indirect=True, ids=["head", "stages:1"])


def refused(site: Site, request: Request) -> str:
    with pytest.raises(SiteRefusal) as refusal:
        site.handle(request)
    return refusal.value.code


def content_of(reply: Reply) -> dict[str, Any]:
    """The fields of a reply, arrays as dtype, shape and bytes."""
    values = {field.name: getattr(reply, field.name) for field in fields(reply)}
    return {
        name: (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


# The conversation


@both_cuts
def test_the_whole_conversation(hospital: Hospital, tmp_path: Path) -> None:
    hospital.cache = tmp_path / "cache"
    site = hospital.site()
    described = site.handle(Describe(hospital.run.to_toml()))
    assert isinstance(described, Description)
    assert (described.site, described.trunk_sha256) == ("north", "")
    labels, splits = hospital.cohort.labels, hospital.cohort.splits
    assert described.support.tolist() == [
        [int(((labels == label) & (splits == split)).sum()) for label in range(2)] for split in range(3)
    ]

    assert site.handle(hospital.install()) == Done()
    again = site.handle(Describe(hospital.run.to_toml()))
    assert isinstance(again, Description)
    assert again.trunk_sha256 == hospital.run.model.trunk_sha256
    assert site.handle(Prepare(hospital.fingerprint)) == Done()

    summed = site.handle(hospital.statistics())
    assert isinstance(summed, Summed)
    assert summed.count.tolist() == [2 * SIZES[0]]  # every view counts
    assert summed.targets.sum() == 2 * SIZES[0]
    assert site.handle(hospital.freeze()) == Done()

    trained = site.handle(hospital.train())
    assert isinstance(trained, Trained)
    assert trained.num_examples == SIZES[0]
    assert trained.weights.shape == hospital.vector.shape
    assert np.isfinite(trained.weights).all()
    assert np.abs(trained.weights).max() > 0
    for split, size in zip(SPLITS, SIZES, strict=True):
        evaluated = site.handle(hospital.evaluate(split))
        assert isinstance(evaluated, Evaluated)
        assert evaluated.confusion.sum() == evaluated.positives.sum() + evaluated.negatives.sum() == size
        metrics.Evaluation.from_arrays(evaluated.__dict__)  # as the coordinator reads it


@pytest.mark.parametrize("gram", [True, False])
def test_statistics_are_the_sums_over_every_view_of_the_training_split(hospital: Hospital, gram: bool) -> None:
    weights = np.array([0.5, 2.0])
    workshop = Workshop(hospital.cache, "cpu")
    site = hospital.settled(hospital.site(workshop))
    summed = site.handle(hospital.statistics(weights, gram=gram))
    bench = workshop.bench(hospital.run, hospital.run.model.trunk_sha256, None, hospital.cohort)
    assert bench is not None
    features = bench.extractor.features(hospital.cohort, 2)
    indices = hospital.cohort.indices("train")
    inputs = np.concatenate([chunk[view].numpy() for chunk in features.chunks(indices, 999) for view in range(2)])
    labels = np.tile(hospital.cohort.labels[indices], 2)
    expected = analytic.sums(inputs.astype(np.float64), labels, weights, gram=gram)
    for name, value in expected.__dict__.items():
        np.testing.assert_allclose(getattr(summed, name), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [7, 67, 256])
@pytest.mark.parametrize("hospital", [{"data": {"views": 3}}], indirect=True)
def test_labels_follow_the_order_of_head_inputs(hospital: Hospital, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Sums by label find the label that each input belongs to, with several chunks and views."""
    monkeypatch.setattr(evaluation, "CHUNK", size)
    summed = hospital.settled(hospital.site()).handle(hospital.statistics())
    assert isinstance(summed, Summed)
    workshop = Workshop(hospital.cache, "cpu")
    hospital.settled(hospital.site(workshop))
    bench = workshop.bench(hospital.run, hospital.run.model.trunk_sha256, None, hospital.cohort)
    assert bench is not None
    features = bench.extractor.features(hospital.cohort, 3).resident
    assert features is not None
    training = hospital.cohort.splits == 0
    for label in range(2):
        rows = features.double().numpy()[:, training & (hospital.cohort.labels == label)]
        np.testing.assert_allclose(summed.cross[:, label], rows.sum((0, 1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hospital", [DEEP], indirect=True, ids=["stages:1"])
def test_statistics_of_a_deep_cut_are_those_of_the_weights_sent(hospital: Hospital) -> None:
    """Not those of whatever the shared model was left with."""
    site = hospital.settled(hospital.site())
    base = content_of(site.handle(hospital.statistics()))
    site.handle(hospital.train())
    assert content_of(site.handle(hospital.statistics())) == base
    hospital.weights = {name: value * 1.5 for name, value in hospital.weights.items()}
    assert content_of(site.handle(hospital.statistics())) != base
    for wrong in (hospital.vector[:0], hospital.vector[:-1]):
        assert refused(site, replace(hospital.statistics(), weights=wrong)) == "malformed"


@both_cuts
def test_training_evaluates_the_weights_received_first(hospital: Hospital) -> None:
    site = hospital.settled(hospital.site())
    trained, evaluated = site.handle(hospital.train()), site.handle(hospital.evaluate("validation"))
    found = content_of(trained)
    assert {name: found[name] for name in content_of(evaluated)} == content_of(evaluated)


@pytest.mark.parametrize(
    "hospital", [{}, {**DEEP, "wire": {"dtype": "bfloat16"}}], indirect=True, ids=["float32", "bfloat16"]
)
def test_the_update_is_trained_minus_received(hospital: Hospital) -> None:
    workshop = Workshop(hospital.cache, "cpu")
    site = hospital.settled(hospital.site(workshop))
    trained = site.handle(hospital.train())
    assert isinstance(trained, Trained)
    bench = workshop.bench(hospital.run, hospital.run.model.trunk_sha256, None, hospital.cohort)
    assert bench is not None
    held = model.trainable_values(bench.upper)
    received = codec.through(hospital.weights, hospital.run.wire.dtype)
    shapes = codec.shapes_of(hospital.weights)
    update = codec.decode(trained.weights, shapes, hospital.run.wire.dtype)
    assert list(update) == list(held) == list(received)
    for name, value in update.items():
        expected = codec.through({name: held[name] - received[name]}, hospital.run.wire.dtype)[name]
        np.testing.assert_array_equal(value, expected)
        assert np.abs(value).max() > 0


def test_the_settled_standardiser_and_class_weights_are_used(hospital: Hospital) -> None:
    site = hospital.settled(hospital.site())
    base = site.handle(hospital.evaluate()), site.handle(hospital.train())
    site.handle(replace(hospital.freeze(), scale=hospital.freeze().scale * 3))
    assert content_of(site.handle(hospital.evaluate())) != content_of(base[0])
    site.handle(replace(hospital.freeze(), class_weights=np.array([1.0, 9.0])))
    assert content_of(site.handle(hospital.evaluate())) == content_of(base[0])
    heavier = site.handle(hospital.train())
    assert isinstance(heavier, Trained)
    assert isinstance(base[1], Trained)
    assert heavier.train_loss > base[1].train_loss


# Restarts and neighbours


@pytest.mark.parametrize(
    "hospital",
    [{}, {"model": {"dropout": 0.3}}, DEEP],
    indirect=True,
    ids=["head", "dropout", "stages:1"],
)
def test_a_restarted_site_answers_to_the_last_bit_as_before(hospital: Hospital) -> None:
    site = hospital.settled(hospital.site())
    base = [content_of(site.handle(request)) for request in (hospital.train(2), hospital.evaluate("test"))]
    for again in (site, hospital.site(), hospital.site()):
        assert [content_of(again.handle(r)) for r in (hospital.train(2), hospital.evaluate("test"))] == base
    described = hospital.site().handle(Describe(hospital.run.to_toml()))  # a coordinator that resumes asks first
    assert isinstance(described, Description)
    assert described.trunk_sha256 == hospital.run.model.trunk_sha256


@pytest.mark.parametrize("hospital", [DEEP], indirect=True)
def test_sites_that_share_a_model_do_not_disturb_each_other(hospital: Hospital) -> None:
    workshop = Workshop(hospital.cache, "cpu")
    south = replace_cohort(hospital, np.arange(len(hospital.cohort))[::2])
    north_site, south_site = hospital.settled(hospital.site(workshop)), south.settled(south.site(workshop, "south"))
    south_site.handle(replace(south.freeze(), mean=south.freeze().mean + 1))
    base = content_of(north_site.handle(hospital.train()))
    south_site.handle(south.train())
    assert content_of(north_site.handle(hospital.train())) == base
    assert content_of(south_site.handle(south.train())) != base


def replace_cohort(hospital: Hospital, indices: np.ndarray) -> Hospital:
    other = copy.copy(hospital)
    other.cohort = hospital.cohort.subset(indices)
    return other


def test_the_same_run_described_again_changes_nothing(hospital: Hospital) -> None:
    site = hospital.settled(hospital.site())
    base = content_of(site.handle(hospital.train()))
    site.handle(Describe(hospital.run.to_toml()))
    assert content_of(site.handle(hospital.train())) == base


def test_another_run_starts_from_nothing_but_the_trunk(hospital: Hospital) -> None:
    site = hospital.settled(hospital.site())
    old = copy.copy(hospital)
    hospital.run = hospital.run.model_copy(update={"seed": 5})
    described = site.handle(Describe(hospital.run.to_toml()))
    assert isinstance(described, Description)
    assert described.trunk_sha256 == hospital.run.model.trunk_sha256
    assert refused(site, old.train()) == "unknown_run"
    site.handle(Prepare(hospital.fingerprint))
    assert refused(site, hospital.train()) == "not_prepared"
    assert refused(hospital.site(), hospital.train()) == "not_prepared"
    site.handle(hospital.freeze())
    assert isinstance(site.handle(hospital.train()), Trained)


def parts_of(hospital: Hospital, size: int) -> list[InstallTrunk]:
    whole = hospital.trunk
    return [
        replace(
            hospital.install(),
            content=np.frombuffer(whole[offset : offset + size], np.uint8),
            offset=offset,
            size=len(whole),
        )
        for offset in range(0, len(whole), size)
    ]


def test_a_trunk_in_parts_goes_on_where_it_was_cut_off(hospital: Hospital) -> None:
    parts = parts_of(hospital, len(hospital.trunk) // 3)
    site = hospital.site()
    site.handle(Describe(hospital.run.to_toml()))
    site.handle(parts[0])
    assert refused(site, parts[2]) == "malformed"  # a gap
    described = hospital.site().handle(Describe(hospital.run.to_toml()))
    assert isinstance(described, Description)
    assert (described.trunk_sha256, described.trunk_bytes) == ("", len(parts[0].content))
    restarted = hospital.site()
    for part in [*parts[:2], *parts[1:]]:  # a part that comes twice is no harm
        restarted.handle(part)
    described = restarted.handle(Describe(hospital.run.to_toml()))
    assert isinstance(described, Description)
    assert (described.trunk_sha256, described.trunk_bytes) == (hospital.run.model.trunk_sha256, 0)
    assert not list(hospital.folder.rglob("*.part"))


def test_parts_that_are_not_the_trunk_are_thrown_away(hospital: Hospital) -> None:
    parts = parts_of(hospital, len(hospital.trunk) // 2 + 1)
    spoiled = parts[1].content.copy()
    spoiled[-1] ^= 1
    site = hospital.site()
    site.handle(Describe(hospital.run.to_toml()))
    site.handle(parts[0])
    assert refused(site, replace(parts[1], content=spoiled)) == "unknown_trunk"
    described = site.handle(Describe(hospital.run.to_toml()))
    assert isinstance(described, Description)
    assert (described.trunk_sha256, described.trunk_bytes) == ("", 0)


def test_a_trunk_that_was_damaged_on_disk_is_asked_for_again(hospital: Hospital) -> None:
    base = content_of(hospital.settled(hospital.site()).handle(hospital.train()))
    path = hospital.folder / "trunks" / f"{hospital.run.model.trunk_sha256}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    site = hospital.site()
    assert refused(site, hospital.train()) == "unknown_trunk"
    described = site.handle(Describe(hospital.run.to_toml()))
    assert isinstance(described, Description)
    assert described.trunk_sha256 == ""
    site.handle(hospital.install())
    assert content_of(hospital.site().handle(hospital.train())) == base


def test_a_remembered_run_that_cannot_be_read_is_no_run(hospital: Hospital) -> None:
    """A site must start after an upgrade whose configuration has other keys."""
    hospital.settled(hospital.site())
    (hospital.folder / "sites" / "north" / "run.toml").write_text("[model]\ndepth = 3\n")
    site = hospital.site()
    assert refused(site, hospital.train()) == "unknown_run"
    assert isinstance(hospital.settled(site).handle(hospital.train()), Trained)


# Refusals


@pytest.mark.parametrize("kind", [InstallTrunk, Prepare, Statistics, Freeze, Train, Evaluate])
def test_a_run_that_was_not_described_is_unknown(hospital: Hospital, kind: type[Any]) -> None:
    requests = [
        hospital.install(),
        Prepare(hospital.fingerprint),
        hospital.statistics(gram=False),
        hospital.freeze(),
        hospital.train(),
        hospital.evaluate(),
    ]
    request = next(request for request in requests if isinstance(request, kind))
    assert refused(hospital.site(), request) == "unknown_run"
    settled = hospital.settled(hospital.site())
    assert refused(settled, replace(request, fingerprint="0" * 64)) == "unknown_run"


def test_other_trunks_are_refused_and_not_kept(hospital: Hospital) -> None:
    site = hospital.site()
    site.handle(Describe(hospital.run.to_toml()))
    tensors = checkpoint.from_bytes(hospital.trunk)
    name = sorted(tensors)[-1]
    foreign = checkpoint.to_bytes({**tensors, name: tensors[name] + 1})
    good, content = hospital.install(), np.frombuffer(foreign, np.uint8)
    wrong = [
        replace(good, sha256="0" * 64),
        replace(good, content=content),
        replace(good, content=good.content[:-1]),
        replace(good, sha256=checkpoint.sha256(foreign), content=content),
    ]
    assert [refused(site, request) for request in wrong] == ["unknown_trunk"] * 4
    assert list((hospital.folder / "trunks").iterdir()) == []
    assert refused(site, Prepare(hospital.fingerprint)) == "unknown_trunk"
    assert refused(site, hospital.freeze()) == "unknown_trunk"


@pytest.mark.parametrize("left_out", ["prepare", "freeze"])
def test_work_before_its_preparation_is_refused(hospital: Hospital, tmp_path: Path, left_out: str) -> None:
    hospital.cache = tmp_path / "cache"
    site = hospital.site()
    requests = [*hospital.before_freeze(), hospital.freeze()]
    for request in requests:
        if not isinstance(request, Prepare if left_out == "prepare" else Freeze):
            site.handle(request)
    assert refused(site, hospital.train()) == "not_prepared"
    assert refused(site, hospital.evaluate()) == "not_prepared"
    if left_out == "prepare":
        assert refused(site, hospital.statistics()) == "not_prepared"


@pytest.mark.parametrize("labels", [("bright", "dark"), ("bright", "third", "dark")])
def test_labels_are_known_by_name_and_a_site_need_not_have_them_all(
    hospital: Hospital, labels: tuple[str, ...]
) -> None:
    task = hospital.run.task.model_copy(update={"labels": labels})
    other = hospital.run.model_copy(update={"task": task})
    straight = hospital.site().handle(Describe(hospital.run.to_toml()))
    turned = hospital.site().handle(Describe(other.to_toml()))
    assert isinstance(straight, Description) and isinstance(turned, Description)
    for name in ("dark", "bright"):
        column = hospital.run.task.labels.index(name)
        assert turned.support[:, labels.index(name)].tolist() == straight.support[:, column].tolist()
    assert turned.support.sum() == straight.support.sum()


def test_other_labels_are_refused(hospital: Hospital) -> None:
    for labels in (("dark", "third"), ("dark",), ()):
        task = hospital.run.task.model_copy(update={"labels": labels})
        other = hospital.run.model_copy(update={"task": task})
        assert refused(hospital.site(), Describe(other.to_toml())) == "labels_differ"


@pytest.mark.parametrize("preprocessing", ["", "others", "NOISE"])
def test_another_preprocessing_is_refused(hospital: Hospital, preprocessing: str) -> None:
    data = hospital.run.data.model_copy(update={"preprocessing": preprocessing})
    other = hospital.run.model_copy(update={"data": data})
    assert refused(hospital.site(), Describe(other.to_toml())) == "preprocessing_differs"


@pytest.mark.parametrize("text", ["[", "colour = 1", "[training]\nrounds = -1", '[task]\nlabels = "dark"', "\x00"])
def test_a_run_that_cannot_be_read_is_malformed(hospital: Hospital, text: str) -> None:
    assert refused(hospital.site(), Describe(text)) == "malformed"


def test_a_refused_description_leaves_the_site_in_its_run(hospital: Hospital) -> None:
    site = hospital.settled(hospital.site())
    base = content_of(site.handle(hospital.train()))
    for text in ("[", hospital.run.to_toml().replace('"dark"', '"dim"')):
        refused(site, Describe(text))
    assert content_of(site.handle(hospital.train())) == base
    assert content_of(hospital.site().handle(hospital.train())) == base


def test_weights_that_do_not_fit_are_malformed(hospital: Hospital) -> None:
    site, good = hospital.settled(hospital.site()), hospital.vector
    wrong = [good[:-1], np.append(good, good[:1]), good[:0], good.reshape(1, -1), good.astype(np.float64)]
    for vector in wrong:
        assert refused(site, replace(hospital.train(), weights=vector)) == "malformed"
        assert refused(site, replace(hospital.evaluate(), weights=vector)) == "malformed"


@pytest.mark.parametrize("split", ["", "all", "Train", "../test"])
def test_an_unknown_split_is_malformed(hospital: Hospital, split: str) -> None:
    assert refused(hospital.settled(hospital.site()), hospital.evaluate(split)) == "malformed"


@pytest.mark.parametrize("number", [0, -1, 4, 2**40])
def test_a_round_that_the_run_does_not_have_is_malformed(hospital: Hospital, number: int) -> None:
    assert hospital.run.training.rounds == 3
    assert refused(hospital.settled(hospital.site()), hospital.train(number)) == "malformed"


@pytest.mark.parametrize("name", ["mean", "scale", "class_weights"])
def test_a_standardiser_of_another_shape_is_malformed_and_not_kept(hospital: Hospital, name: str) -> None:
    """A single number would be spread over all inputs without a word."""
    site = hospital.settled(hospital.site())
    base = content_of(site.handle(hospital.train()))
    good = getattr(hospital.freeze(), name)
    for wrong in (good[:1], good[:0], np.append(good, good[:1]), good.reshape(1, -1)):
        assert refused(site, replace(hospital.freeze(), **{name: wrong})) == "malformed"
    assert content_of(hospital.site().handle(hospital.train())) == base


@pytest.mark.parametrize("weights", [np.ones(1), np.ones(3), np.ones((2, 1)), np.ones(0)])
def test_class_weights_of_another_shape_are_malformed(hospital: Hospital, weights: np.ndarray) -> None:
    site = hospital.settled(hospital.site())
    assert refused(site, hospital.statistics(weights)) == "malformed"


# Privacy


@both_cuts
def test_no_reply_holds_one_entry_an_example(hospital: Hospital) -> None:
    site = hospital.site()
    requests = [
        *hospital.before_freeze(),
        hospital.statistics(),
        hospital.statistics(gram=False),
        hospital.freeze(),
        hospital.train(),
        *(hospital.evaluate(split) for split in SPLITS),
    ]
    counts = {sum(SIZES), *SIZES, SIZES[0] + SIZES[1], SIZES[0] + SIZES[2], SIZES[1] + SIZES[2]}
    telling = {count * views for count in counts for views in (1, 2)}
    for reply in [site.handle(request) for request in requests]:
        for name, value in reply.__dict__.items():
            assert isinstance(value, (np.ndarray, int, float, str)), name
            if isinstance(value, np.ndarray):
                assert value.dtype.kind in "fiu", name
                assert not telling.intersection(value.shape), name
                assert value.size not in telling, name


def test_a_site_without_validation_or_test_examples_still_trains(hospital: Hospital) -> None:
    lean = replace_cohort(hospital, hospital.cohort.indices("train"))
    site = lean.settled(lean.site())
    trained = site.handle(lean.train())
    assert isinstance(trained, Trained)
    assert (trained.num_examples, trained.confusion.sum()) == (SIZES[0], 0)


@pytest.mark.parametrize("hospital", [{}, {"training": {"local_steps": 4}}], indirect=True, ids=["epochs", "steps"])
def test_a_site_without_training_examples_gives_an_update_of_nothing(hospital: Hospital) -> None:
    lean = replace_cohort(hospital, hospital.cohort.indices("test"))
    site = lean.settled(lean.site())
    summed, trained = site.handle(lean.statistics()), site.handle(lean.train())
    assert isinstance(summed, Summed)
    assert isinstance(trained, Trained)
    assert (summed.count.tolist(), summed.gram.any()) == ([0.0], np.False_)
    assert (trained.num_examples, trained.train_loss, np.abs(trained.weights).max()) == (0, 0.0, 0.0)


# Several labels an image

FINDINGS = ("mass", "effusion", "nodule")
MULTI: dict[str, dict[str, Any]] = {"task": {"labels": FINDINGS, "kind": "multi-label"}}
BOTH_SIDES = np.array([[0.8, 1.0, 0.5], [1.3, 1.0, 3.0]])


@dataclass
class Clinic(Hospital):
    """A hospital whose images have several labels."""

    def freeze(self) -> Freeze:
        return replace(super().freeze(), class_weights=BOTH_SIDES)

    def train(self, number: int = 1) -> Train:
        return replace(super().train(number), edges=multilabel.coarse_edges(3, 32))

    def evaluate(self, split: str = "validation") -> Evaluate:
        return replace(super().evaluate(split), edges=multilabel.coarse_edges(3, 32))


@pytest.fixture
def clinic(cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Clinic:
    """A hospital with several labels an image; the run that the test asks for: the head alone by default."""
    plan = run_of(**(MULTI | getattr(request, "param", {})))
    trunk, weights = built_for(plan.to_toml())
    run = plan.model_copy(update={"model": plan.model.model_copy(update={"trunk_sha256": checkpoint.sha256(trunk)})})
    values = np.array([0, 1, 0.5, np.nan], np.float32)
    labels = np.random.default_rng(5).choice(values, (sum(SIZES), 3), p=[0.5, 0.3, 0.1, 0.1])
    cohort = replace(pool(), labels=labels, label_names=FINDINGS)
    return Clinic(cohort, run, trunk, weights, tmp_path / "memory", cache)


both_cuts_of_a_clinic = pytest.mark.parametrize("clinic", [{}, DEEP], indirect=True, ids=["head", "stages:1"])


@both_cuts_of_a_clinic
def test_the_whole_conversation_with_several_labels(clinic: Clinic) -> None:
    site = clinic.site()
    described = site.handle(Describe(clinic.run.to_toml()))
    assert isinstance(described, Description)
    assert described.support.shape == (3, 4, 3)
    assert (described.support.sum(1) == np.array(SIZES)[:, None]).all()
    targets = clinic.cohort.labels[clinic.cohort.indices("train")]
    clinic.settled(site)
    summed = site.handle(clinic.statistics(BOTH_SIDES))
    assert isinstance(summed, Summed)
    assert summed.count.tolist() == [2 * SIZES[0]]  # every view counts
    np.testing.assert_allclose(summed.targets, 2 * BOTH_SIDES[1] * np.nansum(targets, 0))
    weights = BOTH_SIDES[1] * targets + BOTH_SIDES[0] * (1 - targets)
    np.testing.assert_allclose(summed.weight, 2 * np.nansum(weights, 0), rtol=1e-6)

    trained = site.handle(clinic.train())
    assert isinstance(trained, Trained)
    assert trained.num_examples == SIZES[0]
    assert np.isfinite(trained.weights).all() and np.abs(trained.weights).max() > 0
    for number, (split, size) in enumerate(zip(SPLITS, SIZES, strict=True)):
        evaluated = site.handle(clinic.evaluate(split))
        assert isinstance(evaluated, Evaluated)
        found = multilabel.LabelwiseEvaluation.from_arrays(evaluated.__dict__, 3, size)
        assert found.support.tolist() == described.support[number, :2].tolist()
    base = content_of(site.handle(clinic.train(2)))
    assert content_of(clinic.site().handle(clinic.train(2))) == base, "a restarted site remembers the run's labels"


def test_labels_of_a_clinic_follow_the_order_of_head_inputs(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    base = clinic.settled(clinic.site()).handle(clinic.statistics(BOTH_SIDES))
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    chunked = clinic.settled(clinic.site()).handle(clinic.statistics(BOTH_SIDES))
    for name, value in base.__dict__.items():
        np.testing.assert_allclose(getattr(chunked, name), value, rtol=1e-6, atol=1e-6)


def test_labels_are_matched_by_name_and_one_that_is_lacking_is_masked(clinic: Clinic) -> None:
    """A site with the columns of another order, one of them unknown to the run, answers as if it had the run's."""
    whole = clinic.cohort
    masked = whole.labels.copy()
    masked[:, 1] = np.nan
    base = replace(clinic, cohort=replace(whole, labels=masked), folder=clinic.folder / "a")
    own = np.stack([whole.labels[:, 2], whole.labels[:, 1], whole.labels[:, 0]], axis=1)
    other = replace(
        clinic,
        cohort=replace(whole, labels=own, label_names=("nodule", "fracture", "mass")),
        folder=clinic.folder / "b",
    )
    for request in (Describe(clinic.run.to_toml()), clinic.statistics(BOTH_SIDES), clinic.evaluate(), clinic.train()):
        one, two = (each.settled(each.site()).handle(request) for each in (base, other))
        assert content_of(one) == content_of(two)
    assert isinstance(one, Trained)
    update = codec.decode(one.weights, codec.shapes_of(clinic.weights), "float32")["head.linear.weight"]
    assert [bool(row.any()) for row in update] == [True, False, True]
    support = base.site().handle(Describe(clinic.run.to_toml())).support  # type: ignore[union-attr]
    assert support[:, :, 1].tolist() == [[0, 0, 0, size] for size in SIZES]


def test_a_site_of_another_kind_or_without_any_of_the_labels_is_refused(clinic: Clinic, hospital: Hospital) -> None:
    single = run_of(task={"labels": FINDINGS})
    strangers = run_of(task={"labels": ("fracture", "tumour"), "kind": "multi-label"})
    assert refused(clinic.site(), Describe(single.to_toml())) == "labels_differ"
    assert refused(clinic.site(), Describe(strangers.to_toml())) == "labels_differ"
    several = run_of(task={"kind": "multi-label"})
    assert refused(hospital.site(), Describe(several.to_toml())) == "labels_differ"


@pytest.mark.parametrize(
    "weights",
    [np.ones(3), np.ones((1, 3)), np.ones((3, 2)), np.ones((2, 2)), np.full((2, 3), np.nan), np.full((2, 3), -1.0)],
)
def test_class_weights_of_a_clinic_have_both_sides_and_are_finite(clinic: Clinic, weights: np.ndarray) -> None:
    site = clinic.settled(clinic.site())
    assert refused(site, clinic.statistics(weights)) == "malformed"
    assert refused(site, replace(clinic.freeze(), class_weights=weights)) == "malformed"


@pytest.mark.parametrize("clinic", [{"training": {"draw": "patients"}}], indirect=True)
def test_a_site_draws_patients_where_the_run_says_so(clinic: Clinic) -> None:
    patients = np.arange(sum(SIZES)) // 3
    paired = replace(clinic, cohort=replace(clinic.cohort, patients=patients), folder=clinic.folder / "paired")
    alone, drawn = (each.settled(each.site()).handle(clinic.train()) for each in (clinic, paired))
    assert isinstance(alone, Trained) and isinstance(drawn, Trained)
    assert alone.num_examples == drawn.num_examples == SIZES[0]
    assert content_of(alone)["weights"] != content_of(drawn)["weights"]
