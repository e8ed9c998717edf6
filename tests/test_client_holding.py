"""A trunk that is here already is not asked for: from an earlier run, put there by hand, in the wheel, in a file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import save_file

from client import holding
from client.memory import Memory
from common import backbone, checkpoint, model
from common.run_config import RunConfig, build
from common.weights import EMBEDDED_BACKBONE, EMBEDDED_PACKAGE


def run_of(name: str, weights: str) -> tuple[RunConfig, bytes]:
    plan = build(
        {"task": {"labels": ["a", "b"]}, "data": {"image_size": 32}, "model": {"backbone": name, "weights": weights}},
        "test",
    )
    content = model.frozen_content(model.pretrained(plan), plan)
    named = plan.model.model_copy(update={"trunk_sha256": checkpoint.sha256(content)})
    return plan.model_copy(update={"model": named}), content


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(backbone.create("test_efficientnet", image_size=32, seed=7).state_dict(), str(path))
    return path


def test_nothing_is_held_at_first(tmp_path: Path) -> None:
    run, _ = run_of("test_efficientnet", "none")
    memory = Memory.at(tmp_path, "north")
    assert not holding.take_up(memory, run, wheel=True)
    assert memory.trunk() == ""


def test_one_of_an_earlier_run_or_put_there_by_hand_is_held(tmp_path: Path) -> None:
    run, content = run_of("test_efficientnet", "none")
    memory = Memory.at(tmp_path, "north")
    (memory.trunks / f"{run.model.trunk_sha256}.safetensors").write_bytes(content)
    assert holding.take_up(memory, run, wheel=False)
    assert memory.trunk() == run.model.trunk_sha256


def test_one_that_is_damaged_is_not(tmp_path: Path) -> None:
    run, content = run_of("test_efficientnet", "none")
    memory = Memory.at(tmp_path, "north")
    (memory.trunks / f"{run.model.trunk_sha256}.safetensors").write_bytes(content[:-1])
    assert not holding.take_up(memory, run, wheel=False)


def test_one_that_a_local_file_of_weights_gives_is_held(weights: Path, tmp_path: Path) -> None:
    run, content = run_of("test_efficientnet", str(weights))
    elsewhere = run.model.model_copy(update={"weights": "/at/the/coordinator.safetensors"})
    memory = Memory.at(tmp_path, "north")
    assert holding.take_up(memory, run.model_copy(update={"model": elsewhere}), wheel=False, weights=weights)
    assert memory.trunk_content() == content


def test_a_local_file_of_other_weights_is_no_harm(weights: Path, tmp_path: Path) -> None:
    other, _ = run_of("test_efficientnet", "none")
    assert not holding.take_up(Memory.at(tmp_path, "north"), other, wheel=False, weights=weights)
    unfit, _ = run_of("test_resnet", "none")
    assert not holding.take_up(Memory.at(tmp_path, "south"), unfit, wheel=False, weights=weights)
    assert not holding.take_up(Memory.at(tmp_path, "west"), other, wheel=False, weights=tmp_path / "gone.safetensors")


@pytest.mark.skipif(find_spec(EMBEDDED_PACKAGE) is None, reason="the wheel of weights is not installed")
def test_one_of_the_wheel_is_held_where_it_may_be(tmp_path: Path) -> None:
    run, content = run_of(EMBEDDED_BACKBONE, "embedded")
    assert not holding.take_up(Memory.at(tmp_path, "south"), run, wheel=False)
    memory = Memory.at(tmp_path, "north")
    assert holding.take_up(memory, run, wheel=True)
    assert memory.trunk_content() == content
