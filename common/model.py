"""The model of a run: trunk and upper with their weights, what of it is frozen, and how the frozen part is named.

Everything frozen (the trunk, and the norms with running statistics above the cut) crosses the network once, as one
safetensors content. Its SHA-256 is the trunk's identity: it covers the structure as well as the values.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import backbone, checkpoint, weights
from common.backbone import InputSpec, Trunk, Upper
from common.errors import CheckpointError
from common.parameters import Parameters
from common.run_config import RunConfig

STRUCTURE = "structure"
_STANDARDISER = ("head.mean", "head.scale")


@dataclass(frozen=True)
class Built:
    """A cut model with its input specification."""

    trunk: Trunk
    upper: Upper
    spec: InputSpec


def skeleton(run: RunConfig) -> Built:
    """Return the run's model with random weights: the shape that a site fills with the trunk it receives.

    Raises:
        ConfigError: the backbone cannot be built or cut as the run says.
    """
    model = backbone.create(run.model.backbone, image_size=run.data.image_size, seed=run.seed)
    return _cut(model, run)


def pretrained(run: RunConfig) -> Built:
    """Return the run's model with its pretrained weights and a head at zero.

    Raises:
        ConfigError: the backbone cannot be built or cut as the run says.
        WeightsUnavailable: the weights cannot be had.
    """
    source = weights.Weights.parse(run.model.weights, run.model.backbone)
    model = weights.pretrained(run.model.backbone, source, image_size=run.data.image_size, seed=run.seed)
    return _cut(model, run)


def _cut(model: torch.nn.Module, run: RunConfig) -> Built:
    spec = backbone.input_spec(model, run.data.image_size)
    trunk, upper = backbone.build(
        model,
        cut=run.model.trainable,
        features=run.model.features,
        labels=len(run.task.labels),
        image_size=spec.image_size,
        dropout=run.model.dropout,
        scaling=run.model.scaling,
    )
    return Built(trunk, upper, spec)


def frozen_content(built: Built, run: RunConfig) -> bytes:
    """Return every frozen tensor and the structure they belong to, as safetensors bytes."""
    facts = {
        "backbone": run.model.backbone,
        "trainable": run.model.trainable,
        "features": run.model.features,
        "image_size": built.spec.image_size,
    }
    structure = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
    tensors = {name: value.numpy() for name, value in _frozen(built).items()}
    return checkpoint.to_bytes({STRUCTURE: structure, **tensors})


def load_frozen(built: Built, content: bytes) -> None:
    """Fill a skeleton with a trunk's content.

    Raises:
        CheckpointError: the content has other names or shapes than the skeleton.
    """
    received = checkpoint.from_bytes(content)
    received.pop(STRUCTURE, None)
    expected = _frozen(built)
    fits = received.keys() == expected.keys() and all(
        received[name].shape == tuple(expected[name].shape) for name in expected
    )
    if not fits:
        raise CheckpointError("the trunk received does not fit this run's backbone; the two ends run other versions")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(torch.from_numpy(np.array(received[name])))


def _frozen(built: Built) -> dict[str, Tensor]:
    """Return the frozen tensors by name; they share memory with the model."""
    exchanged = set(built.upper.trainable()) | set(_STANDARDISER)
    above = {name: value for name, value in built.upper.state_dict().items() if name not in exchanged}
    parts = {
        **{f"trunk.{name}": value for name, value in built.trunk.state_dict().items()},
        **{f"upper.{name}": value for name, value in above.items()},
    }
    return {name: value.detach() for name, value in parts.items() if not name.endswith("num_batches_tracked")}


def frozen_count(built: Built) -> int:
    """Return the number of frozen values."""
    return sum(value.numel() for value in _frozen(built).values())


def trainable_values(upper: Upper) -> dict[str, NDArray[np.float32]]:
    """Return copies of the trainable parameters, in the order of their names on the wire."""
    return {name: value.detach().cpu().numpy().astype(np.float32) for name, value in sorted(upper.trainable().items())}


def load_trainable(upper: Upper, parameters: Parameters) -> None:
    """Set the trainable parameters."""
    with torch.no_grad():
        for name, target in upper.trainable().items():
            target.copy_(torch.from_numpy(parameters[name]))


def load_standardiser(upper: Upper, mean: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
    """Set what the head subtracts and multiplies by."""
    with torch.no_grad():
        upper.head.get_buffer("mean").copy_(torch.from_numpy(mean))
        upper.head.get_buffer("scale").copy_(torch.from_numpy(scale))


def norm_statistics(upper: Upper) -> bytes:
    """Return the bytes of all running statistics above the cut: equal before and after training, always."""
    buffers = [buffer for norm in upper.frozen_norms() for buffer in norm.buffers()]
    return b"".join(buffer.detach().cpu().numpy().tobytes() for buffer in buffers)
