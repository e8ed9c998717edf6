"""Several labels an image: each counted over its own annotations, added up over sites, and never by what is masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import metrics, multilabel
from common.multilabel import LabelwiseEvaluation, aligned, check_targets, count_states

law = settings(deadline=None, max_examples=60)
BINS = 32


def draw(seed: int, n: int, k: int, masked: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (n, k) and targets (n, k) with what is masked, uncertain, absent and present."""
    stream = np.random.default_rng(seed)
    targets = (stream.random((n, k)) < 0.4).astype(np.float32)
    logits = stream.normal(size=(n, k)) + np.nan_to_num(targets)
    targets[stream.random((n, k)) < masked / 2] = np.nan
    targets[stream.random((n, k)) < masked / 3] = 0.5
    return logits, targets


def evaluated(logits: np.ndarray, targets: np.ndarray) -> LabelwiseEvaluation:
    return multilabel.evaluate(logits, targets, multilabel.coarse_edges(targets.shape[1], BINS))


def names(k: int) -> tuple[str, ...]:
    return tuple(f"finding {number}" for number in range(k))


cases = st.tuples(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 5))


@law
@given(cases)
def test_each_label_is_evaluated_as_two_labels_over_what_was_annotated_clearly(case: tuple[int, int, int]) -> None:
    logits, targets = draw(*case)
    found = evaluated(logits, targets)
    assert found.examples == len(logits)
    edges = metrics.coarse_edges(2, BINS)
    for k, label in enumerate(found.labels):
        clear = np.isin(targets[:, k], [0, 1])
        both = np.stack([np.zeros(clear.sum()), logits[clear, k]], axis=1)
        assert label == metrics.evaluate(both, targets[clear, k].astype(int), edges)
    assert found.support.tolist() == count_states(targets)[:2].tolist()


@law
@given(cases, st.integers(1, 4))
def test_sums_over_sites_are_the_evaluation_of_the_pool(case: tuple[int, int, int], sites: int) -> None:
    logits, targets = draw(*case)
    site = np.random.default_rng(case[0]).integers(0, sites, len(logits))
    parts = [evaluated(logits[site == number], targets[site == number]) for number in range(sites)]
    assert sum(parts[1:], parts[0]) == evaluated(logits, targets)


@law
@given(cases)
def test_what_is_masked_decides_nothing(case: tuple[int, int, int]) -> None:
    """Neither the logits of a masked annotation, nor whether a share is 0.5 or 0.3."""
    logits, targets = draw(*case)
    other, shares = logits.copy(), targets.copy()
    unclear = ~np.isin(targets, [0, 1])
    other[unclear] = 77.0
    shares[targets == 0.5] = 0.3
    assert evaluated(other, shares) == evaluated(logits, targets)


@law
@given(cases)
def test_arrays_are_read_as_they_were_written(case: tuple[int, int, int]) -> None:
    found = evaluated(*draw(*case))
    arrays = found.arrays()
    k = case[2]
    assert {name: value.shape for name, value in arrays.items()} == {
        "confusion": (k, 2, 2), "positives": (k, BINS), "negatives": (k, BINS), "calibration": (k, 15, 3),
        "brier": (k,), "log_loss": (k,),
    }  # fmt: skip
    assert LabelwiseEvaluation.from_arrays(arrays, k, found.examples) == found


def changed(name: str, change: Any) -> dict[str, np.ndarray]:
    arrays = evaluated(*draw(5, 40, 3)).arrays()
    value = arrays[name].copy()
    return {**arrays, name: change(value)}


def bumped(place: tuple[int, ...], by: float) -> Any:
    def change(value: np.ndarray) -> np.ndarray:
        value[place] += by
        return value

    return change


def thinned(value: np.ndarray) -> np.ndarray:
    """Take out one of several bins that hold examples."""
    value[tuple(np.argwhere(value[..., 0] > 0)[0])] = 0
    return value


