"""One site's part in a round, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.features import Features
from client.rowstore import RowStore
from client.training import (
    Fitted,
    add_proximal_gradient,
    example_losses,
    fit,
    learning_rate,
    steps_per_round,
    weighted_loss,
)
from common import model
from common.backbone import Head, Layout, Upper
from common.run_config import DEEP_LR, HEAD_LR, Data, Model, RunConfig, Task, Training, base_lr

EVEN = torch.ones(3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def head_of(width: int, labels: int = 3, dropout: float = 0.0) -> Upper:
    upper = Upper(None, Layout((), width), Head(width, labels, dropout))
    with torch.no_grad():
        upper.head.linear.weight.copy_(torch.randn(labels, width, generator=torch.Generator().manual_seed(1)) * 0.3)
    return upper


def features_of(rows: Tensor, folder: Path) -> Features:
    """Features (K, N, D) that are in memory."""
    store = RowStore(folder, np.dtype(("<f2", (rows.shape[2],))))
    places = np.arange(rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])
    return Features(rows, store, places, torch.device("cpu"))


def problem(folder: Path, examples: int = 12, views: int = 1, width: int = 5) -> tuple[Features, Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(views, examples, width, generator=generator)
    return features_of(rows, folder), torch.randint(3, (examples,), generator=generator)


def trained(upper: Upper, features: Features, labels: Tensor, training: Training, **choices: object) -> Fitted:
    settled: dict[str, object] = {"round_number": 1, "class_weights": EVEN, "seed": 0, "site": "site-1", **choices}
    indices = settled.pop("indices", np.arange(len(labels)))
    return fit(upper, features, labels, indices, training, **settled)  # type: ignore[arg-type]


def bytes_of(upper: Upper) -> bytes:
    return b"".join(value.detach().numpy().tobytes() for _, value in sorted(upper.trainable().items()))


# FedProx


@settings(max_examples=50, deadline=None)
@given(mu=st.floats(0.0, 100.0), seed=st.integers(0, 2**32), shape=st.sampled_from([(3,), (2, 3), (1, 4, 2)]))
def test_the_proximal_gradient_is_that_of_half_mu_times_the_squared_distance(
    mu: float, seed: int, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]
    received = [torch.randn(shape, generator=generator) for _ in range(2)]
    loss = sum((parameter**3).sum() for parameter in parameters)
    distance = sum(((p - r) ** 2).sum() for p, r in zip(parameters, received, strict=True))
    wanted = torch.autograd.grad(loss + mu / 2 * distance, parameters)
    sum((parameter**3).sum() for parameter in parameters).backward()
    add_proximal_gradient(parameters, received, mu)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(2))
    add_proximal_gradient([parameter], [torch.zeros(2)], 0.5)
    assert parameter.grad is None


def softmax_gradient(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(len(weight))[y]) / len(x)
    return [error.T @ x, error.sum(0)]


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_two_steps_of_sgd_by_hand(tmp_path: Path, mu: float) -> None:
    """One batch holds everything: two steps are two gradients, momentum 0.9, and the pull back in the second."""
    features, labels = problem(tmp_path)
    upper = head_of(5)
    start = [upper.head.linear.weight.detach().double().numpy(), upper.head.linear.bias.detach().double().numpy()]
    x, y = features.resident[0].double().numpy(), labels.numpy()  # type: ignore[index]
    training = Training(
        strategy=f"fedprox:{mu}", rounds=1, local_steps=2, batch_size=99, optimizer="sgd", lr=0.5, schedule="constant"
    )
    fitted = trained(upper, features, labels, training)
    first = softmax_gradient(start[0], start[1], x, y)
    middle = [w - 0.5 * g for w, g in zip(start, first, strict=True)]
    second = softmax_gradient(middle[0], middle[1], x, y)
    pulled = [g + mu * (m - w) for g, m, w in zip(second, middle, start, strict=True)]
    expected = [m - 0.5 * (0.9 * v + g) for m, v, g in zip(middle, first, pulled, strict=True)]
    np.testing.assert_allclose(upper.head.linear.weight.detach().numpy(), expected[0], atol=2e-6)
    np.testing.assert_allclose(upper.head.linear.bias.detach().numpy(), expected[1], atol=2e-6)
    losses = [-np.log(np.exp(z := x @ w.T + b)[np.arange(12), y] / np.exp(z).sum(1)).mean() for w, b in (start, middle)]
    assert fitted.loss == pytest.approx(np.mean(losses), abs=1e-6)  # without the proximal term
    assert fitted.steps == 2


def test_mu_zero_is_fedavg_to_the_last_bit_and_a_large_mu_stays_near(tmp_path: Path) -> None:
    features, labels = problem(tmp_path, examples=40)
    ends, distances = {}, {}
    start = head_of(5).head.linear.weight.detach().clone()
    for strategy in ("fedavg", "fedprox:0", "fedprox:30"):
        upper = head_of(5)
        trained(
            upper, features, labels, Training(strategy=strategy, local_epochs=4, batch_size=8, optimizer="sgd", lr=0.03)
        )
        ends[strategy] = bytes_of(upper)
        distances[strategy] = float((upper.head.linear.weight.detach() - start).norm())
    assert ends["fedprox:0"] == ends["fedavg"] != ends["fedprox:30"]
    assert distances["fedprox:30"] < 0.5 * distances["fedavg"]


# Repeatable


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_seed_site_and_round_give_the_same_bytes(tmp_path: Path, dropout: float) -> None:
    """Whatever else drew random numbers in between."""
    features, labels = problem(tmp_path, examples=30, views=3)
    training = Training(local_epochs=2, batch_size=8, lr=0.01, schedule="constant")

    def end(noise: int = 0, **choices: object) -> bytes:
        torch.manual_seed(noise)
        upper = head_of(5, dropout=dropout)
        trained(upper, features, labels, training, **choices)
        return bytes_of(upper)

    base = end()
    assert end(noise=1) == base
    assert len({base, end(seed=1), end(site="site-2"), end(round_number=2)}) == 4


def test_training_draws_nothing_from_the_random_numbers_of_others(tmp_path: Path) -> None:
    features, labels = problem(tmp_path)
    upper = head_of(5, dropout=0.5)
    state = torch.get_rng_state()
    trained(upper, features, labels, Training(local_steps=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_round_starts_a_fresh_optimiser(tmp_path: Path) -> None:
    """Two sites that hold the same weights end with the same, whatever was trained in that model before."""
    features, labels = problem(tmp_path)
    training = Training(local_steps=3, optimizer="sgd", lr=0.1)
    used, fresh = head_of(5), head_of(5)
    trained(used, features, labels, training, site="other")
    used.load_state_dict(fresh.state_dict())
    trained(used, features, labels, training)
    trained(fresh, features, labels, training)
    assert bytes_of(used) == bytes_of(fresh)


# What is visited


class Numbered:
    """A head whose inputs tell example and view apart, and what it has seen."""

    def __init__(self, folder: Path, examples: int, views: int) -> None:
        rows = torch.stack(torch.meshgrid(torch.arange(views), torch.arange(examples), indexing="ij"), -1).float()
        self.features = features_of(rows, folder)
        self.labels = torch.zeros(examples, dtype=torch.int64)
        self.upper = head_of(2)
        self.batches: list[list[tuple[int, int]]] = []
        self.upper.register_forward_pre_hook(self._note)

    def _note(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.batches.append([(int(view), int(example)) for view, example in inputs[0]])

    def examples(self) -> list[int]:
        return [example for batch in self.batches for _, example in batch]


@settings(max_examples=30, deadline=None)
@given(examples=st.integers(1, 20), size=st.integers(1, 9), epochs=st.integers(1, 4), views=st.integers(1, 3))
def test_an_epoch_visits_every_example_once(
    tmp_path_factory: pytest.TempPathFactory, examples: int, size: int, epochs: int, views: int
) -> None:
    numbered = Numbered(tmp_path_factory.mktemp("rows"), examples + 5, views)
    indices = np.arange(5, examples + 5)  # the first five belong to other splits
    training = Training(local_epochs=epochs, batch_size=size, rounds=1)
    fitted = trained(numbered.upper, numbered.features, numbered.labels, training, indices=indices)
    assert fitted.steps == len(numbered.batches) == epochs * math.ceil(examples / size)
    assert all(len(batch) <= size for batch in numbered.batches)
    visited = np.array(numbered.examples()).reshape(epochs, examples)
    np.testing.assert_array_equal(np.sort(visited, axis=1), np.tile(indices, (epochs, 1)))


@settings(max_examples=30, deadline=None)
@given(examples=st.integers(1, 20), size=st.integers(1, 9), steps=st.integers(1, 15))
def test_local_steps_are_exact(tmp_path_factory: pytest.TempPathFactory, examples: int, size: int, steps: int) -> None:
    numbered = Numbered(tmp_path_factory.mktemp("rows"), examples, 1)
    fitted = trained(numbered.upper, numbered.features, numbered.labels, Training(local_steps=steps, batch_size=size))
    assert fitted.steps == len(numbered.batches) == steps
    counts = np.bincount(numbered.examples(), minlength=examples)
    assert counts.max() - counts.min() <= 1  # whole passes, the last one cut short


def test_views_are_drawn_anew_for_each_visit(tmp_path: Path) -> None:
    numbered = Numbered(tmp_path, 50, 3)
    training = Training(local_epochs=20, batch_size=25)
    trained(numbered.upper, numbered.features, numbered.labels, training)
    visits = np.array([visit for batch in numbered.batches for visit in batch])
    shares = np.bincount(visits[:, 0], minlength=3) / len(visits)
    assert np.abs(shares - 1 / 3).max() < 0.06
    assert all(len(set(visits[visits[:, 1] == example, 0])) > 1 for example in range(50))


def test_orders_differ_between_epochs(tmp_path: Path) -> None:
    numbered = Numbered(tmp_path, 20, 1)
    trained(numbered.upper, numbered.features, numbered.labels, Training(local_epochs=2, batch_size=20))
    first, second = (batch for batch in numbered.batches)
    assert first != second != sorted(second)


@pytest.mark.parametrize("training", [Training(local_epochs=2), Training(local_steps=3)])
def test_a_site_without_training_examples_takes_no_step(tmp_path: Path, training: Training) -> None:
    features, labels = problem(tmp_path)
    upper = head_of(5)
    before = bytes_of(upper)
    fitted = trained(upper, features, labels, training, indices=np.zeros(0, np.int64))
    assert (fitted, bytes_of(upper)) == (Fitted(0.0, 0), before)


@pytest.mark.parametrize(
    ("training", "examples", "steps"),
    [
        (Training(local_steps=7, batch_size=4), 100, 7),
        (Training(local_epochs=3, batch_size=32), 65, 9),
        (Training(local_epochs=1, batch_size=32), 64, 2),
        (Training(batch_size=32), 33, 2),
        (Training(local_steps=7), 0, 0),
        (Training(local_epochs=7), 0, 0),
    ],
)
def test_steps_of_a_round(training: Training, examples: int, steps: int) -> None:
    assert steps_per_round(training, examples) == steps


# Rates


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "expected"),
    [
        ("constant", 0.0, 0.0, 1.0),
        ("constant", 0.0, 0.99, 1.0),
        ("constant", 0.2, 0.0, 0.0),
        ("constant", 0.2, 0.05, 0.25),
        ("constant", 0.2, 0.2, 1.0),
        ("cosine", 0.0, 0.0, 1.0),
        ("cosine", 0.0, 1 / 3, 0.75),
        ("cosine", 0.0, 0.5, 0.5),
        ("cosine", 0.0, 1.0, 0.0),
        ("cosine", 0.2, 0.1, 0.5),
        ("cosine", 0.2, 0.2, 1.0),
        ("cosine", 0.2, 0.6, 0.5),
        ("cosine", 0.2, 1.0, 0.0),
    ],
)
def test_learning_rates(schedule: str, warmup: float, progress: float, expected: float) -> None:
    training = Training(schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    assert learning_rate(training, 1.0, progress) == pytest.approx(expected, abs=1e-12)
    assert learning_rate(training, 0.02, progress) == pytest.approx(0.02 * expected, abs=1e-12)


def test_the_rate_is_the_runs_or_the_measured_one() -> None:
    assert base_lr(Training(lr=0.25), deep=True) == base_lr(Training(lr=0.25), deep=False) == 0.25
    assert (base_lr(Training(), deep=False), base_lr(Training(), deep=True)) == (HEAD_LR, DEEP_LR)


def test_the_schedule_runs_over_the_whole_run(tmp_path: Path) -> None:
    """Plain gradient steps show the rate: constant gradients come from a single label at a zero input."""
    rows, labels = torch.zeros(1, 4, 2), torch.zeros(4, dtype=torch.int64)
    training = Training(rounds=2, local_steps=2, batch_size=4, optimizer="sgd", lr=1e-4, schedule="cosine")
    moved = []
    for number in (1, 2):
        upper = head_of(2)
        trained(upper, features_of(rows, tmp_path), labels, training, round_number=number)
        moved.append(float(upper.head.linear.bias.detach()[0]))
    rates = [1e-4 * 0.5 * (1 + math.cos(math.pi * progress)) for progress in (0, 0.25, 0.5, 0.75)]
    gradient = -2 / 3  # of the cross-entropy with respect to the right logit, at three equal logits
    expected = [-gradient * (rates[0] + 1.9 * rates[1]), -gradient * (rates[2] + 1.9 * rates[3])]
    assert moved == pytest.approx(expected, rel=1e-3)


# The loss


def test_the_loss_is_the_mean_of_weighted_cross_entropies() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [math.log(7.0), 0.0]])
    labels, weights = torch.tensor([1, 0, 1]), torch.tensor([0.5, 2.0])
    expected = (2 * math.log(4 / 3) + 0.5 * math.log(2) + 2 * math.log(8)) / 3
    assert float(weighted_loss(logits, labels, weights)) == pytest.approx(expected, rel=1e-6)


def test_a_site_with_one_label_feels_the_weights(tmp_path: Path) -> None:
    features, _ = problem(tmp_path)
    labels = torch.ones(12, dtype=torch.int64)
    losses = [
        trained(head_of(5), features, labels, Training(local_steps=1), class_weights=weights).loss
        for weights in (EVEN, torch.tensor([1.0, 3.0, 1.0]))
    ]
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-5)


def test_class_weights_scale_the_gradient(tmp_path: Path) -> None:
    """Weights of 2 are a learning rate of twice the size, for plain gradient steps."""
    features, labels = problem(tmp_path)
    once, twice = head_of(5), head_of(5)
    training = Training(local_steps=1, optimizer="sgd", lr=0.2, schedule="constant")
    trained(once, features, labels, training.model_copy(update={"lr": 0.4}))
    trained(twice, features, labels, training, class_weights=2 * EVEN)
    torch.testing.assert_close(once.head.linear.weight, twice.head.linear.weight)


# Modes


def test_dropout_works_in_training_and_in_training_alone(tmp_path: Path) -> None:
    features, labels = problem(tmp_path)
    dropping, plain = head_of(5, dropout=0.5), head_of(5)
    training = Training(local_steps=1, batch_size=12)
    assert torch.equal(dropping(features.resident[0]), plain(features.resident[0]))  # type: ignore[index]
    losses = [trained(upper, features, labels, training).loss for upper in (dropping, plain)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert not dropping.training
    assert not any(module.training for module in dropping.modules())
    assert torch.equal(dropping(features.resident[0]), dropping(features.resident[0]))  # type: ignore[index]


@pytest.fixture(scope="module")
def deep_run() -> RunConfig:
    return RunConfig(
        task=Task(name="tiny", labels=("a", "b", "c")),
        data=Data(preset="generic", image_size=32),
        model=Model(backbone="tf_efficientnet_lite0", weights="none", trainable="stages:1"),
    )


def test_norms_above_the_cut_stay_as_they_are_and_all_else_moves(tmp_path: Path, deep_run: RunConfig) -> None:
    built = model.skeleton(deep_run)
    upper = built.upper
    features = features_of(torch.randn(1, 8, upper.layout.width, generator=torch.Generator().manual_seed(0)), tmp_path)
    statistics = model.norm_statistics(upper)
    before = {name: value.clone() for name, value in upper.state_dict().items()}
    trunk = {name: value.clone() for name, value in built.trunk.state_dict().items()}
    training = Training(local_steps=2, batch_size=4, lr=0.01, schedule="constant")
    trained(upper, features, torch.arange(8) % 3, training)
    after = upper.state_dict()
    frozen = set(upper.frozen_norms())
    norms = {f"{name}.{part}" for name, m in upper.named_modules() if m in frozen for part in m.state_dict()}
    assert len(statistics) > 0
    assert model.norm_statistics(upper) == statistics
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == set(upper.trainable())
    assert len(norms) > 10
    assert not moved & norms
    assert all(torch.equal(value, trunk[name]) for name, value in built.trunk.state_dict().items())


def test_statistics_that_moved_stop_the_round(tmp_path: Path, deep_run: RunConfig) -> None:
    """The check itself: a norm that is switched on behind the upper's back is noticed."""
    upper = model.skeleton(deep_run).upper
    norm = next(iter(upper.frozen_norms()))

    def switch_on(*_: object) -> None:
        norm.train(True)

    upper.register_forward_pre_hook(switch_on)
    rows = torch.randn(1, 8, upper.layout.width, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="running statistics"):
        trained(upper, features_of(rows, tmp_path), torch.arange(8) % 3, Training(local_steps=1, batch_size=4))


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    features, _ = problem(tmp_path, examples=60)
    labels = features.resident[0, :, :3].argmax(1)  # type: ignore[index]
    upper = head_of(5)
    training = Training(rounds=3, local_epochs=5, batch_size=16, lr=0.05)
    losses = [trained(upper, features, labels, training, round_number=number).loss for number in (1, 2, 3)]
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.5


