"""Clipped sums against a loop that computes one record's gradient at a time, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample.conv import compute_conv_grad_sample
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from client import clipping, conv_samplers, ghost, linear_samplers
from client.clipping import Clipper, NotPrivate, require_private, self_test
from client.conv_samplers import conv_grad_sample, conv_norm_sample
from client.linear_samplers import linear_norm_sample, squared_norms
from client.taps import drops_out
from client.training import example_losses
from common import backbone
from common.backbone import Head, Layout, Upper

LABELS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@cache
def network_upper(name: str, size: int, cut: str) -> Upper:
    """An upper of a backbone, its weights such that no gradient vanishes."""
    network = backbone.create(name, image_size=size, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        upper = backbone.build(network, cut=cut, features="multi", labels=LABELS, image_size=size)[1]
        nn.init.normal_(upper.head.linear.weight, std=0.05)
        for norm in upper.frozen_norms():
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
    return still(upper.train())


def still(upper: Upper) -> Upper:
    """Nothing drops out at random."""
    for module in upper.modules():
        if drops_out(module):
            module.eval()
    return upper


def head_upper(width: int = 7, labels: int = LABELS, dropout: float = 0.0) -> Upper:
    upper = Upper(None, Layout((), width), Head(width, labels, dropout))
    with torch.no_grad():
        upper.head.linear.weight.copy_(torch.randn(labels, width, generator=seeded()))
    return upper.train()


def module_upper(body: nn.Module, shape: tuple[int, ...], width: int) -> Upper:
    """An upper around any module, which gives a tuple of taps."""
    upper = Upper(body, Layout(shape, 0), Head(width, LABELS))  # type: ignore[arg-type]
    with torch.no_grad():
        upper.head.linear.weight.copy_(torch.randn(LABELS, width, generator=seeded()) * 0.3)
    return upper.train()


class Body(nn.Module):
    """One tap, of some modules one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        return (self.inner(activation),)


def loop(upper: Upper, features: Tensor, labels: Tensor, weights: Tensor) -> list[list[Tensor]]:
    """Gradients of each record."""
    found = []
    for place in range(len(features)):
        alone = slice(place, place + 1)
        loss = example_losses(upper(features[alone]), labels[alone], weights).sum()
        parameters = list(upper.trainable().values())
        found.append(list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)))
    return found


