"""What the federation is compared with has the same budget, sees the same test images, and keeps patients apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client import training
from client.cohort import SPLITS
from simulations.baselines import alone, run_all, run_alone, with_test_of

pytestmark = pytest.mark.slow

SITES = ("north", "south", "west")
LABELS = ("dark", "bright")


@pytest.fixture
def steps(monkeypatch):
    """Count the optimiser steps of each site of each run, and see which examples they are taken on."""
    taken = {}
    fit = training.fit

    def counted(upper, features, labels, indices, section, **rest):
        fitted = fit(upper, features, labels, indices, section, **rest)
        seen = taken.setdefault(rest["site"], {"steps": 0, "examples": 0, "rounds": []})
        seen["steps"] += fitted.steps
        seen["examples"] = len(indices)
        seen["rounds"].append(rest["round_number"])
        return fitted

    monkeypatch.setattr(training, "fit", counted)
    return taken


def compare(lab, start, sites=None, pool=None):
    told = []
    found = run_all(
        start,
        lab.pool if pool is None else pool,
        lab.cohorts() if sites is None else sites,
        lab.workshop(start),
        lab.scratch(),
        lambda *news: told.append(news),
    )
    return found, told


def test_pooled_training_takes_as_many_steps_as_all_sites_together(lab, steps):
    # 16, 24 and 8 training images: all multiples of the batch
    start = lab.start(training={"rounds": 3, "local_epochs": 2})
    lab.execute(start)
    federated = {name: seen["steps"] for name, seen in steps.items()}
    assert federated == {"north": 3 * 2 * 2, "south": 3 * 2 * 3, "west": 3 * 2 * 1}
    steps.clear()
    compare(lab, start)
    assert {name: steps[name]["steps"] for name in SITES} == federated
    assert steps["pooled"] == {"steps": sum(federated.values()), "examples": 48, "rounds": [1, 2, 3]}


def test_so_it_does_when_steps_are_counted_and_not_epochs(lab, steps):
    start = lab.start(training={"rounds": 2, "local_epochs": None, "local_steps": 5})
    lab.execute(start)
    federated = {name: seen["steps"] for name, seen in steps.items()}
    assert federated == dict.fromkeys(SITES, 10)
    steps.clear()
    compare(lab, start)
    assert {name: seen["steps"] for name, seen in steps.items()} == {**federated, "pooled": 30}


def test_all_are_tested_on_the_pooled_test_split(lab):
    found, told = compare(lab, lab.start(training={"rounds": 1}))
    assert list(found) == ["pooled", "local"]
    assert list(found["local"]) == list(SITES)
    for figures in (found["pooled"], *found["local"].values()):
        assert figures["examples"] == 30
        assert figures["support"] == {"dark": 15, "bright": 15}
        assert 0 <= figures["auc"] <= 1
    assert told == [("baselines", done, 4) for done in range(5)]


def test_pooled_training_is_a_federation_of_one_site_with_all_images(lab):
    start = lab.start(training={"rounds": 1})
    found, _ = compare(lab, start)
    one = lab.start(names=("pooled",), training={"rounds": 1})
    whole = lab.execute(one, lab.grid(one, {"pooled": lab.pool}))
    assert found["pooled"] == whole.test.summary(LABELS, whole.threshold)


def test_a_site_alone_trains_on_its_own_patients_and_is_chosen_on_its_own_validation(lab):
    for name, site in lab.cohorts().items():
        mixed = with_test_of(lab.pool, site)
        test = mixed.splits == SPLITS.index("test")
        assert sorted(mixed.rows[~test]) == sorted(site.rows[site.splits != SPLITS.index("test")])
        assert sorted(mixed.rows[test]) == sorted(lab.pool.rows[lab.pool.splits == SPLITS.index("test")])
        others = [cohort for other, cohort in lab.cohorts().items() if other != name]
        foreign = np.concatenate([cohort.patients[cohort.splits != SPLITS.index("test")] for cohort in others])
        assert not set(mixed.patients[~test]) & set(foreign)
        # Every example keeps its label, split, digest and image.
        where = np.searchsorted(lab.pool.rows, mixed.rows)
        for field in ("labels", "splits", "patients", "digests"):
            assert np.array_equal(getattr(mixed, field), getattr(lab.pool, field)[where])


def test_a_site_alone_takes_its_own_number_of_examples(lab, steps):
    compare(lab, lab.start(training={"rounds": 1}))
    assert {name: seen["examples"] for name, seen in steps.items()} == {
        "pooled": 48,
        "north": 16,
        "south": 24,
        "west": 8,
    }


def test_a_site_alone_does_not_see_what_others_have(lab):
    """Other sites' images could be anything: the model of one site alone stays the same to the last bit."""
    start = lab.start(training={"rounds": 1})
    site = lab.cohorts()["north"]
    mixed = with_test_of(lab.pool, site)
    first = run_alone(start, "north", mixed, lab.workshop(start), lab.scratch())
    own = np.isin(lab.pool.rows, site.rows)
    flipped = replace(lab.pool, labels=np.where(own, lab.pool.labels, 1 - lab.pool.labels))
    second = run_alone(start, "north", with_test_of(flipped, site), lab.workshop(start), lab.scratch())
    assert all(np.array_equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert first.test.summary(LABELS)["auc"] != second.test.summary(LABELS)["auc"]


def test_a_site_with_one_label_is_compared_all_the_same(lab):
    cohorts = lab.cohorts()
    cohorts["west"] = cohorts["west"].subset(np.flatnonzero(cohorts["west"].labels == 1))
    kept = np.flatnonzero(np.isin(lab.pool.rows, np.concatenate([cohort.rows for cohort in cohorts.values()])))
    found, _ = compare(lab, lab.start(training={"rounds": 1}), cohorts, lab.pool.subset(kept))
    assert found["local"]["west"]["examples"] == 25
    assert found["local"]["west"]["auc"] is not None


# -------------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("strategy", ["fedprox:0.1", "fedavgm", "fedadam", "median", "trimmed-mean:0.2", "krum"])
def test_alone_there_is_nothing_to_aggregate(lab, strategy):
    run = alone(lab.start(training={"strategy": strategy}).run, "north")
    assert run.training.strategy == "fedavg"
    assert (run.sites.names, run.sites.quorum) == (("north",), 1)


@pytest.mark.parametrize("strategy", ["fedavg", "analytic"])
def test_what_is_the_identity_or_the_closed_form_stays(lab, strategy):
    run = lab.start(training={"strategy": strategy}).run
    found = alone(run, "north")
    assert found.training == run.training
    assert found.model == run.model
    assert found.seed == run.seed


def test_a_limit_on_the_sites_updates_is_none_on_pooled_training(lab):
    """It guards against hostile sites; more steps than one site takes may well exceed it."""
    start = lab.start(training={"rounds": 1}, sites={"max_norm": 1e-6})
    found, _ = compare(lab, start)
    assert found["pooled"]["auc"] is not None


def test_the_closed_form_alone_is_compared_with_closed_forms(lab, steps):
    found, _ = compare(lab, lab.start(training={"strategy": "analytic"}))
    assert steps == {}
    assert found["pooled"]["examples"] == 30
