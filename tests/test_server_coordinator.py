"""One run from end to end over real sites: what is exchanged, what is chosen, and what a fault leaves standing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from client.app import make_app
from client.workshop import Workshop
from common import codec, metrics, model
from common.errors import ConfigError, ConsiliumError, DataError, QuorumLost
from common.messages import REQUEST_OF, Description, PrivateSums, Summed, Trained, count_bytes
from server.company import Cast
from server.coordinator import Coordinator, _competes
from server.evaluation import Measured, first_edges
from server.settling import HEAD_BIAS, HEAD_WEIGHT
from server.state import RunState
from simulations.grid import InProcessGrid
from simulations.hospitals import open_in_process

SITES = ("north", "south", "west")
LABELS = ("dark", "bright")
PRIVATE = {
    "model": {"scaling": "stages", "init": "zero"},
    "training": {
        "local_epochs": None, "local_steps": 1, "batch_size": 65_536, "draw": "patients", "optimizer": "sgd",
        "schedule": "constant", "class_weights": "none", "lr": None,
    },
    "privacy": {"epsilon": 8.0, "run": "0a" * 16},
}  # fmt: skip
WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def timeless(entries):
    """The rounds without what a clock decides."""
    return json.dumps([{**entry, "seconds": 0} for entry in entries], sort_keys=True)


def bits(outcome):
    """Everything that a run ends with, but the times."""
    arrays = [outcome.weights, outcome.fixed]
    content = b"".join(np.asarray(value).tobytes() for group in arrays for _, value in sorted(group.items()))
    test = [outcome.test.edges.tobytes()] + [
        value.tobytes() for name in sorted(outcome.test.sites) for value in outcome.test.sites[name].arrays().values()
    ]
    return content, tuple(test), timeless(outcome.rounds), outcome.best_round, outcome.threshold


def altered(app_of, change):
    """A grid app whose sites' replies pass through `change(site, request, reply)`."""

    def open_site(node):
        handle, name = app_of(node), SITES[node["partition-id"]]
        return lambda request: change(name, request, handle(request))

    return open_site


def hostile_grid(lab, start, change):
    cohorts = lab.cohorts()
    opened = open_in_process(cohorts, lab.workshop(start), lab.scratch())
    return InProcessGrid(make_app(altered(opened, change)), list(cohorts))


# ------------------------------------------------------------------------------------------------ a run that goes well


def test_a_run_has_an_entry_for_the_start_and_one_for_each_round(outcome):
    assert [entry["round"] for entry in outcome.rounds] == [0, 1, 2, 3]
    for entry in outcome.rounds:
        assert list(entry["sites"]) == list(SITES)
        assert entry["validation"]["examples"] == 30
        assert {facts["status"] for facts in entry["sites"].values()} == {"contributed"}
        assert sum(facts["validation"]["examples"] for facts in entry["sites"].values()) == 30
    first, *others = outcome.rounds
    assert (first["bytes_down"], first["bytes_up"]) == (0, 0)
    assert first["seconds"] > 0
    assert all(facts["train_loss"] is None for facts in first["sites"].values())
    assert all(facts["train_loss"] > 0 for entry in others for facts in entry["sites"].values())
    assert all(entry["seconds"] > 0 for entry in others)


def test_the_run_is_complete_and_everybody_contributed(outcome):
    assert outcome.complete
    assert outcome.contributed == dict.fromkeys(SITES, 3)
    assert outcome.cast.status == dict.fromkeys(SITES, "contributed")
    assert outcome.cast.transfers == dict.fromkeys(SITES, 1)
    assert {site: support.tolist() for site, support in outcome.cast.support.items()} == {
        "north": [[8, 8], [5, 5], [5, 5]],
        "south": [[12, 12], [5, 5], [5, 5]],
        "west": [[4, 4], [5, 5], [5, 5]],
    }