HOSTILE = {
    "another label": changed("confusion", lambda value: np.concatenate([value, value[:1]])),
    "one label less": changed("brier", lambda value: value[:2]),
    "flat confusion": changed("confusion", lambda value: value.reshape(3, 4)),
    "three labels a label": changed("confusion", lambda value: np.zeros((3, 3, 3), np.int64)),
    "a number": changed("log_loss", lambda value: np.float64(1.0)),
    "no array": changed("log_loss", lambda value: [0.0, 0.0, 0.0]),
    "a negative count": changed("positives", bumped((1, 3), -100)),
    "a positive too many": changed("positives", bumped((2, 0), 1)),
    "a negative too many": changed("negatives", bumped((0, 5), 1)),
    "other bins": changed("negatives", lambda value: value[:, 1:]),
    "confusion of more": changed("confusion", bumped((0, 1, 1), 1)),
    "a NaN": changed("brier", bumped((1,), np.nan)),
    "Brier score above 1": changed("brier", bumped((1,), 99.0)),
    "calibration of fewer": changed("calibration", thinned),
    "counts as floats": changed("positives", lambda value: value.astype(float)),
    "floats of 32 bits": changed("calibration", lambda value: value.astype(np.float32)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_an_evaluation_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="evaluation"):
        LabelwiseEvaluation.from_arrays(HOSTILE[case], 3, 40)


def test_calibration_may_be_withheld_whole() -> None:
    arrays = changed("calibration", lambda value: value * 0)
    assert not LabelwiseEvaluation.from_arrays(arrays, 3, 40).arrays()["calibration"].any()


def test_no_label_can_be_annotated_in_more_examples_than_there_are() -> None:
    found = evaluated(*draw(5, 40, 3, masked=0.0))
    LabelwiseEvaluation.from_arrays(found.arrays(), 3, 40)
    with pytest.raises(ValueError, match="more than 39"):
        LabelwiseEvaluation.from_arrays(found.arrays(), 3, 39)
    with pytest.raises(ValueError, match="exactly"):
        LabelwiseEvaluation.from_arrays({"confusion": found.arrays()["confusion"]}, 3, 40)


def test_evaluations_of_other_labels_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="2 and of 3 labels"):
        evaluated(*draw(0, 5, 2)) + evaluated(*draw(0, 5, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_an_error_even_where_nothing_was_annotated(value: float) -> None:
    logits, targets = draw(0, 6, 2)
    targets[3, 1], logits[3, 1] = np.nan, value
    with pytest.raises(ValueError, match="not finite"):
        evaluated(logits, targets)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    logits, targets = draw(0, 6, 2)
    for wrong in (logits[:, :1], logits[:5]):
        with pytest.raises(ValueError, match="expected"):
            evaluated(wrong, targets)
    with pytest.raises(ValueError, match="expected"):
        multilabel.evaluate(logits, targets, multilabel.coarse_edges(3, BINS))


# -------------------------------------------------------------------------------------------------------- summaries


def summary(logits: np.ndarray, targets: np.ndarray, thresholds: Any = None) -> dict[str, Any]:
    k = targets.shape[1]
    return multilabel.summarise(evaluated(logits, targets), names(k), multilabel.coarse_edges(k, BINS), thresholds)


@law
@given(cases)
def test_every_figure_is_the_mean_over_the_labels_that_have_it(case: tuple[int, int, int]) -> None:
    logits, targets = draw(*case)
    found = summary(logits, targets)
    each = []
    for k in range(targets.shape[1]):
        clear = np.isin(targets[:, k], [0, 1])
        both = np.stack([np.zeros(clear.sum()), logits[clear, k]], axis=1)
        edges = metrics.coarse_edges(2, BINS)
        each.append(metrics.summarise(metrics.evaluate(both, targets[clear, k].astype(int), edges), "no", edges))
    for key in set(found) - {"examples", "support", "auc_ci95", "per_class", "operating_point"}:
        defined = [figures[key] for figures in each if figures[key] is not None]
        assert found[key] == (pytest.approx(np.mean(defined)) if defined else None), key
        assert [figures[key] for figures in found["per_class"].values()] == [figures[key] for figures in each], key
    assert found["examples"] == len(logits)
    assert list(found["support"].values()) == (targets == 1).sum(0).tolist()
    assert [figures["annotated"] for figures in found["per_class"].values()] == np.isin(targets, [0, 1]).sum(0).tolist()


def test_the_keys_are_those_of_one_label_an_image_and_in_their_order() -> None:
    edges = metrics.coarse_edges(2, 8)
    single = metrics.summarise(metrics.evaluate([[0, 1.0]], [1], edges), "no", edges)
    found = summary(*draw(0, 9, 3))
    assert list(found) == list(single)
    assert set(single["per_class"]["n"]) < set(found["per_class"]["finding 0"])
    assert found["operating_point"] is None


def test_one_label_alone_has_the_figures_of_two_labels() -> None:
    logits, targets = draw(3, 50, 1, masked=0.0)
    edges = metrics.coarse_edges(2, BINS)
    both = np.stack([np.zeros(50), logits[:, 0]], axis=1)
    single = metrics.summarise(metrics.evaluate(both, targets[:, 0].astype(int), edges), ("no", "yes"), edges)
    found = summary(logits, targets)
    for key in set(single) - {"support", "per_class"}:
        assert found[key] == single[key], key


def test_the_interval_of_the_mean_takes_the_mean_error_and_needs_every_error() -> None:
    logits, targets = draw(1, 80, 2, masked=0.0)
    found = summary(logits, targets)
    halves = [(high - low) / 2 for low, high in (figures["auc_ci95"] for figures in found["per_class"].values())]
    low, high = found["auc_ci95"]
    assert (high - low) / 2 == pytest.approx(np.mean(halves))
    targets[:, 1] = 0
    targets[0, 1] = 1  # one positive: its AUC is defined, the error is not
    assert summary(logits, targets)["auc_ci95"] is None
    targets[:, 1] = np.nan
    assert summary(logits, targets)["auc_ci95"] == found["per_class"]["finding 0"]["auc_ci95"]


def test_labels_that_nobody_annotated_are_undefined_and_not_zero() -> None:
    logits, targets = draw(0, 12, 2)
    targets[:, 1] = np.nan
    found = summary(logits, targets)["per_class"]["finding 1"]
    assert found.pop("annotated") == 0
    assert set(found.values()) == {None}
    targets[:] = np.nan
    found = summary(logits, targets)
    assert found["examples"] == 12
    assert found["auc"] is found["accuracy"] is found["brier"] is None
    assert evaluated(logits, targets).mean_log_loss is None


def test_each_label_has_its_own_operating_point() -> None:
    logits, targets = draw(2, 200, 3)
    logits += np.array([0.0, 3.0, -3.0])
    targets[:, 2] = 0
    first = evaluated(logits, targets)
    edges = multilabel.coarse_edges(3, BINS)
    thresholds = multilabel.youden(first, edges)
    assert thresholds[2] is None
    edges = multilabel.quantile_edges(first, edges, 16, thresholds)
    assert edges.shape == (3, 15)
    found = multilabel.summarise(multilabel.evaluate(logits, targets, edges), names(3), edges, thresholds)
    for k, name in enumerate(names(2)):
        point = found["per_class"][name]["operating_point"]
        above, clear = logits[:, k] >= thresholds[k], np.isin(targets[:, k], [0, 1])
        assert point["recall"] == pytest.approx(above[clear & (targets[:, k] == 1)].mean())
        assert point["specificity"] == pytest.approx(1 - above[clear & (targets[:, k] == 0)].mean())
        assert point["threshold"] == pytest.approx(1 / (1 + np.exp(-thresholds[k])))
    assert found["per_class"]["finding 2"]["operating_point"] is None


def test_names_must_be_as_many_and_different() -> None:
    found, edges = evaluated(*draw(0, 5, 2)), multilabel.coarse_edges(2, BINS)
    for wrong in (("a",), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(ValueError, match="2 different names"):
            multilabel.summarise(found, wrong, edges)


# ------------------------------------------------------------------------------------------------------ annotations


@law
@given(cases)
def test_states_of_a_label_sum_to_the_examples(case: tuple[int, int, int]) -> None:
    _, targets = draw(*case)
    counts = count_states(targets)
    assert counts.shape == (4, targets.shape[1]) and counts.dtype == np.int64
    assert (counts.sum(0) == len(targets)).all()
    assert counts[3].tolist() == np.isnan(targets).sum(0).tolist()


def test_columns_are_found_by_name() -> None:
    _, targets = draw(0, 5, 3)
    found = aligned(targets, ("a", "b", "c"), ("c", "x", "a"))
    np.testing.assert_array_equal(found[:, [0, 2]], targets[:, [2, 0]])
    assert np.isnan(found[:, 1]).all() and found.dtype == np.float32


@pytest.mark.parametrize(
    "targets",
    [
        np.zeros((3, 2)),  # float64
        np.zeros((3, 2), np.int64),
        np.zeros(3, np.float32),
        np.zeros((3, 0), np.float32),
        np.array([[0, -1]], np.float32),
        np.array([[0, 1.01]], np.float32),
        np.array([[0, np.inf]], np.float32),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}",
)
def test_targets_of_another_kind_are_refused(targets: np.ndarray) -> None:
    with pytest.raises(ValueError, match="targets"):
        check_targets(targets)
