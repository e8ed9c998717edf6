"""The cut is exact for every kind of network, the head reads what it says, and norms with statistics never move."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from common import backbone
from common.backbone import Head, Layout, Trunk, Upper, build, create, input_spec, pool, split, stage_of_parameter
from common.errors import ConfigError

torch.set_num_threads(1)

CUTS = ["head", "stages:1", "stages:2", "stages:3", "all"]
TINY = ["test_efficientnet", "test_resnet", "test_convnext"]
# Side of the input, where the model leaves a choice.
FAMILIES = {
    "resnet18": 64,
    "resnet50": 64,
    "vgg16": 64,
    "inception_v3": 96,
    "densenet121": 64,
    "tf_efficientnet_lite0": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_large_100": 64,
    "convnext_tiny": 64,
    "swin_tiny_patch4_window7_224": 224,
    "regnety_002": 64,
    "vit_tiny_patch16_224": 224,
    "vit_small_patch14_dinov2": 112,
    "eva02_tiny_patch14_224": 224,
    "hiera_tiny_224": 224,
    "dm_nfnet_f0": 64,
    "mobilevit_xxs": 64,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(side: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=seeded(seed))


def lively(model: nn.Module) -> nn.Module:
    """Give BatchNorms statistics and parameters that are not those of a fresh model, and every layer a voice."""
    random = seeded(1)
    with torch.no_grad():
        model.get_classifier().weight.normal_(0, 0.05, generator=random)  # type: ignore[operator, union-attr]
        for parameter in model.parameters():
            if parameter.ndim == 0:  # gains of residual branches that begin at zero
                parameter.fill_(0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=random)
                module.running_var.uniform_(0.5, 2.0, generator=random)
                module.weight.uniform_(0.5, 1.5, generator=random)
                module.bias.normal_(0, 0.1, generator=random)
    return model.eval()


def make(name: str, side: int | None = None) -> nn.Module:
    return lively(create(name, image_size=side, seed=0))


def assert_exact(name: str, side: int) -> None:
    model, x = make(name, side), images(side)
    with torch.inference_mode():
        expected = model(x)
        assert expected.isfinite().all()
        assert not torch.equal(expected[0], expected[1])
        for cut in CUTS:
            trunk, upper = split(model, cut)
            assert torch.equal(upper(trunk(x)), expected), cut


# -------------------------------------------------------------------------------------------------- the cut is exact


@pytest.mark.parametrize("name", TINY)
def test_upper_of_trunk_is_the_model_to_the_last_bit(name: str) -> None:
    assert_exact(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_upper_of_trunk_is_the_model_to_the_last_bit_in_every_family(name: str) -> None:
    assert_exact(name, FAMILIES[name])


@pytest.mark.parametrize("name", TINY)
def test_every_stage_can_be_cut_and_each_cut_shares_the_work_out_once(name: str) -> None:
    model = make(name)
    depth = max(stage_of_parameter(model).values()) - 1
    x = images(64)
    expected = model(x)
    counts = []
    for stages in range(1, depth + 1):
        trunk, upper = split(model, f"stages:{stages}")
        assert torch.equal(upper(trunk(x)), expected)
        below, above = {id(p) for p in trunk.parameters()}, {id(p) for p in upper.parameters()}
        assert not below & above
        assert below | above == {id(p) for p in model.parameters()}
        counts.append(len(below))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == depth
    with pytest.raises(ConfigError, match=rf"^--trainable stages:{depth + 1}: .* stages 1 to {depth}; or use all$"):
        split(model, f"stages:{depth + 1}")


def test_a_head_alone_holds_the_classifier_alone_and_all_holds_everything() -> None:
    model = make("test_resnet")
    trunk, upper = split(model, "head")
    assert [p.shape for p in upper.parameters()] == [p.shape for p in model.get_classifier().parameters()]  # type: ignore[operator]
    assert trunk(images(64)).ndim == 2
    trunk, upper = split(model, "all")
    assert list(trunk.parameters()) == []
    assert len(list(upper.parameters())) == len(list(model.parameters()))


def test_the_cut_is_not_a_copy() -> None:
    model, x = make("test_resnet"), images(64)
    trunk, upper = split(model, "stages:1")
    before = upper(trunk(x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(upper(trunk(x)), before)
    assert torch.equal(upper(trunk(x)), model(x))


class Masked(nn.Module):
    """A model that callers may ask another way with optional arguments, and that takes hold of a parameter early."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.tensor([2.0, 3.0, 4.0, 5.0]))
        self.pretrained_cfg = {"classifier": "head"}

    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
        gain = self.gain
        x = self.stem(x)
        if mask is not None:
            x = x * mask
        x = self.body(x)
        if double:
            x = x * 2
        return self.head(x.mean((2, 3)) * gain)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": "^stem|^gain", "blocks": [("^body", (0,))]}


