"""A rehearsal ends with the bytes of the simulation, and nothing of it is left: also where it is ended or killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from common import cli
from common.errors import ConsiliumError
from common.run_config import build
from simulations.rehearse import rehearse
from simulations.runner import Job, simulate
from simulations.stage import _root

SMALL = {
    "--backbone": "test_efficientnet", "--weights": "none", "--image-size": 32, "--views": 1, "--sites": 2,
    "--rounds": 3, "--init": "zero", "--lr": 0.001, "--partition": "iid", "--device": "cpu",
}  # fmt: skip
MODEL = "model/upper.safetensors"
LIMIT = 300.0


def stripes(folder: Path) -> Path:
    """Write images whose stripes lie or stand, under noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    wave = (np.sin(np.arange(24) * 1.3) * 60 + 120)[None, :].repeat(24, 0)
    images = np.stack([wave if label else wave.T for label in labels]) + rng.normal(0, 60, (60, 24, 24))
    np.savez(folder / "stripes.npz", images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return folder / "stripes.npz"


def findings(folder: Path) -> Path:
    """Write images with any of two findings, two to a patient, at two hospitals."""
    rng = np.random.default_rng(0)
    found = rng.random((80, 2)) < 0.5
    images = np.full((80, 24, 24), 100.0)
    images[:, 2:8, 2:8] += 60 * found[:, 0, None, None]
    images[:, 14:22, 2:10] += 60 * found[:, 1, None, None]
    np.savez(
        folder / "findings.npz",
        images=(images + rng.normal(0, 30, images.shape)).clip(0, 255).astype(np.uint8),
        labels=found.astype(float),
        label_names=np.array(["mass", "effusion"]),
        patient=np.arange(80) // 2,
        site=np.array(["east", "west"])[np.arange(80) // 2 % 2],
    )
    return folder / "findings.npz"


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of temporary files of its own, with a short path, that must be empty at the end."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    left = [path.name for path in folder.glob("consilium-stage-*")]
    shutil.rmtree(folder)
    assert not left


def descendants(pid: int) -> set[int]:
    """Return a process's children, and theirs."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = {int(child) for child in task.read_text().split()}
        except OSError:
            continue
        found |= children.union(*map(descendants, children))
    return found


def command(data: Path, cache: Path, output: Path, *more: object) -> list[str]:
    options = [str(part) for option in SMALL.items() for part in option]
    places = ["--dataset", str(data), "--cache", str(cache), "--output", str(output)]
    return [*options, *places, "--no-baselines", "--quiet", *map(str, more)]


def started(*arguments: str) -> subprocess.Popen[str]:
    """Start `consilium` in a process of its own."""
    line = [sys.executable, "-P", "-c", "from common.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_a_private_rehearsal_spends_what_it_was_given(tmp_path: Path, scratch: Path) -> None:
    data, cache = stripes(tmp_path), tmp_path / "cache"
    private = ["--epsilon", "8", "--delta", "0.001", "--rounds", "2"]
    process = started("rehearse", *command(data, cache, tmp_path / "rehearsed", "--json", *private))
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    result = json.loads(output)
    assert result["status"] == "completed"
    spent = result["privacy"]
    assert 7.5 < spent["epsilon"] <= 8.0 and spent["delta"] == 0.001
    assert set(spent["sites"]) == set(result["sites"])
    for site in spent["sites"].values():
        assert site["steps"] == site["planned_steps"] == 3  # the centre, and a step a round
    assert all(facts["train_loss"] is None for entry in result["rounds"] for facts in entry["sites"].values())


@pytest.mark.slow
def test_a_rehearsal_ends_with_the_bytes_of_the_simulation(tmp_path: Path, scratch: Path) -> None:
    data, cache = stripes(tmp_path), tmp_path / "cache"
    process = started("rehearse", *command(data, cache, tmp_path / "rehearsed", "--json"))
    seen: set[int] = set()
    while process.poll() is None:
        seen |= descendants(process.pid)
        time.sleep(0.1)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(seen) >= 9, "coordinator and two hospitals: three supervisors, five processes, an engine"
    assert gone(seen)
    result = json.loads(output)
    assert result["status"] == "completed" and result["best_round"] > 0, "or nothing that was trained counts"
    assert result == json.loads((tmp_path / "rehearsed/result.json").read_bytes())
    assert not (tmp_path / "rehearsed/state").exists() and not (tmp_path / "rehearsed/logs").exists()
    again = CliRunner().invoke(cli.consilium, ["simulate", *command(data, cache, tmp_path / "simulated")])
    assert again.exception is None
    assert (tmp_path / "rehearsed" / MODEL).read_bytes() == (tmp_path / "simulated" / MODEL).read_bytes()


def plan(data: Path, **sections: Any) -> Any:
    """Return a small plan with several labels an image, each section changed as given."""
    values: dict[str, dict[str, Any]] = {
        "simulation": {"dataset": str(data), "sites": 2, "partition": "natural", "baselines": False, "device": "cpu"},
        "model": {"backbone": "test_efficientnet", "weights": "none", "init": "zero", "trainable": "stages:1"},
        "data": {"image_size": 32, "views": 2, "uncertain": "soft"},
        "training": {"rounds": 2, "strategy": "fedadam", "draw": "patients"},
        "wire": {"dtype": "bfloat16"},
        "sites": {"quorum": 1},
    }
    return build({name: {**values.get(name, {}), **sections.get(name, {})} for name in values}, "test")


@pytest.mark.slow
def test_several_labels_and_deeper_training_give_the_same_bytes(tmp_path: Path, scratch: Path) -> None:
    asked, cache = plan(findings(tmp_path)), tmp_path / "cache"
    _, simulated = simulate(Job(asked, tmp_path / "simulated", cache), lambda *_: None)
    _, rehearsed = rehearse(Job(asked, tmp_path / "rehearsed", cache), lambda *_: None)
    assert rehearsed["status"] == "completed" and rehearsed["fingerprint"] == simulated["fingerprint"]
    assert rehearsed["best_round"] == simulated["best_round"]
    assert rehearsed["test"] == simulated["test"] and rehearsed["sites"] == simulated["sites"]
    assert (tmp_path / "rehearsed" / MODEL).read_bytes() == (tmp_path / "simulated" / MODEL).read_bytes()


@pytest.mark.slow
@pytest.mark.faults
def test_ended_and_killed_it_leaves_no_process_and_goes_on(tmp_path: Path, scratch: Path) -> None:
    data, cache, output = stripes(tmp_path), tmp_path / "cache", tmp_path / "run"
    more = ["--local-steps", "600"]
    process = started("rehearse", *command(data, cache, output, *more))
    until(lambda: len(descendants(process.pid)) >= 3 or process.poll() is not None)
    seen = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and "Traceback" not in errors and "interrupted" in errors
    until(lambda: gone(seen))
    assert not [*scratch.glob("consilium-stage-*")] and [*(output / "logs").rglob("*.log")]

    process = started("rehearse", *command(data, cache, output, *more, "--resume"))
    until(lambda: (output / "state/round-000001.safetensors").exists() or process.poll() is not None)
    seen = descendants(process.pid)
    process.kill()
    process.communicate(timeout=LIMIT)
    assert len(seen) >= 9
    until(lambda: gone(seen))
    assert [*scratch.glob("consilium-stage-*")], "who was killed cannot clean up: the next one does"

    process = started("rehearse", *command(data, cache, output, "--resume", *more))
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    again = CliRunner().invoke(cli.consilium, ["simulate", *command(data, cache, tmp_path / "simulated", *more)])
    assert again.exception is None
    assert (output / MODEL).read_bytes() == (tmp_path / "simulated" / MODEL).read_bytes()
    assert [json.loads(line)["round"] for line in (output / "rounds.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


NOT_HERE = {
    "a fault": ["--fault", "drop:site-1@1"],
    "Ray": ["--backend", "ray"],
    "an epsilon that is no number": ["--epsilon", "three"],
}


@pytest.mark.parametrize("options", NOT_HERE.values(), ids=NOT_HERE.keys())
def test_what_is_not_for_a_rehearsal_is_refused_in_one_line(options: list[str], tmp_path: Path) -> None:
    line = ["rehearse", *command(tmp_path / "none.npz", tmp_path, tmp_path / "run", *options)]
    result = CliRunner().invoke(cli.consilium, line, standalone_mode=False)
    assert isinstance(result.exception, ConsiliumError) and result.exception.exit_code == 2
    assert options[0] in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_a_site_that_no_hospital_can_be_called_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    data = findings(tmp_path)
    with np.load(data) as held:
        arrays = dict(held)
    np.savez(data, **{**arrays, "site": np.array(["St. Anna", "../west"])[np.arange(80) // 2 % 2]})
    with pytest.raises(ConsiliumError, match=r"site '\.\./west'|site 'St\. Anna'"):
        rehearse(Job(plan(data), tmp_path / "run", tmp_path / "cache"), lambda *_: None)
    assert not (tmp_path / "run").exists()


def test_what_a_killed_rehearsal_left_is_taken_away_and_nothing_else(scratch: Path) -> None:
    for name in ("consilium-stage-dead", "consilium-stage-alive", "consilium-stage-other"):
        (scratch / name).mkdir()
    for name in ("dead", "alive"):
        (scratch / f"consilium-stage-{name}/lock").touch()
    with (scratch / "consilium-stage-alive/lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _root() as own:
            left = {path.name for path in scratch.iterdir()}
    assert left == {"consilium-stage-alive", "consilium-stage-other", own.name}
    for name in ("consilium-stage-alive", "consilium-stage-other"):
        shutil.rmtree(scratch / name)