def test_the_start_is_better_than_chance_and_so_is_the_end(outcome):
    assert outcome.rounds[0]["validation"]["auc"] > 0.6
    assert outcome.test.summary(LABELS)["auc"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox:0.1", "fedavgm", "fedadam", "median", "krum"])
def test_the_best_round_has_the_best_pooled_validation_auc_the_first_of_equals(lab, strategy):
    found = lab.execute(lab.start(training={"strategy": strategy, "rounds": 4}))
    areas = [entry["validation"]["auc"] for entry in found.rounds]
    assert len(areas) == 5
    assert found.best_round == int(np.argmax(areas))


@pytest.mark.slow
def test_the_weights_returned_are_those_of_the_best_round(lab):
    """A run that stops at the best round has them as its last."""
    found = lab.execute(lab.start(training={"rounds": 4, "lr": 0.05, "schedule": "constant"}))
    for stop in range(5):
        training = {"rounds": stop, "lr": 0.05, "schedule": "constant"}
        shorter = lab.execute(lab.start(training=training))
        if shorter.best_round == found.best_round:
            assert all(np.array_equal(shorter.weights[name], found.weights[name]) for name in found.weights)
            return
    raise AssertionError("no shorter run had the same best round")


@pytest.mark.slow
def test_the_round_loss_is_the_mean_over_batches_and_falls(lab):
    found = lab.execute(lab.start(training={"rounds": 6, "local_epochs": 3, "lr": 0.02}))
    losses = [np.mean([facts["train_loss"] for facts in entry["sites"].values()]) for entry in found.rounds[1:]]
    assert losses[-1] < losses[0]


def test_two_runs_end_with_the_same_bits(lab, outcome):
    assert bits(lab.execute(lab.start())) == bits(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_in_which_answers_arrive_does_not_change_a_bit(lab, outcome, order):
    start = lab.start()
    assert bits(lab.execute(start, lab.grid(start, kind=lab.grids.Shuffled, order=order))) == bits(outcome)


@pytest.mark.slow
def test_where_the_sites_are_on_the_grid_does_not_change_a_bit(lab, outcome):
    start = lab.start()
    cohorts = lab.cohorts("west", "north", "south")
    assert bits(lab.execute(start, lab.grid(start, cohorts))) == bits(outcome)


def test_another_seed_is_another_run(lab, outcome):
    start = lab.start()
    other = replace(start, run=start.run.model_copy(update={"seed": 1}))
    assert bits(lab.execute(other, lab.grid(other)))[2] != bits(outcome)[2]


@pytest.mark.slow
def test_the_penalty_of_the_closed_form_is_the_one_that_scores_best_on_validation(lab):
    candidates = (1e-4, 0.3, 100.0)
    areas = []
    for ridge in (*((one,) for one in candidates), candidates):
        found = lab.execute(lab.start(model={"ridge": ridge}, training={"strategy": "analytic"}))
        areas.append((found.rounds[0]["validation"]["auc"], found.weights[HEAD_WEIGHT].tobytes()))
    *alone, together = areas
    assert len({weight for _, weight in alone}) == 3
    assert together[1] == max(alone, key=lambda pair: pair[0])[1]


@pytest.mark.slow
def test_the_sums_are_those_of_the_pooled_images(lab, outcome):
    """The closed form of three sites is that of one site with all their images, up to the order of addition."""
    pooled = lab.pool.subset(np.concatenate([lab.parts[name] for name in SITES]))
    start = lab.start(names=("all",), training={"strategy": "analytic"})
    alone = lab.execute(start, lab.grid(start, {"all": pooled}))
    for name in ("mean", "scale", "class_weights"):
        np.testing.assert_allclose(outcome.fixed[name], alone.fixed[name], rtol=1e-5, atol=1e-7)
    several = lab.execute(lab.start(training={"strategy": "analytic"}))
    np.testing.assert_allclose(several.weights[HEAD_WEIGHT], alone.weights[HEAD_WEIGHT], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(several.weights[HEAD_BIAS], alone.weights[HEAD_BIAS], rtol=1e-3, atol=1e-4)


def test_the_head_starts_at_zero_when_asked_to(lab):
    found = lab.execute(lab.start(training={"rounds": 0}, model={"init": "zero"}))
    assert not found.weights[HEAD_WEIGHT].any()
    assert found.rounds[0]["validation"]["auc"] == 0.5


def test_analytic_stops_at_the_start(lab, outcome):
    recording = lab.start(training={"strategy": "analytic"})
    grid = lab.grid(recording, kind=lab.grids.Recording)
    found = lab.execute(recording, grid)
    assert [entry["round"] for entry in found.rounds] == [0]
    assert found.best_round == 0
    assert found.complete
    assert grid.of_kind("train") == []
    assert found.rounds[0]["validation"]["auc"] == outcome.rounds[0]["validation"]["auc"]


@pytest.mark.slow
def test_views_count_as_examples_of_the_closed_form(lab, outcome):
    found = lab.execute(lab.start(data={"views": 2}))
    assert found.complete
    assert found.cast.support["north"].tolist() == outcome.cast.support["north"].tolist()
    assert not np.array_equal(found.fixed["mean"], outcome.fixed["mean"])


@pytest.mark.slow
def test_three_labels_are_no_special_case(lab):
    names = (*LABELS, "third")
    cohorts = lab.other_cohorts({"north": (18, 9, 9), "south": (18, 9, 9)}, names)
    start = lab.start(names=("north", "south"), task={"labels": names}, training={"rounds": 2})
    found = lab.execute(start, lab.grid(start, cohorts))
    assert found.threshold is None
    assert found.test.summary(names)["support"] == dict.fromkeys(names, 6)
    assert found.complete


# ------------------------------------------------------------------------------------------------ what is exchanged


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRE_BYTES)
def test_the_trunk_travels_once_to_each_site_and_rounds_carry_the_upper_alone(lab, wire):
    start = lab.start(wire={"dtype": wire})
    grid = lab.grid(start, kind=lab.grids.Recording)
    found = lab.execute(start, grid)
    trunks = grid.of_kind("query.install_trunk")
    assert sorted(site for site, _ in trunks) == list(SITES)
    assert all(record["arrays"]["content"].numpy is not None for _, record in trunks)
    assert all(bytes(record["arrays"]["content"].data) == start.trunk for _, record in trunks)
    values = sum(value.size for value in start.weights.values())
    trains = grid.of_kind("train")
    assert [site for site, _ in trains] == list(SITES) * 3
    for _, record in trains:
        weights, others = count_bytes(record)
        assert weights == values * WIRE_BYTES[wire]
        assert others < 5000
    assert weights + others < len(start.trunk) / 50
    for entry in found.rounds[1:]:
        assert entry["bytes_down"] == entry["bytes_up"] == 3 * values * WIRE_BYTES[wire]
        assert 0 < entry["evaluation_bytes_down"] < 15_000
        assert 0 < entry["evaluation_bytes_up"] < 15_000


@pytest.mark.parametrize("private", [False, True])
def test_only_the_closed_list_of_messages_is_sent_and_all_carry_the_fingerprint(lab, private):
    start = lab.start(**(PRIVATE if private else {}))
    grid = lab.grid(start, kind=lab.grids.Recording)
    lab.execute(start, grid)
    needless = {"query.collect", "query.statistics" if private else "query.private_statistics"}
    assert {message.metadata.message_type for message in grid.sent} == set(REQUEST_OF) - needless
    for message in grid.sent:
        if message.metadata.message_type != "query.describe":
            assert message.content["facts"]["fingerprint"] == start.run.fingerprint()


@pytest.mark.slow
def test_the_test_split_is_looked_at_twice_and_only_at_the_end(lab):
    start = lab.start()
    grid = lab.grid(start, kind=lab.grids.Recording)
    lab.execute(start, grid)
    splits = [message.content["facts"]["split"] for message in grid.sent if message.metadata.message_type == "evaluate"]
    assert splits[-6:] == ["test"] * 6
    assert set(splits[:-6]) == {"validation"}
    kinds = [message.metadata.message_type for message in grid.sent]
    assert "train" not in kinds[-9:]


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRE_BYTES)
def test_the_weights_kept_are_those_that_were_tested(lab, wire):
    """What the sites tested had passed the wire."""
    start = lab.start(wire={"dtype": wire})
    found = lab.execute(start)
    seen = codec.through(found.weights, wire)
    assert all(np.array_equal(seen[name], found.weights[name]) for name in seen)


# ------------------------------------------------------------------------------------------------- deeper cuts


@pytest.mark.slow
def test_statistics_of_norms_above_the_cut_are_never_touched(lab):
    start = lab.start(names=("north", "west"), model={"trainable": "stages:1"}, training={"rounds": 1})
    built, _, _ = lab.build(start.run)
    assert list(built.upper.frozen_norms())
    frozen = {name for name, _ in built.upper.named_buffers() if "running" in name}
    assert frozen
    assert not frozen & set(start.weights)
    norms = {name for name, module in built.upper.named_modules() if module in list(built.upper.frozen_norms())}
    assert not {name for name in start.weights if name.rsplit(".", 1)[0] in norms}
    before = model.norm_statistics(built.upper)
    found = lab.execute(start, lab.grid(start, lab.cohorts("north", "west")))
    assert model.norm_statistics(built.upper) == before
    changed = {name for name in start.weights if not np.array_equal(found.weights[name], start.weights[name])}
    assert changed == set(start.weights) or found.best_round == 0


@pytest.mark.slow
def test_the_closed_form_is_that_of_the_weights_the_run_starts_with(lab):
    """A site knows the structure of the model; the values above the cut come from the coordinator."""
    start = lab.start(names=("north", "west"), model={"trainable": "stages:1"}, training={"strategy": "analytic"})
    pretrained = {name: np.float32(1.5) * value for name, value in start.weights.items()}
    outcomes = []
    for before in (pretrained, start.weights):  # whatever the sites' model held before
        workshop = lab.workshop(start)
        model.load_trainable(lab.build(start.run)[0].upper, before)
        opened = open_in_process(lab.cohorts("north", "west"), workshop, lab.scratch())
        grid = InProcessGrid(make_app(opened), ["north", "west"])
        outcomes.append(lab.execute(replace(start, weights=pretrained), grid))
    assert bits(outcomes[0]) == bits(outcomes[1])


@pytest.mark.slow
def test_a_site_that_builds_the_model_itself_ends_with_the_same_bits(lab, outcome):
    start = lab.start()
    opened = open_in_process(lab.cohorts(), Workshop(lab.cache, "cpu"), lab.scratch())
    assert bits(lab.execute(start, InProcessGrid(make_app(opened), SITES))) == bits(outcome)


# --------------------------------------------------------------------------------------------------------- faults


def test_one_dropped_and_one_poisoned_answer_make_the_run_partial(lab):
    start = lab.start(sites={"names": SITES, "quorum": 2})
    found = lab.execute(start, lab.grid(start, faults=["drop:west@1", "nan:north@2"]))
    assert not found.complete
    assert found.contributed == {"north": 2, "south": 3, "west": 2}
    facts = [entry["sites"] for entry in found.rounds]
    assert (facts[1]["west"]["status"], facts[1]["west"]["reason"]) == ("lost", "unreachable")
    assert (facts[2]["north"]["status"], facts[2]["north"]["reason"]) == ("quarantined", "not_finite")
    for entry, site in ((1, "west"), (2, "north")):
        assert facts[entry][site]["examples"] == 0
        assert facts[entry][site]["train_loss"] is None
    assert facts[2]["west"]["status"] == "contributed"
    assert [entry["validation"]["examples"] for entry in found.rounds] == [20, 20, 30, 30]
    assert facts[0]["west"].get("validation") is None if "west" in facts[0] else True
    assert all(np.isfinite(value).all() for value in found.weights.values())
    assert found.cast.status == dict.fromkeys(SITES, "contributed")


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRE_BYTES)
def test_poison_never_reaches_the_global_model_at_any_precision(lab, wire):
    start = lab.start(sites={"quorum": 2}, wire={"dtype": wire})
    found = lab.execute(start, lab.grid(start, faults=["nan:north@1", "nan:south@2", "nan:west@3"]))
    assert found.contributed == dict.fromkeys(SITES, 2)
    assert all(np.isfinite(value).all() for value in found.weights.values())


