"""The page a study coordinator reads after a run: `result.json` in, one self-contained HTML file out.

Everything on the page is taken or computed from the result alone. The page asks the network for nothing, runs no
script, and is the same bytes for the same result. Names of sites and labels are chosen by others, so the template
escapes every value.

    reading   the result, with null wherever a figure is undefined
    wording   numbers as printed
    verdict   sentences
    charts    geometry; plots: which charts there are
    tables    tables; costs: bytes and seconds; privacy: what was spent, and what it cost
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from common.errors import UsageError
from common.files import write_atomic
from server.report import costs, plots, privacy, tables, verdict
from server.report.reading import SCHEMA, Run
from server.report.wording import duration, grouped

TALL = 20  # a longer table scrolls in its own area on a screen (never in print)
STATUS = {
    "completed": ("completed", "good"),
    "completed_partial": ("completed in part", "warn"),
    "failed": ("failed", "bad"),
}


def render(result: Mapping[str, Any]) -> str:
    """Return the report of one run as a complete HTML document.

    Args:
        result: the content of `result.json`, schema 1. Any figure may be null, any group null or missing.

    Raises:
        UsageError: the result has another schema.
    """
    if result.get("schema") != SCHEMA:
        raise UsageError(
            f"result.json: got schema {result.get('schema')!r}, expected {SCHEMA}; "
            "use the version of consilium that wrote it"
        )
    run = Run.of(result)
    values = {"run": run, "title": run.section("config", "task").get("name") or "Federated run", "facts": _facts(run)}
    name, tone = STATUS.get(run.status, (run.status, "warn"))
    parts = {"verdict": verdict, "plots": plots, "tables": tables, "costs": costs, "privacies": privacy}
    return _template().render(**values, **parts, status=name, tone=tone, tall=TALL, grouped=grouped).lstrip()


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the report to `path`, whole or not at all.

    Raises:
        UsageError: the result has another schema.
        OSError: the folder cannot be written.
    """
    write_atomic(path, render(result).encode())


@cache
def _template() -> jinja2.Template:
    """Compile the page once; it is as constant as this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2")


def _visible(value: Any) -> Any:
    """Replace what a name could hide behind: control, bidirectional-override and unencodable characters."""
    if type(value) is not str:
        return value
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in {"Cc", "Cf", "Cs"} else c for c in value)


def _facts(run: Run) -> list[tuple[str, str]]:
    """The line below the title."""
    facts = [
        ("Strategy", run.section("config", "training").get("strategy")),
        ("Sites", grouped(len(run.sites)) if run.sites else None),
        ("Rounds run", grouped(run.trained)),
        ("Backbone", run.section("config", "model").get("backbone")),
        ("Weights", run.section("weights").get("source")),
        ("Time", duration(run.section("seconds").get("total"))),
    ]
    return [(key, value) for key, value in facts if value is not None]