def test_optional_arguments_are_left_at_their_defaults_and_parameters_need_not_cross_the_cut() -> None:
    model, x = Masked().eval(), images(8)
    for cut in ("head", "stages:1", "all"):
        trunk, upper = split(model, cut)
        assert torch.equal(upper(trunk(x)), model(x))


# ------------------------------------------------------------------------------------------------- trunk and upper


@pytest.mark.parametrize("features", ["multi", "last"])
@pytest.mark.parametrize("cut", CUTS)
def test_shapes_follow_from_the_layout(features: str, cut: str) -> None:
    trunk, upper = build(make("test_efficientnet"), cut=cut, features=features, labels=3, image_size=64)
    found = trunk(images(64, 5))
    assert found.shape == (5, trunk.layout.width)
    assert trunk.layout is upper.layout or trunk.layout == upper.layout
    taps = upper.taps(found)
    assert taps.shape == (5, upper.head.linear.in_features)
    assert upper(found).shape == (5, 3)
    assert (upper.body is None) == (cut == "head")
    if cut == "head":
        assert trunk.layout == Layout((), upper.head.linear.in_features)
    if cut == "all":
        assert trunk.layout == Layout((3, 64, 64), 0)
        assert torch.equal(found, images(64, 5).flatten(1))


def test_width_is_activation_plus_pooled() -> None:
    assert Layout((2, 3, 4), 5).width == 29
    assert Layout((), 5).width == 5


@pytest.mark.parametrize("features", ["multi", "last"])
def test_what_the_head_reads_does_not_depend_on_the_cut(features: str) -> None:
    model, x = make("test_efficientnet"), images(64)
    found = []
    for cut in CUTS:
        trunk, upper = build(model, cut=cut, features=features, labels=2, image_size=64)
        with torch.inference_mode():
            found.append(upper.taps(trunk(x)))
    for taps in found[1:]:
        torch.testing.assert_close(taps, found[0], rtol=1e-5, atol=1e-5)


