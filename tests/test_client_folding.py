"""A folded trunk gives the same features with fewer norms, or it is not used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from client.folding import TOLERANCE, folded
from common.backbone import Layout, Trunk, build, create

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(model: nn.Module) -> nn.Module:
    """Give BatchNorms statistics and parameters that are not those of a fresh model."""
    random = seeded(1)
    with torch.no_grad():
        for norm in norms(model):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 0.2, generator=random)
            norm.running_var.uniform_(0.5, 2.0, generator=random)
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5, generator=random)
                norm.bias.normal_(0, 0.2, generator=random)
    return model.eval()


def norms(part: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]


def trunk_of(name: str, side: int, cut: str = "head", features: str = "multi") -> Trunk:
    return build(lively(create(name, image_size=side, seed=0)), cut=cut, features=features, labels=2, image_size=side)[
        0
    ]


def images(side: int) -> Tensor:
    return torch.randn(3, 3, side, side, generator=seeded(5))


class Body(nn.Module):
    """A trunk's body written by hand: returns a tuple of one map."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.children():
            x = layer(x)
        return (x,)


def by_hand(body: nn.Module) -> Trunk:
    return Trunk(lively(body), Layout((), 4))  # type: ignore[arg-type]


def assert_same_features(one: Trunk, other: Trunk, side: int) -> None:
    x = images(side)
    with torch.inference_mode():
        plain, quick = one(x), other(x)
    assert plain.std() > 0
    assert (plain - quick).abs().max() <= TOLERANCE * plain.abs().max()


# ------------------------------------------------------------------------------------------------------ same features


@pytest.mark.parametrize(
    ("name", "cut", "before", "after"),
    [
        ("test_efficientnet", "head", 12, 0),
        ("test_efficientnet", "stages:1", 9, 0),
        ("test_resnet", "head", 15, 1),  # the norm behind a stem of several convolutions stays
    ],
)
def test_a_folded_trunk_has_fewer_norms_and_the_same_features(name: str, cut: str, before: int, after: int) -> None:
    trunk = trunk_of(name, 64, cut)
    quick = folded(trunk, 64)
    assert quick is not trunk
    assert (len(norms(trunk)), len(norms(quick))) == (before, after)
    assert quick.layout == trunk.layout
    assert_same_features(trunk, quick, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["tf_efficientnet_lite0", "resnet18", "densenet121", "mobilenetv3_large_100", "regnety_002", "mobilevit_xxs"],
)
def test_every_family_keeps_its_features_with_fewer_norms(name: str) -> None:
    trunk = trunk_of(name, 64)
    quick = folded(trunk, 64)
    assert len(norms(quick)) < len(norms(trunk))
    assert_same_features(trunk, quick, 64)


def test_at_another_size_than_the_one_compared_the_features_are_the_same_too() -> None:
    trunk = trunk_of("test_efficientnet", 64)
    assert_same_features(trunk, folded(trunk, 64), 96)


def test_the_trunk_itself_is_left_as_it_was() -> None:
    trunk = trunk_of("test_efficientnet", 64)
    before = copy.deepcopy(trunk.state_dict())
    folded(trunk, 64)
    after = trunk.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_folding_is_decided_by_the_trunk_alone() -> None:
    trunk, x = trunk_of("test_resnet", 64), images(64)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    one = folded(trunk, 64)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one(x), folded(trunk, 64)(x))


def test_a_folded_trunk_stays_frozen_and_in_eval_mode() -> None:
    quick = folded(trunk_of("test_efficientnet", 64), 64)
    quick.train()
    assert not any(module.training for module in quick.modules())
    assert not any(parameter.requires_grad for parameter in quick.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_convolutions_with_or_without_bias_and_norms_with_or_without_parameters_fold(bias: bool, affine: bool) -> None:
    trunk = by_hand(Body(conv=nn.Conv2d(3, 4, 3, bias=bias), bn=nn.BatchNorm2d(4, affine=affine), act=nn.ReLU()))
    quick = folded(trunk, 16)
    assert not norms(quick)
    assert_same_features(trunk, quick, 16)


# --------------------------------------------------------------------------------------------- nothing to fold, traps


def test_a_trunk_without_norms_behind_convolutions_is_returned_as_it_is() -> None:
    for trunk in (
        trunk_of("test_convnext", 64),
        trunk_of("test_resnet", 64, cut="all"),
        by_hand(Body(bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 4, 1))),
        by_hand(Body(conv=nn.Conv2d(3, 4, 1), act=nn.ReLU(), bn=nn.BatchNorm2d(4))),
    ):
        assert folded(trunk, 64) is trunk


class Backwards(Body):
    """Calls the norm first, although it stands behind the convolution."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.conv(self.bn(x)),)


class Twice(Body):
    """Uses the convolution's own output beside the norm's."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.conv(x)
        return (self.bn(y) + y,)


class Faint(Body):
    """Has a strong output beside a faint one, of which folding would change the faint one alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 10_000.0, self.conv(self.bn(x)))


class Standardised(nn.Conv2d):
    """A convolution that standardises its weights as it is called."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    "body",
    [
        Backwards(conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3)),
        Twice(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)),
        Body(conv=Standardised(3, 4, 3), bn=nn.BatchNorm2d(4)),
        Faint(conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3)),
    ],
    ids=["norm called first", "output used twice", "weights standardised", "a faint output"],
)
def test_a_fold_that_changes_the_features_is_thrown_away(body: nn.Module) -> None:
    trunk = by_hand(body)
    assert folded(trunk, 16) is trunk
    assert norms(trunk)


@pytest.mark.slow
def test_a_head_that_reads_between_convolution_and_norm_keeps_the_norms() -> None:
    trunk = trunk_of("vgg16_bn", 64)
    assert folded(trunk, 64) is trunk


def test_a_fold_that_gives_no_numbers_is_thrown_away() -> None:
    trunk = by_hand(Body(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))
    with torch.no_grad():
        norms(trunk)[0].running_var.fill_(-1.0)
    assert folded(trunk, 16) is trunk