@pytest.mark.slow
def test_a_round_without_a_site_is_the_round_of_the_others(lab):
    """What a dropped site would have sent changes nothing."""
    start = lab.start(sites={"quorum": 2}, training={"rounds": 1})
    dropped = lab.execute(start, lab.grid(start, faults=["drop:west@1"]))
    poisoned = lab.execute(start, lab.grid(start, faults=["nan:west@1"]))
    assert timeless([{**dropped.rounds[1], "bytes_up": 0, "evaluation_bytes_up": 0, "sites": {}}]) == timeless(
        [{**poisoned.rounds[1], "bytes_up": 0, "evaluation_bytes_up": 0, "sites": {}}]
    )


@pytest.mark.slow
def test_rounds_compete_on_equal_examples_only(lab):
    """The start is judged without one site here, so that it cannot win against rounds judged with it."""
    start = lab.start(sites={"quorum": 2})
    found = lab.execute(start, lab.grid(start, faults=["drop:west@1"]))
    examples = [entry["validation"]["examples"] for entry in found.rounds]
    assert examples == [20, 30, 30, 30]
    areas = [entry["validation"]["auc"] for entry in found.rounds]
    assert found.best_round == 1 + int(np.argmax(areas[1:]))


@pytest.mark.parametrize(
    ("examples", "auc", "best_examples", "best_score", "wins"),
    [
        (8, 1.0, 20, 0.6, False),  # an easier question, for a site is missing
        (8, 0.5, 4, 0.9, True),
        (8, 1.0, 8, 0.9, True),
        (8, 0.5, 8, 0.9, False),
        (8, 1.0, 8, 1.0, False),  # the first of equals stays
        (8, 0.5, 0, None, True),
        (0, None, 8, 0.1, False),
        (0, None, 0, None, True),  # without validation the last round wins
    ],
)
def test_which_of_two_rounds_wins(examples, auc, best_examples, best_score, wins):
    labels = np.arange(examples) % 2
    logits = np.stack([np.zeros(examples), labels if auc == 1.0 else np.zeros(examples)], axis=1)
    edges = first_edges(2)
    measured = Measured(edges, {"a": metrics.evaluate(logits, labels, edges)})
    state = RunState(
        round=2,
        weights={},
        best={},
        best_round=1,
        best_score=best_score,
        best_examples=best_examples,
        threshold=None,
        strategy={},
        fixed={},
        edges=edges,
    )
    assert measured.summary(LABELS)["auc"] == auc
    assert _competes(state, measured, LABELS, measured.pooled.examples) is wins


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["drop:south@2", "nan:south@2", "slow:south@2:30"])
def test_a_lost_quorum_ends_the_run_and_leaves_what_was_reached(lab, tmp_path, fault):
    start = lab.start(tmp_path, sites={"quorum": 3, "deadline_s": 0.5 if "slow" in fault else 30.0})
    cast = Cast()
    with pytest.raises(QuorumLost, match=r"round 2: 2 of 3 sites gave a usable answer, the quorum is 3; south: "):
        lab.execute(start, lab.grid(start, faults=[fault]), cast)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0]
    assert cast.status["south"] in ("lost(unreachable)", "quarantined(not_finite)", "lost(deadline)")
    assert cast.status["north"] == "contributed"
    resumed = lab.execute(start, lab.grid(start))
    assert resumed.complete


