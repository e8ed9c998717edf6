"""What is looked on at: drawn anew on a terminal, as JSON a line for each change, until Ctrl-C."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from common import live

Document = Mapping[str, Any]


def reads(*documents: Document) -> Callable[[], Document]:
    """Return what reads these, one after the other; then somebody types Ctrl-C."""
    left = list(documents)

    def read() -> Document:
        if not left:
            raise KeyboardInterrupt
        return left.pop(0)

    return read


def followed(console: Console, *documents: Document, as_json: bool = False) -> Document:
    return live.follow(
        reads(*documents), lambda found: Text(str(found)), console, as_json=as_json, moving={"at"}, pause_s=0.001
    )


def test_a_line_of_json_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    documents = [{"a": [{"b": 1, "at": 1}]}, {"a": [{"b": 1, "at": 2}]}, {"a": [{"b": 2, "at": 3}]}]
    assert followed(Console(), *documents, as_json=True) == documents[-1]
    printed, _ = capsys.readouterr()
    assert [json.loads(line) for line in printed.splitlines()] == [documents[0], documents[2]]


def test_a_pipe_gets_each_change_once() -> None:
    console = Console(file=io.StringIO())
    followed(console, {"b": 1}, {"b": 1, "at": 5}, {"b": 2})
    file: Any = console.file
    assert file.getvalue() == "{'b': 1}\n{'b': 2}\n"


def test_a_terminal_is_drawn_in_place() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    followed(console, {"b": 1}, {"b": 2})
    file: Any = console.file
    assert "{'b': 1}" in file.getvalue() and "{'b': 2}" in file.getvalue() and "\x1b[2K" in file.getvalue()


@given(st.floats(0, 1e12))
def test_figures_are_short(value: float) -> None:
    assert len(live.size(value)) <= 10
    assert len(live.span(value)) <= 14
