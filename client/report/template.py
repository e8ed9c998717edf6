"""The pages of a site as jinja2 has them: every value escaped, nothing undefined, compiled once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from client.report.wording import visible


@cache
def template(name: str) -> jinja2.Template:
    """Compile a page of this folder once; it is as constant as this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    return visible(value) if type(value) is str else value