@pytest.mark.slow
def test_an_absent_site_is_recorded_and_the_run_is_partial(lab):
    start = lab.start(sites={"quorum": 2, "deadline_s": 0.5})
    found = lab.execute(start, lab.grid(start, lab.cohorts("north", "south")))
    assert not found.complete
    assert found.cast.status == {"north": "contributed", "south": "contributed", "west": "lost(absent)"}
    assert found.contributed == {"north": 3, "south": 3, "west": 0}
    with pytest.raises(QuorumLost, match=r"setup: 2 of 3 .*; west: lost: it is not connected; .*lower --quorum$"):
        strict = lab.start(sites={"deadline_s": 0.5})
        lab.execute(strict, lab.grid(strict, lab.cohorts("north", "south")))


@pytest.mark.slow
def test_an_absent_site_that_comes_back_after_a_resume_has_contributed_only_since(lab, tmp_path):
    start = lab.start(tmp_path, sites={"quorum": 2, "deadline_s": 0.5})
    with pytest.raises(QuorumLost):
        lab.execute(start, lab.grid(start, lab.cohorts("north", "south"), faults=["drop:north@3", "drop:south@3"]))
    found = lab.execute(start, lab.grid(start))
    assert found.contributed == {"north": 3, "south": 3, "west": 1}
    assert not found.complete


