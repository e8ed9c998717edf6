"""What scripts read of a run: every promised key, of the promised type, and a model with the figures it claims."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from client import evaluation
from client.augmentation import Augmentation
from client.features import Extractor
from client.workshop import Workshop
from common import checkpoint, metrics, model
from common.errors import QuorumLost
from common.presets import PRESETS
from common.run_config import RunConfig
from server import result
from server.company import Cast
from server.result import Surroundings, TrunkFacts

SITES = ("north", "south", "west")
LABELS = ("dark", "bright")
MAYBE = (int, float, type(None))
PER_CLASS = ("precision", "recall", "f1", "specificity", "auc", "auc_bound")


def around(lab, start, **changes):
    built, trunk, weights = lab.build(start.run)
    return Surroundings(
        run=start.run,
        trunk=TrunkFacts(start.run.model.trunk_sha256, model.frozen_count(built), len(trunk)),
        upper_parameters=sum(value.size for value in weights.values()),
        weights={"source": "none", "backbone": start.run.model.backbone},
        **{"seconds": {"baselines": 0.0}, **changes},
    )


@pytest.fixture(scope="module")
def found(lab, outcome):
    return result.completed(outcome, around(lab, lab.start()))


def check_metrics(values, labels=LABELS):
    assert set(values) == {
        "examples", "support", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "specificity", "auc",
        "auc_bound", "auc_ci95", "average_precision", "ece", "brier", "per_class", "operating_point",
    }  # fmt: skip
    assert type(values["examples"]) is int
    assert list(values["support"]) == list(labels)
    assert all(type(count) is int for count in values["support"].values())
    assert sum(values["support"].values()) == values["examples"]
    for name in set(values) - {"examples", "support", "auc_ci95", "per_class", "operating_point"}:
        assert isinstance(values[name], MAYBE), name
    if values["auc_ci95"] is not None:
        low, high = values["auc_ci95"]
        assert 0 <= low <= values["auc"] <= high <= 1
    assert list(values["per_class"]) == list(labels)
    for figures in values["per_class"].values():
        assert set(figures) == set(PER_CLASS)
        assert all(isinstance(value, MAYBE) for value in figures.values())
    if values["operating_point"] is not None:
        assert set(values["operating_point"]) == {"threshold", "precision", "recall", "specificity"}
        assert 0 <= values["operating_point"]["threshold"] <= 1


def numbers(value):
    """Every number anywhere in a document."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, float) else []


def leaves(value, path=""):
    """Every figure by its path."""
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in parts for name, leaf in leaves(part, f"{path}/{key}").items()}
    return {path: value}


def keys(value):
    if isinstance(value, dict):
        return [*value, *(key for part in value.values() for key in keys(part))]
    return [key for part in value for key in keys(part)] if isinstance(value, list) else []


# ------------------------------------------------------------------------------------------------- a finished run


def test_the_top_of_the_document(lab, found):
    promised = {
        "schema", "status", "fingerprint", "config", "trunk", "upper", "sites", "rounds", "best_round", "test",
        "baselines", "privacy", "seconds",
    }  # fmt: skip
    assert promised <= set(found)
    start = lab.start()
    assert found["schema"] == 1
    assert found["status"] == "completed"
    assert found["fingerprint"] == start.run.fingerprint()
    assert RunConfig.model_validate(found["config"]) == start.run
    assert found["baselines"] is None
    assert found["privacy"] is None
    assert found["best_round"] in range(4)


def test_trunk_and_upper(lab, found):
    start = lab.start()
    built, trunk, weights = lab.build(start.run)
    assert found["trunk"] == {
        "sha256": checkpoint.sha256(trunk),
        "parameters": model.frozen_count(built),
        "bytes": len(trunk),
        "transfers": dict.fromkeys(SITES, 1),
    }
    assert found["upper"] == {"parameters": sum(value.size for value in weights.values()), "wire_dtype": "float32"}


def test_sites(found):
    assert list(found["sites"]) == list(SITES)
    assert found["sites"]["south"] == {
        "examples": {"train": 24, "validation": 10, "test": 10},
        "labels": {"dark": 22, "bright": 22},
        "rounds": 3,
        "status": "contributed",
    }


