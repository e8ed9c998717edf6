"""What a private step costs beside a plain one, in time and in memory: `python -P -m simulations.privacy_bench`.

plain          `client.training.fit`
ours           `client.private_training.fit`: patients drawn, gradients clipped, noise, optimiser
stock hooks    Opacus as it comes: a gradient for each record, formed in hooks
stock ghost    Opacus as it comes: norms first, then a second backward pass

All train the same upper, with random weights, from random features; steps are whole ones, from the drawing of a batch
to the optimiser. Plain and ours alternate in one process and their medians count, for the machine may have other work;
memory is what each alone, in a process of its own, holds above the level before its first step. Stock Opacus reads
channels-last convolutions wrongly: its columns are for cost alone.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.grad_sample.linear import compute_linear_norm_sample
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from client import private_training, training
from client.features import Features
from client.noise import Noise
from client.private_training import Mechanism
from client.rowstore import RowStore
from common import backbone
from common.backbone import Head, Layout, Upper
from common.errors import ConsiliumError
from common.files import write_json
from common.run_config import Training

BATCH, PATIENTS, LABELS, HEAD_INPUTS = 64, 1024, 3, 704
TURNS = 7
"""Pairs of a plain and a private round."""

MOST_TIME = {"head": 4.0, "deep": 2.2}
MOST_HEAD_MS = 2.0
MOST_MEMORY = 2.0
WIDTH = 132
"""Characters of a line where there is no terminal."""

STOCK_S = 25.0
"""Seconds that a step of stock Opacus, its start included, is waited for."""

STOCK = ("stock hooks", "stock ghost")


@dataclass(frozen=True)
class Case:
    """An upper to train: the head alone, or a backbone's last stage and the head."""

    backbone: str = ""
    image_size: int = 0

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.backbone} stages:1 at {self.image_size}" if self.backbone else f"head of {HEAD_INPUTS} inputs"

    @property
    def steps(self) -> int:
        """Steps of a round: enough that what a round costs once does not count."""
        return 3 if self.backbone else 100

    def upper(self) -> Upper:
        """Return it with random weights, none of them such that gradients vanish."""
        torch.manual_seed(0)
        if not self.backbone:
            return Upper(None, Layout((), HEAD_INPUTS), Head(HEAD_INPUTS, LABELS))
        network = backbone.create(self.backbone, image_size=self.image_size, seed=0)
        built = backbone.build(network, cut="stages:1", features="multi", labels=LABELS, image_size=self.image_size)
        nn.init.normal_(built[1].head.linear.weight, std=0.05)
        return built[1]


@dataclass(frozen=True)
class Work:
    """An upper with features, and the ways to train it."""

    case: Case
    upper: Upper
    features: Features
    labels: Tensor

    @staticmethod
    def of(case: Case, folder: Path) -> Work:
        """Return the work of a case."""
        upper = case.upper()
        rows = torch.randn(1, PATIENTS, upper.layout.width).half()
        store = RowStore(folder, np.dtype(("<f2", (upper.layout.width,))))
        features = Features(rows, store, np.arange(PATIENTS)[None], torch.device("cpu"))
        return Work(case, upper, features, torch.randint(LABELS, (PATIENTS,)))

    def round(self, kind: str, steps: int) -> None:
        """Train for some steps."""
        ways = {"plain": self._plain, "ours": self._ours, "stock hooks": self._hooks, "stock ghost": self._ghost}
        ways[kind](steps)

    def _settings(self, steps: int) -> Training:
        return Training(local_steps=steps, batch_size=BATCH, schedule="constant")

    def _plain(self, steps: int) -> None:
        training.fit(
            self.upper,
            self.features,
            self.labels,
            np.arange(PATIENTS),
            self._settings(steps),
            round_number=1,
            class_weights=torch.ones(LABELS),
            seed=0,
            site="site-1",
        )

    def _ours(self, steps: int) -> None:
        settings = self._settings(steps)
        private_training.fit(
            self.upper,
            self.features,
            self.labels,
            np.arange(PATIENTS),
            settings,
            mechanism=Mechanism.of(settings, PATIENTS, noise_multiplier=1.0, clip=1.0),
            round_number=1,
            class_weights=torch.ones(LABELS),
            patients=np.arange(PATIENTS),
            noise=Noise(),
        )

    def _ready(self) -> torch.optim.Optimizer:
        """Undo what this package does to Opacus, and to the upper what Opacus needs."""
        _restore_opacus()
        for module in self.upper.modules():
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010 - mypy knows no such attribute of a module
        self.upper.train()
        return torch.optim.AdamW(self.upper.trainable().values(), lr=1e-4, fused=True)

    def _hooks(self, steps: int) -> None:
        inner = self._ready()
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # by stock Opacus, at every step
        module = GradSampleModule(self.upper, strict=False)
        optimizer = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=BATCH)
        for index in torch.split(torch.arange(PATIENTS), BATCH)[:steps]:
            optimizer.zero_grad()
            self._losses(module, index).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        module.remove_hooks()

    def _ghost(self, steps: int) -> None:
        inner = self._ready()
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        module = GradSampleModuleFastGradientClipping(self.upper, strict=False, loss_reduction="mean")
        optimizer = DPOptimizerFastGradientClipping(
            inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=BATCH
        )
        for index in torch.split(torch.arange(PATIENTS), BATCH)[:steps]:
            losses = self._losses(module, index)
            losses.mean().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            module.disable_hooks()
            (module.get_clipping_coef() * losses).sum().backward()
            module.enable_hooks()
            optimizer.step()
        module.remove_hooks()

    def _losses(self, module: nn.Module, index: Tensor) -> Tensor:
        rows = self.features.batch(torch.zeros_like(index), index)
        return training.example_losses(module(rows), self.labels[index], torch.ones(LABELS))