# ------------------------------------------------------------------------------------------------- hostile sites


def test_sums_that_are_not_finite_drop_the_site_and_say_why(lab):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Summed):
            return replace(reply, total=np.full_like(reply.total, np.nan))
        return reply

    start = lab.start(sites={"quorum": 2})
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.cast.status["south"] == "quarantined(bad_statistics)"
    assert found.contributed == {"north": 3, "south": 0, "west": 3}
    assert all(np.isfinite(value).all() for value in found.fixed.values())


@pytest.mark.slow
@pytest.mark.parametrize("count", [-24.0, 0.0, 25.0])
def test_sums_of_another_number_of_examples_than_declared_are_refused(lab, count):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Summed):
            return replace(reply, count=np.array([count]))
        return reply

    start = lab.start(sites={"quorum": 2})
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.cast.status["south"] == "quarantined(bad_statistics)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "support",
    [
        np.array([[0, 0], [5, 5], [5, 5]]),  # nothing to train on
        np.array([[-1, 25], [5, 5], [5, 5]]),
        np.array([[12, 12], [5, 5]]),
        np.array([[12, 12, 0], [5, 5, 0], [5, 5, 0]]),
        np.full((3, 2), 2**62),  # two such sites overflow
    ],
)
def test_a_description_that_cannot_be_is_not_believed_and_that_is_said(lab, support):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Description):
            return replace(reply, support=support)
        return reply

    start = lab.start(sites={"quorum": 2})
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.cast.status["south"] == "quarantined(bad_statistics)"
    assert found.contributed == {"north": 3, "south": 0, "west": 3}
    assert found.cast.transfers == {"north": 1, "west": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("num_examples", 10**12, "examples_differ"),
        ("round", 1, "wrong_round"),
        ("train_loss", float("nan"), "not_finite"),
        ("brier", np.array([1e9]), "bad_statistics"),
        ("weights", np.zeros(3, np.float32), "wrong_shape"),
    ],
)
def test_a_reply_that_is_not_admitted_costs_the_site_its_round(lab, field, value, reason):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Trained) and request.round == 2:
            return replace(reply, **{field: value})
        return reply

    start = lab.start(sites={"quorum": 2})
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.contributed == {"north": 3, "south": 2, "west": 3}
    assert found.rounds[2]["sites"]["south"]["reason"] == reason
    assert not found.complete


@pytest.mark.slow
def test_a_norm_limit_is_kept(lab):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Trained):
            return replace(reply, weights=np.full_like(reply.weights, 1e6))
        return reply

    start = lab.start(sites={"quorum": 2, "max_norm": 100.0})
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert {entry["sites"]["south"]["reason"] for entry in found.rounds[1:]} == {"norm_too_large"}
    assert max(np.abs(value).max() for value in found.weights.values()) < 100


@pytest.mark.slow
def test_an_update_out_of_all_proportion_costs_the_site_its_round_without_any_limit(lab):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Trained) and request.round == 2:
            return replace(reply, weights=np.full_like(reply.weights, 1e3))
        return reply

    start = lab.start(sites={"quorum": 2})
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.contributed == {"north": 3, "south": 2, "west": 3}
    assert found.rounds[2]["sites"]["south"] == {
        **found.rounds[2]["sites"]["south"], "status": "quarantined", "examples": 0, "reason": "norm_too_large"
    }  # fmt: skip
    assert max(np.abs(value).max() for value in found.weights.values()) < 100


def test_a_site_that_claims_to_hold_the_world_is_left_out(lab):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Description):
            return replace(reply, support=reply.support * 10**9)
        return reply

    start = lab.start(sites={"quorum": 2})
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.cast.status["south"] == "quarantined(bad_statistics)"
    assert found.contributed == {"north": 3, "south": 0, "west": 3}


# ------------------------------------------------------------------------------------------------- poor data


def test_a_label_that_nobody_has_for_training_is_an_error(lab):
    cohorts = lab.other_cohorts({"north": (16, 8, 8), "south": (16, 8, 8)})
    bright = {
        name: cohort.subset(np.flatnonzero((cohort.labels == 1) | (cohort.splits != 0)))
        for name, cohort in cohorts.items()
    }
    start = lab.start(names=("north", "south"))
    with pytest.raises(DataError, match="label 'dark' has no training example at any site: leave it out"):
        lab.execute(start, lab.grid(start, bright))
    lenient = lab.execute(replace(start, every_label=False), lab.grid(start, bright))
    assert lenient.complete


