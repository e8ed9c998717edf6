from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.run_config import RunConfig
from server import drawing
from server.drawing import Drawing, drawn_once

RUN = RunConfig()
FOUND = Drawing(
    RUN.fingerprint(), b"\x00trunk", 7, {"head": np.float32([[1, 2]]), "scalar": np.float32(3)}, (4, 5), "none"
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Return the runs whose models were built."""
    built: list[RunConfig] = []

    def build(run: RunConfig) -> Drawing:
        built.append(run)
        return replace(FOUND, fingerprint=run.fingerprint())

    monkeypatch.setattr(drawing, "drawn_apart", build)
    return built


def same(found: Drawing) -> None:
    for name, value in FOUND.weights.items():
        assert found.weights[name].dtype == value.dtype and np.array_equal(found.weights[name], value)
    assert replace(found, weights={}) == replace(FOUND, weights={})


def test_a_model_is_built_once(tmp_path: Path, drawn: list[RunConfig]) -> None:
    same(drawn_once(RUN, tmp_path / "state"))
    same(drawn_once(RUN, tmp_path / "state"))
    assert drawn == [RUN]


def test_the_model_of_another_run_is_none(tmp_path: Path, drawn: list[RunConfig]) -> None:
    drawn_once(RUN, tmp_path)
    other = RunConfig(seed=8)
    assert drawn_once(other, tmp_path).fingerprint == other.fingerprint()
    assert drawn == [RUN, other]


@pytest.mark.parametrize("name", [drawing.FACTS, drawing.TENSORS])
@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff\xfe"])
def test_what_is_damaged_is_drawn_again(tmp_path: Path, drawn: list[RunConfig], name: str, content: bytes) -> None:
    drawn_once(RUN, tmp_path)
    (tmp_path / name).write_bytes(content)
    same(drawn_once(RUN, tmp_path))
    same(drawn_once(RUN, tmp_path))
    assert len(drawn) == 2


def test_a_crash_between_the_two_files_costs_another_building(tmp_path: Path, drawn: list[RunConfig]) -> None:
    drawn_once(RUN, tmp_path)
    (tmp_path / drawing.FACTS).unlink()
    same(drawn_once(RUN, tmp_path))
    assert len(drawn) == 2