# Several labels an image


def targets_of(examples: int, labels: int = 3, seed: int = 4) -> Tensor:
    """Targets with what is present, absent, in between and not annotated."""
    stream = np.random.default_rng(seed)
    return torch.from_numpy(stream.choice(np.array([0, 1, 0.5, np.nan], np.float32), (examples, labels)))


def test_the_loss_is_the_mean_over_what_was_annotated() -> None:
    logits, targets = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), targets_of(20)
    weights = torch.tensor([[0.7, 1.0, 2.0], [3.0, 1.0, 0.4]])
    terms = [
        weights[1, k] * t * math.log1p(math.exp(-z)) + weights[0, k] * (1 - t) * math.log1p(math.exp(z))
        for row, truth in zip(logits.tolist(), targets.tolist(), strict=True)
        for k, (z, t) in enumerate(zip(row, truth, strict=True))
        if not math.isnan(t)
    ]
    torch.testing.assert_close(weighted_loss(logits, targets, weights), torch.tensor(np.mean(terms)).float())


def test_what_was_not_annotated_gets_no_gradient_and_takes_none_away() -> None:
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets, weights = targets_of(12), torch.ones(2, 3)
    weighted_loss(logits, targets, weights).backward()
    assert logits.grad is not None
    known = ~targets.isnan()
    wanted = (torch.sigmoid(logits) - targets.nan_to_num()) / known.sum()
    torch.testing.assert_close(logits.grad, wanted.detach() * known)
    assert not logits.grad[~known].any()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_nothing_annotated_is_no_loss_and_no_nan(scale: float) -> None:
    logits = torch.full((4, 3), scale, requires_grad=True)
    loss = weighted_loss(logits, torch.full((4, 3), torch.nan), torch.ones(2, 3))
    loss.backward()
    assert logits.grad is not None
    assert loss.item() == 0 and not logits.grad.any()
    assert example_losses(logits, torch.full((4, 3), torch.nan), torch.ones(2, 3)).tolist() == [0] * 4
    assert torch.isfinite(weighted_loss(logits, torch.zeros(4, 3), torch.ones(2, 3)))