def norm(gradients: list[Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def largest_error(upper: Upper, features: Tensor, labels: Tensor, weights: Tensor, clip: float | None = None) -> float:
    """Of the sums, relative to the norms that went into them; clipped at the middle norm if no clip is given."""
    single = loop(upper, features, labels, weights)
    norms = [norm(gradients) for gradients in single]
    at = clip if clip is not None else sorted(norms)[len(norms) // 2] if norms else 1.0
    sums = Clipper.of(upper).sums(features, labels, weights, at)
    factors = [min(1.0, at / one) if one else 1.0 for one in norms]
    whole = sum(f * n for f, n in zip(factors, norms, strict=True))
    worst = 0.0
    for place, got in enumerate(sums):
        parts = [f * gradients[place] for f, gradients in zip(factors, single, strict=True)]
        scale = max(sum(float(part.norm()) for part in parts), 1e-3 * whole, 1e-30)
        wanted = torch.stack(parts).sum(0) if parts else torch.zeros_like(got)
        worst = max(worst, float((got - wanted).norm()) / scale)
    return worst


def records(upper: Upper, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.randint(upper.head.linear.out_features, (count,), generator=seeded(seed + 1))
    return torch.randn(count, upper.layout.width, generator=seeded(seed)), labels


# Samplers


def convolution(kind: type[nn.Conv2d], groups: int, **options: Any) -> nn.Conv2d:
    layer = kind(4, 8, groups=groups, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded()))
    return layer


LAYERS = [
    pytest.param(
        kind, {"kernel_size": kernel, "stride": stride, "dilation": dilation, **padding}, id="-".join(map(str, what))
    )
    for what in itertools.product(
        (nn.Conv2d, Conv2dSame),
        (1, 3, (2, 3)),
        (1, 2),
        (1, 2),
        (
            {},
            {"padding": (1, 2)},
            {"padding": "same"},
            {"padding": "valid"},
            {"padding": 1, "padding_mode": "circular"},
        ),
    )
    for kind, kernel, stride, dilation, padding in [what]
    if not (kind is Conv2dSame and padding)
    and not (padding.get("padding") == "same" and (stride != 1 or kernel == (2, 3)))
]


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_samplers_of_convolutions_give_what_single_records_give(kind: type[nn.Conv2d], options: dict[str, Any]) -> None:
    for groups, form, tables in itertools.product(
        (1, 2, 4), (torch.contiguous_format, torch.channels_last), (True, False)
    ):
        layer = convolution(kind, groups, **options)
        inputs = torch.randn(3, 4, 8, 7, generator=seeded(1)).contiguous(memory_format=form)
        backprops = torch.randn(layer(inputs).shape, generator=seeded(2)).contiguous(memory_format=form)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conv_samplers, "_cheaper_by_tables", lambda *_, tables=tables: tables)
            norms = conv_norm_sample(layer, [inputs], backprops)
        gradients = conv_grad_sample(layer, [inputs], backprops)
        for place in range(3):
            alone = slice(place, place + 1)
            wanted = torch.autograd.grad(layer(inputs[alone]), list(layer.parameters()), backprops[alone])
            for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
                torch.testing.assert_close(gradients[parameter][place], gradient, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(norms[parameter][place], gradient.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_samplers_leave_out_what_is_frozen(frozen: str) -> None:
    layers: list[tuple[nn.Module, Tensor, Any]] = [
        (nn.Conv2d(2, 3, 3), torch.zeros(1, 2, 5, 5), conv_norm_sample),
        (nn.Conv2d(2, 3, 3), torch.zeros(1, 2, 5, 5), conv_grad_sample),
        (nn.Linear(2, 3), torch.zeros(1, 2), linear_norm_sample),
    ]
    for layer, inputs, sampler in layers:
        layer.get_parameter(frozen).requires_grad_(False)
        assert list(sampler(layer, [inputs], layer(inputs))) == [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("kernel", [1, 3])
def test_samplers_take_an_empty_batch(kind: type[nn.Conv2d], kernel: int) -> None:
    layer = kind(2, 4, kernel)
    inputs = torch.zeros(0, 2, 5, 5)
    backprops = layer(inputs)
    assert conv_grad_sample(layer, [inputs], backprops)[layer.weight].shape == (0, 4, 2, kernel, kernel)
    assert all(len(values) == 0 for values in conv_norm_sample(layer, [inputs], backprops).values())


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    count=st.integers(0, 4),
    seed=st.integers(0, 2**32),
    most=st.integers(1, 99),
)
def test_the_norm_of_a_sum_of_outer_products_is_that_of_the_sum(
    sizes: tuple[int, int, int], count: int, seed: int, most: int
) -> None:
    q, p, o = sizes
    generator = seeded(seed)
    a, b = torch.randn(count, q, p, generator=generator), torch.randn(count, q, o, generator=generator)
    wanted = torch.einsum("nqo,nqp->nop", b, a).square().sum((1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_samplers, "TABLE_VALUES", most)  # in parts
        torch.testing.assert_close(squared_norms(a, b), wanted, rtol=1e-4, atol=1e-4)


def test_a_norm_whose_terms_cancel_is_not_taken_too_small() -> None:
    """Two positions of which each undoes the other but for a millionth: rounding alone would decide the norm."""
    generator = seeded()
    a = torch.randn(50, 1, 300, generator=generator).repeat(1, 2, 1)
    b = torch.randn(50, 1, 300, generator=generator)
    both = torch.cat([b, -b * (1 + 1e-6)], 1)
    true = torch.einsum("nqo,nqp->nop", both.double(), a.double()).flatten(1).square().sum(1)
    assert bool((squared_norms(a, both) >= true).all())


# Sums


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 6), clip=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32), width=st.integers(1, 9))
def test_the_sum_of_a_head_is_that_of_a_loop(count: int, clip: float, seed: int, width: int) -> None:
    upper = head_upper(width)
    assert largest_error(upper, *records(upper, count, seed), torch.tensor([0.3, 1.0, 2.0]), clip) < 1e-4


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), unknown=st.floats(0, 1), count=st.integers(1, 5))
def test_several_labels_some_of_them_unknown(seed: int, unknown: float, count: int) -> None:
    upper = head_upper()
    generator = seeded(seed)
    targets = torch.randint(2, (count, LABELS), generator=generator).float()
    targets[torch.rand(targets.shape, generator=generator) < unknown] = torch.nan
    weights = torch.rand(2, LABELS, generator=generator) + 0.5
    assert largest_error(upper, records(upper, count, seed)[0], targets, weights) < 1e-4


NETWORKS = [
    ("resnet18", 64, "stages:1"),
    ("mobilenetv2_100", 64, "stages:1"),
    ("tf_efficientnet_lite0", 64, "stages:2"),  # with a strided convolution that pads as TensorFlow does
    ("efficientnet_b0", 64, "stages:1"),
    ("mobilenetv3_small_100", 64, "stages:2"),
    ("convnext_atto", 64, "stages:1"),
    ("vit_tiny_patch16_224", 64, "stages:1"),
    ("regnety_002", 64, "stages:1"),
    pytest.param("swin_tiny_patch4_window7_224", 224, "stages:1", marks=pytest.mark.slow),
    pytest.param("swin_tiny_patch4_window7_224", 224, "stages:2", marks=pytest.mark.slow),  # several windows an image
    pytest.param("densenet121", 64, "stages:1", marks=pytest.mark.slow),
    pytest.param("vit_tiny_patch16_224", 64, "all", marks=pytest.mark.slow),  # a position for each patch, by the body
    pytest.param("cait_xxs24_224", 64, "all", marks=pytest.mark.slow),
    pytest.param("nfnet_l0", 64, "stages:1", marks=pytest.mark.slow),  # weights that are standardised
    pytest.param("resnet18", 64, "all", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "cut"), NETWORKS)
