"""Several epsilons and none: one run each in a folder of its own, and one page that sets them side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from common import cli
from common.errors import ConsiliumError, UsageError
from common.run_config import RunConfig
from simulations import sweep
from simulations.runner import Job

QUICK = ["--weights", "none", "--image-size", "32", "--views", "1", "--sites", "2", "--backbone", "test_efficientnet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a flat .npz of 160 grey images, half of them bright."""
    path = tmp_path_factory.mktemp("data") / "tones.npz"
    random, labels = np.random.default_rng(0), np.arange(160) % 2
    images = random.normal(90 + 70 * labels[:, None, None], 30, (160, 24, 24)).clip(0, 255).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path


def simulate(data: Path, output: Path, *more: str) -> tuple[int, str, str]:
    """Return exit code, standard output, and what went wrong in one line."""
    line = ["simulate", "--dataset", data, "--cache", data.parent, "--output", output, *QUICK, *more]
    result = CliRunner().invoke(cli.consilium, [str(one) for one in line], standalone_mode=False)
    if isinstance(result.exception, ConsiliumError):
        return result.exception.exit_code, result.stdout, str(result.exception)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.stdout, ""


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return folder and result of two epsilons, given with a plan that is private by itself."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    plan = folder.parent / "plan.toml"
    plan.write_text("[privacy]\nnoise_multiplier = 9.0\ndelta = 0.001\n")
    options = ["--config", str(plan), "--epsilon", "8,2", "--rounds", "3", "--no-baselines", "--quiet", "--json"]
    code, out, _ = simulate(data, folder, *options)
    assert code == 0
    return folder, json.loads(out)


@pytest.mark.slow
def test_every_epsilon_has_a_run_and_so_has_none(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, found = swept
    assert {path.name for path in folder.iterdir()} == {
        "epsilon-2",
        "epsilon-8",
        "none",
        "report.html",
        "result.json",
    }
    assert json.loads((folder / "result.json").read_text()) == found
    assert [(one["epsilon"], one["folder"]) for one in found["sweep"]] == [
        (2.0, "epsilon-2"),
        (8.0, "epsilon-8"),
        (None, "none"),
    ]
    for one in found["sweep"]:
        single = json.loads((folder / one["folder"] / "result.json").read_text())
        assert one["federated"]["auc"] == single["test"]["pooled"]["auc"]
        assert one["privacy"] == single["privacy"]
        assert (one["status"], one["pooled"], one["local"]) == ("completed", None, {})


@pytest.mark.slow
def test_each_run_stays_within_its_epsilon_and_the_last_has_none(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, found = swept
    for one in found["sweep"][:2]:
        spent = one["privacy"]
        assert 0.9 * one["epsilon"] <= spent["epsilon"] <= one["epsilon"]
        assert spent["delta"] == 0.001
        assert set(spent["sites"]) == {"site-1", "site-2"}
    assert found["sweep"][2]["privacy"] is None
    assert not RunConfig.from_toml((folder / "none" / "run.toml").read_text()).privacy.on


@pytest.mark.slow
def test_the_whole_is_the_result_of_the_largest_epsilon(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, found = swept
    largest = json.loads((folder / "epsilon-8" / "result.json").read_text())
    assert {key: value for key, value in found.items() if key != "sweep"} == largest


@pytest.mark.slow
def test_the_page_and_the_table_set_them_side_by_side(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, found = swept
    page = (folder / "report.html").read_text("utf-8")
    assert "Accuracy against privacy" in page
    console = Console(record=True, width=160)
    sweep.show(found, folder, console)
    shown = console.export_text()
    rows = [re.split(r"[\s│┃]+", line.strip("│ "))[0] for line in shown.splitlines() if line.startswith("│")]
    assert rows == ["2", "8", "none"]
    assert str(folder / "report.html") in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "3,x"], "--epsilon: got '3,x', expected a number such as 3, or several such as 1,3,8"),
        (["--epsilon", ""], "--epsilon: got '', expected a number"),
        (["--epsilon", "0"], "[privacy] epsilon: got 0.0, input should be greater than 0"),
        (["--epsilon", "1,-3"], "[privacy] epsilon: got -3.0, input should be greater than 0"),
        (["--delta", "0.001"], "delta without epsilon or noise_multiplier"),
        (["--epsilon", "3", "--noise-multiplier", "2"], "epsilon and noise_multiplier exclude each other"),
        (["--epsilon", "1,3", "--resume"], "--resume: goes on with one run"),
        (["--epsilon", "3", "--class-weights", "balanced"], '--class-weights: "balanced" takes exact counts'),
        (["--epsilon", "3", "--delta", "0.5"], "[privacy] delta: the run's is 0.5"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(options: list[str], message: str, data: Path, tmp_path: Path) -> None:
    code, out, said = simulate(data, tmp_path / "run", *options, "--quiet")
    assert (code, out) == (2, "")
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def never(_job: Job, _progress: Any) -> Any:
    raise AssertionError("nothing is run")


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    job = Job(RunConfig(), None, tmp_path)
    with pytest.raises(UsageError, match="the folder is in use; name another"):
        sweep.run_all({1.0: job, 2.0: job}, job, never, tmp_path, lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_folders_are_numbered_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep._next_folder(Path("runs")) == Path("runs/sweep-1")
    Path("runs/sweep-1").mkdir(parents=True)
    assert sweep._next_folder(Path("runs")) == Path("runs/sweep-2")