def _restore_opacus() -> None:
    norms = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
    norms[nn.Linear] = compute_linear_norm_sample
    for kind in [kind for kind in norms if issubclass(kind, nn.Conv2d)]:
        del norms[kind], GradSampleModule.GRAD_SAMPLERS[kind]  # both ways have one table of these
    GradSampleModule.GRAD_SAMPLERS[nn.Conv2d] = compute_conv_grad_sample


# Measuring


def paired(work: Work) -> dict[str, list[float]]:
    """Return seconds a step of plain and private rounds, one after the other."""
    found: dict[str, list[float]] = {"plain": [], "ours": []}
    for kind in found:
        work.round(kind, 2)
    for _ in range(TURNS):
        for kind, seconds in found.items():
            seconds.append(_seconds(work, kind, work.case.steps))
    return found


def _seconds(work: Work, kind: str, steps: int) -> float:
    begin = time.perf_counter()
    work.round(kind, steps)
    return (time.perf_counter() - begin) / steps


def alone(work: Work, kind: str) -> dict[str, float]:
    """Return the memory that some steps take above what was held before, in MB, and the seconds of the last."""
    _take_peak()
    held = _take_peak()
    seconds = _seconds(work, kind, 1)
    if kind not in STOCK or seconds < STOCK_S / 3:
        seconds = _seconds(work, kind, 3 if kind not in STOCK else 1)
    return {"seconds": seconds, "mb": _take_peak() - held}


def _take_peak() -> float:
    """Return the most memory resident since the last call, in MB, and begin anew."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return int(lines["VmHWM"].split()[0]) / 1000


def in_child(case: Case, kind: str, threads: int, most_s: float) -> Any:
    """Return what a process of its own measures, None where it takes longer, nothing where it fails."""
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, kind, threads, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv() if receiving.poll(most_s) else None
    except EOFError:
        return {}
    finally:
        process.kill()
        process.join()


def _child(case: Case, kind: str, threads: int, answer: Connection) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="consilium-privacy-") as name:
        work = Work.of(case, Path(name))
        answer.send(paired(work) if kind == "pairs" else alone(work, kind))


@dataclass(frozen=True)
class Cost:
    """What the steps of one case cost."""

    case: str
    plain_ms: float
    ours_ms: float
    ratio: float  # of the medians
    plain_mb: float
    ours_mb: float
    stock: dict[
        str, dict[str, float] | None
    ]  # milliseconds and MB; none if it fails, None if it takes longer than `STOCK_S`
    met: bool


def cost(case: Case, threads: int, *, stock: bool) -> Cost:
    """Measure one case."""
    pairs = in_child(case, "pairs", threads, 300)
    plain, ours = (statistics.median(pairs[kind]) * 1e3 for kind in ("plain", "ours"))
    memory = {kind: in_child(case, kind, threads, 120)["mb"] for kind in ("plain", "ours")}
    most = MOST_TIME["deep" if case.backbone else "head"]
    met = ours <= most * plain and (bool(case.backbone) or ours <= MOST_HEAD_MS)
    met = met and memory["ours"] <= max(MOST_MEMORY * memory["plain"], 10)  # a head's few MB are those of the allocator
    theirs = {kind: in_child(case, kind, threads, STOCK_S) for kind in STOCK} if stock else {}
    found = {kind: one and {"ms": one["seconds"] * 1e3, "mb": one["mb"]} for kind, one in theirs.items()}
    return Cost(case.name, plain, ours, ours / plain, memory["plain"], memory["ours"], found, met)


def show(costs: list[Cost], threads: int, console: Console) -> None:
    """Print the table."""
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"batch {BATCH}, {threads} threads, {cores} cores, load {os.getloadavg()[0]:.1f}")
    for column in ("", "plain", "ours", "times plain", "times its memory", *STOCK, "aims"):
        table.add_column(column)
    for one in costs:
        plain, ours = f"{one.plain_ms:.2f} ms, {one.plain_mb:.0f} MB", f"{one.ours_ms:.2f} ms, {one.ours_mb:.0f} MB"
        stock = [_stock_cell(one, kind) for kind in STOCK]
        memory = f"{one.ours_mb / one.plain_mb:.2f}" if one.plain_mb > 10 else "-"
        table.add_row(one.case, plain, ours, f"{one.ratio:.2f}", memory, *stock, "met" if one.met else "missed")
    console.print(table)


def _stock_cell(one: Cost, kind: str) -> str:
    if kind not in one.stock:
        return "-"
    found = one.stock[kind]
    if not found:
        return "fails" if found is not None else f"over {STOCK_S:.0f} s"
    return f"{found['ms']:.0f} ms, {found['mb']:.0f} MB"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--image-size", multiple=True, type=int, default=(128,), metavar="PIXELS", help="Repeatable [128].")
@click.option("--threads", type=int, default=2, metavar="N", help="Of torch; 1 where others use the machine [2].")
@click.option("--stock/--no-stock", default=True, help="Whether to run Opacus as it comes as well [yes].")
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
def main(image_size: tuple[int, ...], threads: int, stock: bool, as_json: Path | None) -> None:
    """Measure private steps beside plain ones; about three minutes for each image size."""
    backbones = ("resnet18", "mobilenetv2_100", "tf_efficientnet_lite0")
    cases = [Case(), *(Case(name, size) for size in image_size for name in backbones)]
    costs = [cost(case, threads, stock=stock) for case in cases]
    show(costs, threads, Console(width=None if sys.stdout.isatty() else WIDTH))
    if as_json is not None:
        write_json(as_json, {"load": os.getloadavg()[0], "costs": [asdict(one) for one in costs]})


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"privacy_bench: {error}", err=True)
        sys.exit(error.exit_code)