def test_the_sum_of_a_network_is_that_of_a_loop(name: str, size: int, cut: str) -> None:
    """Of one record, which is contiguous, and of three, whose maps are channels last."""
    upper = network_upper(name, size, cut)
    features, labels = records(upper, 3)
    weights = torch.tensor([0.5, 1.0, 2.0])
    assert largest_error(upper, features[:1], labels[:1], weights, 0.1) < 2e-4
    assert largest_error(upper, features, labels, weights) < 2e-4


@pytest.mark.parametrize("most", [1, 10_000])
def test_gradients_formed_a_few_records_at_a_time_give_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_samplers, "TABLE_VALUES", most)
    upper = network_upper("convnext_atto", 64, "stages:1")
    assert largest_error(upper, *records(upper, 3), torch.ones(3)) < 2e-4


@pytest.mark.parametrize(("name", "clip"), [("resnet18", 1e-3), ("convnext_atto", 1e-3), ("resnet18", 1e9)])
def test_one_record_gives_no_more_than_the_clip(name: str, clip: float) -> None:
    upper = network_upper(name, 64, "stages:1")
    features, labels = records(upper, 4)
    clipper = Clipper.of(upper)
    for place in range(4):
        alone = slice(place, place + 1)
        assert norm(clipper.sums(features[alone], labels[alone], torch.ones(3), clip)) <= clip


def test_nobody_gives_zeros() -> None:
    upper = network_upper("resnet18", 64, "stages:1")
    sums = Clipper.of(upper).sums(*records(upper, 0), torch.ones(3), 1.0)
    assert [value.shape for value in sums] == [value.shape for value in upper.trainable().values()]
    assert not any(bool(value.any()) for value in sums)


def test_a_record_without_a_finite_gradient_gives_nothing() -> None:
    upper = head_upper()
    features, labels = records(upper, 3)
    broken = features.clone()
    broken[1] = torch.inf
    clipper = Clipper.of(upper)
    wanted = clipper.sums(features[[0, 2]], labels[[0, 2]], torch.ones(3), 1.0)
    for got, value in zip(clipper.sums(broken, labels, torch.ones(3), 1.0), wanted, strict=True):
        assert torch.equal(got, value)


def test_parameters_that_the_loss_does_not_reach_have_no_gradient() -> None:
    class Idle(Body):
        def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
            self.inner[1](activation)
            return (self.inner[0](activation),)

    upper = module_upper(Idle(nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)), (2, 5, 5), 3)
    sums = dict(zip(upper.trainable(), Clipper.of(upper).sums(*records(upper, 2), torch.ones(3), 1.0), strict=True))
    assert not bool(sums["body.inner.1.weight"].any()) and bool(sums["body.inner.0.weight"].any())


class Twice(Body):
    """One convolution used twice."""

    def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        return (self.inner(self.inner(activation).relu()),)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        return (self.second(self.first(activation).relu()),)


class InPlace(Body):
    """What a layer gave is changed in place, and an activation between two taps is."""

    def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        first = functional.relu(self.inner[0](activation), inplace=True)
        second = self.inner[1](first)
        second += 1
        return (second.mul_(2),)