def test_rounds(found):
    assert [entry["round"] for entry in found["rounds"]] == [0, 1, 2, 3]
    for entry in found["rounds"]:
        assert {"round", "seconds", "bytes_down", "bytes_up", "validation", "sites"} <= set(entry)
        assert isinstance(entry["seconds"], float)
        assert type(entry["bytes_down"]) is type(entry["bytes_up"]) is int
        check_metrics(entry["validation"])
        assert list(entry["sites"]) == list(SITES)
        for facts in entry["sites"].values():
            assert {"status", "examples", "train_loss", "validation"} <= set(facts)
            assert "reason" not in facts
            assert type(facts["examples"]) is int
            assert isinstance(facts["train_loss"], MAYBE)
            check_metrics(facts["validation"])


def test_the_test_split(found, outcome):
    check_metrics(found["test"]["pooled"])
    assert found["test"]["pooled"]["examples"] == 30
    assert list(found["test"]["sites"]) == list(SITES)
    for values in found["test"]["sites"].values():
        check_metrics(values)
        assert values["examples"] == 10
    threshold = found["test"]["pooled"]["operating_point"]["threshold"]
    assert threshold == pytest.approx(1 / (1 + math.exp(-outcome.threshold)))
    assert {values["operating_point"]["threshold"] for values in found["test"]["sites"].values()} == {threshold}


def test_the_operating_point_is_the_one_of_the_best_round_on_validation(found, outcome):
    best = found["rounds"][found["best_round"]]["validation"]
    assert best["auc"] == max(entry["validation"]["auc"] for entry in found["rounds"])
    assert outcome.threshold in outcome.test.edges[0]


def test_seconds(found):
    assert set(found["seconds"]) == {"total", "features", "rounds", "baselines"}
    assert all(isinstance(value, float) and value >= 0 for value in found["seconds"].values())
    assert found["seconds"]["total"] >= found["seconds"]["rounds"]
    assert found["seconds"]["rounds"] == pytest.approx(sum(entry["seconds"] for entry in found["rounds"][1:]))


def test_the_bytes_of_every_phase_outside_the_rounds(lab, found):
    start = lab.start()
    assert set(found["traffic"]) >= {"trunk", "prepare", "statistics", "freeze", "validation", "test"}
    for facts in found["traffic"].values():
        assert set(facts) == {"bytes_down", "bytes_up"}
        assert type(facts["bytes_down"]) is type(facts["bytes_up"]) is int
    overhead = found["traffic"]["trunk"]["bytes_down"] - 3 * len(start.trunk)
    assert 0 < overhead < 3 * 500
    assert found["traffic"]["trunk"]["bytes_up"] == 0
    assert found["traffic"]["test"]["bytes_down"] > 2 * 3 * 4 * found["upper"]["parameters"]


def test_curves_belong_to_the_figures(found):
    """The area under the curve that is drawn is the area that is reported."""
    points = np.array(found["curves"]["roc"]["bright"])
    area = np.sum(np.diff(points[:, 0]) * (points[1:, 1] + points[:-1, 1]) / 2)
    assert area == pytest.approx(found["test"]["pooled"]["auc"])
    assert sum(row["n"] for row in found["curves"]["reliability"]) == 30


def test_the_document_is_json_without_nan_and_reads_back_as_it_was(found):
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == json.loads(json.dumps(found))
    assert all(math.isfinite(number) for number in numbers(found))
    assert all(type(key) is str for key in keys(found))


def test_software_is_named_with_its_version(found):
    assert {"consilium", "flwr", "torch", "timm", "numpy", "python"} <= set(found["software"])


# ----------------------------------------------------------------------------------------------- what did not go well


def test_a_partial_run_says_so(lab):
    start = lab.start(sites={"quorum": 2, "deadline_s": 0.5}, training={"rounds": 1})
    cohorts = lab.cohorts("north", "south")
    reached = lab.execute(start, lab.grid(start, cohorts))
    document = result.completed(reached, around(lab, start))
    assert document["status"] == "completed_partial"
    assert document["sites"]["west"] == {
        "examples": {"train": 0, "validation": 0, "test": 0},
        "labels": {"dark": 0, "bright": 0},
        "rounds": 0,
        "status": "lost(absent)",
    }
    assert "partial_run" in {warning["code"] for warning in document["warnings"]}
    assert document["trunk"]["transfers"] == {"north": 1, "south": 1}


def test_the_reason_of_a_loss_is_in_the_round(lab):
    start = lab.start(sites={"quorum": 2}, training={"rounds": 1})
    document = result.completed(lab.execute(start, lab.grid(start, faults=["nan:west@1"])), around(lab, start))
    facts = document["rounds"][1]["sites"]["west"]
    assert (facts["status"], facts["reason"], facts["examples"]) == ("quarantined", "not_finite", 0)
    assert document["sites"]["west"]["rounds"] == 0
    json.dumps(document, allow_nan=False)