def test_the_losses_of_the_examples_have_the_mean_of_the_batch() -> None:
    """With one label an image always, with several where all have as many annotations."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator)
    labels, targets = torch.randint(3, (8,), generator=generator), targets_of(8).nan_to_num()
    targets[:, 1] = torch.nan
    for truth, weights in ((labels, torch.tensor([1.0, 2.0, 0.5])), (targets, torch.rand(2, 3, generator=generator))):
        losses = example_losses(logits, truth, weights)
        assert losses.shape == (8,)
        torch.testing.assert_close(losses.mean(), weighted_loss(logits, truth, weights))
        single = [weighted_loss(logits[i : i + 1], truth[i : i + 1], weights) for i in range(8)]
        torch.testing.assert_close(losses, torch.stack(single))


def test_training_on_several_labels_lowers_the_loss_and_leaves_a_masked_label_alone(tmp_path: Path) -> None:
    features, _ = problem(tmp_path, examples=40)
    rows = features.resident
    assert rows is not None
    targets = (rows[0, :, :3] > 0).float()
    targets[:, 2] = torch.nan
    upper = head_of(5)
    before = upper.head.linear.weight.detach().clone()
    training = Training(rounds=1, local_epochs=1, batch_size=8, lr=0.05, schedule="constant")
    losses = [trained(upper, features, targets, training, class_weights=torch.ones(2, 3)).loss for _ in range(6)]
    assert losses[-1] < 0.6 * losses[0]
    after = upper.head.linear.weight.detach()
    assert torch.equal(after[2], before[2]) and not torch.equal(after[:2], before[:2])


# Patients instead of images


def visits(
    monkeypatch: pytest.MonkeyPatch, folder: Path, patients: np.ndarray, training: Training, **choices: object
) -> list[list[int]]:
    """The examples of each batch."""
    seen: list[list[int]] = []
    features, labels = problem(folder, examples=len(patients))
    plain = Features.batch

    def batch(self: Features, view: Tensor, index: Tensor) -> Tensor:
        seen.append(index.tolist())
        return plain(self, view, index)

    with monkeypatch.context() as patched:
        patched.setattr(Features, "batch", batch)
        trained(head_of(5), features, labels, training, patients=patients, **choices)
    return seen


@pytest.mark.parametrize("size", [1, 4, 5, 64])
def test_an_epoch_of_patients_visits_each_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int) -> None:
    patients = np.array([7, 3, 7, 9, 3, 7, 1, 2, 2, 5, 6, 7])
    indices = np.array([0, 1, 2, 3, 4, 5, 6, 8, 9])  # patients 7, 3, 9, 1, 2, 5
    training = Training(rounds=3, local_epochs=4, batch_size=size, draw="patients")
    batches = visits(monkeypatch, tmp_path, patients, training, indices=indices)
    each = math.ceil(6 / size)
    assert len(batches) == 4 * each
    for epoch in range(4):
        drawn = np.concatenate(batches[epoch * each : (epoch + 1) * each])
        assert sorted(patients[drawn]) == [1, 2, 3, 5, 7, 9]
        assert set(drawn) <= set(indices.tolist())


def test_every_image_of_a_patient_is_as_likely_as_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patients = np.array([4, 4, 4, 8, 8, 2])
    training = Training(rounds=1, local_epochs=600, batch_size=9, draw="patients")
    counts = np.bincount(np.concatenate(visits(monkeypatch, tmp_path, patients, training)), minlength=6)
    assert counts[5] == 600
    assert (np.abs(counts[:3] - 200) < 60).all() and (np.abs(counts[3:5] - 300) < 60).all()


def test_the_draw_of_patients_is_the_sites_and_the_rounds_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patients = np.arange(40) // 4
    training = Training(rounds=3, local_epochs=1, batch_size=5, draw="patients")
    first, again, other, later = (
        visits(monkeypatch, tmp_path, patients, training, **choices)
        for choices in ({}, {}, {"site": "site-2"}, {"round_number": 2})
    )
    assert first == again
    assert first != other and first != later


@pytest.mark.parametrize("patients", [None, np.arange(12) // 3])
def test_patients_mean_nothing_where_images_are_drawn(tmp_path: Path, patients: np.ndarray | None) -> None:
    features, labels = problem(tmp_path)
    training = Training(rounds=1, local_epochs=2, batch_size=5)
    plain, given_patients = head_of(5), head_of(5)
    trained(plain, features, labels, training)
    trained(given_patients, features, labels, training, patients=patients)
    assert bytes_of(plain) == bytes_of(given_patients)


def test_a_run_that_draws_patients_needs_them(tmp_path: Path) -> None:
    features, labels = problem(tmp_path)
    with pytest.raises(ValueError, match="patients: got none"):
        trained(head_of(5), features, labels, Training(draw="patients"))


def test_patients_with_one_image_each_take_the_steps_of_their_images(tmp_path: Path) -> None:
    features, labels = problem(tmp_path)
    training = Training(rounds=1, local_epochs=1, batch_size=5, draw="patients")
    assert trained(head_of(5), features, labels, training, patients=np.arange(12)).steps == 3
    assert trained(head_of(5), features, labels, training, patients=np.zeros(12, int)).steps == 1
    fixed = training.model_copy(update={"local_epochs": None, "local_steps": 4})
    assert trained(head_of(5), features, labels, fixed, patients=np.zeros(12, int)).steps == 4
