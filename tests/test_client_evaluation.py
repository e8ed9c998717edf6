"""Evaluation at a site: the same figures as from logits worked out by hand, for any number of examples and views."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from client import evaluation
from client.evaluation import CHUNK, evaluate, head_inputs, logits
from client.features import Features
from client.rowstore import RowStore
from common import metrics, model
from common.backbone import Head, Layout, Upper
from common.run_config import Data, Model, RunConfig, Task

WIDTH = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def head_of(labels: int, dropout: float = 0.0) -> Upper:
    upper = Upper(None, Layout((), WIDTH), Head(WIDTH, labels, dropout))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (upper.head.linear.weight, upper.head.linear.bias, upper.head.get_buffer("mean")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        upper.head.get_buffer("scale").uniform_(0.5, 2, generator=generator)
    return upper


def by_hand(upper: Upper, rows: np.ndarray) -> np.ndarray:
    """Logits of rows (..., W) in float64."""
    mean, scale = (upper.head.get_buffer(name).double().numpy() for name in ("mean", "scale"))
    weight, bias = (value.detach().double().numpy() for value in (upper.head.linear.weight, upper.head.linear.bias))
    return (rows - mean) * scale @ weight.T + bias


def rows_of(views: int, examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(views, examples, WIDTH)).astype(np.float16)


def features_of(rows: np.ndarray, folder: Path) -> Features:
    store = RowStore(folder, np.dtype(("<f2", (rows.shape[2],))))
    places = np.arange(rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])
    return Features(torch.from_numpy(rows), store, places, torch.device("cpu"))


@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize("views", [1, 3])
def test_evaluation_is_that_of_logits_by_hand(tmp_path: Path, labels: int, views: int) -> None:
    rows = rows_of(views, 2 * CHUNK + 9)
    upper, truth = head_of(labels), np.random.default_rng(1).integers(0, labels, rows.shape[1])
    indices = np.random.default_rng(2).permutation(rows.shape[1])[: CHUNK + 7]
    edges = np.tile(np.linspace(-4, 4, 31), (len(metrics.targets(labels)), 1))
    found = evaluate(upper, features_of(rows, tmp_path), truth, indices, edges)
    averaged = by_hand(upper, rows.astype(np.float64)).mean(0)
    expected = metrics.evaluate(averaged[indices], truth[indices], edges)
    for name in ("confusion", "positives", "negatives"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.calibration, expected.calibration, atol=1e-4)
    assert (found.brier, found.log_loss) == pytest.approx((expected.brier, expected.log_loss), abs=1e-3)


def test_logits_come_in_the_order_of_the_indices_averaged_over_views(tmp_path: Path) -> None:
    rows = rows_of(3, CHUNK + 20)
    upper, indices = head_of(3), np.concatenate([np.arange(CHUNK + 19, 0, -2), np.array([0, 0])])
    found = logits(upper, features_of(rows, tmp_path), indices)
    assert (found.dtype, found.shape) == (np.float64, (len(indices), 3))
    np.testing.assert_allclose(found, by_hand(upper, rows.astype(np.float64)).mean(0)[indices], atol=1e-5)


def test_views_are_averaged_as_logits_not_as_probabilities(tmp_path: Path) -> None:
    """A view with a large logit outweighs two with small ones of the other sign."""
    upper = Upper(None, Layout((), 1), Head(1, 2))
    with torch.no_grad():
        upper.head.linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
    rows = np.array([[[9.0]], [[-2.0]], [[-2.0]]], np.float16)
    edges = np.array([[0.0]])
    found = evaluate(upper, features_of(rows, tmp_path), np.array([1]), np.array([0]), edges)
    np.testing.assert_array_equal(found.confusion, [[0, 0], [0, 1]])
    assert logits(upper, features_of(rows, tmp_path), np.array([0]))[0, 1] == pytest.approx(5 / 3)


@pytest.mark.parametrize("labels", [2, 3])
def test_an_empty_split_gives_zero_counts(tmp_path: Path, labels: int) -> None:
    edges = np.tile(np.linspace(-1, 1, 4), (len(metrics.targets(labels)), 1))
    nobody = np.zeros(0, np.int64)
    found = evaluate(head_of(labels), features_of(rows_of(2, 5), tmp_path), np.zeros(5, np.int64), nobody, edges)
    assert found == metrics.Evaluation.empty(labels, 5)
    assert logits(head_of(labels), features_of(rows_of(2, 5), tmp_path), nobody).shape == (0, labels)
    assert head_inputs(head_of(labels), features_of(rows_of(2, 5), tmp_path), nobody).shape == (0, WIDTH)


def test_dropout_is_off_even_after_training(tmp_path: Path) -> None:
    upper, features = head_of(2, dropout=0.5), features_of(rows_of(1, 8), tmp_path)
    upper.train()
    expected = by_hand(upper, rows_of(1, 8).astype(np.float64))[0]
    np.testing.assert_allclose(logits(upper, features, np.arange(8)), expected, atol=1e-5)


def test_head_inputs_come_chunk_by_chunk_and_view_by_view(tmp_path: Path) -> None:
    rows = rows_of(3, CHUNK + 44)
    indices = np.random.default_rng(4).permutation(CHUNK + 44)[: CHUNK + 31]
    found = head_inputs(head_of(2), features_of(rows, tmp_path), indices)
    parts = [rows[view, part] for part in (indices[:CHUNK], indices[CHUNK:]) for view in range(3)]
    np.testing.assert_array_equal(found, np.concatenate(parts).astype(np.float64))


def test_head_inputs_of_a_deep_cut_are_what_the_head_reads_not_standardised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CHUNK", 3)
    run = RunConfig(
        task=Task(name="tiny", labels=("a", "b")),
        data=Data(preset="generic", image_size=32),
        model=Model(backbone="test_efficientnet", weights="none", trainable="stages:1"),
    )
    upper = model.skeleton(run).upper
    width = upper.head.linear.in_features
    upper.head.get_buffer("mean").fill_(3.0)
    with torch.no_grad():
        upper.head.linear.weight.copy_(torch.eye(2, width))
    rows = np.random.default_rng(0).normal(size=(2, 5, upper.layout.width)).astype(np.float16)
    features = features_of(rows, tmp_path)
    found = head_inputs(upper, features, np.arange(5))
    assert found.shape == (10, width)
    seen = logits(upper, features, np.arange(5))  # the first two inputs, minus 3, averaged over views
    of_example = np.stack([found[[0, 3]], found[[1, 4]], found[[2, 5]], found[[6, 8]], found[[7, 9]]])
    np.testing.assert_allclose(seen, of_example[:, :, :2].mean(1) - 3.0, atol=1e-5)