def test_a_failed_run_keeps_what_was_reached(lab, tmp_path):
    start = lab.start(tmp_path)
    cast = Cast()
    with pytest.raises(QuorumLost) as caught:
        lab.execute(start, lab.grid(start, faults=["drop:west@2"]), cast)
    rounds = result.read_rounds(tmp_path)
    document = result.failed(str(caught.value), around(lab, start, seconds={"features": 1.5}), cast, rounds, 7.0)
    assert document["status"] == "failed"
    assert document["error"] == str(caught.value)
    assert [entry["round"] for entry in document["rounds"]] == [0]
    assert document["sites"]["west"]["status"] == "lost(unreachable)"
    assert document["sites"]["north"]["examples"]["train"] == 16
    assert document["trunk"]["transfers"] == dict.fromkeys(SITES, 1)
    assert (document["test"], document["best_round"], document["baselines"]) == (None, None, None)
    assert document["seconds"] == {"features": 1.5, "rounds": 0.0, "baselines": 0.0, "total": 7.0}
    json.dumps(document, allow_nan=False)


def test_a_run_that_failed_before_anything_has_the_same_keys(lab, found):
    document = result.failed("no", around(lab, lab.start()), Cast(), [], 0.5)
    assert set(document) == {*found, "error"}
    assert {values["status"] for values in document["sites"].values()} == {"lost(absent)"}
    assert document["rounds"] == []


def test_no_rounds_are_read_from_a_folder_without_any(tmp_path):
    assert result.read_rounds(tmp_path) == []


def test_few_test_examples_are_warned_of(lab, found):
    assert "tiny_support" not in {warning["code"] for warning in found["warnings"]}
    start = lab.start(names=("north",), training={"strategy": "analytic"})
    document = result.completed(lab.execute(start, lab.grid(start, lab.cohorts("north"))), around(lab, start))
    (warning,) = document["warnings"]
    assert warning["code"] == "tiny_support"
    assert "dark, bright" in warning["message"]


def test_undefined_figures_are_null_and_never_zero_or_half(lab):
    """A test split of one label has no AUC, no specificity of the other and no interval."""
    cohorts = lab.other_cohorts({"north": (16, 8, 8)})
    only = cohorts["north"].subset(np.flatnonzero((cohorts["north"].splits != 2) | (cohorts["north"].labels == 1)))
    start = lab.start(names=("north",), training={"strategy": "analytic"})
    document = result.completed(lab.execute(start, lab.grid(start, {"north": only})), around(lab, start))
    pooled = document["test"]["pooled"]
    assert [pooled[name] for name in ("auc", "auc_bound", "auc_ci95", "specificity")] == [None] * 4
    assert pooled["support"] == {"dark": 0, "bright": 4}
    check_metrics(pooled)
    json.dumps(document, allow_nan=False)


# ------------------------------------------------------------------------------------------------------- the model


def reloaded(folder, run, trunk, cohorts, edges, cache):
    """Evaluate a model folder from its files and its trunk alone."""
    card = json.loads((folder / "model.json").read_text())
    tensors = checkpoint.read_tensors(folder / "upper.safetensors", card["upper_sha256"])
    assert checkpoint.sha256(trunk) == card["trunk_sha256"]
    built = model.skeleton(run)
    model.load_frozen(built, trunk)
    model.load_standardiser(built.upper, np.array(tensors.pop("head.mean")), np.array(tensors.pop("head.scale")))
    assert set(tensors) == set(built.upper.trainable())
    model.load_trainable(built.upper, {name: np.array(value) for name, value in tensors.items()})
    total = None
    for cohort in cohorts.values():
        extractor = Extractor.open(
            built.trunk,
            built.spec,
            sha256=card["trunk_sha256"],
            cohort=cohort,
            cache=cache,
            augmentation=Augmentation.of(PRESETS[card["preprocessing"]["preset"]]),
            device="cpu",
        )
        extractor.fill(cohort, card["preprocessing"]["views"])
        features = extractor.features(cohort, card["preprocessing"]["views"])
        part = evaluation.evaluate(built.upper, features, cohort.labels, cohort.indices("test"), edges)
        total = part if total is None else total + part
    return card, total