def test_sites_with_a_single_label_each_learn_together(lab):
    cohorts = lab.other_cohorts({"north": (16, 8, 8), "south": (16, 8, 8)})
    split = {
        name: cohort.subset(np.flatnonzero(cohort.labels == label))
        for label, (name, cohort) in enumerate(cohorts.items())
    }
    start = lab.start(names=("north", "south"))
    found = lab.execute(start, lab.grid(start, split))
    assert found.complete
    last = found.rounds[-1]
    assert last["validation"]["auc"] is not None
    assert [last["sites"][name]["validation"]["auc"] for name in ("north", "south")] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_site_without_validation_or_test_examples_takes_part(lab, missing):
    sizes = {"north": (16, 8, 8), "south": (16, 0, 8) if missing == "validation" else (16, 8, 0)}
    start = lab.start(names=("north", "south"))
    found = lab.execute(start, lab.grid(start, lab.other_cohorts(sizes)))
    assert found.complete
    assert found.contributed == {"north": 3, "south": 3}
    if missing == "validation":
        assert found.rounds[1]["sites"]["south"]["validation"]["examples"] == 0
        assert found.rounds[1]["sites"]["south"]["validation"]["accuracy"] is None
    else:
        assert found.test.site_summaries(LABELS, found.threshold)["south"]["auc"] is None


def test_without_any_validation_the_last_round_is_taken(lab):
    start = lab.start(names=("north", "south"))
    found = lab.execute(start, lab.grid(start, lab.other_cohorts({"north": (16, 0, 8), "south": (16, 0, 8)})))
    assert found.best_round == 3
    assert found.threshold is None
    assert found.complete


@pytest.mark.slow
def test_without_any_test_examples_the_figures_are_undefined(lab):
    start = lab.start(names=("north", "south"))
    found = lab.execute(start, lab.grid(start, lab.other_cohorts({"north": (16, 8, 0), "south": (16, 8, 0)})))
    summary = found.test.summary(LABELS, found.threshold)
    assert summary["examples"] == 0
    assert summary["auc"] is None


def test_krum_with_two_sites_is_refused(lab):
    start = lab.start(names=("north", "south"), training={"strategy": "krum"})
    with pytest.raises(ConfigError, match="krum"):
        lab.execute(start, lab.grid(start, lab.cohorts("north", "south")))


def test_a_site_with_other_labels_or_preprocessing_stays_out(lab):
    cohorts = lab.cohorts()
    cohorts["south"] = replace(cohorts["south"], label_names=("dark", "third"))
    cohorts["west"] = replace(cohorts["west"], preprocessing="other")
    start = lab.start(sites={"quorum": 1})
    found = lab.execute(start, lab.grid(start, cohorts))
    assert found.contributed == {"north": 3, "south": 0, "west": 0}
    assert not found.complete


# ------------------------------------------------------------------------------------------- several labels an image

FINDINGS = ("glow", "third")
SEVERAL = {"task": {"labels": FINDINGS, "kind": "multi-label"}}


@pytest.fixture(scope="module")
def several(lab):
    """A run with two findings an image, of which one site never annotated the second."""
    start = lab.start(**SEVERAL)
    return lab.execute(start, lab.grid(start, lab.clinics(masked="west")))


def test_a_run_with_several_labels_goes_well(several):
    assert several.complete and several.contributed == dict.fromkeys(SITES, 3)
    assert several.cast.status == dict.fromkeys(SITES, "contributed")
    assert several.cast.support["west"][:, :, 1].tolist() == [[0, 0, 0, 8], [0, 0, 0, 10], [0, 0, 0, 10]]
    assert several.fixed["class_weights"].shape == (2, 2)
    for entry in several.rounds:
        assert entry["validation"]["examples"] == 30
        assert entry["sites"]["west"]["validation"]["per_class"]["third"]["auc"] is None
        assert (
            entry["sites"]["west"]["validation"]["auc"]
            == entry["sites"]["west"]["validation"]["per_class"]["glow"]["auc"]
        )
    pooled = several.test.summary(FINDINGS, several.threshold)
    assert pooled["per_class"]["glow"]["auc"] > 0.6
    assert pooled["per_class"]["third"]["annotated"] < pooled["examples"] == 30
    assert all(figures["operating_point"] for figures in pooled["per_class"].values())


def test_the_best_round_of_several_labels_has_the_best_mean_auc(several):
    areas = [entry["validation"]["auc"] for entry in several.rounds]
    assert several.best_round == int(np.argmax(areas))


def test_the_start_of_several_labels_is_that_of_all_their_data_at_one_place(lab, several):
    """Whatever the partition: the sums are those of one site with all examples, masks included."""
    start = lab.start(names=("north",), training={"strategy": "analytic"}, **SEVERAL)
    clinics = lab.clinics(masked="west")
    whole = replace(lab.pool, labels=np.concatenate([clinics[name].labels for name in SITES]), label_names=FINDINGS)
    alone = lab.execute(start, lab.grid(start, {"north": whole}))
    together = lab.start(training={"strategy": "analytic"}, **SEVERAL)
    found = lab.execute(together, lab.grid(together, lab.clinics(masked="west")))
    for name, value in alone.weights.items():
        np.testing.assert_allclose(found.weights[name], value, rtol=1e-4, atol=1e-5)
    assert alone.test.summary(FINDINGS)["support"] == found.test.summary(FINDINGS)["support"]