class Chained(Body):
    """A scale of its own, and two outputs of which one leads to the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        first = activation * self.scale[:, None, None]
        return first, self.inner(first.relu())


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    BODIES = [
        (Twice(nn.Conv2d(2, 2, 3, padding=1)), (2, 5, 5), 2),
        (Tied(), (4,), 4),
        (InPlace(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1)), (2, 5, 5), 3),
        (Chained(nn.Conv2d(2, 3, 3)), (2, 5, 5), 5),
        (Body(nn.GroupNorm(1, 2), nn.Conv2d(2, 4, 3), nn.LayerNorm(3), nn.ReLU()), (2, 5, 5), 4),
        (Body(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)), (3, 2, 4), 3),
    ]


@pytest.mark.parametrize(("body", "shape", "width"), BODIES, ids=lambda value: type(value).__name__)
def test_modules_of_every_kind(body: nn.Module, shape: tuple[int, ...], width: int) -> None:
    upper = module_upper(body, shape, width)
    assert largest_error(upper, *records(upper, 3), torch.ones(3)) < 1e-4
    require_private(upper, LABELS, multi_label=False, clip=1.0)


# What is refused


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_self_test_changes_nothing(multi_label: bool) -> None:
    upper = network_upper("efficientnet_b0", 64, "stages:1")
    upper.eval()
    before = {name: value.clone() for name, value in upper.state_dict().items()}
    state = torch.random.get_rng_state()
    assert self_test(upper, upper.layout.width, LABELS, multi_label=multi_label, clip=1.0) < 1e-4
    require_private(upper, LABELS, multi_label=multi_label, clip=1.0)
    assert all(torch.equal(before[name], value) for name, value in upper.state_dict().items())
    assert all(parameter.grad is None for parameter in upper.parameters())
    assert not any(module.training for module in upper.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    still(upper.train())


def test_a_head_at_zero_is_tested_through_a_head_that_is_not() -> None:
    upper = module_upper(Body(nn.Conv2d(2, 3, 3)), (2, 5, 5), 3)
    nn.init.zeros_(upper.head.linear.weight)
    assert self_test(upper, upper.layout.width, LABELS, multi_label=False, clip=1.0) < 1e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ghost, "weight_gradient", lambda layer, *_: torch.zeros_like(layer.weight))
        assert self_test(upper, upper.layout.width, LABELS, multi_label=False, clip=1.0) > 0.1


@pytest.mark.slow
def test_opacus_own_sampler_of_convolutions_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ghost.NORM_SAMPLERS, nn.Conv2d)
    monkeypatch.setitem(ghost.GRAD_SAMPLERS, nn.Conv2d, compute_conv_grad_sample)
    upper = network_upper("resnet18", 64, "stages:1")
    with pytest.raises(NotPrivate, match="off by"):
        require_private(upper, LABELS, multi_label=False, clip=1.0)


def test_clipping_that_is_off_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "clip_factors", lambda norms, _clip: torch.ones_like(norms))
    with pytest.raises(NotPrivate, match="off by"):
        require_private(head_upper(), LABELS, multi_label=False, clip=1.0)


@pytest.mark.parametrize("factor", [0.998, 1.002])
def test_norms_that_are_slightly_wrong_are_found_out(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = clipping.clip_factors
    monkeypatch.setattr(clipping, "clip_factors", lambda norms, clip: honest(norms * factor**2, clip))
    with pytest.raises(NotPrivate, match="off by"):
        require_private(head_upper(), LABELS, multi_label=False, clip=1e-3)


def test_a_norm_that_left_eval_mode_is_found_out() -> None:
    upper = module_upper(Body(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 5, 5), 3)
    require_private(upper, LABELS, multi_label=False, clip=1.0)
    upper.get_submodule("body.inner.1").training = True
    with pytest.raises(NotPrivate, match=r"body\.inner\.1 \(BatchNorm2d\) normalises"):
        require_private(upper, LABELS, multi_label=False, clip=1.0)
    before = upper.get_submodule("body.inner.1").get_buffer("running_mean").clone()
    assert self_test(upper, upper.layout.width, LABELS, multi_label=False, clip=1.0) > 1e-3
    assert torch.equal(upper.get_submodule("body.inner.1").get_buffer("running_mean"), before)


def test_a_norm_without_running_statistics_is_refused() -> None:
    upper = module_upper(Body(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)), (2, 5, 5), 3)
    with pytest.raises(NotPrivate, match="statistics of a batch"):
        require_private(upper, LABELS, multi_label=False, clip=1.0)


class Mixing(Body):
    """Records know of each other in a way of its own."""

    def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        return (self.inner(activation - activation.mean(0)),)


class Recomputed(Body):
    """A scale of its own, with dropout between it and the output."""

    def __init__(self, rate: float) -> None:
        super().__init__(nn.Dropout(rate))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        return (self.inner(activation * self.scale),)


def test_a_module_that_mixes_records_is_refused() -> None:
    with pytest.raises(NotPrivate):
        require_private(module_upper(Mixing(nn.Linear(4, 4)), (4,), 4), LABELS, multi_label=False, clip=1.0)


def test_what_drops_out_may_not_have_to_be_run_again() -> None:
    require_private(module_upper(Recomputed(0.0), (4,), 4), LABELS, multi_label=False, clip=1.0)
    with pytest.raises(NotPrivate, match="drops out at random"):
        Clipper.of(module_upper(Recomputed(0.5), (4,), 4))


def test_dropout_of_the_head_is_a_record_s_own_matter() -> None:
    """The gradient of a record is that of its own mask, so its norm is within the clip, and varies."""
    upper = head_upper(dropout=0.5)
    require_private(upper, LABELS, multi_label=False, clip=1.0)
    features, labels = records(upper, 1)
    seen = {norm(Clipper.of(upper).sums(features, labels, torch.ones(3), 1e9)) for _ in range(20)}
    assert len(seen) > 1