@pytest.mark.parametrize(
    ("wire", "cut"),
    [
        ("float32", "head"),
        pytest.param("bfloat16", "head", marks=pytest.mark.slow),
        pytest.param("float16", "head", marks=pytest.mark.slow),
        pytest.param("float32", "stages:1", marks=pytest.mark.slow),
        pytest.param("float32", "all", marks=pytest.mark.slow),
    ],
)
def test_the_model_folder_gives_the_figures_of_the_result(lab, tmp_path, wire, cut):
    # A high rate, so that a round beats the start and rounding shows.
    sections = {"wire": {"dtype": wire}, "model": {"trainable": cut}, "training": {"rounds": 2, "local_epochs": 2}}
    start = lab.start(**sections)
    reached = lab.execute(start)
    document = result.completed(reached, around(lab, start))
    result.write_model(tmp_path / "model", reached, around(lab, start), document)
    card, total = reloaded(
        tmp_path / "model", start.run, start.trunk, lab.cohorts(), reached.test.edges, tmp_path / "cache"
    )
    again = metrics.summarise(total, LABELS, reached.test.edges, reached.threshold)
    if cut == "head":
        assert again == document["test"]["pooled"]
    else:  # convolutions round otherwise in another memory layout
        assert leaves(again) == pytest.approx(leaves(document["test"]["pooled"]), abs=1e-6)
    assert card["metrics"] == json.loads(json.dumps(document["test"]["pooled"]))
    assert (card["backbone"], card["cut"], card["labels"]) == ("test_efficientnet", cut, list(LABELS))
    assert card["preprocessing"]["id"] == "blobs"
    assert card["fingerprint"] == start.run.fingerprint()
    assert card["best_round"] == reached.best_round


def test_the_model_folder_holds_tensors_and_facts_and_no_pickle(lab, outcome, found, tmp_path):
    result.write_model(tmp_path / "model", outcome, around(lab, lab.start()), found)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "upper.safetensors"]
    first = (tmp_path / "model" / "upper.safetensors").read_bytes()
    result.write_model(tmp_path / "model", outcome, around(lab, lab.start()), found)
    assert (tmp_path / "model" / "upper.safetensors").read_bytes() == first


def test_a_workshop_of_another_process_takes_the_written_upper(lab, outcome, tmp_path, found):
    """The names in the file are those of the wire, so that a run can go on from a model."""
    start = lab.start()
    result.write_model(tmp_path / "model", outcome, around(lab, start), found)
    tensors = checkpoint.read_tensors(tmp_path / "model" / "upper.safetensors")
    assert set(start.weights) < set(tensors)
    bench = Workshop(lab.cache, "cpu").bench(
        start.run, start.run.model.trunk_sha256, start.trunk, replace(lab.pool, quarantine={})
    )
    model.load_trainable(bench.upper, {name: np.array(tensors[name]) for name in start.weights})


# ------------------------------------------------------------------------------------------- several labels an image

FINDINGS = ("glow", "third")


@pytest.fixture(scope="module")
def several(lab):
    start = lab.start(task={"labels": FINDINGS, "kind": "multi-label"})
    outcome = lab.execute(start, lab.grid(start, lab.clinics(masked="west")))
    return start, outcome, result.completed(outcome, around(lab, start))


def test_the_result_of_several_labels_has_the_same_keys(found, several):
    document = several[2]
    assert list(document) == list(found)
    assert list(document["test"]["pooled"]) == list(found["test"]["pooled"])
    assert list(document["test"]["pooled"]["per_class"]) == list(FINDINGS)
    for figures in document["test"]["pooled"]["per_class"].values():
        assert set(PER_CLASS) < set(figures)
        assert set(figures["operating_point"]) == {"threshold", "precision", "recall", "specificity"}
    assert document["test"]["pooled"]["operating_point"] is None
    json.dumps(document, allow_nan=False)


def test_sites_with_several_labels_count_what_is_present_and_what_was_annotated(several):
    assert several[2]["sites"]["west"] == {
        "examples": {"train": 8, "validation": 10, "test": 10},
        "labels": {"glow": 13, "third": 0},
        "annotated": {"glow": 25, "third": 0},
        "rounds": 3,
        "status": "contributed",
    }


def test_curves_of_several_labels(several):
    curves, pooled = several[2]["curves"], several[2]["test"]["pooled"]
    assert list(curves["roc"]) == list(FINDINGS)
    assert all(points[0] == [0.0, 0.0] and points[-1] == [1.0, 1.0] for points in curves["roc"].values())
    annotated = sum(figures["annotated"] for figures in pooled["per_class"].values())
    assert sum(point["n"] for point in curves["reliability"]) == annotated


def test_the_model_of_several_labels_says_so(lab, several, tmp_path):
    start, outcome, document = several
    result.write_model(tmp_path / "model", outcome, around(lab, start), document)
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    assert (card["kind"], card["labels"]) == ("multi-label", list(FINDINGS))