def test_a_site_that_names_fewer_labels_is_a_site_that_masks_them(lab, several):
    clinics = lab.clinics(masked="west")
    clinics["west"] = replace(clinics["west"], labels=clinics["west"].labels[:, :1], label_names=("glow",))
    start = lab.start(**SEVERAL)
    assert bits(lab.execute(start, lab.grid(start, clinics))) == bits(several)


def test_one_finding_alone_is_enough(lab):
    clinics = {
        name: replace(cohort, labels=cohort.labels[:, :1], label_names=("glow",))
        for name, cohort in lab.clinics().items()
    }
    start = lab.start(task={"labels": ("glow",), "kind": "multi-label"})
    found = lab.execute(start, lab.grid(start, clinics))
    assert found.complete
    summary = found.test.summary(("glow",), found.threshold)
    assert summary["auc"] == summary["per_class"]["glow"]["auc"] > 0.6


def test_sites_of_another_kind_or_without_any_label_stay_out(lab):
    clinics = lab.clinics()
    clinics["south"] = replace(clinics["south"], label_names=("fracture", "tumour"))
    clinics["west"] = lab.cohorts()["west"]
    start = lab.start(sites={"quorum": 1}, **SEVERAL)
    found = lab.execute(start, lab.grid(start, clinics))
    assert found.contributed == {"north": 3, "south": 0, "west": 0}


def test_a_run_with_several_labels_is_resumed_to_the_same_bits(lab, several, tmp_path):
    start = lab.start(tmp_path, **SEVERAL)
    with pytest.raises(QuorumLost):
        lab.execute(start, lab.grid(start, lab.clinics(masked="west"), faults=["drop:south@2"]))
    assert bits(lab.execute(start, lab.grid(start, lab.clinics(masked="west")))) == bits(several)


def test_a_hostile_clinic_is_left_out_round_by_round(lab):
    def change(name, request, reply):
        if name == "south" and isinstance(reply, Trained):
            return replace(reply, positives=reply.positives + 1)
        return reply

    start = lab.start(sites={"quorum": 2}, **SEVERAL)
    cohorts = lab.clinics()
    opened = open_in_process(cohorts, lab.workshop(start), lab.scratch())
    found = lab.execute(start, InProcessGrid(make_app(altered(opened, change)), list(cohorts)))
    assert found.contributed == {"north": 3, "south": 0, "west": 3}
    assert {entry["sites"]["south"]["reason"] for entry in found.rounds[1:]} == {"bad_statistics"}


def test_a_finding_that_is_absent_nowhere_ends_the_run_with_its_name(lab):
    clinics = lab.clinics()
    always = {name: cohort.labels.copy() for name, cohort in clinics.items()}
    for labels in always.values():
        labels[:, 1] = 1
    start = lab.start(**SEVERAL)
    changed = {name: replace(cohort, labels=always[name]) for name, cohort in clinics.items()}
    with pytest.raises(DataError, match="'third' is absent in no training example"):
        lab.execute(start, lab.grid(start, changed))


# ----------------------------------------------------------------------------------------------------------- farewell


def test_a_farewell_that_fails_changes_nothing_of_how_the_run_ended(lab):
    class Gone(lab.grids.Recording):
        """The line breaks when the run is over."""

        def push_messages(self, messages):
            messages = list(messages)
            if any(message.metadata.message_type == "query.finish" for message in messages):
                raise ConsiliumError("the SuperLink does not answer")
            return super().push_messages(messages)

    start = lab.start()
    assert lab.execute(start, lab.grid(start, kind=Gone)).complete


@pytest.mark.parametrize(("ended", "word"), [(QuorumLost("too few"), "failed"), (KeyboardInterrupt(), "stopped")])
def test_the_sites_are_told_how_a_run_ended(lab, monkeypatch, ended, word):
    start = lab.start()
    grid = lab.grid(start, kind=lab.grids.Recording)

    def rounds(_self, _current):
        raise ended

    monkeypatch.setattr(Coordinator, "_rounds", rounds)
    with pytest.raises(type(ended)):
        lab.execute(start, grid)
    told = [m.content["facts"]["status"] for m in grid.sent if m.metadata.message_type == "query.finish"]
    assert told == [word] * 3


# ------------------------------------------------------------------------------------------------- private runs


def private(lab, folder=None, **sections):
    return lab.start(folder, **{name: {**PRIVATE.get(name, {}), **sections.get(name, {})} for name in PRIVATE})


