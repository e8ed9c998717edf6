"""The closing words on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.report.closing import show


def result(kind: str) -> dict[str, Any]:
    figures = {"examples": 12, "auc": 0.91, "auc_ci95": None, "accuracy": 0.8, "precision": None, "recall": 0.7}
    return {
        "status": "completed",
        "best_round": 1,
        "rounds": [{}, {}],
        "weights": {"source": "embedded"},
        "config": {"task": {"labels": ["a", "b", "c"], "kind": kind}},
        "test": {"pooled": figures},
        "baselines": {"pooled": figures, "local": {"north": figures}},
        "privacy": None,
        "warnings": [{"code": "x", "message": "something [to] know"}],
    }


@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
def test_the_table_has_a_row_for_each_model_and_says_what_its_figures_are(kind: str) -> None:
    console = Console(record=True, width=100)
    show(result(kind), Path("runs/x"), console)
    text = console.export_text()
    for row in ("federated", "all data pooled", "north alone", "something [to] know", "report: runs/x/report.html"):
        assert row in text
    assert ("means over 3 labels" in text) == (kind == "multi-label")
    assert "differential privacy" not in text


def test_a_private_run_says_what_it_promises_and_never_less_than_it_spent() -> None:
    console = Console(record=True, width=160)
    spent = {"epsilon": 2.9991, "delta": 1e-5, "unit": "patient"}
    show({**result("single-label"), "privacy": spent}, Path("runs/x"), console)
    said = "differential privacy: epsilon 3.000 at delta 1e-05 at most, for each training patient of each site"
    assert said in console.export_text()
