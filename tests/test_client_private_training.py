"""A private round: who is drawn, how much noise is in what it changes, and that all else is as in a plain one.

Statistical bounds are set where a correct round fails less than once in 10⁹ runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client import private_training
from client.features import Features
from client.noise import Noise
from client.private_training import Mechanism, PrivateFitted, fit
from client.rowstore import RowStore
from client.training import Pool, example_losses
from common import backbone
from common.backbone import Head, Layout, Upper
from common.run_config import Training

EVEN = torch.ones(3)
SIGMAS = 6.5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def head_of(width: int, labels: int = 3) -> Upper:
    upper = Upper(None, Layout((), width), Head(width, labels))
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


def plainly(**choices: Any) -> Training:
    """One step of SGD at rate 1, so that the change is the negative gradient."""
    values = {"local_steps": 1, "batch_size": 4, "optimizer": "sgd", "lr": 1.0, "schedule": "constant", "rounds": 1}
    return Training(**{**values, **choices})


def trained(
    upper: Upper, features: Features, labels: Tensor, training: Training, mechanism: Mechanism, **choices: Any
) -> PrivateFitted:
    values = {
        "round_number": 1,
        "class_weights": EVEN,
        "patients": np.arange(len(labels)),
        "noise": Noise(),
        "indices": np.arange(len(labels)),
        **choices,
    }
    indices = values.pop("indices")
    return fit(upper, features, labels, indices, training, mechanism=mechanism, **values)


def values_of(upper: Upper) -> Tensor:
    return torch.cat([value.detach().flatten() for value in upper.trainable().values()]).clone()


def change(upper: Upper, *arguments: Any, **choices: Any) -> Tensor:
    before = values_of(upper)
    trained(upper, *arguments, **choices)
    return values_of(upper) - before


# The mechanism


@pytest.mark.parametrize(("patients", "rate"), [(1, 1.0), (4, 1.0), (5, 0.8), (4000, 0.001)])
def test_the_rate_is_the_batch_over_the_patients(patients: int, rate: float) -> None:
    assert Mechanism.of(plainly(), patients, noise_multiplier=1.0, clip=1.0).sampling_rate == rate


def test_a_site_without_patients_has_no_mechanism() -> None:
    with pytest.raises(ValueError, match="patients"):
        Mechanism.of(plainly(), 0, noise_multiplier=1.0, clip=1.0)


@pytest.mark.parametrize(
    "values", [(-1, 1, 1), (math.nan, 1, 1), (1, 0, 1), (1, 1.1, 1), (1, 1, 0), (1, 1, math.inf), (1, 1, math.nan)]
)
def test_a_mechanism_that_protects_nobody_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="expected a noise"):
        Mechanism(*values)


# One step


def test_a_step_is_the_clipped_sum_over_the_patients_expected(tmp_path: Path) -> None:
    features, labels = problem(tmp_path)
    upper = head_of(5)
    wanted = torch.zeros(18)
    for row, label in zip(features.resident[0], labels, strict=True):  # type: ignore[index]
        loss = example_losses(upper(row[None]), label[None], EVEN).sum()
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(upper.parameters()))])
        wanted += gradient * min(1.0, 0.7 / float(gradient.norm()))
    changed = change(upper, features, labels, plainly(batch_size=99), Mechanism(0.0, 1.0, 0.7))
    torch.testing.assert_close(changed, -wanted / 12, rtol=1e-4, atol=1e-6)


def test_one_patient_changes_an_update_by_the_clip_at_most(tmp_path: Path) -> None:
    features, labels = problem(tmp_path, examples=1)
    assert float(change(head_of(5), features, labels, plainly(), Mechanism(0.0, 1.0, 1e-3)).norm()) <= 1e-3


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (1e-9, 1), (1e-9, 9)])
def test_the_noise_on_the_update_is_as_accounted_for(tmp_path: Path, rate: float, steps: int) -> None:
    """Each step adds σ C / (q P) to every value, of nobody's draw as of everybody's: chi-squared of 30,003 degrees."""
    features, labels = problem(tmp_path, examples=50, width=10_000)
    training = plainly(local_steps=steps, momentum=0.0)
    mechanism = Mechanism(1.5, rate, 0.2)
    changed = change(head_of(10_000), features, labels, training, mechanism).double()
    std = 1.5 * 0.2 / (rate * 50) * math.sqrt(steps)
    degrees = len(changed)
    if rate < 1:
        assert abs(float((changed / std).square().sum()) - degrees) < SIGMAS * math.sqrt(2 * degrees)
    else:  # the sum of 50 clipped gradients, of norm 10 at most, is in it as well
        still = change(head_of(10_000), features, labels, training, Mechanism(0.0, rate, 0.2)).double()
        assert abs(float(((changed - still) / std).square().sum()) - degrees) < SIGMAS * math.sqrt(2 * degrees)


def test_two_rounds_from_one_start_differ(tmp_path: Path) -> None:
    """Whatever the seeds of everything else."""
    features, labels = problem(tmp_path)
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        upper = head_of(5)
        assert trained(upper, features, labels, plainly(), Mechanism(1.0, 0.5, 1.0)) == PrivateFitted(1)
        ends.append(values_of(upper))
    assert not bool((ends[0] == ends[1]).any())


def test_the_proximal_term_is_added_after_the_noise_and_is_not_clipped(tmp_path: Path) -> None:
    """Nobody is drawn and there is no noise: two steps of it alone leave the weights where they were."""
    features, labels = problem(tmp_path)
    training = plainly(strategy="fedprox:0.5", local_steps=3, momentum=0.0, lr=0.1)
    assert not bool(change(head_of(5), features, labels, training, Mechanism(0.0, 1e-12, 1.0)).any())
    upper = head_of(5)
    start = values_of(upper)
    ends = {}
    for strategy in ("fedprox:5", "fedavg"):
        upper = head_of(5)
        training = plainly(strategy=strategy, local_steps=30, momentum=0.0, lr=0.1)
        trained(upper, features, labels, training, Mechanism(0.0, 1.0, 1.0))
        ends[strategy] = float((values_of(upper) - start).norm())
    assert ends["fedprox:5"] < 0.5 * ends["fedavg"]


def test_the_proximal_term_by_hand(tmp_path: Path) -> None:
    """Two steps at full rate: the second is pulled back by μ times the first."""
    features, labels = problem(tmp_path)
    ends = []
    for mu in (0.0, 0.7):
        upper = head_of(5)
        start = values_of(upper)
        training = plainly(strategy=f"fedprox:{mu}", local_steps=2, momentum=0.0, batch_size=99)
        trained(upper, features, labels, training, Mechanism(0.0, 1.0, 1.0))
        ends.append(values_of(upper))
    upper = head_of(5)
    trained(upper, features, labels, plainly(momentum=0.0, batch_size=99), Mechanism(0.0, 1.0, 1.0))
    torch.testing.assert_close(ends[1] - ends[0], -0.7 * (values_of(upper) - start), rtol=1e-4, atol=1e-6)


# Who is drawn


def draws(pool: Pool, views: int, rate: float, count: int) -> list[tuple[Tensor, Tensor]]:
    noise = Noise()
    return [private_training._drawn(pool, views, rate, noise) for _ in range(count)]


def test_patients_are_drawn_each_by_itself_and_give_one_image(tmp_path: Path) -> None:
    """Patient p has p + 1 images; 3,000 draws."""
    patients = np.repeat(np.arange(5), np.arange(1, 6))
    pool = Pool.of(np.arange(len(patients)), patients)
    drawn = draws(pool, 3, 0.3, 3000)
    times = torch.zeros(5)
    pairs = 0
    for view, index in drawn:
        seen = patients[index.numpy()]
        assert len(set(seen.tolist())) == len(seen) == len(view)
        times[torch.from_numpy(seen)] += 1
        pairs += {0, 1} <= set(seen.tolist())
    spread = math.sqrt(3000 * 0.3 * 0.7)
    assert float((times - 900).abs().max()) < SIGMAS * spread
    assert abs(pairs - 3000 * 0.09) < SIGMAS * math.sqrt(3000 * 0.09)
    index = torch.cat([index for _, index in drawn])
    images = torch.bincount(index, minlength=15)[10:]  # of patient 4
    assert float((images - images.sum() / 5).abs().max()) < SIGMAS * math.sqrt(float(images.sum()) / 5)
    views = torch.bincount(torch.cat([view for view, _ in drawn]), minlength=3)
    assert float((views - views.sum() / 3).abs().max()) < SIGMAS * math.sqrt(float(views.sum()) / 3)


def test_a_rate_of_one_takes_everybody(tmp_path: Path) -> None:
    pool = Pool.of(np.array([4, 2, 7, 9]), np.array([0, 0, 5, 0, 5, 0, 0, 8, 0, 3]))
    for _, index in draws(pool, 1, 1.0, 20):
        assert len(index) == 3 and {7, 9} <= set(index.tolist())


def test_steps_are_passes_over_patients(tmp_path: Path) -> None:
    features, labels = problem(tmp_path, examples=12)
    patients = np.repeat(np.arange(6), 2)
    training = plainly(local_steps=None, local_epochs=2, batch_size=4)
    fitted = trained(head_of(5), features, labels, training, Mechanism(1.0, 0.5, 1.0), patients=patients)
    assert fitted.steps == 2 * math.ceil(6 / 4)


def test_no_examples_no_steps(tmp_path: Path) -> None:
    features, labels = problem(tmp_path)
    upper = head_of(5)
    nobody = np.empty(0, np.int64)
    assert not bool(change(upper, features, labels, plainly(), Mechanism(1.0, 1.0, 1.0), indices=nobody).any())


@pytest.mark.parametrize("size", [1, 5, 12, 99])
def test_a_large_draw_is_taken_in_parts(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(tmp_path)
    whole = change(head_of(5), features, labels, plainly(), Mechanism(0.0, 1.0, 1.0))
    monkeypatch.setattr(private_training, "RECORDS", {"head": size, "deep": size})
    parts = change(head_of(5), features, labels, plainly(), Mechanism(0.0, 1.0, 1.0))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


# Deeper uppers


def test_running_statistics_stay_and_the_last_stage_is_trained(tmp_path: Path) -> None:
    network = backbone.create("mobilenetv2_100", image_size=64, seed=0)
    upper = backbone.build(network, cut="stages:1", features="multi", labels=3, image_size=64)[1]
    features, labels = problem(tmp_path, examples=6, width=upper.layout.width)
    before = {name: value.clone() for name, value in upper.state_dict().items()}
    trained(upper, features, labels, plainly(optimizer="adamw", lr=1e-3), Mechanism(1.0, 0.5, 1.0))
    for name, value in upper.state_dict().items():
        assert torch.equal(before[name], value) == (name not in upper.trainable()), name
    assert not any(module.training for module in upper.modules())


def test_statistics_that_change_stop_the_round(tmp_path: Path) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
            assert self.norm.running_mean is not None
            self.norm.running_mean.add_(1)
            return (self.norm(activation),)

    upper = Upper(Body(), Layout((2, 3, 3), 0), Head(2, 3))  # type: ignore[arg-type]
    features, labels = problem(tmp_path, width=18)
    with pytest.raises(RuntimeError, match="running statistics"):
        trained(upper, features, labels, plainly(), Mechanism(1.0, 1.0, 1.0))


def test_it_learns(tmp_path: Path) -> None:
    """Three labels that a line tells apart, 600 patients, ε about 3: most are told apart afterwards."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    rows = torch.randn(1, 600, 8, generator=generator) + 3 * torch.eye(8)[labels][None]
    features = features_of(rows, tmp_path)
    upper = Upper(None, Layout((), 8), Head(8, 3))
    training = plainly(local_steps=60, batch_size=64, lr=1.0, momentum=0.0)
    trained(upper, features, labels, training, Mechanism.of(training, 600, noise_multiplier=1.5, clip=1.0))
    assert float((upper(rows[0]).argmax(1) == labels).float().mean()) > 0.8