def test_a_private_run_stays_within_its_epsilon_and_tells_no_loss(lab):
    found = lab.execute(private(lab))
    assert found.complete
    assert found.contributed == dict.fromkeys(SITES, 3)
    assert set(found.cast.privacy) == set(SITES)
    for site, spent in found.cast.privacy.items():
        assert 0.97 * 8.0 < spent.epsilon <= spent.planned <= 8.0
        assert spent.steps == spent.planned_steps == 4
        told = [entry["sites"][site] for entry in found.rounds[1:]]
        assert all(facts["train_loss"] is None for facts in told)
        assert [facts["epsilon"] for facts in told] == sorted({facts["epsilon"] for facts in told})
        assert told[-1]["epsilon"] == spent.epsilon
    # patients, two images each, and nothing of the labels of training
    assert found.cast.examples == {"north": 8, "south": 12, "west": 4}
    assert all(not support[0].any() and support[1:].sum() == 20 for support in found.cast.support.values())
    assert found.fixed["lr"][0] > 0
    assert (found.fixed["scale"] == 1).all() and (found.fixed["class_weights"] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"strategy": "analytic"}},
        {"model": {"init": "analytic"}, "training": {"rounds": 1}},
        {"privacy": {"centre": False}},
    ],
)
def test_a_private_run_takes_its_closed_form_and_its_centre_from_the_budget(lab, sections):
    found = lab.execute(private(lab, **sections))
    assert found.complete
    for spent in found.cast.privacy.values():
        assert 0.97 * 8.0 < spent.epsilon <= 8.0
        assert spent.steps == spent.planned_steps
    assert bool(found.fixed["mean"].any()) <= sections.get("privacy", {}).get("centre", True)


@pytest.mark.slow
def test_a_private_run_that_is_resumed_spends_nothing_twice(lab, tmp_path):
    start = private(lab, tmp_path)
    memory = lab.scratch()
    with pytest.raises(QuorumLost):
        lab.execute(start, lab.grid(start, faults=["drop:south@2"], memory=memory))
    found = lab.execute(start, lab.grid(start, memory=memory))
    for spent in found.cast.privacy.values():
        assert spent.epsilon <= 8.0
        assert spent.steps == 4


def with_quorum(start, quorum):
    sites = start.run.sites.model_copy(update={"quorum": quorum})
    return replace(start, run=start.run.model_copy(update={"sites": sites}))


def test_a_site_for_which_delta_is_too_large_stays_out_before_it_gives_anything(lab, caplog):
    """South has twelve patients, of whom one in ten would be given away whole."""
    start = with_quorum(private(lab, privacy={"delta": 0.1}), 2)
    found = lab.execute(start, lab.grid(start))
    assert "refused (target)" in caplog.text and "this site has 12 training patients" in caplog.text
    assert found.cast.status.get("south", "lost(absent)") == "lost(absent)"  # in a process nobody knows who refused
    assert sorted(found.cast.privacy) == ["north", "west"]
    assert found.contributed == {"north": 3, "south": 0, "west": 3}


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_noisy_counts_are_all_that_is_known_of_an_evaluation(lab, several):
    metrics_told = {"metrics": ("confusion", "histograms")}
    sections = {name: {**values} for name, values in PRIVATE.items()}
    sections["privacy"]["histogram_epsilon"] = 50.0
    if several:
        sections["task"] = {"labels": ("glow", "third"), "kind": "multi-label"}
    start = lab.start(evaluation=metrics_told, **sections)
    found = lab.execute(start, lab.grid(start, lab.clinics() if several else None))
    assert found.complete
    assert all(not support.any() for support in found.cast.support.values())
    labels = start.run.task.labels
    for summary in (found.test.summary(labels), *(entry["validation"] for entry in found.rounds)):
        assert (summary["ece"], summary["brier"]) == (None, None)
        assert summary["auc"] is not None
        assert not any(figures.get("brier") or figures.get("ece") for figures in summary["per_class"].values())
    assert {facts["status"] for entry in found.rounds for facts in entry["sites"].values()} == {"contributed"}


@pytest.mark.slow
def test_rounds_of_noisy_counts_compete_by_their_score_and_not_by_how_many_they_seem_to_be(lab):
    sections = {**PRIVATE, "privacy": {**PRIVATE["privacy"], "histogram_epsilon": 5.0}}
    found = lab.execute(lab.start(evaluation={"metrics": ("confusion", "histograms")}, **sections))
    scores = [entry["validation"]["auc"] for entry in found.rounds]
    assert found.best_round == scores.index(max(scores))


@pytest.mark.slow
def test_a_private_site_that_says_too_much_of_its_plan_is_left_out(lab):
    def change(name, request, reply):
        return replace(reply, epsilon=8.1) if name == "south" and isinstance(reply, Description) else reply

    start = with_quorum(private(lab), 2)
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.cast.status["south"] == "quarantined(bad_statistics)"
    assert sorted(found.cast.privacy) == ["north", "west"]


@pytest.mark.slow
def test_noise_that_is_not_finite_drops_the_site(lab):
    def change(name, request, reply):
        return (
            replace(reply, total=reply.total * np.inf) if name == "south" and isinstance(reply, PrivateSums) else reply
        )

    start = with_quorum(private(lab), 2)
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.cast.status["south"] == "quarantined(bad_statistics)"
    assert np.isfinite(found.fixed["mean"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"noise_multiplier": 1e300}, {"sampling_rate": 1e-300}, {"steps": 2**62}])
def test_a_plan_that_would_overflow_what_follows_from_it_is_left_out(lab, changes):
    def change(name, request, reply):
        return replace(reply, **changes) if name == "south" and isinstance(reply, Description) else reply

    start = with_quorum(private(lab), 2)
    found = lab.execute(start, hostile_grid(lab, start, change))
    assert found.cast.status["south"] == "quarantined(bad_statistics)"
    assert np.isfinite(found.fixed["lr"]).all()
