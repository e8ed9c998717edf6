"""What privacy costs in accuracy, and how fast a ledger adds up: `python -P -m simulations.privacy_utility`.

Each cell is the pooled test AUC of whole runs, as `consilium simulate --epsilon E --delta 1e-4` makes them: the mean
and the range over partition seeds, noise drawn anew in each. The aims are those of PneumoniaMNIST at 128 pixels; on
other data they mean nothing.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from common import privacy
from common.errors import ConsiliumError
from common.files import write_json
from common.privacy import Release
from common.run_config import build
from simulations.runner import Job, simulate

DELTA = 1e-4
EPSILONS: tuple[float | None, ...] = (8.0, 3.0, 1.0, None)
PARTITIONS = ("dirichlet:0.5", "dirichlet:0.1")
LEAST = {8.0: 0.935, 3.0: 0.925, 1.0: 0.915}
AIMS = {8.0: 0.945, 3.0: 0.935, 1.0: 0.93}
WIDTH = 120
"""Characters of a line where there is no terminal."""

LEDGER_ROUNDS, LEDGER_S = 200, 1.0


def utility(options: dict[str, Any], seeds: Sequence[int], cache: Path, strategy: str) -> list[dict[str, Any]]:
    """Return the AUC of every epsilon and partition.

    Args:
        options: of the simulation: data set, sites, image size.
        seeds: of partition and start.
        cache: of features.
        strategy: steps (fedavg), or the closed form (analytic).
    """
    return [
        {"strategy": strategy, "partition": partition, "epsilon": epsilon, "auc": areas}
        for partition in PARTITIONS
        for epsilon in EPSILONS
        for areas in [[_area(options, partition, epsilon, seed, cache, strategy) for seed in seeds]]
    ]


def _area(
    options: dict[str, Any], partition: str, epsilon: float | None, seed: int, cache: Path, strategy: str
) -> float | None:
    size = options["image_size"]
    values: dict[str, Any] = {
        "simulation": {key: options[key] for key in ("dataset", "sites")}
        | {"partition": partition, "baselines": False},
        "data": {} if size is None else {"image_size": size},
        "training": {"strategy": strategy},
        "privacy": {} if epsilon is None else {"epsilon": epsilon, "delta": DELTA},
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix="consilium-utility-") as folder:
        _, found = simulate(Job(build(values, "bench"), Path(folder) / "run", cache), lambda *_: None)
    area: float | None = found["test"]["pooled"]["auc"]
    return area


def ledger_seconds() -> float:
    """Return the seconds that the epsilon of rounds takes, each with noise and sampling of its own."""
    releases = [Release(1 + 0.01 * number, 0.02 + 0.001 * (number % 7), 3) for number in range(LEDGER_ROUNDS)]
    begin = time.perf_counter()
    privacy.epsilon(releases, DELTA)
    return time.perf_counter() - begin


def show(found: Sequence[dict[str, Any]], seconds: float, console: Console) -> None:
    """Print the table."""
    table = Table(title="pooled test AUC at a site's epsilon", title_justify="left")
    for column in ("trained by", "partition", "epsilon", "AUC, mean (range over seeds)", "least / aim", ""):
        table.add_column(column)
    for row in found:
        table.add_row(*_cells(row))
    console.print(table)
    met = "met" if seconds < LEDGER_S else "missed"
    console.print(
        f"epsilon of a ledger of {LEDGER_ROUNDS} different rounds: {seconds:.2f} s, below {LEDGER_S:g} s: {met}"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    known = [area for area in row["auc"] if area is not None]
    mean = fmean(known) if known else 0.0
    shown = f"{mean:.4f} ({min(known):.3f} to {max(known):.3f})" if known else "not defined"
    epsilon = row["epsilon"]
    if epsilon is None or row["strategy"] != "fedavg":
        return [row["strategy"], row["partition"], "none" if epsilon is None else f"{epsilon:g}", shown, "", ""]
    least, aim = LEAST[epsilon], AIMS[epsilon]
    verdict = "aim met" if mean >= aim else "least met" if mean >= least else "missed"
    return [row["strategy"], row["partition"], f"{epsilon:g}", shown, f"{least} / {aim}", verdict]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dataset", default="phantoms", metavar="NAME|FILE|FOLDER", help="As of consilium simulate [phantoms].")
@click.option("--image-size", type=int, metavar="PIXELS", help="Side of the square input [the preset's].")
@click.option("--sites", type=int, default=5, metavar="N", help="Hospitals [5].")
@click.option("--seeds", type=int, default=3, metavar="N", help="Seeds, from 0 on [3].")
@click.option(
    "--cache", type=click.Path(path_type=Path), metavar="DIR", help="Features and images [a folder for once]."
)
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
def main(
    dataset: str, image_size: int | None, sites: int, seeds: int, cache: Path | None, as_json: Path | None
) -> None:
    """Measure accuracy against epsilon, by private steps and by the private closed form."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    options = {"dataset": dataset, "image_size": image_size, "sites": sites}
    with tempfile.TemporaryDirectory(prefix="consilium-utility-") as name:
        place = cache or Path(name)
        found = [row for rule in ("fedavg", "analytic") for row in utility(options, range(seeds), place, rule)]
    seconds = ledger_seconds()
    show(found, seconds, Console(width=None if sys.stdout.isatty() else WIDTH))
    if as_json is not None:
        write_json(as_json, {"utility": found, "ledger_seconds": seconds})


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"privacy_utility: {error}", err=True)
        sys.exit(error.exit_code)