def outputs_of(model: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """Return what the named modules put out as the model runs: hooks, not tracing."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: seen.__setitem__(name, call[2]))
        for name in names
    ]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["head", "stages:1", "stages:2", "stages:4", "all"])
def test_the_head_of_efficientnet_lite0_reads_the_last_four_stages_by_hand(cut: str) -> None:
    model, x = make("tf_efficientnet_lite0"), images(64)
    stages = outputs_of(model, ["blocks.3", "blocks.4", "blocks.5", "blocks.6"], x)
    by_hand = torch.cat([stage.mean((2, 3)) for stage in stages], 1)
    assert by_hand.shape[1] == 80 + 112 + 192 + 320
    trunk, upper = build(model, cut=cut, features="multi", labels=2, image_size=64)
    head = upper.head
    with torch.no_grad():
        head.get_buffer("mean").copy_(by_hand.mean(0))
        head.get_buffer("scale").fill_(0.5)
        head.linear.weight.normal_(generator=seeded(2))
        head.linear.bias.fill_(3.0)
    with torch.inference_mode():
        expected = (by_hand - by_hand.mean(0)) * 0.5 @ head.linear.weight.T + 3.0
        torch.testing.assert_close(upper(trunk(x)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_the_last_features_of_efficientnet_lite0_are_what_its_classifier_reads() -> None:
    model, x = make("tf_efficientnet_lite0"), images(64)
    trunk, upper = build(model, cut="head", features="last", labels=2, image_size=64)
    with torch.inference_mode():
        assert torch.equal(upper.taps(trunk(x)), model.forward_head(model.forward_features(x), pre_logits=True))  # type: ignore[operator]
    assert upper.head.linear.in_features == 1280


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
        ("vit_tiny_patch16_224", [192] * 4),
        ("convnext_tiny", [96, 192, 384, 768]),
        ("densenet121", [128, 256, 512, 1024]),
    ],
)
def test_the_multi_layer_head_is_as_wide_as_the_last_four_stages_together(name: str, widths: list[int]) -> None:
    model = make(name)
    _, upper = build(model, cut="head", features="multi", labels=2, image_size=FAMILIES[name])
    assert upper.head.linear.in_features == sum(widths)


def test_a_fresh_head_is_zero_whatever_it_reads() -> None:
    trunk, upper = build(make("test_resnet"), cut="stages:1", features="multi", labels=4, image_size=64)
    assert upper(trunk(images(64))).tolist() == [[0.0] * 4] * 2


def test_the_head_standardises_then_multiplies_by_hand() -> None:
    head = Head(2, 1)
    with torch.no_grad():
        head.get_buffer("mean").copy_(torch.tensor([1.0, 2.0]))
        head.get_buffer("scale").copy_(torch.tensor([10.0, 0.5]))
        head.linear.weight.copy_(torch.tensor([[1.0, 100.0]]))
        head.linear.bias.fill_(0.25)
    assert head(torch.tensor([[1.5, 4.0]])).tolist() == [[5.0 + 100.0 + 0.25]]
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}


def test_dropout_acts_in_training_alone() -> None:
    _, upper = build(make("test_resnet"), cut="head", features="last", labels=2, image_size=64, dropout=0.5)
    with torch.no_grad():
        upper.head.linear.weight.fill_(1.0)
    rows = torch.ones(64, upper.head.linear.in_features)
    assert upper(rows).unique().numel() == 1
    assert upper.train()(rows).unique().numel() > 1
    assert upper.eval()(rows).unique().numel() == 1


def norms_of(part: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in part.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("cut", ["stages:1", "stages:2", "all"])
def test_batchnorm_above_the_cut_stays_in_eval_mode_and_frozen(cut: str) -> None:
    trunk, upper = build(make("test_efficientnet"), cut=cut, features="multi", labels=2, image_size=64, dropout=0.1)
    with torch.no_grad():
        upper.head.linear.weight.normal_(generator=seeded())
    norms = norms_of(upper)
    assert norms
    assert list(upper.frozen_norms()) == norms
    before = {name: value.clone() for name, value in upper.state_dict().items()}
    upper.train()
    assert upper.training
    assert upper.head.dropout.training
    assert not any(norm.training for norm in norms)
    for norm in norms:
        assert not any(parameter.requires_grad for parameter in norm.parameters())
    upper(trunk(images(64, 4))).square().sum().backward()
    torch.optim.SGD(upper.trainable().values(), lr=1e-3, weight_decay=0.1).step()
    of_norms = {
        f"{name}.{key}" for name, module in upper.named_modules() if module in norms for key in module.state_dict()
    }
    changed = {name for name, value in upper.state_dict().items() if not torch.equal(value, before[name])}
    assert not changed & of_norms
    assert changed <= set(upper.trainable())
    assert "head.linear.weight" in changed
    assert len(changed) > 3
    assert not upper.eval().training


def test_the_trunk_has_one_behaviour_and_learns_nothing() -> None:
    trunk, upper = build(make("test_efficientnet"), cut="stages:1", features="multi", labels=2, image_size=64)
    trunk.train()
    assert not any(module.training for module in trunk.modules())
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert any(parameter.requires_grad for parameter in upper.parameters())
    assert not trunk(images(64)).requires_grad


def test_parameters_are_shared_with_the_model_and_in_one_part_alone() -> None:
    model = make("test_efficientnet")
    trunk, upper = build(model, cut="stages:1", features="multi", labels=2, image_size=64)
    own = {id(parameter) for parameter in model.parameters()}
    below, above = {id(p) for p in trunk.parameters()}, {id(p) for p in upper.parameters()}
    assert not below & above
    assert below <= own
    assert above - own == {id(p) for p in upper.head.parameters()}
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}  # type: ignore[operator]
    assert not classifier & (below | above)


def test_what_nobody_reads_is_left_out() -> None:
    """The multi-layer head does not read the last convolution: it is neither run nor trained nor sent."""
    model = make("test_efficientnet")
    read, unread = (
        build(model, cut="stages:1", features=kind, labels=2, image_size=64)[1].state_dict()
        for kind in ("last", "multi")
    )
    assert any("conv_head" in name for name in read)
    assert not any("conv_head" in name for name in unread)


def test_a_batch_of_one_and_of_many_give_the_same_rows() -> None:
    trunk, upper = build(make("test_resnet"), cut="stages:2", features="multi", labels=2, image_size=64)
    with torch.inference_mode():
        rows = trunk(images(64, 3))
        together = upper.taps(rows)
        alone = torch.cat([upper.taps(row[None]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- pool


@pytest.mark.parametrize(
    ("shape", "positions"),
    [((2, 5, 3, 3), (2, 3)), ((2, 3, 3, 5), (1, 2)), ((2, 4, 4, 4), (2, 3)), ((2, 7, 1, 1), (2, 3)), ((2, 9, 6), (1,))],
)
def test_pool_averages_over_positions_wherever_the_channels_stand(
    shape: tuple[int, ...], positions: tuple[int, ...]
) -> None:
    activation = torch.randn(shape, generator=seeded())
    torch.testing.assert_close(pool(activation), activation.mean(positions))


def test_pool_leaves_a_row_as_it_is() -> None:
    row = torch.randn(2, 5, generator=seeded())
    assert torch.equal(pool(row), row)


@pytest.mark.slow
def test_a_map_whose_layout_cannot_be_told_is_refused() -> None:
    """Swin's first stage at 384 pixels: 96 x 96 positions of 96 channels, channels last."""
    model = create("swin_tiny_patch4_window7_224", image_size=384, seed=0)
    with pytest.raises(
        ConfigError, match=r"^--image-size 384: a stage of this backbone is as wide as its maps; choose"
    ):
        build(model, cut="head", features="multi", labels=2, image_size=384)
    _, upper = build(model, cut="head", features="last", labels=2, image_size=384)
    assert upper.head.linear.in_features == 768


def test_a_map_as_wide_as_its_sides_is_no_trouble_where_channels_stand_first() -> None:
    model, side = make("test_resnet"), 128  # 32 channels on 32 x 32 positions
    (stage,) = outputs_of(model, ["layer1"], images(side))
    assert stage.shape[1:] == (32, 32, 32)
    trunk, upper = build(model, cut="head", features="multi", labels=2, image_size=side)
    with torch.inference_mode():
        torch.testing.assert_close(upper.taps(trunk(images(side)))[:, :32], stage.mean((2, 3)))


# ------------------------------------------------------------------------------------------------------------- create


def test_random_weights_are_decided_by_the_seed_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (create("test_resnet", image_size=None, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_models_of_a_fixed_size_are_made_for_the_size_asked_for() -> None:
    model = create("vit_tiny_patch16_224", image_size=64, seed=0)
    trunk, upper = build(model, cut="stages:1", features="last", labels=2, image_size=64)
    assert trunk.layout.activation == (17, 192)
    assert upper(trunk(images(64))).shape == (2, 2)


def test_the_input_is_the_models_own_unless_a_size_is_given() -> None:
    model = create("tf_efficientnet_lite0", image_size=None, seed=0)
    spec = input_spec(model)
    assert (spec.image_size, spec.mean, spec.std, spec.interpolation) == (224, (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert input_spec(model, 96).image_size == 96
    assert input_spec(create("resnet18", image_size=None, seed=0)).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "eva02_tiny_patch14_224"])
@pytest.mark.slow
def test_a_model_made_without_a_classifier_gets_one_to_replace(name: str) -> None:
    side = FAMILIES[name]
    trunk, upper = build(make(name, side), cut="head", features="multi", labels=3, image_size=side)
    assert upper(trunk(images(side))).shape == (2, 3)


# ------------------------------------------------------------------------------------------------------------- errors


def refused(name: str, side: int, cut: str = "head", features: str = "multi") -> str:
    with pytest.raises(ConfigError) as caught:
        build(create(name, image_size=side, seed=0), cut=cut, features=features, labels=2, image_size=side)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_comes_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        create("resnt18", image_size=None, seed=0)
    assert "--backbone: got 'resnt18', expected" in str(caught.value)
    assert "did you mean 'resnet18'" in str(caught.value)


@pytest.mark.parametrize("name", ["", "hf-hub:someone/something", "../resnet18", "zzzzzzzzzzzz"])
def test_a_name_like_nothing_known_is_refused_too(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--backbone: got "):
        create(name, image_size=None, seed=0)


def test_an_unknown_set_of_pretrained_weights_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^--backbone resnet18.nonsense: timm cannot make it \(Invalid pretrained tag"
    ):
        create("resnet18.nonsense", image_size=None, seed=0)


@pytest.mark.parametrize("name", ["levit_128s", "crossvit_9_240", "resnetv2_18", "deit_tiny_distilled_patch16_224"])
def test_a_model_without_a_single_linear_classifier_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^--backbone {name}: expected a model with one linear classifier"):
        create(name, image_size=None, seed=0)


def test_an_image_that_is_too_small_is_refused() -> None:
    assert refused("inception_v3", 32).startswith("--image-size 32: this backbone cannot take it (")
    assert refused("densenet121", 16).startswith("--image-size 16: this backbone cannot take it (")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut", "features"),
    [
        ("hrnet_w18_small", "head", "multi"),
        ("hrnet_w18_small", "stages:1", "last"),
        ("hrnet_w18", "head", "multi"),
        ("coat_tiny", "stages:1", "last"),
        ("mvitv2_tiny", "head", "multi"),
    ],
)
def test_stages_that_hand_on_several_tensors_are_refused(name: str, cut: str, features: str) -> None:
    side = {"coat_tiny": 224, "mvitv2_tiny": 224}.get(name, 64)
    message = refused(name, side, cut, features)
    assert message.startswith("this backbone hands on several tensors at once where it was to be cut or read; use")
    trunk, upper = build(make(name, side), cut="head", features="last", labels=2, image_size=side)
    assert upper(trunk(images(side))).shape == (2, 2)


@pytest.mark.parametrize("name", ["poolformerv2_s12", "pit_ti_224", "rdnet_tiny"])
def test_a_model_whose_stages_timm_does_not_name_is_refused_but_its_head_can_be_trained(name: str) -> None:
    side = 224 if name == "pit_ti_224" else 64
    for cut, features in [("stages:1", "last"), ("head", "multi")]:
        assert "timm names no stages of it; use --features last with --trainable head or all" in refused(
            name, side, cut, features
        )
    trunk, upper = build(make(name, side), cut="head", features="last", labels=2, image_size=side)
    assert upper(trunk(images(side))).shape == (2, 2)


def test_code_that_cannot_be_traced_is_refused() -> None:
    assert "cannot be cut (" in refused("twins_svt_small", 224)
    assert "cannot be cut (" in refused("test_vit", 160)


@pytest.mark.slow
def test_a_stage_that_several_tensors_leave_has_no_single_output() -> None:
    assert refused("pnasnet5large", 128) == (
        "--features multi: several tensors leave a stage of this backbone; use --features last"
    )


def test_parts_put_together_by_hand_are_what_build_makes() -> None:
    layout = Layout((4, 2, 2), 3)
    assert Trunk(None, layout)(torch.arange(24.0).reshape(2, 3, 2, 2)).shape == (2, 12)
    upper = Upper(None, layout, Head(7, 2))
    assert list(upper.frozen_norms()) == []
    assert set(upper.trainable()) == {"head.linear.weight", "head.linear.bias"}


def test_the_tested_families_are_classifiers_of_timm() -> None:
    assert set(FAMILIES) <= set(timm.list_models())
    assert backbone.TAPPED_STAGES == 4
