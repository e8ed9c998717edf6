"""The closing table of a run, on standard output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.report.privacy import at_most
from server.report.wording import plural

MOST_SITES = 12
"""Sites that the table names one by one; the report has them all."""


def show(result: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print what was reached, and where the report is."""
    console = console or Console()
    if result["weights"]["source"] == "none":
        console.print("Random backbone weights (--weights none): these figures say nothing about transfer learning.")
    table = Table(title=_title(result), title_justify="left", padding=(0, 0, 0, 1), caption=_caption(result))
    for column in ("", "images", "AUC", "95 % interval", "accuracy", "precision", "recall"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    _row(table, "federated", result["test"]["pooled"])
    baselines = result["baselines"]
    if baselines:
        _row(table, "all data pooled", baselines["pooled"])
        for site, figures in list(baselines["local"].items())[:MOST_SITES]:
            _row(table, f"{site} alone", figures)
    console.print(table)
    if result["privacy"]:
        console.print(_privacy(result["privacy"]), highlight=False)
    for warning in result["warnings"]:
        console.print(f"warning: {warning['message']}", markup=False, highlight=False)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, markup=False, highlight=False)


def _privacy(spent: Mapping[str, Any]) -> str:
    """Say in a line what the run promises."""
    promise = f"epsilon {at_most(spent['epsilon'])} at delta {spent['delta']:g}"
    return f"differential privacy: {promise} at most, for each training {spent['unit']} of each site"


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['status'].replace('_', ' ')}: best round {result['best_round']} of {len(result['rounds']) - 1}"


def _caption(result: Mapping[str, Any]) -> str | None:
    """Say what the figures are where an image has several labels; the report has those of each."""
    task = result["config"]["task"]
    return f"all figures: means over {plural(len(task['labels']), 'label')}" if task["kind"] == "multi-label" else None


def _row(table: Table, name: str, figures: Mapping[str, Any]) -> None:
    interval = figures["auc_ci95"]
    shown = f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else "–"
    cells = [figures["auc"], shown, figures["accuracy"], figures["precision"], figures["recall"]]
    texts = [cell if isinstance(cell, str) else "–" if cell is None else f"{cell:.3f}" for cell in cells]
    table.add_row(name, str(figures["examples"]), *texts)
