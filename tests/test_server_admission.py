"""What a site sends is taken as it is or refused with a code; nothing hostile comes through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from client import noisy_counts
from client.noise import Noise
from common import analytic, codec, metrics, multilabel
from common.messages import Description, Evaluated, PrivateStatistics, PrivateSums, Statistics, Summed, Trained
from common.run_config import RunConfig
from server.admission import (
    REASONS,
    Declared,
    Expectation,
    Rejected,
    admissible,
    admit_evaluation,
    admit_private_sums,
    admit_sums,
    admit_update,
)
from server.evaluation import first_edges

SHAPES = {"body": (2, 3), "head": (2,)}
SIZE = 8
WIRES = ("float32", "bfloat16", "float16")
SUPPORT = np.array([[5, 7], [2, 4], [1, 1]])
BINS = 6
NAN_BITS = {"float32": np.float32(np.nan), "bfloat16": np.uint16(0x7FC1), "float16": np.float16(np.nan)}
INFINITE = {"float32": np.float32(-np.inf), "bfloat16": np.uint16(0xFF80), "float16": np.float16(np.inf)}


def evaluation(support=SUPPORT[1], labels=2, seed=0):
    """Statistics of as many examples as are declared."""
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(labels), support)
    edges = metrics.coarse_edges(labels, BINS)
    return metrics.evaluate(random.normal(size=(len(y), labels)), y, edges).arrays()


def trained(values=None, wire="float32", **changes):
    update = np.zeros(SIZE, np.float32) if values is None else np.asarray(values, np.float32)
    vector = codec.encode({"all": update}, wire)
    return replace(Trained(vector, int(SUPPORT[0].sum()), 0.5, **evaluation()), **changes)


def expectation(wire="float32", max_norm=None):
    return Expectation(SHAPES, wire, int(SUPPORT[0].sum()), max_norm)


def test_a_reply_of_another_round_is_none():
    admit_update(trained(round=3), replace(expectation(), round=3))
    rejects("wrong_round", trained(round=2), replace(expectation(), round=3))


def rejects(reason, reply, expected):
    assert reason in REASONS
    with pytest.raises(Rejected) as caught:
        admit_update(reply, expected)
    assert str(caught.value) == reason


def edges_of(bins=BINS):
    return np.zeros((1, bins - 1))


def admitted(reply, support=SUPPORT[1], bins=BINS, exact=True):
    return admit_evaluation(reply, Declared(support, exact, calibrated=exact), edges_of(bins))


def rejects_evaluation(reply, support=SUPPORT[1], bins=BINS, exact=True):
    with pytest.raises(Rejected) as caught:
        admitted(reply, support, bins, exact)
    assert str(caught.value) == "bad_statistics"


# ---------------------------------------------------------------------------------------------------- updates


@given(
    arrays.arrays(np.float32, SIZE, elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=True)),
    st.sampled_from(WIRES),
)
def test_an_admitted_update_is_the_decoded_one(values, wire):
    admitted = admit_update(trained(values, wire), expectation(wire))
    decoded = codec.decode(codec.encode({"all": values}, wire), SHAPES, wire)
    assert list(admitted) == list(SHAPES)
    for name, shape in SHAPES.items():
        assert admitted[name].dtype == np.float32
        assert admitted[name].shape == shape
        assert admitted[name].tobytes() == decoded[name].tobytes()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("place", range(SIZE))
@pytest.mark.parametrize("poison", [NAN_BITS, INFINITE])
def test_one_value_that_is_not_finite_is_enough(wire, place, poison):
    vector = np.array(trained(wire=wire).weights)
    vector[place] = poison[wire]
    rejects("not_finite", trained(wire=wire, weights=vector), expectation(wire))


@given(arrays.arrays(np.uint16, SIZE))
def test_any_bits_of_bfloat16_are_finite_or_refused(bits):
    reply = trained(wire="bfloat16", weights=bits.astype("<u2"))
    infinite = ((bits & 0x7F80) == 0x7F80).any()
    if infinite:
        rejects("not_finite", reply, expectation("bfloat16"))
    else:
        admitted = admit_update(reply, expectation("bfloat16"))
        assert all(np.isfinite(value).all() for value in admitted.values())


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_refused(loss):
    rejects("not_finite", trained(train_loss=loss), expectation())


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(SIZE - 1, np.float32),
        np.zeros(SIZE + 1, np.float32),
        np.zeros(0, np.float32),
        np.zeros((1, SIZE), np.float32),
        np.zeros((2, 4), np.float32),
        np.zeros((), np.float32),
        np.zeros(SIZE, np.float64),
        np.zeros(SIZE, np.float16),
        np.zeros(SIZE, np.int64),
        np.zeros(SIZE, np.uint16),
    ],
)
def test_another_shape_or_precision_is_refused(vector):
    rejects("wrong_shape", trained(weights=vector), expectation())


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("sent", WIRES)
def test_the_wire_precision_is_the_one_agreed_on(wire, sent):
    reply = trained(wire=sent)
    if wire == sent:
        admit_update(reply, expectation(wire))
    else:
        rejects("wrong_shape", reply, expectation(wire))


def test_the_norm_is_that_of_all_arrays_together():
    reply = trained([3, 0, 0, 0, 0, 0, 0, 4])  # 3 in the one array, 4 in the other
    admit_update(reply, expectation(max_norm=5.0))
    rejects("norm_too_large", reply, expectation(max_norm=4.999))


def test_the_norm_of_the_largest_floats_does_not_overflow():
    reply = trained(np.full(SIZE, np.finfo(np.float32).max))
    rejects("norm_too_large", reply, expectation(max_norm=1e30))


@given(st.integers(-(2**63), 2**63 - 1))
@example(0)
@example(-12)
@example(2**62)
@example(11)
@example(13)
def test_the_number_of_examples_is_the_declared_one(count):
    assume(count != SUPPORT[0].sum())
    rejects("examples_differ", trained(num_examples=count), expectation())


# ------------------------------------------------------------------------------------------------- statistics


@given(
    st.integers(2, 4).flatmap(
        lambda k: st.tuples(st.just(k), st.lists(st.integers(0, 9), min_size=k, max_size=k), st.integers(0, 99))
    )
)
def test_admitted_statistics_are_what_was_sent(case):
    labels, counts, seed = case
    support = np.array(counts)
    sent = evaluation(support, labels, seed)
    found = admitted(Evaluated(**sent), support)
    for name, value in found.arrays().items():
        assert np.array_equal(value, sent[name])


def test_both_kinds_of_reply_carry_statistics():
    assert admitted(trained()) == admitted(Evaluated(**evaluation()))


@pytest.mark.parametrize("name", ["confusion", "positives", "negatives"])
@pytest.mark.parametrize("value", [-1, 2**41, 2**62, -(2**63)])
def test_negative_and_huge_counts_are_refused(name, value):
    sent = evaluation()
    sent[name] = sent[name].copy()
    sent[name][0, 0] = value
    rejects_evaluation(Evaluated(**sent))


def test_counts_whose_sum_wraps_around_are_refused():
    sent = evaluation(np.array([0, 0]))
    sent["confusion"] = np.array([[2**62, 2**62], [2**62, 2**62]])  # 2^64 is 0 in 64 bits
    rejects_evaluation(Evaluated(**sent), np.array([0, 0]))


@pytest.mark.parametrize("name", ["calibration", "brier", "log_loss"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-9])
def test_reals_are_finite_and_not_negative(name, value):
    sent = evaluation()
    sent[name] = sent[name].copy()
    sent[name].flat[-1] = value
    rejects_evaluation(Evaluated(**sent))


@pytest.mark.parametrize("name", metrics.FIELDS)
def test_another_type_or_shape_is_refused(name):
    sent = evaluation()
    other = np.float32 if sent[name].dtype == np.float64 else np.float64
    for value in (sent[name].astype(other), sent[name].ravel()[:-1], sent[name][None], np.zeros((0, 0), np.int64)):
        rejects_evaluation(Evaluated(**{**sent, name: value}))


@pytest.mark.parametrize("declared", [[2, 3], [3, 4], [4, 2], [0, 0], [6, 0]])
def test_statistics_of_other_examples_than_declared_are_refused(declared):
    rejects_evaluation(Evaluated(**evaluation()), np.array(declared))


def test_statistics_of_other_labels_are_refused():
    rejects_evaluation(Evaluated(**evaluation(np.array([2, 4, 0]), 3)), np.array([2, 4]))


@pytest.mark.parametrize("bins", [BINS - 1, BINS + 1, 1, len(first_edges(2)[0]) + 1])
def test_other_bins_than_asked_for_are_refused(bins):
    rejects_evaluation(Evaluated(**evaluation()), bins=bins)


@given(st.sampled_from(["confusion", "positives", "negatives"]), st.data())
def test_moving_one_example_to_another_label_is_noticed(name, data):
    """A histogram or a confusion matrix alone cannot change its totals: the others contradict it."""
    sent = evaluation()
    counts = sent[name].copy()
    place = data.draw(st.integers(0, counts.size - 1))
    counts.flat[place] += data.draw(st.integers(1, 5))
    rejects_evaluation(Evaluated(**{**sent, name: counts}))


def test_an_empty_split_has_empty_statistics():
    nothing = np.array([0, 0])
    assert admitted(Evaluated(**evaluation(nothing)), nothing).examples == 0
    rejects_evaluation(Evaluated(**evaluation()), nothing)


# ------------------------------------------------------------------------------------------------ noisy statistics


def hidden(support=SUPPORT[1], labels=2, seed=0):
    """Statistics under Laplace noise, as a site makes them."""
    exact = metrics.Evaluation.from_arrays(evaluation(support, labels, seed))
    return noisy_counts.noisy(exact, 1.0, Noise()).arrays()


@given(st.integers(0, 99))
def test_noisy_statistics_need_not_agree_with_anything_declared(seed):
    sent = hidden(seed=seed)
    found = admitted(Evaluated(**sent), np.array([0, 0]), exact=False)
    for name, value in found.arrays().items():
        assert np.array_equal(value, sent[name])


def test_calibration_is_withheld_only_where_the_run_does_not_ask_for_it():
    for sent, support in ((evaluation(), SUPPORT[1]), (labelwise(), TRAIN_STATES)):
        without = Evaluated(**{**sent, "calibration": np.zeros_like(sent["calibration"])})
        rejects_evaluation(without, support)
        found = admit_evaluation(without, Declared(support, calibrated=False), edges_of())
        assert not found.arrays()["calibration"].any()


@given(st.sampled_from(["confusion", "positives", "negatives"]), st.integers(-9, 9))
def test_totals_of_noisy_statistics_agree(name, change):
    assume(change)
    sent = hidden()
    counts = sent[name].copy()
    counts[0, 0] += change
    rejects_evaluation(Evaluated(**{**sent, name: counts}), exact=False)


@pytest.mark.parametrize("name", metrics.FIELDS)
def test_noisy_statistics_of_another_type_or_shape_are_refused(name):
    for sent, support in ((hidden(), SUPPORT[1]), (hidden_labelwise(), TRAIN_STATES)):
        other = np.float32 if sent[name].dtype == np.float64 else np.float64
        value = sent[name]
        endless = np.full(value.shape, np.inf)
        for wrong in (value.astype(other), value.ravel()[:-1], value[None], np.zeros((0, 0), np.int64), endless):
            rejects_evaluation(Evaluated(**{**sent, name: wrong}), support, exact=False)


def hidden_labelwise():
    exact = multilabel.LabelwiseEvaluation.from_arrays(labelwise(), 3, 12)
    return noisy_counts.noisy(exact, 1.0, Noise()).arrays()


def test_noisy_statistics_of_several_labels_are_admitted():
    sent = hidden_labelwise()
    found = admitted(Evaluated(**sent), np.zeros_like(TRAIN_STATES), exact=False)
    assert all(np.array_equal(value, sent[name]) for name, value in found.arrays().items())
    rejects_evaluation(Evaluated(**sent), SUPPORT[1], exact=False)


# ---------------------------------------------------------------------------------------- what a site says of itself

EXACT = RunConfig.model_validate({"task": {"labels": ("a", "b")}})
PRIVATE = RunConfig.model_validate({"task": {"labels": ("a", "b")}, "privacy": {"epsilon": 3.0}})
UNTOLD = SUPPORT * np.array([[0], [1], [1]])


def described(**changes):
    values = {"examples": 12, "unit": "patient", "delta": 1e-3, "epsilon": 3.0, "noise_multiplier": 2.0}
    return Description("x", UNTOLD, "", **{**values, "sampling_rate": 0.5, "steps": 30, **changes})


def test_a_site_needs_something_to_train_on():
    assert admissible(Description("x", SUPPORT, ""), EXACT)
    assert not admissible(Description("x", UNTOLD, ""), EXACT)
    assert not admissible(Description("x", SUPPORT.astype(float), ""), EXACT)


def test_a_site_of_a_private_run_tells_its_size_and_its_plan_and_no_training_labels():
    assert admissible(described(), PRIVATE)
    assert not admissible(replace(described(), support=SUPPORT), PRIVATE)
    assert not admissible(described(examples=0), PRIVATE)
    assert not admissible(described(examples=2**41), PRIVATE)
    assert not admissible(described(epsilon=3.1), PRIVATE)
    assert not admissible(Description("x", UNTOLD, ""), PRIVATE)


# ------------------------------------------------------------------------------------------------------- noisy sums

CLOSED, CENTRE = PrivateStatistics("", gram=True), PrivateStatistics("", gram=False)


def sums(**changes):
    """The reply to a request for the closed form of four inputs and two labels."""
    values = {"total": np.zeros(0), "gram": np.ones(15), "cross": -np.ones((5, 2))}
    return PrivateSums(**{**values, "noise_multiplier": 2.0, "epsilon": 1.0, "steps": 1, **changes})


def test_noisy_sums_are_taken_as_they_are():
    found = admit_private_sums(sums(), CLOSED, 4, 2)
    assert (found.gram.tolist(), found.cross.tolist()) == ([1.0] * 15, [[-1.0, -1.0]] * 5)
    total = sums(total=np.ones(4), gram=np.zeros(0), cross=np.zeros((0, 0)))
    assert admit_private_sums(total, CENTRE, 4, 2).total.tolist() == [1.0] * 4
    for reply, request in ((total, CLOSED), (sums(), CENTRE)):
        with pytest.raises(Rejected, match="bad_statistics"):
            admit_private_sums(reply, request, 4, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"gram": np.full(15, np.nan)},
        {"gram": np.full(15, 1e300)},
        {"gram": np.ones(14)},
        {"cross": np.full((5, 2), -np.inf)},
        {"cross": np.ones((5, 3))},
        {"cross": np.ones(10)},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"steps": -1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_noisy_sums_that_cannot_be_are_refused(changes):
    with pytest.raises(Rejected, match="bad_statistics"):
        admit_private_sums(sums(**changes), CLOSED, 4, 2)


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf")])
def test_an_epsilon_that_is_not_finite_is_refused(epsilon):
    rejects("not_finite", trained(epsilon=epsilon), expectation())


# ---------------------------------------------------------------------------------------- several labels an image

# By state (present, absent, between, missing) and label: 12 training examples.
TRAIN_STATES = np.array([[5, 2, 4], [4, 6, 0], [1, 0, 2], [2, 4, 6]])
BOTH_SIDES = np.array([[0.5, 1.0, 2.0], [3.0, 1.0, 0.7]])
WIDTH = 4


def targets_of(states):
    """Targets that are in these states: (N, K)."""
    columns = [np.repeat(np.array([1, 0, 0.5, np.nan], np.float32), column) for column in states.T]
    return np.stack([np.random.default_rng(k).permutation(column) for k, column in enumerate(columns)], axis=1)


def labelwise(states=TRAIN_STATES, seed=0):
    targets = targets_of(states)
    logits = np.random.default_rng(seed).normal(size=targets.shape)
    return multilabel.evaluate(logits, targets, multilabel.coarse_edges(3, BINS)).arrays()


def test_statistics_of_several_labels_are_taken_as_they_are():
    found = admitted(Evaluated(**labelwise()), TRAIN_STATES)
    assert found.examples == 12
    assert found.support.tolist() == TRAIN_STATES[:2].tolist()
    for name, value in labelwise().items():
        assert np.array_equal(found.arrays()[name], value)


@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2), (0, 3), (1, 3)])
def test_annotations_of_another_state_than_declared_are_refused(label, one, other):
    declared = TRAIN_STATES.copy()
    declared[one, label] += 1
    declared[other, label] -= 1
    rejects_evaluation(Evaluated(**labelwise()), declared)


@pytest.mark.parametrize("name", metrics.FIELDS)
def test_another_type_or_shape_of_several_labels_is_refused(name):
    sent = labelwise()
    other = np.float32 if sent[name].dtype == np.float64 else np.float64
    value = sent[name]
    for wrong in (value.astype(other), value[:-1], value[None], value[..., None], np.zeros((0, 0), np.int64)):
        rejects_evaluation(Evaluated(**{**sent, name: wrong}), TRAIN_STATES)


@given(st.sampled_from(["confusion", "positives", "negatives"]), st.data())
def test_moving_one_annotation_is_noticed(name, data):
    sent = labelwise()
    counts = sent[name].copy()
    counts.flat[data.draw(st.integers(0, counts.size - 1))] += data.draw(st.integers(1, 5))
    rejects_evaluation(Evaluated(**{**sent, name: counts}), TRAIN_STATES)


def test_statistics_of_one_kind_are_not_those_of_the_other():
    rejects_evaluation(Evaluated(**evaluation()), TRAIN_STATES)
    rejects_evaluation(Evaluated(**labelwise()), SUPPORT[1])
    rejects_evaluation(Evaluated(**labelwise()), TRAIN_STATES, bins=BINS + 1)


def test_an_update_is_of_the_declared_examples_of_several_labels():
    expected = Expectation(SHAPES, "float32", int(TRAIN_STATES[:, 0].sum()))
    admit_update(trained(num_examples=12), expected)
    rejects("examples_differ", trained(num_examples=11), expected)
    rejects("examples_differ", trained(num_examples=36), expected)


def summed(**changes):
    """The sums of a site with several labels, changed by a function of the value."""
    inputs = np.random.default_rng(1).normal(size=(12, WIDTH))
    values = analytic.labelwise_sums(inputs, targets_of(TRAIN_STATES), BOTH_SIDES, gram=True).__dict__
    return Summed(**{name: changes[name](value) if name in changes else value for name, value in values.items()})


def asked(weights=BOTH_SIDES, gram=True):
    return Statistics("", weights, gram)


def test_sums_of_several_labels_are_admitted_with_and_without_their_matrices():
    found = admit_sums(summed(), asked(), TRAIN_STATES, WIDTH)
    assert found.gram.shape == (3, 10) and found.weighted.shape == (3, WIDTH)
    short = replace(summed(), gram=np.zeros((3, 0)), cross=np.zeros((0, 0)))
    admit_sums(short, asked(gram=False), TRAIN_STATES, WIDTH)


SHIFTED = {name: lambda value: value + 0.01 for name in ("count", "weight", "targets")}
HOSTILE = {
    **{f"other {name}": {name: change} for name, change in SHIFTED.items()},
    **{f"{name} of NaN": {name: lambda value: value * np.nan} for name in Summed.__dataclass_fields__},
    **{f"flat {name}": {name: lambda value: value.reshape(-1)[:-1]} for name in Summed.__dataclass_fields__},
    "more present than can be": {
        "targets": lambda value: value + BOTH_SIDES[1] * 1.5,
        "weight": lambda value: value + (BOTH_SIDES[1] - BOTH_SIDES[0]) * 1.5,
    },
    "fewer present than can be": {
        "targets": lambda value: value - BOTH_SIDES[1] * 1.5,
        "weight": lambda value: value - (BOTH_SIDES[1] - BOTH_SIDES[0]) * 1.5,
    },
    "endless": {"gram": lambda value: value + 1e300},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_sums_that_contradict_what_was_declared_are_refused(case):
    with pytest.raises(Rejected, match="bad_statistics"):
        admit_sums(summed(**HOSTILE[case]), asked(), TRAIN_STATES, WIDTH)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_in_between_may_count_as_any_share(share):
    targets = targets_of(TRAIN_STATES)
    targets[targets == 0.5] = share
    sums = analytic.labelwise_sums(np.ones((12, WIDTH)), targets, BOTH_SIDES, gram=False)
    admit_sums(Summed(**sums.__dict__), asked(gram=False), TRAIN_STATES, WIDTH)
