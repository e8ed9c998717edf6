"""What `simulations.compare` measures against: the same training as a plain Flower app has it.

A stock ClientApp and a stock FedAvg: every batch passes the whole network, the whole state dict travels both ways,
and training and evaluation are two exchanges. It is spared what does not depend on the method: the images are
preprocessed and in memory, the sites of the process share one model, and the weights stay in the memory format that
is fastest on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

from client import views
from client.cohort import Cohort
from client.workshop import threads
from common.backbone import InputSpec
from common.errors import DataError
from common.model import Built
from simulations.grid import InProcessGrid

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Recipe:
    """How a site trains in a round: one pass over its training images."""

    batch_size: int
    lr: float
    spec: InputSpec


@dataclass(frozen=True)
class Images:
    """One site's images in memory, preprocessed."""

    pixels: Tensor  # (N, C, S, S) uint8
    labels: Tensor  # (N,)
    splits: Mapping[str, Tensor]  # indices of `train` and `validation`

    @staticmethod
    def of(cohort: Cohort) -> Images:
        """Return the training and validation images of a cohort.

        Raises:
            DataError: an image has several labels, which this plain trainer does not learn.
        """
        if cohort.kind == "multi-label":
            raise DataError("the comparison with plain Flower takes one label an image: name another --dataset")
        splits = {name: torch.from_numpy(cohort.indices(name)) for name in ("train", "validation")}
        pixels = cohort.pixels(torch.arange(len(cohort)).numpy())
        return Images(torch.from_numpy(pixels), torch.from_numpy(cohort.labels), splits)

    def batch(self, index: Tensor, spec: InputSpec) -> Tensor:
        """Return the network's input for these images: (B, 3, S, S)."""
        return views.normalise(self.pixels[index].float() / 255, spec).contiguous(memory_format=torch.channels_last)


class WholeModel(nn.Module):
    """A cut model in one piece: the same blocks frozen as in the run it is compared with, but passed every time."""

    def __init__(self, built: Built) -> None:
        super().__init__()
        self.trunk = built.trunk
        self.upper = built.upper
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K)."""
        with torch.no_grad():
            features = self.trunk(images)
        logits: Tensor = self.upper(features)
        return logits


def fit(model: WholeModel, images: Images, recipe: Recipe, steps: int | None = None) -> float:
    """Train over the site's images once, or for some steps; return the mean loss."""
    optimizer = torch.optim.AdamW(list(model.upper.trainable().values()), lr=recipe.lr, weight_decay=0.0, fused=True)
    model.train()
    train = images.splits["train"]
    losses = []
    for index in torch.split(train[torch.randperm(len(train))], recipe.batch_size)[:steps]:
        loss = functional.cross_entropy(model(images.batch(index, recipe.spec)), images.labels[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / max(len(losses), 1)


@torch.inference_mode()
def accuracy(model: WholeModel, images: Images, recipe: Recipe) -> float:
    """Return the share of validation images that the model labels rightly."""
    model.eval()
    validation = images.splits["validation"]
    hits = [
        (model(images.batch(index, recipe.spec)).argmax(1) == images.labels[index]).sum().item()
        for index in torch.split(validation, recipe.batch_size)
    ]
    return float(sum(hits)) / max(len(validation), 1)


def make_app(model: WholeModel, sites: Sequence[Images], recipe: Recipe) -> ClientApp:
    """Return a ClientApp as Flower's guide writes it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        images = sites[int(context.node_config["partition-id"])]
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        loss = fit(model, images, recipe)
        metrics = MetricRecord({"train_loss": loss, "num-examples": len(images.splits["train"])})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        images = sites[int(context.node_config["partition-id"])]
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        found = accuracy(model, images, recipe)
        metrics = MetricRecord({"accuracy": found, "num-examples": len(images.splits["validation"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@dataclass(frozen=True)
class Measured:
    """What the rounds of a plain app cost, and that they trained."""

    seconds: tuple[float, ...]  # a round
    cores: float  # kept busy during the rounds
    state_bytes: int  # of the state dict, each way and site
    losses: tuple[float, ...]  # mean training loss of a round


def run(built: Built, cohorts: Sequence[Cohort], recipe: Recipe, rounds: int) -> Measured:
    """Run a stock FedAvg over these sites, on all cores, after a few steps that do not count.

    Args:
        built: a model of its own; it is trained.
        cohorts: one a site.
        recipe: of local training.
        rounds: at least one.
    """
    model = WholeModel(built)
    sites = [Images.of(cohort) for cohort in cohorts]
    initial = ArrayRecord(model.state_dict())
    grid = InProcessGrid(make_app(model, sites, recipe), [f"site-{number}" for number in range(len(sites))])
    strategy = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    marks: list[tuple[float, float]] = []
    with threads():
        fit(model, sites[0], recipe, WARM_UP_STEPS)
        # Flower calls `evaluate_fn` before the first round and after each: a clock that belongs to its own loop.
        result = strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=lambda _round, _arrays: _mark(marks))
    losses = tuple(float(str(result.train_metrics_clientapp[n]["train_loss"])) for n in range(1, rounds + 1))
    seconds = tuple(after[0] - before[0] for before, after in pairwise(marks))
    cores = (marks[-1][1] - marks[0][1]) / sum(seconds)
    return Measured(seconds, cores, sum(len(array.data) for array in initial.values()), losses)


def _mark(marks: list[tuple[float, float]]) -> None:
    marks.append((time.perf_counter(), time.process_time()))
