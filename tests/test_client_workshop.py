"""What the sites of a process share: one model a run, built from the trunk that was received."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.workshop import Workshop, choose_device, threads, trunk_matches
from common import checkpoint, model
from common.errors import CacheError, CheckpointError, ConfigError
from common.run_config import RunConfig


@pytest.fixture
def run(lab: Any) -> RunConfig:
    return lab.start(names=("north",), model={"trainable": "stages:1"}).run


@pytest.fixture
def content(lab: Any, run: RunConfig) -> bytes:
    return lab.build(run)[1]


def another(run: RunConfig, **model_changes: object) -> RunConfig:
    return run.model_copy(update={"model": run.model.model_copy(update=model_changes)})


def test_a_model_is_built_once_a_run_and_trunk(lab: Any, run: RunConfig, content: bytes, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, "cpu")
    north, south = lab.cohorts("north", "south").values()
    sha256 = run.model.trunk_sha256
    assert workshop.bench(run, sha256, None, north) is None
    bench = workshop.bench(run, sha256, content, north)
    assert bench is not None
    assert workshop.bench(run, sha256, content, south) is bench
    assert workshop.bench(run, sha256, None, south) is bench
    assert workshop.bench(another(run, dropout=0.5), sha256, None, north) is None
    assert workshop.bench(run, "0" * 64, None, north) is None


def test_runs_share_a_model_only_where_nothing_decides_another(
    lab: Any, run: RunConfig, content: bytes, tmp_path: Path
) -> None:
    workshop, cohort, sha256 = Workshop(tmp_path, "cpu"), lab.cohorts("north")["north"], run.model.trunk_sha256
    bench = workshop.bench(run, sha256, content, cohort)
    slower = run.model_copy(update={"training": run.training.model_copy(update={"lr": 1e-5}), "seed": 4})
    assert workshop.bench(slower, sha256, None, cohort) is bench
    others = [
        another(run, dropout=0.5),
        run.model_copy(update={"task": run.task.model_copy(update={"labels": ("a", "b", "c")})}),
        run.model_copy(update={"data": run.data.model_copy(update={"preset": "chest-xray"})}),
    ]
    assert [workshop.bench(other, sha256, None, cohort) for other in others] == [None] * 3
    assert workshop.bench(run, sha256, None, replace(cohort, preprocessing="others")) is None


def test_the_model_holds_the_tensors_received(lab: Any, run: RunConfig, content: bytes, tmp_path: Path) -> None:
    tensors = checkpoint.from_bytes(content)
    name = next(name for name in tensors if name.startswith("trunk.") and tensors[name].ndim == 4)
    changed = checkpoint.to_bytes({**tensors, name: tensors[name] + np.float32(1)})
    bench = Workshop(tmp_path, "cpu").bench(run, checkpoint.sha256(changed), changed, lab.cohorts("north")["north"])
    assert bench is not None
    held = bench.extractor.trunk.state_dict()[name.removeprefix("trunk.")].numpy()
    np.testing.assert_array_equal(held, tensors[name] + 1)
    assert checkpoint.sha256(changed)[:32] in bench.extractor.store.folder.name


def test_a_model_that_was_lent_is_used_for_its_own_run_alone(
    lab: Any, run: RunConfig, content: bytes, tmp_path: Path
) -> None:
    cohort = lab.cohorts("north")["north"]
    spare = model.skeleton(run)
    for other, used in ((another(run, dropout=0.5), False), (run, True)):
        workshop = Workshop(tmp_path, "cpu")
        workshop.lend(run.fingerprint(), spare)
        bench = workshop.bench(other, run.model.trunk_sha256, content, cohort)
        assert bench is not None
        assert (bench.extractor.trunk is spare.trunk) == used
        assert (bench.upper is spare.upper) == used


def test_a_lent_model_is_used_once(lab: Any, run: RunConfig, content: bytes, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, "cpu")
    workshop.lend(run.fingerprint(), model.skeleton(run))
    cohort = lab.cohorts("north")["north"]
    one = workshop.bench(run, run.model.trunk_sha256, content, cohort)
    two = workshop.bench(run, "0" * 64, content, cohort)
    assert one is not None
    assert two is not None
    assert one.upper is not two.upper


@pytest.mark.parametrize("content", [b"", b"no tensors", checkpoint.to_bytes({"trunk.x": np.zeros(3, np.float32)})])
def test_a_trunk_that_does_not_fit_is_an_error(lab: Any, run: RunConfig, content: bytes, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, "cpu")
    with pytest.raises(CheckpointError):
        workshop.bench(run, "0" * 64, content, lab.cohorts("north")["north"])
    assert workshop.bench(run, "0" * 64, None, lab.cohorts("north")["north"]) is None


def test_a_cache_that_cannot_be_written_is_an_error(lab: Any, run: RunConfig, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError):
        Workshop(tmp_path / "file", "cpu").bench(run, "0" * 64, content, lab.cohorts("north")["north"])


def test_devices() -> None:
    there = torch.cuda.is_available()
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if there else "cpu")
    if there:
        assert choose_device("cuda") == "cuda"
    else:
        with pytest.raises(ConfigError, match="no GPU"):
            choose_device("cuda")


def test_threads_are_given_back_even_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    with threads():
        assert torch.get_num_threads() >= 1
    assert torch.get_num_threads() == before


def test_a_trunk_is_matched_by_its_hash() -> None:
    assert trunk_matches(b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert not trunk_matches(b"x", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert not trunk_matches(b"", "")
