"""`consilium simulate --epsilon 0.5,1,3,8`: the same run at several epsilons and without, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import UsageError
from common.files import write_json
from server.report import page
from server.report.privacy import sweep as points_of
from server.report.reading import Run
from simulations.runner import Job, Progress

EXACT = "none"
"""Folder of the run without privacy."""

RunOne = Callable[[Job, Progress], tuple[Path, dict[str, Any]]]


def run_all(
    jobs: Mapping[float, Job], exact: Job, run: RunOne, output: Path | None, progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """Run every job in a folder of its own below one, and return that one and what stands in its `result.json`.

    The result is that of the largest epsilon, with a list `sweep` of all runs beside it.

    Args:
        jobs: by epsilon.
        exact: the same without privacy.
        run: carries out one of them.
        output: the folder; None: the next free one in `runs`.
        progress: told how far the run at hand is.

    Raises:
        UsageError: the folder is in use, or cannot be written.
        ConsiliumError: one of the runs failed; those before it are in their folders.
    """
    folder = _open(output or _next_folder(Path("runs")))
    found: dict[float | None, dict[str, Any]] = {}
    for epsilon, job in [*sorted(jobs.items()), (None, exact)]:
        name = EXACT if epsilon is None else f"epsilon-{epsilon:g}"
        progress(f"epsilon {epsilon:g}" if epsilon is not None else "without privacy", len(found), len(jobs) + 1)
        _, found[epsilon] = run(replace(job, output=folder / name), progress)
        found[epsilon]["folder"] = name
    whole = _together(found, max(jobs))
    write_json(folder / "result.json", whole)
    page.write(whole, folder / "report.html")
    return folder, whole


def _together(found: Mapping[float | None, Mapping[str, Any]], largest: float) -> dict[str, Any]:
    whole = copy.deepcopy(dict(found[largest]))
    del whole["folder"]
    complete = all(result["status"] == "completed" for result in found.values())
    return {
        **whole,
        "status": "completed" if complete else "completed_partial",
        "sweep": [_point(epsilon, result) for epsilon, result in found.items()],
    }


def _point(epsilon: float | None, result: Mapping[str, Any]) -> dict[str, Any]:
    baselines = result["baselines"] or {}
    kept = ("auc", "auc_ci95", "accuracy")
    figures = {"federated": result["test"]["pooled"], "pooled": baselines.get("pooled")}
    return {
        "epsilon": epsilon,
        "folder": result["folder"],
        "status": result["status"],
        "privacy": result["privacy"],
        **{name: {key: one[key] for key in kept} if one else None for name, one in figures.items()},
        "local": {site: one["auc"] for site, one in (baselines.get("local") or {}).items()},
    }


def _open(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"--output {folder}: the folder is in use; name another")
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written ({error.strerror})") from None
    return folder


def _next_folder(root: Path) -> Path:
    number = 1
    while (root / f"sweep-{number}").exists():
        number += 1
    return root / f"sweep-{number}"


def show(found: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print what each epsilon reached, and where the report is."""
    console = console or Console()
    table = Table(title="accuracy against privacy", title_justify="left", padding=(0, 0, 0, 1))
    for column in ("epsilon", "AUC", "95 % interval", "accuracy", "pooled", "alone, mean", "alone, range"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points_of(Run.of(found)):
        table.add_row(point.name, *(cell.replace(" to ", "–") for cell in point.cells))
    console.print(table)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, markup=False, highlight=False)
